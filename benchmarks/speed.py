"""What stitching costs: time and memory, as ratios to the same models without stitches.

    python benchmarks/speed.py                       # two CPU cores, about an hour: 4 models of 98M parameters
    python benchmarks/speed.py --preset paper        # one GPU: 4 models of the paper's shape
    python benchmarks/speed.py --preset large        # one GPU of 141 GB: 4 models of 8B parameters
    python benchmarks/speed.py --only decode,plain   # some sections

Writes `benchmarks/results/speed-<machine>.json`, and beside it a page (.md) with tables, plots and targets met or not.
Every row is kept as soon as it is measured, and skipped by the next run; `--fresh` measures all again. Whatever is
compared takes turns on the same machine (speed_parts/timing.py), so that only ratios of neighbours count.
"""

import json
import os
import platform
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import peft
import torch
import transformers
from speed_parts.cases import PRESETS, Case, Preset, forget_models, models, token_ids
from speed_parts.page import write_page
from speed_parts.processes import ProcessRows, measure_here
from speed_parts.rows import Forward, Measurements, Row, alone
from speed_parts.timing import keep_freed_memory
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging


FROM_PROCESSES = ("memory", "attaching", "sizes")


@dataclass
class Arguments:
    preset: str = field(default="base", metadata={"help": "how large everything is", "choices": [*PRESETS]})
    device: str = field(default="", metadata={"help": "cpu or cuda [what the preset is for]"})
    dtype: str = field(default="", metadata={"help": "of the models: float32, bfloat16 or float16 [the preset's]"})
    experts: int = field(default=0, metadata={"help": "how many [the preset's]"})
    stitches: int = field(default=0, metadata={"help": "K [the preset's]"})
    threads: int = field(default=2, metadata={"help": "of the CPU"})
    only: str = field(default="", metadata={"help": "sections to measure, separated by commas [the preset's]"})
    fresh: bool = field(default=False, metadata={"help": "measure again what the results file has already"})
    machine: str = field(default="", metadata={"help": "what to call this machine in file names [cpu-2-cores, h200]"})
    results: str = field(default="", metadata={"help": "file to write [benchmarks/results/speed-MACHINE.json]"})
    child: str = field(default="", metadata={"help": "for this script's own use: a row to measure in this process"})
    folder: str = field(default="", metadata={"help": "for this script's own use: checkpoints for that row"})


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable`", FutureWarning)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT 0.21, transformers 5.23
    preset = PRESETS[arguments.preset]
    chosen = {name: getattr(arguments, name) for name in ("device", "dtype", "experts", "stitches")}
    case = replace(preset.case, **{name: value for name, value in chosen.items() if value})
    if case.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU. Use --device cpu, or another preset.")
    if arguments.child:
        folder = Path(arguments.folder) if arguments.folder else None
        print(json.dumps(measure_here(arguments.child, preset, case, folder)))
        return

    keep_freed_memory()
    sections = arguments.only.split(",") if arguments.only else list(preset.sections)
    if unknown := [section for section in sections if section not in PRESETS["smoke"].sections]:
        raise SystemExit(f"Unknown section(s) {unknown}; there are {', '.join(PRESETS['smoke'].sections)}.")
    here = Measurements(preset, case)
    command = [sys.executable, __file__, f"--preset={arguments.preset}", f"--threads={arguments.threads}"]
    elsewhere = ProcessRows(preset, case, command)
    rows = [row for s in sections for row in getattr(elsewhere if s in FROM_PROCESSES else here, s)()]

    machine = arguments.machine or machine_slug(case.device, arguments.threads)
    suffix = "" if arguments.preset == "base" else f"-{arguments.preset}"
    path = Path(arguments.results or Path(__file__).parent / "results" / f"speed-{machine}{suffix}.json")
    results = read_results(path, settings_of(arguments, preset, case), arguments.fresh)
    todo = [row for row in rows if arguments.fresh or row.name not in results["rows"].get(row.section, {})]
    if any(row.section not in FROM_PROCESSES for row in todo):
        say_how_long(todo, preset, case)
    with tqdm(todo, desc="rows") as bar:
        for row in bar:
            bar.set_postfix_str(f"{row.section}: {row.name}")
            started = time.perf_counter()
            try:
                measured = row.measure()
            except torch.OutOfMemoryError:
                forget_models()
                measured = {"out_of_memory": ["its models"]}
            measured["took"] = time.perf_counter() - started
            results["rows"].setdefault(row.section, {})[row.name] = measured
            write_results(results, path)
    forget_models()
    write_page(results, path)
    print(f"Wrote {path} and {path.with_suffix('.md')}")


def machine_slug(device: str, threads: int) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name().lower().replace("nvidia", "").strip().replace(" ", "-")
    return f"cpu-{threads}-core{'s' * (threads > 1)}"


def settings_of(arguments: Arguments, preset: Preset, case: Case) -> dict:
    """All that a row depends on, besides its name and the package itself."""
    chip = torch.cuda.get_device_name() if case.device.startswith("cuda") else platform.processor()
    return {
        "preset": arguments.preset,
        "threads": arguments.threads,
        "machine": chip or platform.machine(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "case": asdict(case),
        "sizes": {
            "length": preset.prefill[0][1],  # of the base case of `scaling`
            "prompt": preset.prompt,
            "tokens": preset.tokens,
            "training": list(preset.training),
        },
    }


def read_results(path: Path, settings: dict, fresh: bool) -> dict:
    """What is measured already; nothing if that was with other settings and shall be measured again."""
    results = json.loads(path.read_text()) if path.exists() else {"settings": settings, "rows": {}}
    different = [key for key in settings if results["settings"].get(key) != settings[key]]
    if different and not fresh:
        raise SystemExit(
            f"{path} was measured with other settings ({', '.join(different)}). Use --fresh to replace it, or "
            "--results to write another file."
        )
    return {"settings": settings, "rows": {}} if different else results


def write_results(results: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(rounded(results), indent=1) + "\n")
    os.replace(written, path)


def rounded(value):
    """Five significant digits are enough for a file that people read."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def say_how_long(todo: list[Row], preset: Preset, case: Case) -> None:
    """An estimate from E, measured now."""
    _, hub, experts = models(case)
    run = Forward(alone(hub, experts), token_ids(case, 1, min(256, preset.prefill[0][1])))
    unit = min(run() for _ in range(3))
    least = preset.rounds[0]
    total = sum(max(row.budget, (1 + least) * row.units * unit if row.budget else row.units * unit) for row in todo)
    print(f"{len(todo)} rows, about {total / 60:.0f} minutes (E at 1 x 256 tokens takes {unit:.3g} s here)")


if __name__ == "__main__":
    main()

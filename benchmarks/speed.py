"""What stitching costs: time and memory, as ratios to the same models without stitches.

    python -m benchmarks.speed                       # two CPU cores, about an hour: 4 models of 98M parameters
    python -m benchmarks.speed --preset paper        # one GPU: 4 models of the paper's shape
    python -m benchmarks.speed --preset large        # one GPU of 141 GB: 4 models of 8B parameters
    python -m benchmarks.speed --preset lora         # one GPU of 80 GB: a model of 8B parameters and 3 LoRAs of it
    python -m benchmarks.speed --only decode,plain   # some sections

Writes `benchmarks/results/speed-<machine>.json`, and beside it a page (.md) with tables, plots and targets met or not.
Every row is kept as soon as it is measured, and skipped by the next run; `--fresh` measures all again. Whatever is
compared takes turns on the same machine (measuring.py), so that only ratios of neighbours count.
"""

import ctypes
import gc
import json
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from .measuring import set_up
from .reporting import environment, write_results
from .speed_parts.page import SECTIONS, write_page
from .speed_parts.presets import PRESETS, Case, Preset


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
    results: str = field(default="", metadata={"help": "file to write [benchmarks/results/speed-MACHINE.json]"})


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_up(arguments.threads)
    keep_freed_memory()
    preset = PRESETS[arguments.preset]
    chosen = {name: getattr(arguments, name) for name in ("device", "dtype", "experts", "stitches")}
    case = replace(preset.case, **{name: value for name, value in chosen.items() if value})
    if case.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU. Use --device cpu, or another preset.")
    sections = (arguments.only or preset.sections).split(",")
    if unknown := [section for section in sections if section not in SECTIONS]:
        raise SystemExit(f"Unknown section(s) {unknown}; there are {', '.join(SECTIONS)}.")

    path = Path(arguments.results or Path(__file__).parent / "results" / f"{file_name(arguments, case)}.json")
    results = read_results(path, settings_of(arguments, preset, case), arguments.fresh)
    found = results["rows"]
    rows = [(section, *row) for section in sections for row in SECTIONS[section][1](preset, case)]
    with tqdm([row for row in rows if arguments.fresh or row[1] not in found.get(row[0], {})], desc="rows") as bar:
        for section, name, measure, *sizes in bar:
            bar.set_postfix_str(f"{section}: {name}")
            gc.collect()  # the models of the row before: modules and hooks refer to each other in circles
            started = time.perf_counter()
            try:
                measured = measure(*sizes)
            except torch.OutOfMemoryError:
                measured = {"out_of_memory": ["its models"]}
            found.setdefault(section, {})[name] = measured | {"took": time.perf_counter() - started}
            write_results(results, path)
    write_page(results, path)
    print(f"Wrote {path} and {path.with_suffix('.md')}")


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, instead of giving large blocks back to the system.

    Else every large tensor is made of new pages, and what they cost depends on who ran before: on a virtual machine
    one and the same prefill took 33 seconds, and 21 when its pages were there already.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def file_name(arguments: Arguments, case: Case) -> str:
    machine = f"cpu {arguments.threads} core{'s' * (arguments.threads > 1)}"
    if case.device.startswith("cuda"):
        machine = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    return "-".join(["speed", *machine.split(), *([] if arguments.preset == "base" else [arguments.preset])])


def settings_of(arguments: Arguments, preset: Preset, case: Case) -> dict:
    """All that a row depends on, besides its name and the package itself."""
    return {
        "preset": arguments.preset,
        "threads": arguments.threads,
        **environment(case.device),
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


if __name__ == "__main__":
    main()

"""The study of the Branch-Train-Stitch paper (arXiv 2502.00075) on real text, at a size that fits.

    python -m benchmarks.replicate                     # quick: 2 cores, one set of seed and experts
    python -m benchmarks.replicate --preset full       # 2 cores, five sets; hours, in as many sittings as you like
    python -m benchmarks.replicate --preset gpu        # one GPU, larger models

Every finished piece is a small JSON file in the cache, and the same command goes on where it was stopped;
`--minutes 170` ends a sitting between two pieces, `--parts lora size0.3M` does parts alone, and `--earlier FILE` goes
on from a results file whose pieces are gone. Writes `benchmarks/results/replicate.json`
(`replicate-<preset>.json` for other presets than full), and beside it a report (`.md`) and a folder of plots. The
library behind it is `benchmarks/replication/`.
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from .measuring import set_up
from .replication.reporting.report import write_report
from .replication.reporting.summary import summarize
from .replication.work.earlier import keep_earlier
from .replication.work.hours import hours_table
from .replication.work.jobs import pending, run, share
from .replication.work.plan import Plan
from .replication.work.presets import PRESETS


@dataclass
class Arguments:
    preset: str = field(default="quick", metadata={"help": "how large the study is", "choices": [*PRESETS]})
    workers: int = field(default=2, metadata={"help": "processes that share the work, with one thread each"})
    minutes: float = field(default=0.0, metadata={"help": "begin no new piece after so many minutes [no limit]"})
    cache_dir: str = field(default=".cache/replicate", metadata={"help": "where text, models and results are kept"})
    results: str = field(default="", metadata={"help": "file to write [benchmarks/results/replicate.json for full]"})
    earlier: str = field(
        default="",
        metadata={"help": "results whose pieces are gone: take their learning rates, report their figures too"},
    )
    parts: list[str] = field(default_factory=list, metadata={"help": "do these parts of the study alone [all]"})
    device: str = field(default="", metadata={"help": "cpu or cuda [cuda for the preset gpu]"})
    report_only: bool = field(default=False, metadata={"help": "train nothing: report what is finished so far"})
    hours: bool = field(default=False, metadata={"help": "only say what each part has taken so far, and has left"})
    worker: bool = field(default=False, metadata={"help": "only do pieces, in this process; write no report"})


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_up(threads=1)
    device = arguments.device or ("cuda" if arguments.preset == "gpu" else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU. Use --device cpu to wait very long, or another preset.")
    preset = PRESETS[arguments.preset]
    unknown = set(arguments.parts) - {part.name for part in preset.parts}
    if unknown:
        have = ", ".join(part.name for part in preset.parts)
        raise SystemExit(f"The preset {arguments.preset} has no part {', '.join(sorted(unknown))}; it has {have}.")
    plan = Plan(preset, Path(arguments.cache_dir), device)
    if arguments.earlier:
        try:
            keep_earlier(Path(arguments.earlier), arguments.preset, preset, plan.store)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        plan = Plan(preset, Path(arguments.cache_dir), device)
    if arguments.hours:
        print(hours_table(plan, arguments.parts))
        return
    jobs = plan.jobs(arguments.parts)
    until = time.time() + 60 * arguments.minutes if arguments.minutes else float("inf")
    if arguments.report_only:
        pass
    elif arguments.worker or arguments.workers < 2:
        run(jobs, plan.store, desc=arguments.preset, until=until)
    else:
        _ = plan.material.tokenizer  # made once, before the workers all want it
        command = [sys.executable, "-m", "benchmarks.replicate", *sys.argv[1:], "--worker"]
        share(jobs, plan.store, command, arguments.workers, arguments.preset)
    if not arguments.worker:
        left = len(pending(jobs, plan.store))
        if left:
            print(f"{left} of {len(jobs)} pieces are left; the same command goes on with them.")
        name = "replicate" if arguments.preset == "full" else f"replicate-{arguments.preset}"
        path = Path(arguments.results or Path(__file__).parent / "results" / f"{name}.json")
        write_report(summarize(plan, arguments.preset), path)
        print(f"Wrote {path} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()

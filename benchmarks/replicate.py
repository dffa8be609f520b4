"""The study of the Branch-Train-Stitch paper (arXiv 2502.00075), re-run at a size that fits, by one command.

    python -m benchmarks.replicate                     # quick: 2 cores, one set of seed and experts
    python -m benchmarks.replicate --preset full       # 2 cores, three sets, goes on from quick
    python -m benchmarks.replicate --preset gpu        # one GPU, three sets of 54M-parameter models

Trains seeds and experts from nothing, combines them with every method of the paper, and writes
`benchmarks/results/replicate.json` (`replicate-<preset>.json` for other presets than full) and a report beside it
(`.md`) that states the paper's claims one by one with the paper's figures, ours, and a verdict. Every finished
training is a file in the cache: after a kill, the same command goes on where it was. The library behind it is
`benchmarks/replication/`.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from .measuring import set_up
from .replication.jobs import Store, run, share
from .replication.presets import PRESETS
from .replication.report import write_report
from .replication.studies import Set, folder_of
from .replication.summary import summarize


@dataclass
class Arguments:
    preset: str = field(default="quick", metadata={"help": "how large the study is", "choices": [*PRESETS]})
    workers: int = field(default=2, metadata={"help": "processes that share the work, with one thread each"})
    cache_dir: str = field(default=".cache/replicate", metadata={"help": "where finished pieces are kept"})
    results: str = field(default="", metadata={"help": "file to write [benchmarks/results/replicate.json for full]"})
    device: str = field(default="", metadata={"help": "cpu or cuda [cuda for the preset gpu]"})
    report_only: bool = field(default=False, metadata={"help": "train nothing: report what is finished so far"})
    worker: bool = field(default=False, metadata={"help": "only do pieces, in this process; write no report"})


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_up(threads=1)
    preset = PRESETS[arguments.preset]
    device = arguments.device or ("cuda" if arguments.preset == "gpu" else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU. Use --device cpu to wait very long, or another preset.")
    store = Store(folder_of(Path(arguments.cache_dir), preset, device))
    sets = [Set(preset, number, store, device) for number in range(preset.sets)]
    jobs = [job for one in sets for job in one.jobs()]
    if arguments.report_only:
        pass
    elif arguments.worker or arguments.workers < 2:
        run(jobs, store, desc=arguments.preset)
    else:
        command = [sys.executable, "-m", "benchmarks.replicate", *sys.argv[1:], "--worker"]
        share(jobs, store, command, arguments.workers, arguments.preset)
        unfinished = [job.name for job in jobs if not store.has(job.name)]
        if unfinished:
            raise SystemExit(f"{len(unfinished)} pieces are not done, first {unfinished[0]}; see {store.folder}/logs.")
    if not arguments.worker:
        name = "replicate" if arguments.preset == "full" else f"replicate-{arguments.preset}"
        path = Path(arguments.results or Path(__file__).parent / "results" / f"{name}.json")
        write_report(summarize(sets, arguments.preset), path)
        print(f"Wrote {path} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()

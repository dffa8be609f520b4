"""What vLLM makes of a stitched model: throughput and latency, against its hub alone and against transformers.

    python -m benchmarks.serving                     # two CPU cores
    python -m benchmarks.serving --preset gpu        # one GPU
    python -m benchmarks.serving --preset smoke      # that it runs

Needs an environment with vLLM (`pip install "peft_bts[vllm,viz]"`). Models have random weights, which change no time.
vLLM's OpenAI server runs on each of them in turn, and vLLM's own client asks it: prompts of random tokens, as many at
once as the preset says. transformers gets the same requests as one batch. Rows go to the results file as they are
measured.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedTokenizerFast

from .measuring import in_fresh_process, set_up
from .random_models import Case, llamas, stitched
from .reporting import environment, save_figures, show, table, write_results


@dataclass(frozen=True)
class Preset:
    """Models, and what is asked of them.

    Attributes:
        case: The models.
        concurrent: How many requests are under way at once.
        requests: How many there are, per one of those at once.
        prompt, answer: Their lengths in tokens.
        options: For the server.
    """

    case: Case
    concurrent: tuple[int, ...] = (1, 8, 32)
    requests: int = 3
    prompt: int = 128
    answer: int = 64
    options: tuple[str, ...] = ()


PRESETS = {
    "base": Preset(Case(width=256, layers=8, heads=8, kv_heads=8, intermediate=688)),
    "gpu": Preset(
        Case(width=3072, layers=28, heads=24, kv_heads=8, intermediate=8192, vocabulary=128_256, device="cuda",
             dtype="bfloat16"), concurrent=(1, 8, 32, 128), requests=4, prompt=512, answer=256,
    ),
    "smoke": Preset(
        Case(width=64, layers=2, heads=2, kv_heads=2, intermediate=128, vocabulary=512, experts=1, stitches=1),
        concurrent=(1, 2), requests=1, prompt=8, answer=4, options=("--enforce-eager",),
    ),
}  # fmt: skip


@dataclass
class Arguments:
    preset: str = field(default="base", metadata={"help": " or ".join(PRESETS)})
    threads: int = field(default=1, metadata={"help": "threads of each engine, on a CPU"})
    results: str = field(default="", metadata={"help": "results file; its table and plot go beside it"})
    only: list[str] = field(
        default_factory=list, metadata={"help": "measure these (hub, stitched, transformers), and keep the other rows"}
    )
    report_only: bool = field(default=False, metadata={"help": "only write the table and the plot of a results file"})


# --- The models -----------------------------------------------------------------------------------------------------


def write_models(case: Case, folder: Path) -> dict[str, Path]:
    """Write the hub alone and the stitched model, with a tokenizer whose words are numbers."""
    case = replace(case, device="cpu")
    hub, *experts = llamas(case)
    folders = {"hub": folder / "hub", "stitched": folder / "stitched"}
    hub.save_pretrained(folders["hub"])
    stitched(case, hub, experts).export(folders["stitched"])
    words = {f"w{number}": number for number in range(case.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for path in folders.values():
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w0").save_pretrained(path)
    return folders


# --- vLLM -----------------------------------------------------------------------------------------------------------


@contextmanager
def server(folder: Path, preset: Preset, threads: int, log: Path) -> Iterator[tuple[int, psutil.Process]]:
    """vLLM's server on a model, while the block runs: its port and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    longest = preset.prompt + preset.answer + 16
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--dtype", preset.case.dtype, "--max-model-len", str(longest), "--no-enable-prefix-caching"]
    command += ["--max-num-seqs", str(max(preset.concurrent)), *preset.options]
    variables = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while not _answers(port):
            if process.poll() is not None:
                raise RuntimeError(f"vLLM did not start:\n{log.read_text()[-4000:]}")
            time.sleep(1)
        yield port, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(port: int) -> bool:
    try:
        return urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except (URLError, OSError):
        return False


def cpu_seconds(process: psutil.Process) -> float:
    """Processor time of a process and all that it has started."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


# The client is a command of `vllm`, which builds for CPUs cannot start; so its module is called.
_CLIENT = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def ask(port: int, folder: Path, preset: Preset, concurrent: int, requests: int) -> dict[str, Any]:
    """Have vLLM's client send requests; return what it has measured."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", _CLIENT, "--model", str(folder), "--port", str(port), "--ignore-eos"]
        command += ["--dataset-name", "random", "--random-input-len", str(preset.prompt)]
        command += ["--random-output-len", str(preset.answer), "--num-prompts", str(requests), "--disable-tqdm"]
        command += ["--max-concurrency", str(concurrent), "--save-result", "--result-dir", out]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"vLLM's client failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        (file,) = Path(out).glob("*.json")
        return json.loads(file.read_text())


def measure_vllm(folder: Path, preset: Preset, threads: int, log: Path) -> Iterator[dict[str, Any]]:
    """A row for every number of requests at once."""
    with server(folder, preset, threads, log) as (port, process):
        ask(port, folder, preset, max(preset.concurrent), max(preset.concurrent))  # warms up
        for concurrent in preset.concurrent:
            before = cpu_seconds(process)
            found = ask(port, folder, preset, concurrent, concurrent * preset.requests)
            used = cpu_seconds(process) - before
            yield {
                "concurrent": concurrent,
                "tokens_per_second": found["output_throughput"],
                "tokens_per_cpu_second": found["total_output_tokens"] / used,
                "first_token_ms": found["median_ttft_ms"],
                "per_token_ms": found["median_tpot_ms"],
                "failed": found["failed"],
            }


# --- transformers ---------------------------------------------------------------------------------------------------


def measure_transformers(folder: Path, preset: Preset, concurrent: int) -> dict[str, Any]:
    """The same requests by `generate()`, as many in a batch as are under way at once."""
    import peft_bts  # noqa: F401  # registers the class

    dtype = getattr(torch, preset.case.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(preset.case.device).eval()
    shape = (concurrent, preset.prompt)
    tokens = torch.randint(2, preset.case.vocabulary, shape, device=preset.case.device)
    options = {"max_new_tokens": preset.answer, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    seconds = processor = 0.0
    for round_number in range(1 + preset.requests):
        start = time.perf_counter(), time.process_time()
        model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
        if round_number:  # the first one warms up
            seconds += time.perf_counter() - start[0]
            processor += time.process_time() - start[1]
    made = concurrent * preset.answer * preset.requests
    return {
        "concurrent": concurrent,
        "tokens_per_second": made / seconds,
        "tokens_per_cpu_second": made / processor,
        "per_token_ms": 1000 * seconds / (preset.answer * preset.requests),
    }


def measure(preset: Preset, arguments: Arguments, path: Path) -> dict[str, Any]:
    """Measure what was asked for; rows are written as they come."""
    from vllm import __version__

    chosen = arguments.only or list(SERIES)
    settings = {**environment(preset.case.device), "vllm": __version__, "threads": arguments.threads}
    rows = json.loads(path.read_text())["rows"] if arguments.only and path.exists() else []
    rows = [row for row in rows if row["model"] not in chosen]
    results = {**settings, "settings": asdict(preset), "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        folders = write_models(preset.case, Path(folder))
        for model in chosen:
            for row in measure_one(model, folders, preset, arguments.threads, Path(folder, "log")):
                rows.append({"model": model, **row})
                write_results(results, path)
    return results


def measure_one(
    model: str, folders: dict[str, Path], preset: Preset, threads: int, log: Path
) -> Iterator[dict[str, Any]]:
    if model != "transformers":
        yield from measure_vllm(folders[model], preset, threads, log)
        return
    for concurrent in preset.concurrent:
        yield in_fresh_process(measure_transformers, folders["stitched"], preset, concurrent)


# --- Report ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    "tokens_per_second": "tokens / s",
    "tokens_per_cpu_second": "tokens / CPU s",
    "first_token_ms": "first token, ms",
    "per_token_ms": "per token, ms",
}
SERIES = {
    "hub": "hub alone, vLLM",
    "stitched": "stitched, vLLM",
    "transformers": "stitched, transformers' batch",
}


def report(results: dict[str, Any], path: Path) -> str:
    """The page: settings, a table, and a plot, which is written beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = sorted(results["rows"], key=lambda row: (row["concurrent"], list(SERIES).index(row["model"])))
    lines = [
        [SERIES[row["model"]], row["concurrent"], *(f"{row[key]:.4g}" if key in row else "" for key in COLUMNS)]
        for row in rows
    ]
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    for name, label in SERIES.items():
        own = [row for row in rows if row["model"] == name]
        axes.plot([row["concurrent"] for row in own], [row["tokens_per_second"] for row in own], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="requests at once", ylabel="tokens per second", title="Throughput")
    axes.set_xticks(results["settings"]["concurrent"], results["settings"]["concurrent"])
    axes.minorticks_off()
    axes.legend()
    images = save_figures({"throughput": figure}, path.with_suffix(""))
    case = results["settings"]["case"]
    return "\n\n".join(
        [
            "# Serving",
            f"Hub and {case['experts']} experts of width {case['width']} and {case['layers']} layers, "
            f"{case['dtype']}, K = {case['stitches']}; prompts of {results['settings']['prompt']} tokens, answers of "
            f"{results['settings']['answer']}; {results['machine']}, {results['threads']} thread(s) per engine.",
            table(["model", "at once", *COLUMNS.values()], lines),
            f"![Throughput]({images['throughput']})",
        ]
    )


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    preset = PRESETS[arguments.preset]
    set_up(arguments.threads)
    name = "serving" if arguments.preset == "base" else f"serving-{arguments.preset}"
    path = Path(arguments.results or Path(__file__).parent / "results" / f"{name}.json")
    results = json.loads(path.read_text()) if arguments.report_only else measure(preset, arguments, path)
    page = report(results, path)
    path.with_suffix(".md").write_text(page + "\n")
    show(page)


if __name__ == "__main__":
    main()

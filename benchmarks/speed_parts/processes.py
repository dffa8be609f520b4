"""Rows that need a process of their own: peak memory, attaching, loading; also by number of experts and K.

The parent makes rows (`ProcessRows`), the child measures (`measure_here`). Peak: on a GPU, what PyTorch has allocated
at most, less what it held before; on a CPU the same of the process's resident memory.
"""

import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from .cases import Case, Preset, forget_models, llama, llamas, stitched, token_ids
from .decoding import Decoding
from .rows import Forward, Row, TrainingStep, lora


LINUX = sys.platform == "linux"


class Peak:
    """How far memory rises above what is held now."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            if LINUX:
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what came before
            self.before = psutil.Process().memory_info().rss

    def rise(self) -> int:
        """Bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        if LINUX:  # whose ru_maxrss is at least that of the parent when it started this process
            peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(0, peak - self.before)


def model_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------- the child


def measure_here(name: str, preset: Preset, case: Case, folder: Path | None) -> dict:
    """What the row `name` asks for, measured in this process.

    A rehearsal with tiny models comes first: what modules and libraries take when they are first used is not meant.
    """
    what, _, kind = name.partition(", ")
    tiny = replace(case, width=64, layers=4, heads=2, kv_heads=1, intermediate=64, vocabulary=64, stitches=4)
    try:
        if what == "load":
            return load(case, folder)
        if what == "attach":
            from_path = kind == "from a path"
            with tempfile.TemporaryDirectory() as rehearsal:
                llama(tiny, 1).save_pretrained(f"{rehearsal}/e0")
                attach(tiny, Path(rehearsal) if from_path else None)
            return attach(case, folder if from_path else None)
        peak(what, kind, replace(preset, prompt=4, tokens=2, training=(1, 8)), tiny)
        return peak(what, kind, preset, case)
    except torch.OutOfMemoryError:
        return {"out_of_memory": [name]}


def peak(what: str, kind: str, preset: Preset, case: Case) -> dict:
    kind, _, checkpointed = kind.partition(", ")
    if kind == "LoRA":
        parts = [lora(case)]
    elif kind in ("full", "models alone"):
        parts = [model.requires_grad_(kind == "full") for model in llamas(case)]
    else:
        hub, *experts = llamas(case)
        parts = [stitched(case, hub, experts, kind)]
    held = sum(map(model_bytes, parts))
    if what == "decode":
        action = Decoding(parts, token_ids(case, 1, preset.prompt), preset.tokens)
    elif what == "training":
        for part in parts:
            part.train()
            if checkpointed:
                part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        action = TrainingStep(parts, token_ids(case, *preset.training))
    else:
        alone = [parts[0], *(part.model for part in parts[1:])]
        action = Forward(alone, token_ids(case, *preset.training))
    watched = Peak(case.device)
    action()
    again = action()  # with the optimizer's state in memory, which the first step has made
    return {"peak_bytes": watched.rise(), "model_bytes": held, "seconds": again}


def attach(case: Case, folder: Path | None) -> dict:
    """Attach one expert: a loaded model, or a path."""
    model = stitched(case, llama(case), [])
    expert = llama(case, 1) if folder is None else str(folder / "e0")
    before = model_bytes(model)
    watched, start = Peak(case.device), time.perf_counter()
    model.attach_expert("e0", expert)
    elapsed = time.perf_counter() - start
    rise = watched.rise()
    size = model_bytes(model.base_model.experts["default"]["e0"].model)
    stitches = model_bytes(model) - before - size
    return {"seconds": elapsed, "peak_bytes": rise, "expert_bytes": size, "stitch_bytes": stitches}


def load(case: Case, folder: Path, repeats: int = 3) -> dict:
    """Load an adapter and its experts, by turns with the experts alone."""
    dtype = getattr(torch, case.dtype)
    times: dict[str, list[float]] = {"adapter and experts": [], "experts alone": []}
    for _ in range(1 + repeats):
        hub = AutoModelForCausalLM.from_pretrained(folder / "hub", dtype=dtype, device_map=case.device)
        start = time.perf_counter()
        model = PeftModel.from_pretrained(hub, folder / "adapter")
        times["adapter and experts"].append(time.perf_counter() - start)
        del model, hub
        start = time.perf_counter()
        experts = [
            AutoModelForCausalLM.from_pretrained(folder / f"e{i}", dtype=dtype, device_map=case.device)
            for i in range(case.experts)
        ]
        times["experts alone"].append(time.perf_counter() - start)
        del experts
    file = folder / "adapter" / "adapter_model.safetensors"
    return {"seconds": {k: statistics.median(v[1:]) for k, v in times.items()}, "file_bytes": file.stat().st_size}


# ---------------------------------------------------------------------------------------------------- the parent


class ProcessRows:
    """Rows that start this script again, for one measurement.

    Args:
        command: The script with its options; the case, and what the child is to measure, are added.
    """

    def __init__(self, preset: Preset, case: Case, command: list[str]) -> None:
        self.preset, self.case, self.command = preset, case, command

    def memory(self) -> Iterator[Row]:
        for name in self.preset.processes:
            yield Row("memory", name, partial(self._start, name), 20, 0)

    def attaching(self) -> Iterator[Row]:
        for name in ("attach, a loaded model", "attach, from a path", "load, adapter and experts"):
            measure: Callable = self._start if name.endswith("loaded model") else self._start_with_folder
            yield Row("attaching", name, partial(measure, name), 15, 0)

    def sizes(self) -> Iterator[Row]:
        """What the two sections above measure of the alternating pattern, by number of experts and K."""
        yield Row("sizes", "base", self._all_of_one_size, 60, 0)
        for size in ("experts", "stitches"):
            for value in self.preset.scaling.get(size, ()):
                scaled = ProcessRows(self.preset, replace(self.case, **{size: value}), self.command)
                yield Row("sizes", f"{size} = {value}", scaled._all_of_one_size, 60, 0)

    def _all_of_one_size(self) -> dict:
        return {
            "inference": self._start("inference, alternating"),
            "training": self._start("training, alternating"),
            "attach": self._start("attach, a loaded model"),
            "load": self._start_with_folder("load, adapter and experts"),
        }

    def _start(self, name: str, folder: str = "") -> dict:
        forget_models()  # the child may need all of a GPU
        if self.case.device.startswith("cuda"):
            torch.cuda.empty_cache()
        case = [f"--{key}={getattr(self.case, key)}" for key in ("device", "dtype", "experts", "stitches")]
        command = [*self.command, *case, "--child", name, *(["--folder", folder] if folder else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"The process that measured {name!r} has failed; see above.")
        return json.loads(done.stdout.splitlines()[-1])

    def _start_with_folder(self, name: str) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            hub, *experts = llamas(self.case)
            hub.save_pretrained(f"{folder}/hub")
            for number, expert in enumerate(experts):
                expert.save_pretrained(f"{folder}/e{number}")
                expert.config._name_or_path = f"{folder}/e{number}"
            hub.config._name_or_path = f"{folder}/hub"
            stitched(self.case, hub, experts).save_pretrained(f"{folder}/adapter")
            del hub, experts, expert
            return self._start(name, folder)

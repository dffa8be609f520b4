"""Rows that need a process of their own: peak memory, attaching, loading; also by number of experts and K."""

import gc
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from torch.utils.benchmark import timer
from transformers import AutoModelForCausalLM

from ..measuring import Peak, in_fresh_process, take_turns
from ..random_models import Case, bytes_of, llama, llamas, save_loras, stitched, to_train, token_ids
from .presets import Preset
from .rows import Rows, sizes_of
from .runners import Decoding, Forward, TrainingStep, alone


def memory(preset: Preset, case: Case) -> Rows:
    """Each in a process of its own: how far memory rises above what it holds once the models are there, over two
    forwards or training steps; the models themselves; and the seconds of the second."""
    for name in preset.processes:
        yield name, in_fresh_process, peak, name, preset, case


def attaching(preset: Preset, case: Case) -> Rows:
    """One expert attached, in a process of its own."""
    yield "attach, a loaded model", in_fresh_process, attach, case
    yield "attach, from a path", with_checkpoints, attach, case
    yield "attach, a LoRA of the hub", in_fresh_process, attach_lora, case
    yield "load, adapter and experts", with_checkpoints, load, case


def sizes(preset: Preset, case: Case) -> Rows:
    """Each in a process of its own; MiB that a forward and a training step need beside the models, and of the adapter
    file; seconds to attach one loaded model, and to load the adapter with its experts, and the experts alone."""
    yield "base", of_one_size, preset, case
    for name, size, value in sizes_of(preset):
        if size in ("experts", "stitches"):
            yield name, of_one_size, preset, replace(case, **{size: value})


SECTIONS = {
    "memory": ("Memory", memory),
    "attaching": ("Attaching and loading", attaching),
    "sizes": ("Memory, files and loading by number of experts and K", sizes),
}


def of_one_size(preset: Preset, case: Case) -> dict:
    return {
        "inference": in_fresh_process(peak, "inference, alternating", preset, case),
        "training": in_fresh_process(peak, "training, alternating", preset, case),
        "attach": in_fresh_process(attach, case),
        "load": with_checkpoints(load, case),
    }


# --- What is measured in the fresh process --------------------------------------------------------------------------
# A rehearsal with tiny models comes first: what modules and libraries take when they are first used is not meant.


def tiny(case: Case) -> Case:
    return replace(case, width=64, layers=4, heads=2, kv_heads=1, intermediate=64, vocabulary=64, stitches=4)


def case_of(name: str, case: Case) -> Case:
    """The case of a row in whose name there may be another vocabulary."""
    sizes = re.findall(r"vocabulary of (\d+)", name)
    return replace(case, vocabulary=int(sizes[0]), tied=True) if sizes else case


def peak(name: str, preset: Preset, case: Case) -> dict:
    """How far memory rises in two runs of what a row is called, such as "training, alternating, checkpointed" or
    "training, mixture, vocabulary of 128000"."""
    (what, kind, *how), case = name.split(", "), case_of(name, case)

    def measure(preset: Preset, case: Case) -> dict:
        parts = llamas(case) if kind == "models alone" else to_train(case, kind)
        held, ids = sum(map(bytes_of, parts)), token_ids(case, *preset.training)
        for part in parts if "checkpointed" in how else ():
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run = {
            "inference": lambda: Forward(alone(parts[0], parts[1:]), ids),
            "training": lambda: TrainingStep(parts, ids),
            "decode": lambda: Decoding(parts, token_ids(case, 1, preset.prompt), preset.tokens),
        }[what]()
        watched = Peak(case.device)
        run()
        again = run()  # with the optimizer's state in memory, which the first step has made
        return {"peak_bytes": watched.rise(), "model_bytes": held, "seconds": again}

    measure(replace(preset, prompt=4, tokens=2, training=(1, 8)), tiny(case))
    return measure(preset, case)


def attach(case: Case, folder: Path | None = None) -> dict:
    """Attach one expert: a loaded model, or the path of one."""
    with tempfile.TemporaryDirectory() as rehearsal:
        expert = llama(tiny(case), 1)
        expert.save_pretrained(rehearsal)
        attached(tiny(case), llama(tiny(case)), expert if folder is None else rehearsal)
    return attached(case, llama(case), llama(case, 1) if folder is None else str(folder / "e0"))


def attach_lora(case: Case) -> dict:
    """Attach one expert by the path of a LoRA of the hub."""

    def measure(case: Case) -> dict:
        hub = llama(case)
        with tempfile.TemporaryDirectory() as folder:
            save_loras(replace(case, experts=1), hub, Path(folder))
            gc.collect()
            return attached(case, hub, str(Path(folder) / "e0"))

    measure(tiny(case))
    return measure(case)


def attached(case: Case, hub: torch.nn.Module, expert: torch.nn.Module | str) -> dict:
    model = stitched(case, hub, [])
    before, there = bytes_of(model), set(map(id, model.parameters()))
    watched, start = Peak(case.device), timer()
    model.attach_expert("e0", expert)
    elapsed, rise = timer() - start, watched.rise()
    own = [p for p in model.base_model.experts["default"]["e0"].model.parameters() if id(p) not in there]
    size = sum(p.numel() * p.element_size() for p in own)
    return {
        "seconds": elapsed,
        "peak_bytes": rise,
        "expert_bytes": size,
        "stitch_bytes": bytes_of(model) - before - size,
    }


def load(case: Case, folder: Path) -> dict:
    """Load an adapter and its experts, by turns with the experts alone."""
    options = {"dtype": getattr(torch, case.dtype), "device_map": case.device}

    def adapter_and_experts() -> float:
        hub = AutoModelForCausalLM.from_pretrained(folder / "hub", **options)
        start = timer()
        PeftModel.from_pretrained(hub, folder / "adapter")
        return timer() - start

    def experts_alone() -> float:
        start = timer()
        [AutoModelForCausalLM.from_pretrained(folder / f"e{i}", **options) for i in range(case.experts)]
        return timer() - start

    runners = {"adapter and experts": adapter_and_experts, "experts alone": experts_alone}
    seconds = take_turns(runners, {}, budget=math.inf, rounds=(3, 3))["seconds"]
    return {"seconds": seconds, "file_bytes": (folder / "adapter" / "adapter_model.safetensors").stat().st_size}


def with_checkpoints(measure: Callable[[Case, Path], dict], case: Case) -> dict:
    """`measure` in a fresh process, with a folder of checkpoints: hub, experts and adapter."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoints(case, Path(folder))
        return in_fresh_process(measure, case, Path(folder))


def save_checkpoints(case: Case, folder: Path) -> None:
    hub, *experts = llamas(case)
    for name, model in [("hub", hub), *((f"e{number}", expert) for number, expert in enumerate(experts))]:
        model.save_pretrained(folder / name)
        model.config._name_or_path = str(folder / name)
    stitched(case, hub, experts).save_pretrained(folder / "adapter")

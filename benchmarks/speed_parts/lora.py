"""Rows of experts that are LoRAs of the hub, with which they run as one batch (`peft_bts/inference/joint_lora.py`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel

from peft_bts.forward.state import run_in_turn

from ..random_models import Case, lora_models, token_ids
from .presets import Preset
from .rows import Rows, decoding, sequences, turns
from .runners import Decoding, Forward, alone


DECODE = (1, 4)  # sequences


def lora(preset: Preset, case: Case) -> Rows:
    """Experts that are LoRAs of the hub (r=16, all linear layers) and run with it as rows of one batch. Here, E is one
    forward of the hub alone, and one of it with every LoRA in turn, unmerged and without heads. "one by one" is the
    same stitched model with its experts run by themselves."""
    for batch in DECODE:
        yield f"decode, {sequences(batch)}", beside, preset, case, decoding(preset), batch, preset.prompt
    for batch, length in preset.prefill[:3]:  # 4 x 1024 would take minutes a round, and says no more
        yield f"prefill, {batch} x {length} tokens", beside, preset, case, Forward, batch, length


def lora_compiled(preset: Preset, case: Case) -> Rows:
    """Static cache, one graph per step; on a GPU, CUDA graphs."""
    yield "decode, 1 sequence", compiled, preset, case


SECTIONS = {
    "lora": ("LoRA experts", lora),
    "lora_compiled": ("Compiled decoding with LoRA experts", lora_compiled),
}


def beside(preset: Preset, case: Case, work: Callable, batch: int, length: int) -> dict:
    model, hub, experts = lora_models(case)
    ids = token_ids(case, batch, length)
    runners = {
        "stitched": work([model], ids),
        "one by one": work([model], ids, inside=lambda: one_by_one(model)),
        "hub alone": work([hub], ids),
    }
    return turns(preset, runners, {"E": work(alone(hub, experts), ids)})


def compiled(preset: Preset, case: Case) -> dict:
    model, hub, experts = lora_models(case)
    ids = token_ids(case, 1, preset.prompt)
    options = {"mode": "reduce-overhead"} if case.device.startswith("cuda") else {"backend": "aot_eager"}
    every = {"stitched": [model], "hub alone": [hub], "E": alone(hub, experts)}
    runners = {name: Decoding(parts, ids, preset.tokens, compile_options=options) for name, parts in every.items()}
    for runner in runners.values():
        for _ in range(2):  # compiles; captures graphs
            runner()
    result = turns(preset, runners, {"E": runners.pop("E")})
    torch._dynamo.reset()
    return result


@contextmanager
def one_by_one(model: PeftModel) -> Iterator[None]:
    """While this is active, all experts run by themselves."""
    settings = model.base_model._forward.settings
    settings.make_executor = run_in_turn
    try:
        yield
    finally:
        settings.make_executor = None

"""The timed rows: which runners take turns, and which of them are the units that the others are measured in.

E is the unit of cost: one plain forward of the hub, and one of every expert without its lm_head; in decoding one such
step, each model with a cache of its own. Every row makes its own models.

A section is a function that yields rows. A row is a name, and a function with its arguments that measures what goes to
the results file. The section's docstring stands above its rows on the page.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch.utils.benchmark import timer

from peft_bts.stitch import ExpertsIntoHub

from ..measuring import Runner, take_turns
from ..random_models import MIXTURES, PATTERNS, Case, llama, llamas, lora, models, stitched, token_ids
from .plain import PlainLoop
from .presets import Preset
from .runners import Decoding, Forward, TrainingStep, alone


Rows = Iterator[tuple]  # (name, function, *arguments)


def prefill(preset: Preset, case: Case) -> Rows:
    """One forward over a prompt. E: one forward of the plain hub and one of each expert without its lm_head."""
    for more, one in by_dtype(preset, case):
        for batch, length in preset.prefill:
            yield f"{batch} x {length} tokens{more}", in_E, preset, one, Forward, batch, length, True


def decode(preset: Preset, case: Case) -> Rows:
    """One token at a time behind a prompt, with a `DynamicCache`, by a greedy loop written by hand. Seconds are of
    all decoded tokens of a round."""
    for more, one in by_dtype(preset, case):
        for batch in preset.decode:
            yield f"{sequences(batch)}{more}", in_E, preset, one, decoding(preset), batch, preset.prompt


def training(preset: Preset, case: Case) -> Rows:
    """Forward, backward and AdamW of the stitches, against training all models in full, and a LoRA (r=8, all linear
    layers) on the hub alone."""
    name = "{} x {} tokens".format(*preset.training)
    for more, one in by_dtype(preset, case):
        yield f"{name}{more}", training_step, preset, one
    for size in preset.vocabularies:
        yield f"{name}, vocabulary of {size:,}", training_step, preset, replace(case, vocabulary=size)


def plain(preset: Preset, case: Case) -> Rows:
    """The paper's appendix B in plain PyTorch, every layer of every model called in turn. Its logits are checked to be
    the same before it is timed."""
    for name, work, sizes in (
        ("prefill, {} x {} tokens", Forward, preset.prefill[0]),
        ("decode, {} sequence", decoding(preset), (1, preset.prompt)),
        ("training step, {} x {} tokens", TrainingStep, preset.training),
    ):
        yield name.format(*sizes), against_plain_loop, preset, case, work, *sizes


def streams(preset: Preset, case: Case) -> Rows:
    """All models' layers between two stitches at once: `parallel_streams()`, on two threads."""
    for batch in sorted({*preset.decode, 2}):
        yield f"decode, {sequences(batch)}", parallel, preset, case, decoding(preset), batch, preset.prompt
    if case.device == "cpu":
        batch, length = preset.prefill[0]
        yield f"prefill, {batch} x {length} tokens", parallel, preset, case, Forward, batch, length


def dropping(preset: Preset, case: Case) -> Rows:
    """Decoding with at most k experts (`max_active_experts`), in one sequence."""
    for kept in range(1 + case.experts):
        yield f"decode, 1 sequence, {kept} of {case.experts} experts kept", dropped, preset, case, kept


def mixture(preset: Preset, case: Case) -> Rows:
    """With `output="mixture"`. E' is E with the experts' heads; a step of the output gates alone is measured in
    forwards."""
    batch, length = preset.prefill[0]
    yield f"prefill, {batch} x {length} tokens", in_E_with_heads, preset, case, "mixture", Forward, batch, length
    for batch in preset.decode:
        row = in_E_with_heads, preset, case, "mixture", decoding(preset), batch, preset.prompt
        yield f"decode, {sequences(batch)}", *row
    name = "training step of the gates alone, {} x {} tokens".format(*preset.training)
    for size in (case.vocabulary, *preset.vocabularies):
        row = in_E_with_heads, preset, replace(case, vocabulary=size), "output gates", TrainingStep, *preset.training
        yield f"{name}, vocabulary of {size:,}", *row


def compiled(preset: Preset, case: Case) -> Rows:
    """Static cache, one graph per step; on a GPU, CUDA graphs."""
    for more, one in by_dtype(preset, case):
        yield f"decode, 1 sequence{more}", compiled_decoding, preset, one


def scaling(preset: Preset, case: Case) -> Rows:
    """Around the base case; E is that of the same sizes."""
    preset = replace(preset, seconds=preset.scaling_seconds)
    length, prompt = preset.prefill[0][1], preset.prompt

    def scaled(name: str, case: Case, length: int, prompt: int) -> Rows:
        yield f"{name}, prefill", in_E, preset, case, Forward, 1, length
        yield f"{name}, decode", in_E, preset, case, decoding(preset), 1, prompt
        if not name.startswith(("width", "length")):
            yield f"{name}, training", in_E, preset, case, TrainingStep, 1, length

    yield from scaled("base", case, length, prompt)
    for name, size, value in sizes_of(preset):
        if size == "length":
            base = f"length = {length}, prefill", f"length = {prompt}, decode"
            yield from (row for row in scaled(name, case, value, value) if row[0] not in base)
        else:
            other = case.with_width(value) if size == "width" else replace(case, **{size: value})
            yield from scaled(name, other, length, prompt)


SECTIONS = {
    "prefill": ("Prefill", prefill),
    "decode": ("Decoding", decode),
    "training": ("A training step", training),
    "plain": ("A plain loop", plain),
    "streams": ("Parallel streams", streams),
    "dropping": ("Dropping experts", dropping),
    "mixture": ("Output mixture", mixture),
    "compiled": ("Compiled decoding", compiled),
    "scaling": ("One size at a time", scaling),
}


# --- Names and sizes ------------------------------------------------------------------------------------------------


def by_dtype(preset: Preset, case: Case) -> Iterator[tuple[str, Case]]:
    """The cases to measure, by what is added to the row's name."""
    for dtype in preset.stitch_dtypes:
        yield f", {dtype} stitches" * (len(preset.stitch_dtypes) > 1), replace(case, stitch_dtype=dtype)


def sizes_of(preset: Preset) -> list[tuple[str, str, int]]:
    return [(f"{size} = {value}", size, value) for size, values in preset.scaling.items() for value in values]


def sequences(batch: int) -> str:
    return f"{batch} sequence{'s' * (batch > 1)}"


def decoding(preset: Preset) -> partial:
    return partial(Decoding, tokens=preset.tokens)


# --- Measurements ---------------------------------------------------------------------------------------------------


def turns(preset: Preset, runners: dict[str, Runner], units: dict[str, Runner], flops: bool = False) -> dict:
    return take_turns(runners, units, budget=preset.seconds, rounds=preset.rounds, flops=flops)


def in_E(preset: Preset, case: Case, work: Callable, batch: int, length: int, flops: bool = False) -> dict:
    """The stitched model, and E, both doing the same work; a training step is measured in forwards."""
    model, hub, experts = models(case)
    ids = token_ids(case, batch, length)
    unit = Forward if work is TrainingStep else work
    return turns(preset, {"stitched": work([model], ids)}, {"E": unit(alone(hub, experts), ids)}, flops)


def in_E_with_heads(preset: Preset, case: Case, kind: str, work: Callable, batch: int, length: int) -> dict:
    """The same with an output mixture, against E with the experts' heads."""
    model, hub, experts = models(case, **MIXTURES[kind])
    ids = token_ids(case, batch, length)
    unit = Forward if work is TrainingStep else work
    return turns(preset, {"mixture": work([model], ids)}, {"E'": unit([hub, *experts], ids)})


def training_step(preset: Preset, case: Case) -> dict:
    ids = token_ids(case, *preset.training)
    hub, *experts = llamas(case)
    full = [llama(case).requires_grad_(True) for _ in range(1 if preset.train_one_of_all else 1 + case.experts)]
    times = (1 + case.experts) // len(full)
    runners = {p: TrainingStep([stitched(case, copy.deepcopy(hub), experts, p)], ids) for p in PATTERNS}
    units = {
        "full training": TrainingStep(full, ids, times),
        "LoRA on the hub": TrainingStep([lora(case)], ids),
        "E": Forward(alone(hub, experts), ids),
    }
    result = turns(preset, runners, units, flops=True)
    if "full training" in result["flops"]:
        result["flops"]["full training"] *= times
    return result


def against_plain_loop(preset: Preset, case: Case, work: Callable, batch: int, length: int) -> dict:
    model, hub, experts = models(case)
    loop = PlainLoop(model, hub, experts)
    ids = token_ids(case, *preset.prefill[0])
    with torch.no_grad():
        actual, expected = model(input_ids=ids).logits, loop(input_ids=ids).logits
    difference = ((actual - expected).abs().max() / expected.abs().max()).item()  # in units of the largest logit
    if not difference < (1e-4 if case.dtype == "float32" else 5e-2):
        raise AssertionError(f"The plain loop's logits differ from the stitched model's, by {difference:.1e}.")

    ids = token_ids(case, batch, length)
    ours, theirs = work([model], ids), work([loop], ids)
    result = {"largest_difference": difference, **turns(preset, {"stitched": ours}, {"plain loop": theirs})}
    same = {"same_tokens": torch.equal(ours.chosen, theirs.chosen)} if isinstance(ours, Decoding) else {}
    return result | same


def parallel(preset: Preset, case: Case, work: Callable, batch: int, length: int) -> dict:
    model, hub, experts = models(case)
    ids = token_ids(case, batch, length)
    ways = {"threads": work([model], ids, inside=model.parallel_streams)}
    return turns(preset, ways, {"E": work(alone(hub, experts), ids), "sequential": work([model], ids)})


def dropped(preset: Preset, case: Case, kept: int) -> dict:
    """The hub and at most `kept` experts, against the same models that nobody stitches."""
    model, hub, experts = models(case)
    with torch.no_grad():  # gates that differ for good: random ones would call back another expert every few tokens
        for stitch in model.modules():
            if isinstance(stitch, ExpertsIntoHub):
                for rank, name in enumerate(stitch.experts):
                    stitch.gate.of(name).bias.fill_(-2.0 * rank)
    run = partial(decoding(preset), ids=token_ids(case, 1, preset.prompt))
    units = {"hub + kept experts": run(alone(hub, experts[:kept])), "E": run(alone(hub, experts))}
    return turns(preset, {"dropped": run([model], inside=partial(model.drop_experts, kept))}, units)


def compiled_decoding(preset: Preset, case: Case) -> dict:
    """Besides the time: which share of the memory's bandwidth it uses to read the weights."""
    cuda = case.device.startswith("cuda")
    options = {"mode": "reduce-overhead"} if cuda else {"backend": "aot_eager"}
    bandwidth = copy_bandwidth(case.device, size=2**32 if cuda else 2**26)
    model, hub, experts = models(case)
    run = partial(decoding(preset), ids=token_ids(case, 1, preset.prompt), compile_options=options)
    ours, unit = run([model]), run(alone(hub, experts))
    for runner in (ours, ours, unit, unit):
        runner()  # compiles; captures graphs
    result = turns(preset, {"stitched": ours}, {"E": unit})
    torch._dynamo.reset()
    read = {"stitched": weights_read([model]), "E": weights_read(alone(hub, experts))}
    share = {name: read[name] / bandwidth * preset.tokens / result["seconds"][name] for name in read}
    return {"bytes_per_second": bandwidth, "bytes_read": read, "share_of_bandwidth": share, **result}


def weights_read(parts: list[torch.nn.Module]) -> int:
    """Bytes of weights that a decoding step of one sequence has to read: all but embeddings and experts' lm_heads."""
    read = [p for model in parts for name, p in model.named_parameters() if "embed" not in name and "head" not in name]
    return sum(p.numel() * p.element_size() for p in [*read, parts[0].get_output_embeddings().weight])


def copy_bandwidth(device: str, size: int = 2**28, times: int = 10) -> float:
    """Bytes per second that memory reads and writes while `size` bytes are copied; the fastest of some tries."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(1 + times):
        start = timer()
        target.copy_(source)
        best = min(best, timer() - start)
    return 2 * size / best

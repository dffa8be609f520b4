"""The timed rows: which runners take turns, and which ratios are asked of them.

E is the unit of cost: one plain forward of the hub, and one of every expert without its lm_head; in decoding one such
step, each model with a cache of its own. Every row makes its own models.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.utils.benchmark import timer

from peft_bts.inference.joint_layers import MOST_SEQUENCES
from peft_bts.stitch import ExpertsIntoHub

from ..measuring import Runner, take_turns
from .cases import PATTERNS, Case, Preset, llama, llamas, lora, models, stitched, token_ids
from .plain import PlainLoop
from .runners import Decoding, Forward, TrainingStep, alone


Rows = Iterator[tuple[str, Callable[[], dict]]]  # names, and functions that measure what goes to the results file


def turns(preset: Preset, runners: dict[str, Runner], pairs: list[tuple[str, str]], flops: bool = False) -> dict:
    return take_turns(runners, pairs, budget=preset.seconds, rounds=preset.rounds, flops=flops)


def in_E(preset: Preset, case: Case, work: Callable, batch: int, length: int, flops: bool = False, **options) -> dict:
    """The stitched model against E, both doing the same work: `Forward` or `Decoding`."""
    model, hub, experts = models(case)
    run = partial(work, **options)
    ids = token_ids(case, batch, length)
    return turns(
        preset, {"stitched": run([model], ids), "E": run(alone(hub, experts), ids)}, [("stitched", "E")], flops
    )


def by_dtype(preset: Preset, case: Case) -> Iterator[tuple[str, Case]]:
    """The cases to measure, by what is added to the row's name."""
    for dtype in preset.stitch_dtypes:
        several = len(preset.stitch_dtypes) > 1
        yield f", {dtype} stitches" if several else "", replace(case, stitch_dtype=dtype)


def prefill(preset: Preset, case: Case) -> Rows:
    for more, case in by_dtype(preset, case):
        for batch, length in preset.prefill:
            measure = partial(in_E, preset, case, Forward, batch, length, flops=True)
            yield f"{batch} x {length} tokens{more}", measure


def decode(preset: Preset, case: Case) -> Rows:
    for more, case in by_dtype(preset, case):
        for batch in preset.decode:
            measure = partial(in_E, preset, case, Decoding, batch, preset.prompt, tokens=preset.tokens)
            yield f"{sequences(batch)}{more}", measure


def sequences(batch: int) -> str:
    return f"{batch} sequence{'s' * (batch > 1)}"


def training(preset: Preset, case: Case) -> Rows:
    """A step of either pattern, against one of everything in full, one of a LoRA, and E; with other vocabularies."""
    name = "{} x {} tokens".format(*preset.training)
    for more, one in by_dtype(preset, case):
        yield f"{name}{more}", partial(training_step, preset, one)
    for size in preset.vocabularies:
        yield f"{name}, vocabulary of {size:,}", partial(training_step, preset, replace(case, vocabulary=size))


def training_step(preset: Preset, case: Case) -> dict:
    ids = token_ids(case, *preset.training)
    hub, *experts = llamas(case)
    runners = {p: TrainingStep([stitched(case, copy.deepcopy(hub), experts, p)], ids) for p in PATTERNS}
    runners["E"] = Forward(alone(hub, experts), ids)
    runners["LoRA on the hub"] = TrainingStep([lora(case)], ids)
    count = 1 if preset.train_one_of_all else 1 + case.experts
    full = [llama(case).requires_grad_(True) for _ in range(count)]
    times = (1 + case.experts) // count
    runners["full training"] = TrainingStep(full, ids, times=times)
    pairs = [(p, unit) for p in PATTERNS for unit in ("full training", "LoRA on the hub", "E")]
    result = turns(preset, runners, pairs, flops=True)
    if "full training" in result["flops"]:
        result["flops"]["full training"] *= times
    return result


def plain(preset: Preset, case: Case) -> Rows:
    """The paper's pseudo code as a plain loop, which must give the same logits."""
    measure = partial(against_plain_loop, preset, case)
    yield "prefill, {} x {} tokens".format(*preset.prefill[0]), partial(measure, Forward, *preset.prefill[0])
    yield "decode, 1 sequence", partial(measure, Decoding, 1, preset.prompt, tokens=preset.tokens)
    yield "training step, {} x {} tokens".format(*preset.training), partial(measure, TrainingStep, *preset.training)


def against_plain_loop(preset: Preset, case: Case, work: Callable, batch: int, length: int, **options) -> dict:
    model, hub, experts = models(case)
    loop = PlainLoop(model, hub, experts)
    ids = token_ids(case, *preset.prefill[0])
    with torch.no_grad():
        actual, expected = model(input_ids=ids).logits, loop(input_ids=ids).logits
    scale = expected.abs().max()
    tolerance = 1e-4 if case.dtype == "float32" else 5e-2
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)

    ids = token_ids(case, batch, length)
    runners = {"stitched": work([model], ids, **options), "plain loop": work([loop], ids, **options)}
    result = turns(preset, runners, [("stitched", "plain loop")])
    result["largest_difference"] = ((actual - expected).abs().max() / scale).item()  # in units of the largest logit
    if work is Decoding:
        result["same_tokens"] = torch.equal(runners["stitched"].chosen, runners["plain loop"].chosen)
    return result


def streams(preset: Preset, case: Case) -> Rows:
    """All models' layers between two stitches at the same time."""
    for batch in sorted({*preset.decode, 2}):
        work = partial(Decoding, tokens=preset.tokens)
        yield f"decode, {sequences(batch)}", partial(parallel, preset, case, work, batch, preset.prompt)
    if case.device == "cpu":
        batch, length = preset.prefill[0]
        yield f"prefill, {batch} x {length} tokens", partial(parallel, preset, case, Forward, batch, length)


def parallel(preset: Preset, case: Case, work: Callable, batch: int, length: int) -> dict:
    model, hub, experts = models(case)
    on_cpu = case.device == "cpu"
    ways = {"threads": (model, model.parallel_streams)} if on_cpu else {}
    if work is not Forward and not (on_cpu and batch > MOST_SEQUENCES):
        own = copy.deepcopy(model)  # its weights move with every run, which the others would feel
        ways["stacked"] = own, partial(own.parallel_streams, 2 if on_cpu else 1, stack=True)
    ids = token_ids(case, batch, length)
    runners = {name: work([its_model], ids, inside=way) for name, (its_model, way) in ways.items()}
    runners |= {"sequential": work([model], ids), "E": work(alone(hub, experts), ids)}
    return turns(preset, runners, [(name, unit) for unit in ("E", "sequential") for name in ways])


def dropping(preset: Preset, case: Case) -> Rows:
    """Decoding with at most k experts, against the hub and k experts that nobody stitches."""
    for kept in range(1 + case.experts):
        yield f"decode, 1 sequence, {kept} of {case.experts} experts kept", partial(dropped, preset, case, kept)


def dropped(preset: Preset, case: Case, kept: int) -> dict:
    model, hub, experts = models(case)
    with torch.no_grad():  # gates that differ for good: random ones would call back another expert every few tokens
        for stitch in model.modules():
            if isinstance(stitch, ExpertsIntoHub):
                for rank, name in enumerate(stitch.experts):
                    stitch.gate.of(name).bias.fill_(-2.0 * rank)
    run = partial(Decoding, prompt=token_ids(case, 1, preset.prompt), tokens=preset.tokens)
    runners = {
        "dropped": run([model], inside=partial(model.drop_experts, kept)),
        "hub + kept experts": run(alone(hub, experts[:kept])),
        "E": run(alone(hub, experts)),
    }
    return turns(preset, runners, [("dropped", "hub + kept experts"), ("dropped", "E")])


def scaling(preset: Preset, case: Case) -> Rows:
    """One size at a time, around the base case."""
    preset = replace(preset, seconds=preset.scaling_seconds)
    length, prompt = preset.prefill[0][1], preset.prompt

    def scaled(name: str, case: Case, length: int, prompt: int) -> Rows:
        yield f"{name}, prefill", partial(in_E, preset, case, Forward, 1, length)
        yield f"{name}, decode", partial(in_E, preset, case, Decoding, 1, prompt, tokens=preset.tokens)
        if not name.startswith(("width", "length")):
            yield f"{name}, training", partial(training_in_E, preset, case)

    yield from scaled("base", case, length, prompt)
    for size, values in preset.scaling.items():
        for value in values:
            if size == "length":
                rows = scaled(f"length = {value}", case, value, value)
                base = {f"length = {length}, prefill", f"length = {prompt}, decode"}
                yield from ((name, measure) for name, measure in rows if name not in base)
            else:
                other = case.with_width(value) if size == "width" else replace(case, **{size: value})
                yield from scaled(f"{size} = {value}", other, length, prompt)


def training_in_E(preset: Preset, case: Case) -> dict:
    model, hub, experts = models(case)
    ids = token_ids(case, *preset.prefill[0])
    return turns(
        preset, {"stitched": TrainingStep([model], ids), "E": Forward(alone(hub, experts), ids)}, [("stitched", "E")]
    )


def compiled(preset: Preset, case: Case) -> Rows:
    """Decoding by compiled steps with a static cache; on a GPU, by CUDA graphs."""
    for more, case in by_dtype(preset, case):
        yield f"decode, 1 sequence{more}", partial(compiled_decoding, preset, case)


def compiled_decoding(preset: Preset, case: Case) -> dict:
    model, hub, experts = models(case)
    cuda = case.device.startswith("cuda")
    bandwidth = copy_bandwidth(case.device, size=2**32 if cuda else 2**26)
    options = {"mode": "reduce-overhead"} if cuda else {"backend": "aot_eager"}
    prompt = token_ids(case, 1, preset.prompt)
    run = partial(Decoding, prompt=prompt, tokens=preset.tokens, compile_options=options)
    runners = {"stitched": run([model]), "E": run(alone(hub, experts))}
    for decoding in runners.values():
        decoding()  # compiles
        decoding()  # captures graphs
    result = turns(preset, runners, [("stitched", "E")])
    if cuda:
        torch._dynamo.reset()
    read = {"stitched": weights_read(model), "E": sum(weights_read(part) for part in alone(hub, experts))}
    share = {name: read[name] / bandwidth * preset.tokens / result["seconds"][name] for name in read}
    return {"bytes_per_second": bandwidth, "bytes_read": read, "share_of_bandwidth": share, **result}


def weights_read(model: nn.Module) -> int:
    """Bytes of weights that a decoding step of one sequence has to read: all but embeddings and experts' lm_heads."""
    read = [p for name, p in model.named_parameters() if "embed_tokens" not in name and "lm_head" not in name]
    if hasattr(model, "lm_head"):
        read.append(model.lm_head.weight)
    return sum(p.numel() * p.element_size() for p in read)


def copy_bandwidth(device: str, size: int = 2**28, times: int = 10) -> float:
    """Bytes per second that memory reads and writes while `size` bytes are copied; the fastest of some tries."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy_once() -> float:
        start = timer()
        target.copy_(source)
        return timer() - start

    return 2 * size / min(copy_once() for _ in range(1 + times))


SECTIONS: dict[str, Callable[[Preset, Case], Rows]] = {
    section.__name__: section for section in (prefill, decode, training, plain, streams, dropping, scaling, compiled)
}

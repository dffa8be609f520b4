"""The timed rows: which runners take turns, and which ratios are asked of them.

E is the unit of cost: one plain forward of the hub, and one of every expert without its lm_head, whose logits nobody
needs; in decoding one such step, each model with a cache of its own.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_bts.inference.joint_layers import MOST_SEQUENCES
from peft_bts.stitch import ExpertsIntoHub

from .cases import PATTERNS, Case, Preset, forget_models, llama, llamas, models, stitched, token_ids
from .decoding import Decoding
from .plain import PlainLoop
from .timing import Runner, copy_bandwidth, seconds, take_turns


@dataclass
class Row:
    """One measurement: `measure()` returns what goes to the results file."""

    section: str
    name: str
    measure: Callable[[], dict]
    units: float  # about what a round takes, in E's seconds at 1 x 256 tokens; for the estimate of the whole run
    budget: float


# ---------------------------------------------------------------------------------------------------- runners


class Forward:
    """Plain forwards, one model after another, without gradients, inside of a context that is not timed."""

    def __init__(self, parts: list[nn.Module], ids: torch.Tensor, inside: Callable = nullcontext) -> None:
        self.parts, self.ids, self.inside = parts, ids, inside

    @torch.no_grad()
    def __call__(self) -> float:
        with self.inside():
            return seconds(self._run, self.ids.device.type)

    def _run(self) -> None:
        for part in self.parts:
            part(input_ids=self.ids)


class TrainingStep:
    """Forward, backward and AdamW on whatever of the models requires gradients; `times` multiplies the seconds."""

    def __init__(self, parts: list[nn.Module], ids: torch.Tensor, times: int = 1) -> None:
        self.parts, self.ids, self.times = [part.train() for part in parts], ids, times
        trained = [p for part in parts for p in part.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def __call__(self) -> float:
        return self.times * seconds(self._run, self.ids.device.type)

    def _run(self) -> None:
        for part in self.parts:
            part(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def alone(hub: nn.Module, experts: list[nn.Module]) -> list[nn.Module]:
    """What E runs."""
    return [hub, *(expert.model for expert in experts)]


def lora(case: Case) -> nn.Module:
    return get_peft_model(llama(case), LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))


# ---------------------------------------------------------------------------------------------------- measurements


class Measurements:
    """Rows of a preset; every method that is named like a section yields those of that section."""

    def __init__(self, preset: Preset, case: Case) -> None:
        self.preset, self.case = preset, case

    def _turns(
        self, runners: dict[str, Runner], pairs: list, budget: float | None = None, flops: bool = False
    ) -> dict:
        return take_turns(
            runners,
            pairs,
            budget=self.preset.seconds if budget is None else budget,
            rounds=self.preset.rounds,
            flops=flops and self.preset.flops,
        )

    def _row(
        self, section: str, name: str, measure: Callable[[], dict], units: float, budget: float | None = None
    ) -> Row:
        return Row(section, name, measure, units, self.preset.seconds if budget is None else budget)

    def _dtypes(self) -> Iterator[tuple[str, Case]]:
        """The cases to measure by what is added to the row's name."""
        for dtype in self.preset.stitch_dtypes:
            several = len(self.preset.stitch_dtypes) > 1
            yield f", {dtype} stitches" if several else "", replace(self.case, stitch_dtype=dtype)

    def _prefill(self, case: Case, batch: int, length: int, budget: float | None = None) -> dict:
        model, hub, experts = models(case)
        ids = token_ids(case, batch, length)
        runners = {"stitched": Forward([model], ids), "E": Forward(alone(hub, experts), ids)}
        return self._turns(runners, [("stitched", "E")], budget, flops=True)

    def _decode(self, case: Case, batch: int, prompt: int, budget: float | None = None) -> dict:
        model, hub, experts = models(case)
        ids, tokens = token_ids(case, batch, prompt), self.preset.tokens
        runners = {"stitched": Decoding([model], ids, tokens), "E": Decoding(alone(hub, experts), ids, tokens)}
        return self._turns(runners, [("stitched", "E")], budget)

    def prefill(self) -> Iterator[Row]:
        for more, case in self._dtypes():
            for batch, length in self.preset.prefill:
                name = f"{batch} x {length} tokens{more}"
                yield self._row("prefill", name, partial(self._prefill, case, batch, length), 2 * batch * length / 256)

    def decode(self) -> Iterator[Row]:
        for more, case in self._dtypes():
            for batch in self.preset.decode:
                name = f"{batch} sequence{'s' * (batch > 1)}{more}"
                yield self._row("decode", name, partial(self._decode, case, batch, self.preset.prompt), 2 + batch / 2)

    def training(self) -> Iterator[Row]:
        batch, length = self.preset.training
        for more, case in self._dtypes():
            name = f"{batch} x {length} tokens{more}"
            yield self._row("training", name, partial(self._training, case), 7 * batch * length / 256)
        for size in self.preset.vocabularies:
            name, case = f"{batch} x {length} tokens, vocabulary of {size:,}", replace(self.case, vocabulary=size)
            yield self._row("training", name, partial(self._training, case), 10 * batch * length / 256)

    def _training(self, case: Case) -> dict:
        forget_models()
        ids = token_ids(case, *self.preset.training)
        hub, *experts = llamas(case)
        runners = {p: TrainingStep([stitched(case, copy.deepcopy(hub), experts, p)], ids) for p in PATTERNS}
        runners["E"] = Forward(alone(hub, experts), ids)
        runners["LoRA on the hub"] = TrainingStep([lora(case)], ids)
        count = 1 + case.experts
        full = [llama(case).requires_grad_(True) for _ in range(1 if self.preset.train_one_of_all else count)]
        times = count // len(full)
        runners["full training"] = TrainingStep(full, ids, times=times)
        pairs = [(p, unit) for p in PATTERNS for unit in ("full training", "LoRA on the hub", "E")]
        result = self._turns(runners, pairs, flops=True)
        if "full training" in result.get("flops", {}):
            result["flops"]["full training"] *= times
        return result

    def plain(self) -> Iterator[Row]:
        """The paper's pseudo code as a plain loop, which must give the same logits."""
        batch, length = self.preset.prefill[0]
        yield self._row("plain", f"prefill, {batch} x {length} tokens", self._plain_prefill, 3)
        yield self._row("plain", "decode, 1 sequence", self._plain_decode, 4)
        batch, length = self.preset.training
        yield self._row("plain", f"training step, {batch} x {length} tokens", self._plain_training, 6 * batch)

    def _plain_loop(self) -> tuple[nn.Module, PlainLoop, float]:
        """Both, with the largest difference of their logits in units of the largest logit."""
        model, hub, experts = models(self.case)
        loop = PlainLoop(model, hub, experts)
        ids = token_ids(self.case, *self.preset.prefill[0])
        with torch.no_grad():
            actual, expected = model(input_ids=ids).logits, loop(input_ids=ids).logits
        exact = self.case.dtype == "float32"
        scale = expected.abs().max()
        torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=1e-4 if exact else 5e-2)
        return model, loop, ((actual - expected).abs().max() / scale).item()

    def _plain_prefill(self) -> dict:
        model, loop, difference = self._plain_loop()
        ids = token_ids(self.case, *self.preset.prefill[0])
        runners = {"stitched": Forward([model], ids), "plain loop": Forward([loop], ids)}
        return {"largest_difference": difference, **self._turns(runners, [("stitched", "plain loop")])}

    def _plain_decode(self) -> dict:
        model, loop, difference = self._plain_loop()
        prompt = token_ids(self.case, 1, self.preset.prompt)
        runners = {
            "stitched": Decoding([model], prompt, self.preset.tokens),
            "plain loop": Decoding([loop], prompt, self.preset.tokens),
        }
        result = self._turns(runners, [("stitched", "plain loop")])
        same = torch.equal(runners["stitched"].chosen, runners["plain loop"].chosen)
        return {"largest_difference": difference, "same_tokens": same, **result}

    def _plain_training(self) -> dict:
        model, loop, difference = self._plain_loop()
        ids = token_ids(self.case, *self.preset.training)
        runners = {"stitched": TrainingStep([model], ids), "plain loop": TrainingStep([loop], ids)}
        result = {"largest_difference": difference, **self._turns(runners, [("stitched", "plain loop")])}
        forget_models()  # its stitches have been trained, and it is in training mode
        return result

    def streams(self) -> Iterator[Row]:
        """All models' layers between two stitches at the same time."""
        for batch in sorted({*self.preset.decode, 2}):
            name = f"decode, {batch} sequence{'s' * (batch > 1)}"
            yield self._row("streams", name, partial(self._parallel, batch, None), 3 + batch)
        for batch, length in self.preset.prefill[:1] if self.case.device == "cpu" else ():
            name = f"prefill, {batch} x {length} tokens"
            yield self._row("streams", name, partial(self._parallel, batch, length), 3 * batch * length / 256)

    def _parallel(self, batch: int, length: int | None) -> dict:
        model, hub, experts = models(self.case)
        on_cpu, decodes = self.case.device == "cpu", length is None
        ways = {"threads": (model, model.parallel_streams)} if on_cpu else {}
        if decodes and not (on_cpu and batch > MOST_SEQUENCES):
            own = copy.deepcopy(model)  # its weights move with every run, which the others would feel
            ways["stacked"] = own, partial(own.parallel_streams, 2 if on_cpu else 1, stack=True)
        if decodes:
            run = partial(Decoding, prompt=token_ids(self.case, batch, self.preset.prompt), tokens=self.preset.tokens)
        else:
            run = partial(Forward, ids=token_ids(self.case, batch, length))
        runners = {name: run([its_model], inside=way) for name, (its_model, way) in ways.items()}
        runners |= {"sequential": run([model]), "E": run(alone(hub, experts))}
        return self._turns(runners, [(name, of) for of in ("E", "sequential") for name in ways])

    def dropping(self) -> Iterator[Row]:
        """Decoding with at most k experts, against the hub and k experts that nobody stitches."""
        for kept in range(1 + self.case.experts):
            name = f"decode, 1 sequence, {kept} of {self.case.experts} experts kept"
            yield self._row("dropping", name, partial(self._dropping, kept), 2.5)

    def _dropping(self, kept: int) -> dict:
        model, hub, experts = models(self.case)
        rank_gates(model)
        run = partial(Decoding, prompt=token_ids(self.case, 1, self.preset.prompt), tokens=self.preset.tokens)
        runners = {
            "dropped": run([model], inside=partial(model.drop_experts, kept)),
            "hub + kept experts": run(alone(hub, experts[:kept])),
            "E": run(alone(hub, experts)),
        }
        return self._turns(runners, [("dropped", "hub + kept experts"), ("dropped", "E")])

    def scaling(self) -> Iterator[Row]:
        """One size at a time, around the base case."""
        length, prompt = self.preset.prefill[0][1], self.preset.prompt
        yield from self._scaled("base", self.case, length, prompt, training=True)
        for size, values in self.preset.scaling.items():
            for value in values:
                name = f"{size} = {value}"
                if size == "length":
                    yield from self._scaled(name, self.case, value if value != length else None, value)
                elif size == "width":
                    yield from self._scaled(name, self.case.with_width(value), length, prompt)
                else:
                    case = replace(self.case, **{size: value})
                    yield from self._scaled(name, case, length, prompt, training=True)

    def _scaled(self, name: str, case: Case, length: int | None, prompt: int, training: bool = False) -> Iterator[Row]:
        budget = self.preset.scaling_seconds
        size = (1 + case.experts) / 4 * (case.width / 768) ** 2
        if length is not None:
            measure = partial(self._prefill, case, 1, length, budget)
            yield self._row("scaling", f"{name}, prefill", measure, 2 * size * length / 256, budget)
        if prompt != self.preset.prompt or not name.startswith("length"):
            measure = partial(self._decode, case, 1, prompt, budget)
            yield self._row("scaling", f"{name}, decode", measure, size * (2 + prompt / 128), budget)
        if training:
            measure = partial(self._train_scaled, case, budget)
            yield self._row("scaling", f"{name}, training", measure, 4 * size * length / 256, budget)

    def _train_scaled(self, case: Case, budget: float) -> dict:
        model, hub, experts = models(case)
        ids = token_ids(case, *self.preset.prefill[0])
        runners = {"stitched": TrainingStep([model], ids), "E": Forward(alone(hub, experts), ids)}
        result = self._turns(runners, [("stitched", "E")], budget)
        forget_models()
        return result

    def compiled(self) -> Iterator[Row]:
        """Decoding by compiled steps with a static cache; on a GPU, by CUDA graphs."""
        for more, case in self._dtypes():
            yield self._row("compiled", f"decode, 1 sequence{more}", partial(self._compiled, case), 60)

    def _compiled(self, case: Case) -> dict:
        model, hub, experts = models(case)
        cuda = case.device.startswith("cuda")
        options = {"mode": "reduce-overhead"} if cuda else {"backend": "aot_eager"}
        bandwidth = copy_bandwidth(case.device, size=2**32 if cuda else 2**26)
        run = partial(
            Decoding, prompt=token_ids(case, 1, self.preset.prompt), tokens=self.preset.tokens, compile_options=options
        )
        runners = {"stitched": run([model]), "E": run(alone(hub, experts))}
        for decoding in runners.values():
            decoding()  # compiles
            decoding()  # captures graphs
        result = self._turns(runners, [("stitched", "E")])
        read = {"stitched": weights_read(model), "E": sum(map(weights_read, [hub, *experts]))}
        if cuda:
            torch._dynamo.reset()
        read["E"] -= sum(output_bytes(expert) for expert in experts)
        limits = {name: size / bandwidth for name, size in read.items()}
        share = {name: limits[name] * self.preset.tokens / result["seconds"][name] for name in read}
        return {"bytes_per_second": bandwidth, "bytes_read": read, "share_of_bandwidth": share, **result}


@torch.no_grad()
def rank_gates(model: nn.Module) -> None:
    """Give the experts gates that differ for good: random ones would call back another expert every few tokens."""
    for stitch in model.modules():
        if isinstance(stitch, ExpertsIntoHub):
            for rank, name in enumerate(stitch.experts):
                stitch.gate.of(name).bias.fill_(-2.0 * rank)


def output_bytes(model: nn.Module) -> int:
    weight = model.get_output_embeddings().weight
    return weight.numel() * weight.element_size()


def weights_read(model: nn.Module) -> int:
    """Bytes of weights that a decoding step of one sequence has to read: all but embeddings and experts' lm_heads."""
    inner = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if "embed_tokens" not in name and "lm_head" not in name
    )
    return inner + output_bytes(model)

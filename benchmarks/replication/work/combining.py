"""One set of models combined by every method, as pieces of work.

A method is a trial for each of its learning rates, rated on validation text at 25, 50 and 100% of its steps, and a
test of the trial that did best. Test data is not looked at otherwise.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from peft_bts.stitch import HUB

from ..branching.models import EXPERTS
from ..branching.training import mix, train
from ..measures.answers import chrf, greedy, prompts_of
from ..measures.forgetting import FACTORS, btm_losses
from ..measures.gates import measure_gates
from ..measures.losses import bits_per_byte
from ..measures.oracles import best_per_document, best_per_token
from ..methods.cost import measure_costs
from ..methods.ensembles import Routing
from ..methods.parameters import Method, count_parameters, load_trained, trained_weights
from ..methods.registry import TRAINED, UNTRAINED
from ..methods.streams import stream_of
from ..text.catalogues import LANGUAGES
from ..text.tasks import CROSS
from ..tokens.blocks import LENGTH
from .earlier import rate_of
from .jobs import Job
from .material import PROTOCOLS, SWITCHES, Tests, cross_blocks
from .measuring import by_document, measure, predictor_of
from .presets import CROSS_EXPERTS, FORMS, SHARES, STITCH_MIX, Part
from .sets import Set, save


CHOSEN = "chosen"  # the trial of a method whose learning rate other sets, or an earlier run, have chosen


class Study:
    """A part on one of its sets. Pieces are `<size>/set<number>/<table>/<method>/<trial, or "test">`.

    Args:
        of: The set.
        part: Which methods, and what for.
        tuned: The same part on the sets on which learning rates are tried.
        earlier: Results of an earlier run, whose learning rates are taken (`earlier.py`); may be empty.
    """

    def __init__(self, of: Set, part: Part, tuned: list["Study"], earlier: dict[str, Any]) -> None:
        self.set, self.part, self.preset, self.tuned, self.earlier = of, part, of.preset, tuned, earlier
        self.experts = CROSS_EXPERTS if part.kind == "cross" else EXPERTS
        self.models = of.models(part.lora)
        self.steps = part.steps or (self.preset.cross_steps if part.kind == "cross" else self.preset.steps)

    def name(self, *parts: Any) -> str:
        return self.set.name(self.part.table, *parts)

    # --- Pieces ---

    @property
    def alone(self) -> list[str]:
        """The models that are combined, which are tested by themselves, too."""
        return ["seed", *(f"expert_{name}" for name in self.experts)]

    @property
    def methods(self) -> list[str]:
        return [*self.alone, *self.part.methods]

    def trials(self, method: str) -> list[str]:
        if method not in TRAINED:
            return []
        if self.set.number >= self.preset.tuned_sets or rate_of(self.earlier, self.part, method):
            return [CHOSEN]
        return [f"{rate:g}" for rate in self.preset.rates_of(method)]

    @property
    def is_reported_in_full(self) -> bool:
        """Whether gates and BTM's factors of forgetting are in the report: those of the main models are."""
        return self.part.kind == "main" and self.part.size == self.preset.parts[0].size and not self.part.lora

    @property
    def combined(self) -> list[str]:
        """The pieces that make the models."""
        return [self.set.model_job(name, self.part.lora).name for name in ("seed", *self.experts)]

    def tested(self, method: str) -> list[str]:
        """The trials whose weights a test may take: the best one, where it is known already."""
        trials = self.trials(method)
        if all(self.set.store.has(self.name(method, trial)) for trial in trials):
            trials = [self.best(method)] if trials else []
        return [self.name(method, trial) for trial in trials]

    def jobs(self) -> list[Job]:
        jobs = []
        for method in self.methods:
            trials = self.trials(method)
            for trial in trials:
                reads = [study.name(method, rate) for study in self.tuned for rate in study.trials(method)]
                chosen_here = trial == CHOSEN and not rate_of(self.earlier, self.part, method)
                jobs.append(
                    Job(
                        self.name(method, trial),
                        partial(self.trial, method, trial),
                        needs=[self.set.blocks_job.name, *self.combined],
                        reads=reads if chosen_here else [],
                        keeps=[self.weights(method, trial)],
                    )
                )
            jobs.append(
                Job(
                    self.name(method, "test"),
                    partial(self.test, method),
                    needs=[*self.combined, *self.tested(method)],
                    reads=[self.name(method, trial) for trial in trials],
                    keeps=[self.losses(method)] if self.keeps_losses(method) else [],
                )
            )
        if self.part.kind == "main":
            needs = [self.name(method, "test") for method in self.alone]
            jobs.append(Job(self.name("oracles"), self.oracles, needs))
        if self.is_reported_in_full:
            jobs.append(Job(self.name("forgetting"), self.forgetting, needs))
            for method in FORMS:
                if method in self.part.methods:
                    reads = [self.name(method, trial) for trial in self.trials(method)]
                    needs = [*self.combined, *self.tested(method)]
                    jobs.append(Job(self.name(method, "gates"), partial(self.gates, method), needs, reads))
        return jobs

    def prompt_jobs(self) -> list[Job]:
        """What the tested methods do behind four examples, and what they write as translations: a single expert, into
        its own language alone."""
        works = [(method, "four", partial(self.four_examples, method)) for method in self.methods]
        works += [
            (method, f"answers_{protocol}_{language}", partial(self.answers, method, protocol, language))
            for protocol in PROTOCOLS
            for language in LANGUAGES
            for method in self.methods
            if not method.startswith("expert_") or method == f"expert_{language}"
        ]
        return [
            Job(self.name(method, what), work, [*self.combined, *self.tested(method)], [self.name(method, "test")])
            for method, what, work in works
        ]

    def cost_job(self) -> Job:
        """What the methods cost, on random tokens."""
        return Job(self.name("cost"), self.cost, self.combined)

    # --- Where things are ---

    def weights(self, method: str, trial: str) -> Path:
        return self.set.store.folder / self.name(method, trial) / "weights.pt"

    def losses(self, method: str) -> Path:
        return self.set.store.folder / self.name(method, "losses.pt")

    def keeps_losses(self, method: str) -> bool:
        return method in self.alone and self.part.kind != "cross"

    # --- Work ---

    def build(self, method: str) -> Method:
        torch.manual_seed(self.set.number)
        return (TRAINED | UNTRAINED)[method](self.models, self.experts)

    def chosen(self, method: str) -> Method:
        """The method as its best trial left it."""
        built = self.build(method)
        if method in TRAINED:
            built = load_trained(built, torch.load(self.weights(method, self.best(method))))
        return built

    def shares(self, method: str) -> dict[str, float]:
        """Of what the method is trained on."""
        if self.part.kind == "cross":
            return {cross_blocks(min(self.part.items, self.preset.corpora.cross)): 1.0}
        if method.endswith(f"_{SWITCHES}"):
            return {domain: share / 2 for domain, share in STITCH_MIX.items()} | {SWITCHES: 0.5}
        return STITCH_MIX

    @property
    def rated(self) -> Tests:
        """What learning rates are chosen on."""
        wanted = f"alone/{CROSS}" if self.part.kind == "cross" else "text/"
        return {name: part for name, part in self.set.material.validation.items() if name.startswith(wanted)}

    def validate(self, method: Method) -> dict[str, float]:
        """Bits per byte on validation text, by test, and their average."""
        tests = self.rated
        bits = {
            name: bits_per_byte(losses.nats, tests[name])
            for name, losses in measure(predictor_of(method), tests).items()
        }
        return bits | {"average": float(np.mean(list(bits.values())))}

    def rate(self, method: str, trial: str) -> float:
        if trial != CHOSEN:
            return float(trial)
        return rate_of(self.earlier, self.part, method) or float(self.best_of(method, self.tuned))

    def best(self, method: str) -> str:
        """The trial that this study tests."""
        return self.trials(method)[0] if len(self.trials(method)) == 1 else self.best_of(method, [self])

    @staticmethod
    def best_of(method: str, studies: list["Study"]) -> str:
        """The trial with the fewest bits at its end, on average over studies that tried them all."""

        def bits(trial: str) -> float:
            results = [study.set.store.read(study.name(method, trial)) for study in studies]
            return float(np.mean([result["curve"][f"{SHARES[-1]:g}"]["average"] for result in results]))

        return min(studies[0].trials(method), key=bits)

    def trial(self, method: str, trial: str) -> dict[str, Any]:
        """Train with one learning rate on the blocks that all methods see, in their order; keep what was trained."""
        built, rate = self.build(method), self.rate(method, trial)
        order, curve = 1000 * (self.set.number + 1), {}
        rows = mix(self.set.blocks, self.shares(method), self.steps * self.preset.batch, order).long()
        pauses = {max(1, round(share * self.steps)): f"{share:g}" for share in SHARES}

        def look(step: int) -> None:
            curve[pauses[step]] = self.validate(built)

        torch.manual_seed(order)
        if isinstance(built, Routing):
            result = built.fit(rows, learning_rate=rate, seed=order, epochs=self.preset.length_of_routing)
            look(self.steps)
        else:
            result = train(built, rows, steps=self.steps, learning_rate=rate, desc=self.name(method, trial),
                           pauses=pauses, at_pause=look)  # fmt: skip
        save(trained_weights(built), self.weights(method, trial))
        return {**result, "learning_rate": rate, "curve": curve}

    def test(self, method: str) -> dict[str, Any]:
        tests = self.set.material.test
        if self.part.kind == "cross":
            tests = {f"alone/{CROSS}": tests[f"alone/{CROSS}"]}
        built = self.chosen(method)
        found = measure(predictor_of(built), tests)
        if self.keeps_losses(method):
            save({name: torch.from_numpy(losses.nats) for name, losses in found.items()}, self.losses(method))
        result = {
            "tests": {name: by_document(name, losses, tests[name]) for name, losses in found.items()},
            "parameters": count_parameters(built),
        }
        if method in TRAINED:
            rate = self.set.store.read(self.name(method, self.best(method)))["learning_rate"]
            result["learning_rate"] = rate
        return result

    def oracles(self) -> dict[str, Any]:
        """The best that choices among the models could do, from their losses of every token."""
        kept, tests = [torch.load(self.losses(method)) for method in self.alone], self.set.material.test
        found: dict[str, dict[str, Any]] = {"oracle_document": {}, "oracle_token": {}}
        for name, sequences in tests.items():
            nats = np.stack([losses[name].numpy() for losses in kept])
            choices: dict[str, np.ndarray] = {
                "oracle_document": best_per_document(nats, sequences), "oracle_token": best_per_token(nats)
            }  # fmt: skip
            for oracle, best in choices.items():
                found[oracle][name] = {"nats": [round(float(sum_), 3) for sum_ in sequences.sums(best)]}
        return {"tests": found}

    def forgetting(self) -> dict[str, Any]:
        """BTM by its factor of forgetting: bits per byte on the average of the domains, and on mixed text."""
        kept, found = [torch.load(self.losses(method)) for method in self.alone], {}
        tests = {name: part for name, part in self.set.material.test.items() if name.startswith(("text/", "mixed/"))}
        nats = {name: np.stack([losses[name].numpy() for losses in kept]) for name in tests}
        for factor in FACTORS:
            bits = {name: bits_per_byte(btm_losses(nats[name], part, factor), part) for name, part in tests.items()}
            found[f"{factor:g}"] = {
                on: float(np.mean([bits[name] for name in bits if name.startswith(kind)]))
                for on, kind in {"average": "text/", "mixed": "mixed/"}.items()
            }
        return {"factors": found}

    def gates(self, method: str) -> dict[str, Any]:
        """Whom a form listens to: on validation text of each domain, and where test documents switch domain."""
        material = self.set.material
        text = {name.removeprefix("text/"): part for name, part in material.validation.items() if "text/" in name}
        owners = {"prose": HUB, **{expert: expert for expert in EXPERTS}}
        return measure_gates(self.chosen(method), text, material.test[f"mixed/{SWITCHES}"], owners)

    def four_examples(self, method: str) -> dict[str, Any]:
        tests = self.set.material.prompted
        found = measure(predictor_of(self.chosen(method)), tests)
        return {"tests": {name: by_document(name, losses, tests[name]) for name, losses in found.items()}}

    def answers(self, method: str, protocol: str, language: str) -> dict[str, Any]:
        """chrF of greedy translations, by item."""
        built, tokenizer = self.chosen(method), self.set.material.tokenizer
        sequences = self.set.material.translations[f"{protocol}/{language}"]
        written = greedy(partial(stream_of, built), prompts_of(sequences), tokenizer.eos_token_id,
                         self.name(method, protocol, language), self.set.device)  # fmt: skip
        right = [
            tokenizer.decode(ids[prompt:], skip_special_tokens=True)
            for ids, prompt in zip(sequences.of(sequences.tokens), sequences.prompt)
        ]
        scores = chrf([tokenizer.decode(ids) for ids in tqdm(written, desc="rate", leave=False)], right)
        return {"chrf": [round(float(score), 2) for score in scores]}

    def cost(self) -> dict[str, Any]:
        return measure_costs(
            {name: partial(self.build, name) for name in ("seed", *self.part.methods)}, batch=self.preset.batch,
            length=LENGTH, vocabulary=len(self.set.material.tokenizer),
        )  # fmt: skip

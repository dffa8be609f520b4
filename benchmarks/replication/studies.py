"""Which pieces of work the study is made of, for one set: its seed, its experts, and all that is done with them."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .cost import measure_costs
from .data import Data, make_data
from .ensembles import Routing
from .evaluation import predictor, rate_all, rate_domains, rate_task
from .gates import measure_gates
from .jobs import Job, Store
from .methods import (
    CROSS_TRAINED,
    DIRECT,
    LONG,
    TRAINED,
    UNTRAINED,
    Method,
    Models,
    count_parameters,
    load_trained,
    trained_weights,
)
from .presets import BRANCH_MIX, EXPERTS, FOURTH, STITCH_MIX, Preset
from .training import mix, train


CROSS_EXPERTS = ["lang", "math"]
REPEATS = [1, 2]  # the paper's form once more, with the data in another order: how much chance there is in a training


@dataclass
class Study:
    """Models to combine, data to train the combination on, and how it is rated."""

    name: str
    experts: list[str]
    shares: dict[str, float]
    steps: int
    trained: dict[str, Any]
    task: str = ""  # rated on this task alone; else on all domains

    def validate(self, predict, data: Data) -> dict:
        rows = data.rows["validation"]
        return rate_task(predict, rows, self.task) if self.task else rate_domains(predict, rows)

    def test(self, predict, data: Data) -> dict:
        rows = data.rows["test"]
        return rate_task(predict, rows, self.task) if self.task else rate_all(predict, rows)


class Set:
    """One independent repetition of everything: its pieces are `set<number>/...`."""

    def __init__(self, preset: Preset, number: int, store: Store, device: str) -> None:
        self.preset, self.number, self.store, self.device = preset, number, store, device
        self.main = Study("main", EXPERTS, STITCH_MIX, preset.steps, TRAINED)
        short, long = preset.cross_steps, preset.long_factor * preset.cross_steps

        def cross(name: str, task: str, steps: int, methods: Iterable[str]) -> Study:
            return Study(name, CROSS_EXPERTS, {task: 1.0}, steps, {m: CROSS_TRAINED[m] for m in methods}, task)

        self.cross = cross("cross_steps", "cross_steps", short, CROSS_TRAINED)
        self.direct = cross("cross_direct", "cross_direct", short, DIRECT)
        self.long = cross("cross_direct_long", "cross_direct", long, LONG)

    def name(self, *parts: Any) -> str:
        return "/".join([f"set{self.number}", *map(str, parts)])

    @cached_property
    def data(self) -> Data:
        return torch.load(self.store.place(self.name("data")) / "data.pt", weights_only=False)  # our own file

    @cached_property
    def models(self) -> Models:
        return Models({name: self.store.place(self.name("model", name)) for name in self.preset.branch}, self.device)

    def jobs(self) -> list[Job]:
        """All pieces, those that others need first."""
        jobs = [Job(self.name("data"), self.make_data), Job(self.name("model", "seed"), partial(self.branch, "seed"),
                                                            [self.name("data")])]  # fmt: skip
        jobs += [
            Job(self.name("model", name), partial(self.branch, name), [self.name("model", "seed")])
            for name in [*EXPERTS, FOURTH]
        ]
        jobs += self.study_jobs(self.main)
        needs = [self.name("main", "bts", "test")]
        jobs += [Job(self.name("repeat", i), partial(self.repeat, i), needs) for i in REPEATS]
        jobs += [Job(self.name("removal", name), partial(self.remove, name), needs) for name in EXPERTS]
        for study in (self.cross, self.direct):
            jobs += self.study_jobs(study)
        models = [self.name("model", name) for name in ["seed", *EXPERTS]]
        if self.number == 0:  # pictures and costs are of the first set
            jobs.append(Job(self.name("gates"), self.gates, needs))
            jobs.append(Job(self.name("cost"), self.cost, models))
        jobs += [
            Job(self.name("addition", init), partial(self.add, init), [*needs, self.name("model", FOURTH)])
            for init in ("zero", "hub", "closed")
        ]
        jobs += self.study_jobs(self.long)
        return jobs

    def study_jobs(self, study: Study) -> list[Job]:
        models = [self.name("model", name) for name in ["seed", *study.experts]]
        jobs = []
        if study in (self.main, self.cross):
            for name in ["seed", *(f"expert_{expert}" for expert in study.experts), *UNTRAINED]:
                jobs.append(Job(self.name(study.name, name, "test"), partial(self.untrained, study, name), models))
        for name in study.trained:
            trials = [self.name(study.name, name, rate) for rate in self.preset.learning_rates]
            for trial, rate in zip(trials, self.preset.learning_rates):
                jobs.append(Job(trial, partial(self.trial, study, name, rate), models))
            jobs.append(Job(self.name(study.name, name, "test"), partial(self.test, study, name), trials))
        return jobs

    # ---------------------------------------------------------------- branch

    def make_data(self) -> dict:
        data = make_data(self.preset, self.number)
        torch.save(data, self.store.place(self.name("data")) / "data.pt")
        return {"blocks": {domain: len(blocks) for domain, blocks in data.train.items()}}

    def branch(self, name: str) -> dict:
        """Train the seed from nothing, or an expert from the seed."""
        steps, learning_rate = self.preset.branch[name]
        rows = mix(self.data.train, BRANCH_MIX[name], steps * self.preset.batch, seed=self.number)
        torch.manual_seed(self.number)
        model = self.new_model().to(self.device) if name == "seed" else self.models.load("seed").requires_grad_(True)
        result = train(model, rows, steps=steps, learning_rate=learning_rate, desc=name)
        model.save_pretrained(self.models.folders[name])
        self.data.tokenizer.save_pretrained(self.models.folders[name])
        return {**result, "parameters": model.num_parameters()}

    def new_model(self) -> LlamaForCausalLM:
        end = self.data.tokenizer.eos_token_id
        config = LlamaConfig(
            vocab_size=len(self.data.tokenizer), max_position_embeddings=2 * self.preset.length,
            tie_word_embeddings=True, bos_token_id=end, eos_token_id=end, pad_token_id=end, **self.preset.llama,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    # ---------------------------------------------------------------- train and compare

    def build(self, study: Study, name: str) -> Method:
        torch.manual_seed(self.number)
        if name in UNTRAINED:
            return UNTRAINED[name](self.models, study.experts)
        if name in study.trained:
            return study.trained[name](self.models, study.experts)
        return self.models.load(name.removeprefix("expert_"))

    def untrained(self, study: Study, name: str) -> dict:
        method = self.build(study, name)
        return {**study.test(as_predictor(method), self.data), "parameters": count_parameters(method)}

    def fit(self, study: Study, method: Method, learning_rate: float, desc: str, order: int = 0) -> dict:
        """Train on the study's blocks: the same blocks in the same order for every method."""
        seed = 1000 * (self.number + 1) + order
        rows = mix(self.data.train, study.shares, study.steps * self.preset.batch, seed)
        torch.manual_seed(seed)
        if isinstance(method, Routing):
            return method.fit(rows, learning_rate=learning_rate, seed=seed)
        return train(method, rows, steps=study.steps, learning_rate=learning_rate, desc=desc)

    def trial(self, study: Study, name: str, learning_rate: float) -> dict:
        """Train with one learning rate, rate on validation data, keep what was trained."""
        method, place = self.build(study, name), self.name(study.name, name, learning_rate)
        result = self.fit(study, method, learning_rate, place)
        torch.save(trained_weights(method), self.store.place(place) / "weights.pt")
        return {**result, "validation": study.validate(as_predictor(method), self.data)}

    def best_rate(self, study: Study, name: str) -> float:
        def validation(rate: float) -> tuple[float, float]:
            result = self.store.read(self.name(study.name, name, rate))["validation"]
            losses = [domain["loss"] for domain in result.get("domains", {"": result}).values()]
            return result["average"], -sum(losses)  # the loss decides between equal averages

        return max(self.preset.learning_rates, key=validation)

    def chosen(self, study: Study, name: str) -> Method:
        """The method as its best learning rate left it."""
        place = self.store.place(self.name(study.name, name, self.best_rate(study, name)))
        return load_trained(self.build(study, name), torch.load(place / "weights.pt"))

    def test(self, study: Study, name: str) -> dict:
        """Rate, on test data, the trial that did best on validation data. Test data is not looked at otherwise."""
        rate, rates = self.best_rate(study, name), self.preset.learning_rates
        trials = {r: self.store.read(self.name(study.name, name, r)) for r in rates}
        method = self.chosen(study, name)
        return {
            **study.test(as_predictor(method), self.data),
            "parameters": count_parameters(method),
            "learning_rate": rate,
            "validation": {str(r): trial["validation"]["average"] for r, trial in trials.items()},
        }

    def repeat(self, order: int) -> dict:
        method = self.build(self.main, "bts")
        self.fit(self.main, method, self.best_rate(self.main, "bts"), f"repeat {order}", order)
        return rate_domains(as_predictor(method), self.data.rows["test"])

    # ---------------------------------------------------------------- take apart and extend

    def remove(self, expert: str) -> dict:
        """Detach one expert of the trained model; nothing is trained afterwards."""
        model = self.chosen(self.main, "bts")
        model.detach_expert(expert)
        return rate_domains(predictor(model), self.data.rows["test"])

    def add(self, init: str) -> dict:
        """Attach a fourth expert to the trained model, and go on training its stitches with all five domains."""
        model = self.chosen(self.main, "bts")
        model.attach_expert(FOURTH, str(self.models.folders[FOURTH]), init=init)
        rated = {}

        def rate(step: int) -> None:
            rated[step] = rate_domains(predictor(model), self.data.rows["test"], ["math", "lang", FOURTH])

        rate(0)
        shares, steps = dict.fromkeys([*BRANCH_MIX["seed"], FOURTH], 0.2), max(self.preset.addition_steps)
        rows = mix(self.data.train, shares, steps * self.preset.batch, seed=self.number)
        train(model, rows, steps=steps, learning_rate=self.best_rate(self.main, "bts"), constant=True,
              desc=f"add, {init}", pauses=self.preset.addition_steps, at_pause=rate)  # fmt: skip
        return {"steps": rated}

    def gates(self) -> dict:
        return measure_gates(self.chosen(self.main, "bts"), self.data)

    def cost(self) -> dict:
        return measure_costs(
            {name: partial(self.build, self.main, name) for name in ["seed", "soup", "btm", *TRAINED]},
            batch=self.preset.batch, length=self.preset.length, vocabulary=len(self.data.tokenizer),
        )  # fmt: skip


def as_predictor(method: Method):
    return predictor(method) if isinstance(method, torch.nn.Module) else method


def folder_of(cache: Path, preset: Preset, device: str) -> Path:
    return cache / f"{device}-{preset.key}"

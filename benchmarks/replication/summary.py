"""From the pieces of all sets to one results file: means, spreads, and everything that the report states."""

import platform
from collections.abc import Iterable
from functools import reduce
from operator import getitem
from statistics import mean, stdev
from typing import Any

from ..reporting import commit, environment
from .claims import compare, judge
from .data import CROSS, DOMAINS
from .methods import TRAINED, UNTRAINED
from .presets import EXPERTS, FOURTH
from .studies import REPEATS, Set, Study


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean and standard deviation over independent sets; `sd` is `None` for a single set."""
    values = list(values)
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "n": len(values), "values": values}


def read_all(sets: list[Set], name: str) -> list[dict[str, Any]]:
    """A piece's result in every set."""
    return [one.store.read(one.name(name)) for one in sets]


def over_sets(sets: list[Set], name: str, *keys: str) -> dict[str, Any]:
    """The figure that `keys` lead to in a piece's results."""
    return spread(reduce(getitem, keys, result) for result in read_all(sets, name))


def done(sets: list[Set], name: str) -> bool:
    return all(one.store.has(one.name(name)) for one in sets)


def summarize(sets: list[Set], preset_name: str) -> dict[str, Any]:
    """Everything that was found out, ready for JSON. What is not finished is left out.

    Raises:
        ValueError: If no set has come as far as the paper's form of BTS.
    """
    sets = [one for one in sets if done([one], "main/bts/test")]
    if not sets:
        raise ValueError("there is nothing to report yet: the paper's form of BTS is not trained and tested")
    first = sets[0]

    def finished(names: Iterable[str], place: str = "{}") -> list[str]:
        return [name for name in names if done(sets, place.format(name))]

    def one_of_first(name: str) -> dict[str, Any]:
        return first.store.read(first.name(name)) if done([first], name) else {}

    results = {
        "preset": preset_name,
        "sets": len(sets),
        **origin(sets),
        "trained": trainings(sets),
        "methods": {
            name: main_method(sets, name)
            for name in finished([*untrained_names(first.main), *TRAINED], "main/{}/test")
        },
        "repeats": repeats(sets),
        "cross": {
            study.name: cross(sets, study.name, finished(names, f"{study.name}/{{}}/test"))
            for study, names in (
                (first.cross, [*untrained_names(first.cross), *first.cross.trained]),
                (first.direct, first.direct.trained),
                (first.long, first.long.trained),
            )
        },
        "cross_long_factor": first.preset.long_factor,
        "removal": {name: rated(sets, f"removal/{name}") for name in finished(EXPERTS, "removal/{}")},
        "addition": {init: addition(sets, init) for init in finished(("zero", "hub", "closed"), "addition/{}")},
        "cost": one_of_first("cost"),
        "gates": one_of_first("gates"),
    }
    results["claims"], results["to_bts"] = judge(results), compare(results)
    return results


def untrained_names(study: Study) -> list[str]:
    return ["seed", *(f"expert_{name}" for name in study.experts), *UNTRAINED]


def origin(sets: list[Set]) -> dict[str, Any]:
    """The machine, the versions and the commit; how much is done, and how long it took; the settings."""
    one = sets[0]
    pieces = [(one, job.name) for one in sets for job in one.jobs()]
    finished = [one.store.read(name) for one, name in pieces if one.store.has(name)]
    return {
        **environment(one.device),
        "python": platform.python_version(),
        "commit": commit(),
        "pieces": {"done": len(finished), "all": len(pieces)},
        "core_minutes": sum(result["cpu_seconds"] for result in finished) / 60,
        "settings": {
            "seed_parameters": one.store.read(one.name("model", "seed"))["parameters"],
            "batch": one.preset.batch, "length": one.preset.length, "steps": one.preset.steps,
            "cross_steps": one.preset.cross_steps, "cross_items": one.preset.cross_items,
            "learning_rates": list(one.preset.learning_rates), "mix": one.main.shares,
            "branch": one.preset.branch, "layers": one.preset.llama["num_hidden_layers"],
        },
    }  # fmt: skip


def trainings(sets: list[Set]) -> dict[str, Any]:
    return {name: {key: over_sets(sets, f"model/{name}", key) for key in ("loss", "seconds")}
            for name in ["seed", *EXPERTS, FOURTH]}  # fmt: skip


def rated(sets: list[Set], name: str) -> dict[str, Any]:
    """Average and domains of one rated thing; `se` is the mean standard error from the choice of test data."""
    return {
        "average": over_sets(sets, name, "average"),
        "se": over_sets(sets, name, "se")["mean"],
        "domains": {
            domain: {
                "score": over_sets(sets, name, "domains", domain, "score"),
                "loss": over_sets(sets, name, "domains", domain, "loss"),
                "se": over_sets(sets, name, "domains", domain, "se")["mean"],
            }
            for domain in DOMAINS
        },
    }


def chosen_rates(sets: list[Set], name: str) -> list[float]:
    return [result["learning_rate"] for result in read_all(sets, name) if "learning_rate" in result]


def main_method(sets: list[Set], name: str) -> dict[str, Any]:
    place = f"main/{name}/test"
    result = rated(sets, place)
    parameters = sets[0].store.read(sets[0].name("main", name, "test"))["parameters"]
    result |= {f"{kind}_parameters": count for kind, count in parameters.items()}
    result["switching_bits"] = over_sets(sets, place, "switching", "bits_per_token")
    result["three"] = {key: over_sets(sets, place, "three", key) for key in ("exact", "code")}
    result["three"]["se"] = over_sets(sets, place, "three", "se")["mean"]
    result["cross_untrained"] = {
        kind: {
            "exact": over_sets(sets, place, "cross_untrained", kind, "exact"),
            "se": over_sets(sets, place, "cross_untrained", kind, "exact_se")["mean"],
        }
        for kind in CROSS
    }
    result["learning_rates"] = chosen_rates(sets, place)
    return result


def repeats(sets: list[Set]) -> dict[str, Any]:
    """The paper's form trained again with its data in other orders: the spread that one training has by chance."""
    names = ["main/bts/test", *(f"repeat/{i}" for i in REPEATS)]
    if not all(done(sets, name) for name in names):
        return {"sd": 0.0, "domains": {}, "trainings": 1}

    def sd(*keys: str) -> float:
        trainings = zip(*(over_sets(sets, name, *keys)["values"] for name in names))
        return mean(map(stdev, trainings))

    domains = {domain: sd("domains", domain, "score") for domain in DOMAINS}
    return {"sd": sd("average"), "domains": domains, "trainings": len(names)}


def cross(sets: list[Set], study: str, names: list[str]) -> dict[str, Any]:
    rows = {}
    for name in names:
        place = f"{study}/{name}/test"
        rows[name] = {
            "average": over_sets(sets, place, "average"),
            "se": over_sets(sets, place, "se")["mean"],
            "learning_rates": chosen_rates(sets, place),
            "trained_parameters": sets[0].store.read(sets[0].name(study, name, "test"))["parameters"]["trained"],
        }
    return rows


def addition(sets: list[Set], init: str) -> dict[str, Any]:
    """By step: the new domain, and the mean of the old ones."""
    runs = [run["steps"] for run in read_all(sets, f"addition/{init}")]
    return {
        step: {
            "new": spread(run[step]["domains"][FOURTH]["score"] for run in runs),
            "old": spread(mean(run[step]["domains"][domain]["score"] for domain in DOMAINS) for run in runs),
        }
        for step in runs[0]
    }

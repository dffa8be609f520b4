"""From the pieces of all sets to one results file: figures with their spreads, paired differences, verdicts."""

import platform
from collections.abc import Iterable
from statistics import mean, stdev
from typing import Any

import numpy as np

from ...reporting import commit, environment
from ..branching.models import EXPERTS
from ..methods.registry import ORACLES, TRAINED
from ..text.tasks import CROSS, TASKS
from ..work.earlier import rate_of
from ..work.jobs import pending
from ..work.material import PROTOCOLS
from ..work.plan import Plan
from ..work.presets import FORMS, SHARES, Part
from .claims import claims, other_claims
from .merging import merged
from .paired import gap_rows, paired_rows
from .tables import EXACT, MIXED_TEXT, ON, TEXT, Table
from .targets import targets


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean and standard deviation over independent sets; `sd` is `None` for a single set."""
    values = list(values)
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "n": len(values), "values": values}


def summarize(plan: Plan, preset_name: str) -> dict[str, Any]:
    """Everything that was found out, here and by an earlier run, ready for JSON. What is not finished is left out.

    Raises:
        SystemExit: If no method of the first part has been tested on any set, here or by an earlier run.
    """
    tables = {key: Table(plan, part) for key, part in plan.tables().items()}
    size = plan.preset.parts[0].size
    main = tables[size, "main"]
    if not plan.store.has("tests") or not (main.methods or plan.earlier):
        raise SystemExit("There is nothing to report yet: no method has been tested.")
    cross = cross_tables([table for (of, _), table in tables.items() if of == size and table.part.kind == "cross"])
    results = {
        "preset": preset_name,
        "sets": len(main.sets("seed")),
        **origin(plan),
        "methods": {name: method_row(main, name) for name in main.methods},
        "cross": {
            table.part.results_key: {name: cross_method(table, name) for name in table.methods}
            for table in cross.values()
        },
        "lora": of_table(tables.get((size, "main_lora"))),
        "sizes": {of: of_table(table) for (of, name), table in tables.items() if name == "main"},
        "cost": read(plan, main.studies[0].name("cost")),
        "prompts": prompts(main),
        "forgetting": forgetting(main),
        "gates": gates(main),
    }
    results["paired"] = paired_rows(main, cross)
    kinds = {
        "experts as LoRAs" if table.part.lora else table.part.size: table
        for table in tables.values()
        if table.part.kind != "cross" and table.methods
    }
    results["gaps"] = {what: gap_rows(table) for what, table in kinds.items()}
    results["trained_of"] = {what: trainings(plan, table) for what, table in kinds.items()}
    of_cross = [cross[on] for on in ("cross_long", "cross") if on in cross]
    results["claims"] = claims(main, of_cross) + other_claims(results)
    results["targets"] = targets(results)
    return merged(results, plan.earlier) if plan.earlier else results


def cross_tables(tables: list[Table]) -> dict[str, Table]:
    """The tables of the cross task that have results: for the usual steps, for more of them, and with fewer items."""
    most, found = max((table.part.items for table in tables), default=0), {}
    for table in tables:
        if table.methods:
            few = table.part.items < most
            found["cross_few" if few else "cross_long" if table.part.steps else "cross"] = table
    return found


def read(plan: Plan, name: str) -> dict[str, Any]:
    return plan.store.read(name) if plan.store.has(name) else {}


def origin(plan: Plan) -> dict[str, Any]:
    """The machine, the versions and the commit; how much is done, and how long it took; the settings."""
    jobs, preset = plan.jobs(), plan.preset
    finished = [plan.store.read(job.name) for job in jobs if plan.store.has(job.name)]
    return {
        **environment(plan.device),
        "python": platform.python_version(),
        "commit": commit(),
        "pieces": {
            "done": len(jobs) - len(pending(jobs, plan.store)), "all": len(jobs),
            "parts": {part.name: done_of(plan, part) for part in preset.parts},
        },
        "commits": sorted({result["commit"] for result in finished}),  # that the pieces were made by
        "core_minutes": sum(result["cpu_seconds"] for result in finished) / 60,
        "settings": {**preset.settings, "parts": {part.name: part.sets for part in preset.parts}},
    }  # fmt: skip


def done_of(plan: Plan, part: Part) -> tuple[int, int]:
    """How many pieces of a part are done, and how many there are."""
    jobs = plan.jobs_of(part)
    return sum(plan.store.has(job.name) for job in jobs), len(jobs)


def trainings(plan: Plan, table: Table) -> dict[str, Any]:
    """Of every expert: its bits per byte over its seed's, how often it was trained, and how many have learned."""
    found = {}
    for name in EXPERTS:
        jobs = [study.set.model_job(name, table.part.lora).name for study in table.studies]
        results = [plan.store.read(job) for job in jobs if plan.store.has(job)]
        if results:
            found[name] = {
                "to_seed": spread(result["tries"][-1] / result["seed"] for result in results),
                "trainings": [len(result["tries"]) for result in results],
                "learned": sum(result["learned"] for result in results),
            }
    return found


def of_table(table: Table | None) -> dict[str, Any]:
    return {name: method_row(table, name) for name in table.methods} if table else {}


def method_row(table: Table, name: str) -> dict[str, Any]:
    """Bits per byte and scores of one method; oracles have no scores."""
    row: dict[str, Any] = {
        "bits_per_byte": {
            on: spread(table.values(name, ON[on], "bits_per_byte")) for on in ("average", "mixed")
        },
        "domains": {
            test.partition("/")[2]: {"bits_per_byte": spread(table.values(name, [test], "bits_per_byte"))}
            for test in TEXT
        },
        "mixed": {
            test.partition("/")[2]: {"bits_per_byte": spread(table.values(name, [test], "bits_per_byte"))}
            for test in MIXED_TEXT
        },
    }  # fmt: skip
    if name in ORACLES:
        return row
    row["average"] = spread(table.values(name, EXACT, "exact"))
    row["tasks"] = {task: {"alone": spread(table.values(name, [f"alone/{task}"], "exact"))}
                    for task in (*TASKS, CROSS) if f"alone/{task}" in table.sizes}  # fmt: skip
    piece = next(piece for study in table.studies if (piece := table.piece(study, name)))
    row |= {f"{kind}_parameters": count for kind, count in piece["parameters"].items()}
    if name in TRAINED:
        row |= training(table, name)
    return row


def training(table: Table, name: str) -> dict[str, Any]:
    """Learning rates taken, whether they are at the `edge` of those that were tried, whether by an earlier run
    (`rate_of_earlier_run`), and the learning curve."""
    pieces = [table.piece(table.studies[number], name) for number in table.sets(name)]
    rates = [piece["learning_rate"] for piece in pieces if piece]
    tried = table.plan.preset.rates_of(name)
    edge = len(tried) > 1 and any(rate in (tried[0], tried[-1]) for rate in rates)
    row = {"learning_rates": rates, "edge": edge, "curve": curve(table, name)}
    given = rate_of(table.plan.earlier, table.part, name) is not None
    return row | ({"rate_of_earlier_run": True} if given else {})


def prompts(table: Table) -> dict[str, Any]:
    """By method and task: right answers in percent, and chrF of translations, "alone" and behind "four" examples, on
    the sets that were asked both ways."""
    found: dict[str, Any] = {}
    for name in table.methods:
        if sets := table.sets(name, "four"):
            found[name] = {task: asked_both_ways(table, name, task, sets) for task in (*TASKS, CROSS)}
    return found


def asked_both_ways(table: Table, name: str, task: str, sets: list[int]) -> dict[str, Any]:
    row: dict[str, Any] = {"four": spread(table.values(name, [f"four/{task}"], "exact", "four"))}
    if f"alone/{task}" in table.sizes:
        row["alone"] = spread(table.values(name, [f"alone/{task}"], "exact", sets=sets))
    for protocol in PROTOCOLS:
        written = f"answers_{protocol}_{task}"
        if done := table.sets(name, written):
            pieces = [table.piece(table.studies[number], name, written) for number in done]
            row.setdefault("chrf", {})[protocol] = spread(mean(piece["chrf"]) for piece in pieces if piece)
    return row


def curve(table: Table, name: str) -> dict[str, Any]:
    """Bits per byte on validation text by share of the steps, of the trial that was tested."""
    found: dict[str, list[float]] = {}
    for number in table.sets(name):
        study = table.studies[number]
        result = table.plan.store.read(study.name(name, study.best(name)))["curve"]
        for share in (f"{share:g}" for share in SHARES):
            if share in result:
                found.setdefault(share, []).append(result[share]["average"])
    return {share: spread(values) for share, values in found.items()}


def cross_method(table: Table, name: str) -> dict[str, Any]:
    test = f"alone/{CROSS}"
    piece = next(piece for study in table.studies if (piece := table.piece(study, name)))
    row = {
        "average": spread(table.values(name, [test], "exact")),
        "bits_per_byte": spread(table.values(name, [test], "bits_per_byte")),
        "trained_parameters": piece["parameters"]["trained"],
    }
    return row | (training(table, name) if name in TRAINED else {})


def forgetting(table: Table) -> dict[str, Any]:
    """BTM's bits per byte by its factor of forgetting, averaged over sets."""
    names = [study.name("forgetting") for study in table.studies if study.set.number in table.whole]
    pieces = [table.plan.store.read(name)["factors"] for name in names if table.plan.store.has(name)]
    return {
        factor: {on: spread(piece[factor][on] for piece in pieces) for on in bits}
        for factor, bits in (pieces[0].items() if pieces else ())
    }


def gates(table: Table) -> dict[str, Any]:
    """By form: mean gates by domain, and around changes of domain (`measures/gates.py`), averaged over sets."""
    found = {}
    for method in FORMS:
        each = [piece for number in table.sets(method, "gates")
                if (piece := table.piece(table.studies[number], method, "gates"))]  # fmt: skip
        if each:
            first = each[0]
            found[method] = {
                "sets": len(each), "models": first["models"],
                "mean": {domain: {model: mean(one["mean"][domain][model] for one in each) for model in row}
                         for domain, row in first["mean"].items()},
                "turn": {"tokens": first["turn"]["tokens"],
                         **{key: np.mean([one["turn"][key] for one in each], axis=0).tolist()
                            for key in ("old", "new")}},
                "changes": sum(one["changes"] for one in each),
            }  # fmt: skip
    return found

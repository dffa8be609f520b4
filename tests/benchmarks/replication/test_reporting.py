"""What follows from the figures: which of two is better, whether targets are met, where a simple way wins."""

import pytest

from benchmarks.replication.measures.bootstrap import Interval
from benchmarks.replication.methods.registry import form_of
from benchmarks.replication.reporting import targets
from benchmarks.replication.reporting.advice import cross_advice, simple_wins
from benchmarks.replication.reporting.cells import everywhere, variants_table
from benchmarks.replication.reporting.merging import merged
from benchmarks.replication.reporting.paired import better
from benchmarks.replication.reporting.predictions import predictions
from benchmarks.replication.work.earlier import rate_of
from benchmarks.replication.work.presets import Part


@pytest.mark.parametrize("figure, low, high, expected", [
    ("bits_per_byte", -0.2, -0.1, 1), ("bits_per_byte", 0.1, 0.2, -1), ("bits_per_byte", -0.1, 0.1, 0),
    ("exact", 1, 2, 1), ("exact", -2, -1, -1), ("exact", -1, 1, 0),
])  # fmt: skip
def test_fewer_bits_and_more_right_answers_are_better(figure, low, high, expected):
    assert better(Interval((low + high) / 2, low, high), figure) == expected


def results_with(*rows):
    methods = {
        name: {"bits_per_byte": {on: {"mean": bits, "n": 2} for on in ("average", "mixed")},
               "trained_parameters": count, "curve": {"0.5": {"mean": half}, "1": {"mean": bits}}}
        for name, bits, half, count in (("bts", 2.0, 2.2, 100), ("outputs", 1.9, 1.95, 10), ("btm", 2.1, 2.1, 0))
    }  # fmt: skip
    keys = ("ours", "baseline", "on", "figure", "difference", "low", "high", "sets")
    return {"methods": methods, "paired": [dict(zip(keys, row)) for row in rows]}


def test_targets_are_met_or_not_by_intervals():
    beaten = ("outputs", "btm", "average", "bits_per_byte", -0.2, -0.3, -0.1)
    unclear = ("outputs", "dense", "average", "bits_per_byte", -0.2, -0.5, 0.1)
    among_ours = ("outputs", "bts", "average", "bits_per_byte", -0.1, -0.3, 0.1)
    target = targets.best_everywhere(results_with(beaten, among_ours), "average", "")
    assert (target["met"], target["by"]) == (True, "outputs")
    target = targets.best_everywhere(results_with(beaten, unclear), "average", "")
    assert (target["met"], target["not_beaten"]) == (False, ["dense"])
    effort = targets.half_the_effort(results_with())
    assert (effort["met"], effort["by"]) == (True, "outputs")
    fewer_sets = results_with()
    fewer_sets["methods"]["outputs"]["bits_per_byte"]["average"]["n"] = 1  # a mean of other models
    assert targets.half_the_effort(fewer_sets)["met"] is None
    assert targets.best_everywhere(fewer_sets, "average", "")["by"] == "bts"
    another_run = results_with()
    another_run["methods"]["outputs"]["run"] = 1
    assert targets.half_the_effort(another_run)["met"] is None
    right = ("bts", "dense", "cross", "exact", 5.0, 2.0, 8.0)
    assert targets.beats_dense(results_with(right), "cross", "exact")["by"] == "bts"
    assert targets.beats_dense(results_with((*right[:4], 5.0, -2.0, 8.0)), "cross", "exact")["met"] is False
    assert targets.beats_dense(results_with(right), "cross", "bits_per_byte")["met"] is None
    assert targets.beats_dense(results_with(right), "cross_long", "exact")["met"] is None
    fewer = ("outputs", "dense", "cross", "bits_per_byte", -0.2, -0.3, -0.1)
    assert targets.beats_dense(results_with(right, fewer), "cross", "bits_per_byte")["by"] == "outputs"
    assert targets.beats_dense(results_with(), "cross", "exact")["met"] is None
    assert len(targets.targets(results_with(right))) == 5
    later = targets.targets(results_with(right, ("bts", "dense", "cross_long", "exact", 9.0, 8.0, 10.0)))
    assert [target["met"] for target in later if "with more steps" in target["text"]] == [None, True]


def test_the_page_says_what_to_use_for_tasks_of_two_experts():
    rows = {
        name: {"bits_per_byte": {"mean": bits, "n": sets}, "average": {"mean": right}, "trained_parameters": 10}
        for name, bits, right, sets in (
            ("bts", 1.2, 4.0, 5),
            ("bts_outputs", 1.1, 5.0, 5),
            ("bts_k1", 1.0, 6.0, 1),  # the mean of other models
            ("dense", 1.6, 1.0, 5),
            ("seed", 3.0, 0.0, 5),
        )
    }
    found = results_with(
        ("bts_outputs", "dense", "cross", "bits_per_byte", -0.5, -0.6, -0.4, 1),
        ("bts_outputs", "dense", "cross_long", "bits_per_byte", 0.5, 0.4, 0.6, 1),
    )
    found["settings"] = {"cross_steps": 250}
    found["cross"] = {"200": rows, "2000": rows, "2000 for 1000 steps": rows}
    usual, many = cross_advice(found)  # from 200 items there are no differences
    assert "2,000 training items, 250 steps)" in usual
    assert "use **BTS with output gates**. Bits per byte: 1.100 with BTS with output gates (5.0% right, " in usual
    assert "; 1.600 with seed, all weights trained (1.0% right, " in usual
    assert "-0.500 (-0.600 to -0.400), 1 set." in usual
    assert "2,000 training items, 1000 steps" in many and "fewer steps" not in usual
    rows["dense"]["curve"] = {"0.25": {"mean": 1.7}, "0.5": {"mean": 1.4}, "1": {"mean": 1.5}}
    assert "(1.400 on validation items after 50% of the steps, 1.500 in the end)" in cross_advice(found)[0]
    assert "a simple way wins: use **seed, all weights trained**" in many
    assert cross_advice({**found, "cross": {}}) == []


@pytest.mark.parametrize(
    "name, form",
    [
        ("bts_k1", "bts"),
        ("bts_outputs_k1", "bts_outputs"),
        ("outputs_switches", "outputs"),
        ("btx_soft", "bts_outputs"),
    ],
)
def test_variants_are_held_against_their_form(name, form):
    assert form_of(name) == form


def test_the_page_says_where_a_simple_way_wins():
    found = results_with(
        ("outputs", "btm", "average", "bits_per_byte", 0.2, 0.1, 0.3),
        ("bts", "btm", "average", "bits_per_byte", 0.2, 0.1, 0.3),
        ("bts", "dense", "cross", "exact", -9.0, -12.0, -6.0),
        ("bts", "btm", "mixed", "bits_per_byte", 0.1, -0.1, 0.3),
    )
    assert simple_wins(found) == (
        "- Where a form of ours is beaten by another method:\n"
        "  - the average of the domains, bits per byte: BTM beats *output gates alone* and *BTS, the paper's form*\n"
        "  - the cross task, right answers: seed, all weights trained beats *BTS, the paper's form*"
    )
    assert "Nowhere" in simple_wins(results_with())


def run_of(sets, bits, commit, asked=None):
    """Results as small as they may be: one method, one difference."""
    spread = {"mean": bits, "n": sets}
    row = {"bits_per_byte": {"average": spread, "mixed": spread}, "tasks": {"sums": {"alone": spread}},
           "trained_parameters": 1, "curve": {"0.5": spread, "1": spread}}  # fmt: skip
    pair = {"ours": "bts", "baseline": "btm", "on": "average", "figure": "bits_per_byte", "difference": bits,
            "low": bits, "high": bits, "sets": sets}  # fmt: skip
    claim = {"id": "bts_over_btm", "sets": sets}
    return {
        "sets": sets, "commit": commit, "commits": [commit], "core_minutes": 60, "lora": {},
        "pieces": {"parts": {"main": [sets, 9]}}, "methods": {"bts": row}, "gates": {}, "cross": {},
        "sizes": {"0.75M": {"bts": row}}, "cost": {}, "forgetting": {}, "paired": [pair], "gaps": {"0.75M": [pair]},
        "trained_of": {"0.75M": {}},
        "claims": [claim], "prompts": asked or {},
    }  # fmt: skip


@pytest.mark.parametrize("new, earlier", [(1, 5), (5, 1), (2, 2)])
def test_of_two_runs_each_figure_is_of_the_one_with_more_sets(new, earlier):
    asked = {"bts": {"sums": {"four": {"mean": 7.0, "n": 1}}}}
    both = merged(run_of(new, 1.0, "b", asked), run_of(earlier, 2.0, "a"))
    bits, taken, run = (1.0, new, 1) if new >= earlier else (2.0, earlier, 0)
    for row in (both["methods"]["bts"], both["sizes"]["0.75M"]["bts"]):
        assert row["bits_per_byte"]["average"] == row["tasks"]["sums"]["alone"] == {"mean": bits, "n": taken}
        assert row.get("run", 0) == run
    (row,) = both["paired"]
    assert (row["difference"], row["sets"]) == (bits, taken)
    assert {name: rows[0]["difference"] for name, rows in both["gaps"].items()} == {"0.75M": 2.0, "0.75M, run 2": 1.0}
    assert [*both["trained_of"]] == [*both["gaps"]]
    assert both["claims"][0]["sets"] == both["sets"] == taken
    assert both["prompts"] == asked
    assert (both["core_minutes"], both["commits"]) == (120, ["a", "b"])
    assert both["pieces"]["parts"] == {"main": [taken, 9]}


def test_what_one_run_has_alone_stays():
    new, earlier = run_of(1, 1.0, "b"), run_of(2, 2.0, "a")
    new["methods"] = {"bts_k1": new["methods"]["bts"]}
    new["paired"] = [{**new["paired"][0], "ours": "bts_k1", "baseline": "bts"}]
    both = merged(new, {**earlier, "lora": earlier["methods"], "cross": {"2000": earlier["methods"]}})
    assert [*both["methods"]] == ["bts", "bts_k1"]
    assert [row["ours"] for row in both["paired"]] == ["bts", "bts_k1"]
    assert [*both["lora"]] == [*both["cross"]["2000"]] == ["bts"]
    again = merged(run_of(1, 3.0, "c"), both)
    assert [run["commit"] for run in again["runs"]] == ["a", "b", "c"]
    assert again["core_minutes"] == 180
    assert [*again["gaps"]] == ["0.75M", "0.75M, run 2", "0.75M, run 3"]


def test_costs_are_those_of_the_earlier_run_where_it_has_them():
    def measured(**ratios):
        return {"seed": {"forward_flops": 1e6}, "ratios": {name: {"forward_flops": r} for name, r in ratios.items()}}

    new, earlier = run_of(1, 1.0, "b"), run_of(1, 2.0, "a")
    both = merged({**new, "cost": measured(btm=5.0, btm_forgetting=4.0)}, {**earlier, "cost": measured(btm=6.0)})
    assert both["cost"] == measured(btm=6.0, btm_forgetting=4.0)
    assert merged({**new, "cost": measured(btm=5.0)}, earlier)["cost"] == measured(btm=5.0)


def test_predictions_are_held_against_what_was_found():
    """Differences of the main models, of models of another size, and right answers of one method."""
    found = results_with(
        ("bts_outputs", "outputs", "average", "bits_per_byte", -0.01, -0.02, 0.0, 5),  # predicted: -0.02 to 0
        ("outputs", "btm", "average", "bits_per_byte", 0.03, 0.02, 0.04, 5),  # -0.05 to -0.02
    )
    small = {"ours": "outputs_evidence", "baseline": "btm_forgetting", "on": "average", "figure": "bits_per_byte",
             "difference": -0.004, "low": -0.005, "high": -0.003, "sets": 2}  # fmt: skip
    other = {**small, "difference": -0.5, "low": -0.6, "high": -0.4}
    bits = {"btm": [2.0, 1.0, 1.0], "outputs_evidence": [0.0, 0.995, 0.994]}  # without the first set: -0.0055
    found |= {
        "preset": "full",
        "gaps": {"0.3M": [other], "0.3M, run 2": [small]},
        "cross": {"2000": {"bts": {"average": {"mean": 12.34, "sd": None, "n": 1}, "bits_per_byte": None}}},
        "prompts": {name: {"german": {"chrf": {"alone": {"mean": score, "n": 1}}}}
                    for name, score in (("btm", 14.0), ("bts", 13.0), ("outputs", 14.2))},
        "methods": {name: {"bits_per_byte": {on: {"values": values} for on in ("average", "mixed")}}
                    for name, values in bits.items()},
    }  # fmt: skip
    page = predictions(found)  # the last run's figure, of two over as many sets
    lines = [line for line in page.splitlines() if line.startswith("| before")]
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    average = "the average of the domains"
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("BTS with output gates less output gates alone", average, "yes"),
        ("output gates alone less BTM", average, "**no**"),
        ("BTS, the paper's form", "the cross task, right answers in percent", "yes"),
        ("output gates with evidence less BTM", average, "yes"),
        ("output gates with evidence less BTM", "mixed text", "**no**"),
        ("output gates alone less BTM", "german, chrF", "yes"),
        ("BTS, the paper's form less BTM", "german, chrF", "**no**"),
        ("output gates with evidence less BTM that forgets (0.95)", f"{average}, 0.3M", "yes"),
    ]
    assert "5 of 8 came out as predicted" in page
    assert [rows[place][2:5] for place in (2, 3, 6)] == [
        ["10.0 to 40.0", "12.3", "1"], ["-0.008 to -0.003", "-0.006", "2"], ["less than -2.0", "-1.0", "1"],
    ]  # fmt: skip
    assert predictions({**found, "preset": "quick"}) == ""


def test_methods_of_another_run_do_not_stand_beside_those_of_the_first():
    """As many sets, but of other models."""
    both = merged(run_of(1, 1.0, "b"), run_of(1, 2.0, "a"))
    both["methods"]["btm"] = run_of(1, 0.5, "a")["methods"]["bts"]
    assert [*everywhere(both)] == ["bts"]


EARLIER = {
    "methods": {"outputs": {"learning_rates": [0.01] * 5}, "bts": {"learning_rates": [0.001] * 5}, "btm": {}},
    "lora": {"bts": {"learning_rates": [0.03]}},
    "sizes": {},
    "cross": {"200": {}, "2000": {"bts": {"learning_rates": [0.003]}}, "2000 for 9 steps": {}},
}


@pytest.mark.parametrize("part, method, expected", [
    ({}, "bts", 0.001),
    ({}, "bts_k1", 0.001),  # of its form
    ({}, "bts_outputs", None),  # a form of its own
    ({}, "routing", None),
    ({"size": "0.3M"}, "outputs", 0.01),  # of the main models
    ({"lora": True}, "bts", 0.03),
    ({"kind": "cross"}, "bts", 0.003),
    ({"kind": "cross", "items": 200}, "bts", None),  # other items and steps want other rates
    ({"kind": "cross", "steps": 9}, "bts", None),
])  # fmt: skip
def test_learning_rates_of_an_earlier_run(part, method, expected):
    part = Part(**{"name": "part", "kind": "main", "methods": (), "sets": 1, **part})
    assert rate_of(EARLIER, part, method) == expected
    assert rate_of({}, part, method) is None


def test_variants_are_given_with_their_sets():
    found = results_with(
        *(("bts_k1", "bts", on, "bits_per_byte", 0.1, 0.0, 0.2, 1) for on in ("average", "mixed")),
        *(("bts", "bts_outputs", on, "bits_per_byte", 0.1, 0.0, 0.2, 5) for on in ("average", "mixed")),
        ("bts_k1", "bts", "cross", "bits_per_byte", 0.3, 0.2, 0.4, 2),
    )
    found["methods"]["bts_k1"] = {"trained_parameters": 25}
    cell = "+0.100 (+0.000 to +0.200)"
    expected = (
        f"| BTS, K = 1 | BTS, the paper's form | 25 | 100 | {cell} | {cell} | 1 | +0.300 (+0.200 to +0.400) | 2 |"
    )
    assert variants_table(found).splitlines()[2:] == [expected]
    with pytest.raises(ValueError, match="no variant of our forms has been tested"):
        variants_table(results_with())

"""The study as a whole, on tiny archives and models of a few steps: its pieces, its results file, its report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.replication.ensembles import Routing
from benchmarks.replication.jobs import Job, Store, pending, run
from benchmarks.study import answers, loading, report, verdicts
from benchmarks.study import run as command
from benchmarks.study.bootstrap import Interval
from benchmarks.study.hours import hours_table
from benchmarks.study.plan import Plan
from benchmarks.study.presets import FORMS, PRESETS, RATES, SHARES, Part
from benchmarks.study.quote import quote
from benchmarks.study.routers import TokenRouter
from benchmarks.study.sources import SOURCES
from benchmarks.study.summary import summarize
from tests.helpers.study_archives import SIZES, write_archives


SMOKE = replace(PRESETS["smoke"], corpora=SIZES)
SOME = (
    Part("main", "main", ("btm", "routing", "bts"), sets=2, size="smoke"),
    Part("cross", "cross", ("dense",), sets=1, size="smoke"),
)


def done(preset, folder, sources):
    """All pieces of a preset, on tiny archives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "download", lambda _: write_archives(sources, SOURCES))
        plan = Plan(preset, folder)
        run(plan.jobs(), plan.store)
    return plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return done(replace(SMOKE, parts=SOME), tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def results(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "study.json"
    report.write_report(summarize(plan, "smoke"), path)
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_the_study_runs_and_reports(plan, results):
    found, page = results
    check_pieces(plan, found)
    assert {"seed", "expert_python", "btm", "routing", "bts", "oracle_token"} <= found["methods"].keys()
    assert [*found["methods"]["bts"]["curve"]] == [f"{share:g}" for share in SHARES]
    assert {(row["on"], row["figure"]) for row in found["paired"]} == {
        ("average", "bits_per_byte"), ("mixed", "bits_per_byte"), ("tasks", "exact")
    }  # fmt: skip
    assert {claim["id"] for claim in found["claims"]} >= {"bts_over_seed", "bts_over_btm", "keeps_math"}
    assert len(found["targets"]) == 4
    assert page.startswith("# Which way of combining experts to use")
    assert page.index("## In one page") < page.index("## All methods") < page.index("## Cross capability")
    assert "learning curves" in page
    assert "| main |" in hours_table(plan)


def check_pieces(plan, found):
    assert not pending(plan.jobs(), plan.store)
    assert len(found["commits"]) == 1
    assert found["pieces"]["done"] == found["pieces"]["all"] == len(plan.jobs())
    methods = found["methods"]
    for name, row in methods.items():
        assert row["bits_per_byte"]["average"]["n"] == row["bits_per_byte"]["mixed"]["n"] == 2
        domains = [domain["bits_per_byte"]["mean"] for domain in row["domains"].values()]
        assert row["bits_per_byte"]["average"]["mean"] == pytest.approx(np.mean(domains), rel=1e-4), name
    average = {name: row["bits_per_byte"]["average"]["mean"] for name, row in methods.items()}
    alone = [average[name] for name in methods if name == "seed" or "expert" in name]
    assert average["oracle_token"] < average["oracle_document"] <= min(alone)


def test_the_command(plan, results, tmp_path, monkeypatch, capsys):
    """It finds all pieces done, and reports; what has taken how long; and nothing, where nothing is done."""
    monkeypatch.setattr(command, "set_up", lambda threads: None)
    monkeypatch.setitem(command.PRESETS, "smoke", plan.preset)

    def start(*options, cache=plan.material.cache):
        always = ["--preset", "smoke", "--cache_dir", str(cache), "--results", str(tmp_path / "out.json")]
        monkeypatch.setattr("sys.argv", ["run", *always, *options])
        command.main()
        return capsys.readouterr().out

    assert "out.md" in start("--workers", "1")
    reported = json.loads((tmp_path / "out.json").read_text())
    assert reported["methods"] == results[0]["methods"]
    assert "core hours left" in start("--hours")
    with pytest.raises(SystemExit, match="nothing to report"):
        start("--report_only", cache=tmp_path)


@pytest.mark.slow
def test_all_of_the_smoke_preset_runs_and_reports(tmp_path):
    plan = done(SMOKE, tmp_path / "study", tmp_path)
    found = summarize(plan, "smoke")
    report.write_report(found, tmp_path / "study.json")
    check_pieces(plan, found)
    methods = found["methods"]
    assert {*FORMS, "soup", "token_router", "dense", "bts_hub_maths", "outputs_switches"} <= methods.keys()
    assert methods["outputs"]["trained_parameters"] < methods["bts_token_r8_outputs"]["trained_parameters"]
    for name in ("seed", "btm", "routing", "token_router", "outputs"):
        assert {"alone", "four"} <= methods[name]["tasks"]["sums"].keys()
        assert "chrf" in methods[name]["tasks"]["french"]
    assert "btm" in found["lora"]
    assert {row["on"] for row in found["paired"]} == {"average", "mixed", "tasks", "cross"}
    assert "seed_as_hub" in {claim["id"] for claim in found["claims"]}


def test_what_is_reported_is_what_the_pieces_say(plan, results):
    """One figure by hand: bits of a method on a domain, from its pieces."""
    found, _ = results
    sizes = plan.store.read("tests")["sizes"]["text/python"]
    values = []
    for number in range(2):
        nats = plan.store.read(f"smoke/set{number}/main/bts/test")["tests"]["text/python"]["nats"]
        values.append(sum(nats) / np.log(2) / sum(sizes))
    reported = found["methods"]["bts"]["domains"]["python"]["bits_per_byte"]
    assert reported["values"] == pytest.approx(values, rel=1e-4)
    assert reported["mean"] == pytest.approx(np.mean(values), rel=1e-4)


def test_later_sets_take_the_rate_that_did_best_on_the_first(plan):
    def read(*parts):
        return plan.store.read("/".join(parts))

    tried = {f"{rate:g}": read("smoke/set0/main/bts", f"{rate:g}")["curve"]["1"]["average"] for rate in RATES}
    best = float(min(tried, key=tried.get))
    assert read("smoke/set0/main/bts/test")["learning_rate"] == best
    assert read("smoke/set1/main/bts/chosen")["learning_rate"] == best


def test_lost_files_are_made_again_for_those_who_need_them(plan):
    jobs = plan.jobs()
    kept = plan.set("smoke", 0).folder("python") / "model.safetensors"
    before, place = kept.read_bytes(), kept.parent
    shutil.rmtree(place)
    try:
        assert not pending(jobs, plan.store)  # nobody needs it any more
        result = plan.store.path("smoke/set0/main/btm/test")
        old = result.read_text()
        result.unlink()
        assert {job.name for job in pending(jobs, plan.store)} == {
            "smoke/set0/experts/python", "smoke/set0/main/btm/test"
        }  # fmt: skip
        run(jobs, plan.store)
        assert json.loads(result.read_text())["tests"] == json.loads(old)["tests"]
        assert kept.read_bytes() == before
    finally:
        run(jobs, plan.store)


def test_a_run_whose_time_is_up_begins_nothing(tmp_path):
    store, done = Store(tmp_path), []
    run([Job("one", lambda: done.append(1) or {})], store, until=0.0)
    assert not done


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_need_only_what_they_make(preset):
    """Every need of a piece is a piece, and comes before it."""
    plan, seen = Plan(PRESETS[preset], Path("nowhere")), set()
    for job in plan.jobs():
        assert seen.issuperset([*job.needs, *job.reads]), job.name
        assert job.name not in seen
        seen.add(job.name)


def test_pages_quote_the_results(results):
    found, _ = results
    page = "Text.\n<!-- study: table -->\nold figures\n<!-- /study -->\nMore.\n"
    new = quote(page, found)
    assert "old figures" not in new
    assert f"{found['methods']['bts']['bits_per_byte']['average']['mean']:.3f}" in new
    assert new.startswith("Text.\n<!-- study: table -->\n")
    assert new.endswith("<!-- /study -->\nMore.\n")
    assert quote(new, found) == new
    with pytest.raises(ValueError, match=r"asks for nothing.*one of advice, table"):
        quote(page.replace("table", "nothing"), found)
    with pytest.raises(ValueError, match="no place for figures"):
        quote("Text.", found)


# --- Routers --------------------------------------------------------------------------------------------------------


def llama(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, initializer_range=0.3)  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


TOKENS = torch.randint(30, (3, 9), generator=torch.Generator().manual_seed(0))


def random_router():
    router = TokenRouter([llama(seed) for seed in range(3)])
    torch.manual_seed(0)
    torch.nn.init.normal_(router.gate.weight)
    return router


def test_the_router_by_token_takes_the_likeliest_model_and_expects_the_loss_of_a_draw():
    router, labels = random_router(), TOKENS.clone()
    labels[0, :4] = -100
    states = router.models[0].model(TOKENS).last_hidden_state
    g = (states @ router.gate.weight.T + router.gate.bias).softmax(-1)
    logits = [model(TOKENS).logits for model in router.models]
    found, total, count = router(input_ids=TOKENS).logits, 0.0, 0
    for row in range(len(TOKENS)):
        for place in range(TOKENS.shape[1]):
            best = int(g[row, place].argmax())
            torch.testing.assert_close(found[row, place], logits[best][row, place])
            if place + 1 < TOKENS.shape[1] and labels[row, place + 1] != -100:
                losses = [-one[row, place].log_softmax(-1)[TOKENS[row, place + 1]] for one in logits]
                total += sum(weight * loss for weight, loss in zip(g[row, place], losses))
                count += 1
    assert len(g.argmax(-1).unique()) > 1
    torch.testing.assert_close(router(input_ids=TOKENS, labels=labels).loss, total / count)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_routers_write_what_they_predict(kind):
    """Streams with caches, against whole sequences without."""
    router = random_router()
    if kind == "sequence":
        router = Routing(list(router.models))
        torch.nn.init.normal_(router.router.weight, std=20.0)
        assert len(router.choose(TOKENS, torch.full((3,), 9)).argmax(-1).unique()) > 1
    said = answers.greedy(lambda: answers.stream_of(router), list(TOKENS), -1, "test", longest=4)
    for row, answer in enumerate(said):
        tokens = TOKENS[row]
        for token in answer:
            if kind == "token":
                logits = router(input_ids=tokens[None]).logits
            else:
                logits = router(tokens[None], torch.tensor([TOKENS.shape[1]]))
            assert token == logits[0, -1].argmax()
            tokens = torch.cat([tokens, torch.tensor([token])])


# --- Verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("figure, low, high, expected", [
    ("bits_per_byte", -0.2, -0.1, 1), ("bits_per_byte", 0.1, 0.2, -1), ("bits_per_byte", -0.1, 0.1, 0),
    ("exact", 1, 2, 1), ("exact", -2, -1, -1), ("exact", -1, 1, 0),
])  # fmt: skip
def test_fewer_bits_and_more_right_answers_are_better(figure, low, high, expected):
    assert verdicts.better(Interval((low + high) / 2, low, high), figure) == expected


def results_with(*rows):
    methods = {
        name: {"bits_per_byte": {"average": {"mean": bits}}, "trained_parameters": count,
               "curve": {"0.5": {"mean": half}, "1": {"mean": bits}}}
        for name, bits, half, count in (("bts", 2.0, 2.2, 100), ("outputs", 1.9, 1.95, 10), ("btm", 2.1, 2.1, 0))
    }  # fmt: skip
    keys = ("ours", "baseline", "on", "figure", "difference", "low", "high")
    return {"methods": methods, "paired": [dict(zip(keys, row)) for row in rows]}


def test_targets_are_met_or_not_by_intervals():
    beaten = ("outputs", "btm", "average", "bits_per_byte", -0.2, -0.3, -0.1)
    unclear = ("outputs", "dense", "average", "bits_per_byte", -0.2, -0.5, 0.1)
    among_ours = ("outputs", "bts", "average", "bits_per_byte", -0.1, -0.3, 0.1)
    target = verdicts.best_everywhere(results_with(beaten, among_ours), "average", "")
    assert (target["met"], target["by"]) == (True, "outputs")
    target = verdicts.best_everywhere(results_with(beaten, unclear), "average", "")
    assert (target["met"], target["not_beaten"]) == (False, ["dense"])
    effort = verdicts.half_the_effort(results_with())
    assert (effort["met"], effort["by"]) == (True, "outputs")
    right = ("bts", "dense", "cross", "exact", 5.0, 2.0, 8.0)
    assert verdicts.beats_dense(results_with(right))["by"] == "bts"
    assert verdicts.beats_dense(results_with((*right[:4], 5.0, -2.0, 8.0)))["met"] is False
    assert verdicts.beats_dense(results_with())["met"] is None


def test_the_page_says_where_a_simple_way_wins():
    found = results_with(
        ("outputs", "btm", "average", "bits_per_byte", 0.2, 0.1, 0.3),
        ("bts", "btm", "average", "bits_per_byte", 0.2, 0.1, 0.3),
        ("bts", "dense", "cross", "exact", -9.0, -12.0, -6.0),
        ("bts", "btm", "mixed", "bits_per_byte", 0.1, -0.1, 0.3),
    )
    assert report.simple_wins(found) == (
        "BTM (average, bits) against output gates alone, BTS, the paper's form; "
        "seed, all weights trained (cross, right answers) against BTS, the paper's form"
    )
    assert report.simple_wins(results_with()) == "nowhere, in what was measured"

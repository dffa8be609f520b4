"""The study as a whole, on tiny archives and models of a few steps: its pieces, its results file, its report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import dropping
from benchmarks import replicate as command
from benchmarks.replication.reporting import report
from benchmarks.replication.reporting.quote import quote
from benchmarks.replication.reporting.summary import summarize
from benchmarks.replication.text import loading
from benchmarks.replication.text.sources import SOURCES
from benchmarks.replication.work.hours import hours_table
from benchmarks.replication.work.jobs import pending, run
from benchmarks.replication.work.plan import Plan
from benchmarks.replication.work.presets import FORMS, PRESETS, RATES, SHARES, Part
from tests.helpers.study_archives import SIZES, write_archives


SMOKE = replace(PRESETS["smoke"], corpora=SIZES)
SOME = (
    Part("main", "main", ("btm", "routing", "bts"), sets=2, size="smoke"),
    Part("cross", "cross", ("dense",), sets=1, size="smoke"),
    Part("cross_long", "cross", ("dense", "bts"), sets=1, size="smoke", steps=3),
    Part("cross200", "cross", ("dense", "bts"), sets=1, size="smoke", items=200),
    Part("few", "main", ("bts_token",), sets=1, size="smoke"),
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
    path = tmp_path_factory.mktemp("results") / "replicate.json"
    report.write_report(summarize(plan, "smoke"), path)
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_the_study_runs_and_reports(plan, results):
    found, page = results
    check_pieces(plan, found)
    assert {"seed", "expert_python", "btm", "routing", "bts", "oracle_token"} <= found["methods"].keys()
    assert [*found["methods"]["bts"]["curve"]] == [f"{share:g}" for share in SHARES]
    assert {(row["on"], row["figure"]) for row in found["paired"]} == {
        ("average", "bits_per_byte"), ("mixed", "bits_per_byte"), ("tasks", "exact"),
        ("cross_long", "bits_per_byte"), ("cross_long", "exact"),
        ("cross_few", "bits_per_byte"), ("cross_few", "exact"),
    }  # fmt: skip
    assert {*found["cross"]} == {"2000", "2000 for 3 steps", "200"}
    assert "cross_over_dense" in {claim["id"] for claim in found["claims"]}  # of BTS with more steps
    ids = {claim["id"] for claim in found["claims"]}
    assert ids >= {"bts_over_seed", "bts_over_btm", "keeps_math", "cross_needs_data", "gates_fit"}
    assert found["gates"]["bts"]["sets"] == 2
    assert {len(row) for row in found["gates"]["bts"]["mean"].values()} == {6}  # models
    assert "gates around a change of domain" in page
    assert len(found["targets"]) == 7
    assert page.startswith("# Which way of combining experts to use")
    assert page.index("## In one page") < page.index("## All methods") < page.index("## Cross capability")
    assert "learning curves" in page
    assert "| main |" in hours_table(plan)


def check_pieces(plan, found):
    assert not pending(plan.jobs(), plan.store)
    assert len(found["commits"]) == 1
    assert all(done == every for done, every in found["pieces"]["parts"].values())
    methods = found["methods"]
    for name, row in methods.items():
        sets = 1 if name == "bts_token" else 2
        assert row["bits_per_byte"]["average"]["n"] == row["bits_per_byte"]["mixed"]["n"] == sets
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
        monkeypatch.setattr("sys.argv", ["replicate", *always, *options])
        command.main()
        return capsys.readouterr().out

    assert "out.md" in start("--workers", "1")
    reported = json.loads((tmp_path / "out.json").read_text())
    assert reported["methods"] == results[0]["methods"]
    assert "core hours left" in start("--hours")
    alone = start("--hours", "--parts", "cross200")
    assert "| cross200 |" in alone and "| main |" not in alone
    with pytest.raises(SystemExit, match="nothing to report"):
        start("--report_only", cache=tmp_path)


def test_a_run_goes_on_from_an_earlier_results_file(plan, results, tmp_path, monkeypatch):
    """On another machine, with nothing but that file: one part alone, with the rates that were chosen."""
    monkeypatch.setattr(command, "set_up", lambda threads: None)
    monkeypatch.setattr(loading, "download", lambda _: write_archives(tmp_path, SOURCES))
    variants = Part("variants", "main", ("bts", "bts_k1"), sets=1, size="smoke")
    parts = (*SOME, variants, Part("lora", "main", ("btm",), sets=1, size="smoke", lora=True))
    monkeypatch.setitem(command.PRESETS, "smoke", replace(plan.preset, parts=parts))
    earlier, out = tmp_path / "earlier.json", tmp_path / "out.json"
    earlier.write_text(json.dumps(results[0]))

    def start(*options, cache=tmp_path / "new"):
        always = ["--preset", "smoke", "--workers", "1", "--cache_dir", str(cache), "--results", str(out)]
        monkeypatch.setattr("sys.argv", ["replicate", *always, *options])
        command.main()
        return json.loads(out.read_text())

    found = start("--earlier", str(earlier), "--parts", "variants")
    store = Plan(command.PRESETS["smoke"], tmp_path / "new").store
    assert not [*store.folder.glob("**/routing*"), *store.folder.glob("**/set1"), *store.folder.glob("**/cross*")]
    chosen = results[0]["methods"]["bts"]["learning_rates"][0]
    for name in ("bts", "bts_k1"):
        place = store.folder / "smoke/set0/main" / name
        assert {path.stem for path in place.glob("*.json")} - {"gates"} == {"chosen", "test"}
        assert json.loads((place / "chosen.json").read_text())["learning_rate"] == chosen
    assert found["methods"]["bts"] == results[0]["methods"]["bts"]  # of two sets
    assert found["cross"] == results[0]["cross"]
    variant = found["methods"]["bts_k1"]
    assert (variant["bits_per_byte"]["average"]["n"], variant["rate_of_earlier_run"]) == (1, True)
    (row,) = (row for row in found["paired"] if row["ours"] == "bts_k1" and row["on"] == "average")
    assert (row["baseline"], row["sets"]) == ("bts", 1)
    assert found["core_minutes"] > results[0]["core_minutes"]
    page = out.with_suffix(".md").read_text()
    assert "Figures of 2 runs" in page and f"| BTS, K = 1 | 1, run 2 | {chosen:g}†" in page
    assert start("--report_only") == found  # the file is kept with the results
    earlier.write_text(json.dumps(found))  # where the results are written over the file that they go on from
    assert start("--earlier", str(earlier), "--parts", "variants") == found
    earlier.write_text(json.dumps(results[0]))
    check_refused(start, earlier, plan, tmp_path)
    # A part of which nothing stands in the main table.
    found = start("--earlier", str(earlier), "--parts", "lora", cache=tmp_path / "lora")
    assert found["lora"]["btm"]["run"] == 1
    assert found["methods"] == results[0]["methods"]


def check_refused(start, earlier, plan, tmp_path):
    """Before anything is trained."""
    results = json.loads(earlier.read_text())
    with pytest.raises(SystemExit, match="has no part trend; it has main, cross"):
        start("--parts", "trend", cache=tmp_path / "none")
    with pytest.raises(SystemExit, match="has results already: take another --cache_dir"):
        start("--earlier", str(earlier), cache=plan.material.cache)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**results, "commit": "another"}))
    with pytest.raises(SystemExit, match="goes on from another file already"):
        start("--earlier", str(other))
    other.write_text(json.dumps({"preset": "quick"}))
    with pytest.raises(SystemExit, match="of the preset quick, not smoke"):
        start("--earlier", str(other), cache=tmp_path / "none")
    settings = {**results["settings"], "steps": 1}
    other.write_text(json.dumps({**results, "settings": settings}))
    with pytest.raises(SystemExit, match="of other settings"):
        start("--earlier", str(other), cache=tmp_path / "none")
    with pytest.raises(SystemExit, match="there is no results file"):
        start("--earlier", str(tmp_path / "nowhere.json"), cache=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_experts_are_left_out_on_the_studys_models(plan, tmp_path, monkeypatch, capsys):
    """`benchmarks.dropping`, on the trained stitches and test documents of this study."""
    monkeypatch.setattr(dropping, "set_up", lambda threads: None)
    cases = [("last 4", {}), ("prompt", {"max_active_experts": 1})]
    monkeypatch.setattr(dropping, "settings", lambda experts, stitches: cases)
    monkeypatch.setitem(dropping.PRESETS, "smoke", plan.preset)
    monkeypatch.setattr(dropping, "PROMPT_TOKENS", 4)  # these documents are short
    monkeypatch.setattr(dropping, "SHORTEST", 6)
    path = tmp_path / "dropping.json"
    always = ["dropping", "--preset", "smoke", "--method", "bts", "--documents", "2", "--results", str(path)]
    monkeypatch.setattr("sys.argv", [*always, "--cache_dir", str(plan.material.cache)])
    dropping.main()
    found = json.loads(path.read_text())
    assert [row["data"] for row in found["rows"]] == 2 * [*dropping.SHOWN]
    assert all(row["n"] and row["bits_per_byte"] > 0 for row in found["rows"])
    assert {row["experts_per_token"] for row in found["rows"]} == {5, 1}
    assert "word problems, %" in capsys.readouterr().out.replace("\n", " ")
    monkeypatch.setattr("sys.argv", [*always, "--cache_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"`python -m benchmarks\.replicate` first"):
        dropping.main()


def test_what_the_verdict_hangs_on_comes_set_by_set_and_then_first_sets_of_the_rest(tmp_path):
    part = lambda name, lora: Part(name, "main", ("btm",), sets=2, size="smoke", lora=lora)  # noqa: E731
    preset = replace(SMOKE, parts=(*SOME[:2], part("one", True), replace(part("two", True), methods=("soup",))))
    names = [job.name for job in Plan(preset, tmp_path).jobs() if "/test" in job.name]
    places = [names.index(f"smoke/{name}/test") for name in (
        "set0/main/btm", "set0/cross2000/dense", "set1/main/btm",
        "set0/main_lora/btm", "set0/main_lora/soup", "set1/main_lora/btm", "set1/main_lora/soup",
    )]  # fmt: skip
    assert places == sorted(places)


def test_what_ran_on_fewer_sets_stands_apart(results):
    found, page = results
    assert (found["sets"], found["methods"]["bts_token"]["bits_per_byte"]["average"]["n"]) == (2, 1)
    main, _, fewer = page.partition("## All methods")[2].partition("\n## ")[0].partition("on fewer sets")
    assert "| BTS, the paper's form |" in main and "BTS, token gate" not in main
    rows = {row["on"]: row for row in found["paired"] if (row["ours"], row["baseline"]) == ("bts_token", "bts")}
    assert {on: row["sets"] for on, row in rows.items()} == {"average": 1, "mixed": 1, "tasks": 1}
    expected = [
        found["methods"]["bts_token"]["bits_per_byte"]["average"]["values"][0],
        found["methods"]["bts"]["bits_per_byte"]["average"]["values"][0],
    ]
    assert rows["average"]["difference"] == pytest.approx(expected[0] - expected[1], abs=1e-3)
    assert "BTS, token gate less BTS, the paper's form" in fewer


def test_btm_by_its_factor(results):
    found, page = results
    assert found["forgetting"]["1"]["mixed"]["n"] == 2
    for on in ("average", "mixed"):  # nothing forgotten is the method itself
        expected = found["methods"]["btm"]["bits_per_byte"][on]["mean"]
        assert found["forgetting"]["1"][on]["mean"] == pytest.approx(expected, rel=1e-4)
    assert "BTM by its factor of forgetting" in page


def test_gaps_by_models(results):
    found, _ = results
    assert [*found["gaps"]] == ["smoke"]
    assert {(row["ours"], row["baseline"]) for row in found["gaps"]["smoke"]} == {("bts", "btm")}


@pytest.mark.slow
def test_all_of_the_smoke_preset_runs_and_reports(tmp_path):
    plan = done(SMOKE, tmp_path / "study", tmp_path)
    found = summarize(plan, "smoke")
    report.write_report(found, tmp_path / "replicate.json")
    check_pieces(plan, found)
    methods = found["methods"]
    assert {*FORMS, "soup", "token_router", "dense", "bts_hub_maths", "outputs_switches"} <= methods.keys()
    assert methods["outputs"]["trained_parameters"] < methods["bts_token_r8_outputs"]["trained_parameters"]
    for name in ("seed", "btm", "routing", "token_router", "outputs"):
        assert {"alone", "four"} <= found["prompts"][name]["sums"].keys()
        assert {"alone", "four"} == found["prompts"][name]["french"]["chrf"].keys()
    assert "btm" in found["lora"]
    assert {row["on"] for row in found["paired"]} == {"average", "mixed", "tasks", "cross", "cross_long"}
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


def test_a_set_that_is_not_whole_is_not_reported(plan, results):
    """Or means over different sets would stand side by side."""
    path = plan.store.path("smoke/set1/main/btm/test")
    kept = path.read_bytes()
    path.unlink()
    try:
        methods = summarize(plan, "smoke")["methods"]
    finally:
        path.write_bytes(kept)
    for name in ("seed", "btm", "bts"):
        values = results[0]["methods"][name]["bits_per_byte"]["average"]["values"]
        assert methods[name]["bits_per_byte"]["average"]["values"] == pytest.approx(values[:1], rel=1e-4)


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
    with pytest.raises(ValueError, match="there is 2000, 2000 for 3 steps, 200, and no '2000 for 1000 steps'"):
        quote(page.replace("table", "cross_long"), found)


@pytest.mark.parametrize("page", ["README.md", "docs/choosing-options.md"])
def test_pages_are_up_to_date(page):
    """After new results: `python -m benchmarks.replication.reporting.quote README.md docs/choosing-options.md`."""
    root = Path(__file__).parents[3]
    text = (root / page).read_text()
    assert quote(text, json.loads((root / "benchmarks/results/replicate.json").read_text())) == text

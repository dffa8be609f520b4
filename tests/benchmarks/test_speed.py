"""`benchmarks/speed.py` measures what it says: the plain loop against the reference, ratios against arithmetic."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measuring, speed
from benchmarks.random_models import LORA_RANK, PATTERNS, llama, llamas, lora_models, models, stitched, token_ids
from benchmarks.speed_parts import fresh, lora, rows
from benchmarks.speed_parts.page import SECTIONS, target_values, write_page
from benchmarks.speed_parts.plain import PlainLoop
from benchmarks.speed_parts.presets import PRESETS
from benchmarks.speed_parts.runners import Decoding, Forward, TrainingStep, alone
from peft_bts.model import StitchModel
from tests.helpers.models import assert_near, expected_logits


ROOT = Path(speed.__file__).parent.parent
SMOKE = PRESETS["smoke"]
CASE = SMOKE.case
IN_PROCESS = "prefill,decode,training,plain,lora,streams,dropping,mixture,scaling"


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the script in this process; returns its results and its page."""

    def run(*options):
        path = tmp_path / "speed.json"
        arguments = ["speed.py", "--preset=smoke", "--threads=1", f"--results={path}", *options]
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(speed, "keep_freed_memory", lambda: None)  # else for all tests after this one
        speed.main()
        return json.loads(path.read_text()), path.with_suffix(".md").read_text()

    return run


@pytest.mark.slow
def test_every_timed_row_and_the_page(run, tmp_path):
    results, page = run(f"--only={IN_PROCESS}")
    rows = results["rows"]
    assert {"prefill", "decode", "training", "plain", "scaling"} <= rows.keys()
    for section, found in rows.items():
        for row in found.values():
            assert row["ratios"] and all(0 < r["low"] <= r["median"] <= r["high"] for r in row["ratios"].values())
            assert all(value > 0 for value in row["seconds"].values())
        assert f"## {SECTIONS[section][0]}\n" in page
    assert all(row["largest_difference"] < 1e-4 for row in rows["plain"].values())
    assert rows["plain"]["decode, 1 sequence"]["same_tokens"]
    assert "sequential decoding, in E" in page and "not measured" in page
    assert (tmp_path / "speed" / "scaling.png").stat().st_size > 1000 and "speed/scaling.png" in page


def test_goes_on_where_it_was(run):
    """Rows are measured once, unless `--fresh`; other sections are added; other sizes are refused."""
    first, _ = run("--only=prefill")
    second, _ = run("--only=prefill,decode")
    assert second["rows"]["prefill"] == first["rows"]["prefill"] and len(second["rows"]["decode"]) == 2
    third, _ = run("--only=prefill", "--fresh")
    assert third["rows"]["prefill"] != first["rows"]["prefill"] and third["rows"]["decode"] == second["rows"]["decode"]
    with pytest.raises(SystemExit, match=r"measured with other settings \(case\)"):
        run("--only=prefill", "--dtype=bfloat16")
    with pytest.raises(SystemExit, match="Unknown section"):
        run("--only=prefil")


@pytest.mark.slow
def test_models_over_processes(run):
    """Two processes against one: time, and what they send, which has a formula where nothing is generated."""
    results, page = run("--only=processes")
    rows = results["rows"]["processes"]
    assert len(rows) == len(SMOKE.decode) + 2 and "two processes: decoding, in E" in page
    for name, row in rows.items():
        assert row["ratios"]["two processes / one process"]["median"] > 0
        assert not any(name.endswith("_bytes") for name in row), "memory is not measured here"
        assert row["sent_per_token"] == row["formula_per_token"], name
        assert row["fsdp_per_token"] > row.get("wire_per_token", 0) >= 0
    # Hub and an expert in one process: the other one's gets the hub's state, and sends its own, at one stitch each;
    # and the last state of the hub (float32).
    batch, length = SMOKE.prefill[0]
    assert rows[f"prefill, {batch} x {length} tokens"]["sent_per_token"] == 3 * CASE.width * 4


def measure(row):
    _, function, *arguments = row
    return function(*arguments)


def test_options_that_make_decoding_cheaper(monkeypatch):
    """Their rows run inside of what the package offers for it."""
    asked = []

    def parallel_streams(self, *args):
        asked.append("threads")
        return real_streams(self, *args)

    def drop_experts(self, max_active_experts):
        asked.append(max_active_experts)
        return real_drop(self, max_active_experts)

    real_streams, real_drop = StitchModel.parallel_streams, StitchModel.drop_experts
    monkeypatch.setattr(StitchModel, "parallel_streams", parallel_streams)
    monkeypatch.setattr(StitchModel, "drop_experts", drop_experts)
    streams, dropping = list(rows.streams(SMOKE, CASE)), list(rows.dropping(SMOKE, CASE))
    assert "threads / E" in measure(streams[0])["ratios"] and set(asked) == {"threads"}
    assert len(dropping) == 1 + CASE.experts
    assert "dropped / hub + kept experts" in measure(dropping[1])["ratios"] and set(asked) == {"threads", 1}


def test_rows_of_lora_experts():
    """E runs the hub and every LoRA by themselves, and gives what the stitched model's experts give, in one batch."""
    model, hub, experts = lora_models(CASE)
    ids = token_ids(CASE, 2, 5)
    assert model.describe_execution().count("one batch with the hub") == CASE.experts
    names = {f"e{number}": expert for number, expert in enumerate(experts)}
    expected = expected_logits(model, hub, names, ids)
    with torch.no_grad():
        assert_near(model(input_ids=ids).logits, expected, 1e-5)
        with lora.one_by_one(model):
            assert_near(model(input_ids=ids).logits, expected, 1e-5)
    row = measure(next(lora.lora(SMOKE, CASE)))
    assert row["ratios"].keys() == {"stitched / E", "one by one / E", "hub alone / E"}


def test_attaching_a_lora_takes_memory_for_the_lora():
    """Its weights are counted without the hub's, which it shares."""
    row = fresh.attach_lora(CASE)
    shapes = [p.shape for n, p in llama(CASE).model.layers.named_parameters() if "proj" in n]
    assert row["expert_bytes"] == sum(4 * LORA_RANK * (rows + columns) for rows, columns in shapes)
    assert row["stitch_bytes"] > 0


# --- what is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_plain_loop_is_the_papers_forward(pattern):
    """Against the tests' independent reference; the loop copies the stitches of a model that never runs here."""
    hub, *experts = llamas(CASE)
    other_hub, *other_experts = llamas(CASE)
    model = stitched(CASE, other_hub, other_experts, pattern)
    ids = token_ids(CASE, 2, 9)
    expected = expected_logits(model, hub, {"e0": experts[0], "e1": experts[1]}, ids)
    assert_near(PlainLoop(model, hub, experts)(input_ids=ids).logits, expected, 1e-5)


def test_plain_loop_trains_alike():
    """The same gradients of gates and projections as in the package."""
    model, hub, experts = models(CASE)
    loop, ids = PlainLoop(model, hub, experts), token_ids(CASE, 2, 9)
    for each in (model, loop):
        each(input_ids=ids, labels=ids).loss.backward()
    ours = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    theirs = sum(p.grad.square().sum() for p in loop.parameters() if p.grad is not None)
    assert ours > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"static": True}, pytest.param({"compile_options": {"backend": "aot_eager"}}, marks=pytest.mark.slow)],
    ids=["dynamic", "static", "compiled"],
)
def test_decoding_is_greedy_generation(options):
    model, hub, experts = models(CASE)
    ids = token_ids(CASE, 2, 5)
    for parts, like in (([model], model), (alone(hub, experts), hub)):
        expected = like.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 5:]
        decoding = Decoding(parts, ids, 5, **options)
        for _ in range(2):  # the second run reuses static caches
            assert decoding() > 0
            assert torch.equal(decoding.chosen, expected)


def test_unit_of_cost_runs_every_layer_but_no_expert_head():
    _, hub, experts = models(CASE)
    called = []
    for number, model in enumerate([hub, *experts]):
        model.lm_head.register_forward_hook(lambda *_, n=number: called.append(f"head {n}"))
        model.model.layers[-1].register_forward_hook(lambda *_, n=number: called.append(f"layers {n}"))
    Forward(alone(hub, experts), token_ids(CASE, 1, 4))()
    assert called == ["layers 0", "head 0", "layers 1", "layers 2"]


def test_unit_of_cost_of_a_mixture_runs_every_head():
    row = measure(next(rows.mixture(SMOKE, CASE)))
    assert row["ratios"].keys() == {"mixture / E'"}
    model, hub, experts = models(CASE, output="mixture")
    ids, called = token_ids(CASE, 1, 4), []
    for each in (hub, *experts):
        each.lm_head.register_forward_hook(lambda module, *_: called.append(module))
    Forward([hub, *experts], ids)()
    assert called == [each.lm_head for each in (hub, *experts)]
    torch.testing.assert_close(model(input_ids=ids).logits.exp().sum(-1), torch.ones(1, 4))  # a mixture it is


def test_training_step_trains_the_stitches_alone():
    hub, *experts = llamas(CASE)
    model = stitched(CASE, hub, experts)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    TrainingStep([model], token_ids(CASE, 2, 8))()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and changed == {name for name in before if ".stitch_layer." in name}


def test_weights_read_in_a_decoding_step():
    hub = llama(CASE)
    assert rows.weights_read([hub]) == 4 * sum(p.numel() for p in hub.parameters()) - 4 * CASE.vocabulary * CASE.width


# --- how it is measured ---------------------------------------------------------------------------------------------


def scripted(*values):
    times = iter(values)
    return lambda: next(times)


def test_ratios_are_those_of_neighbours():
    """A machine that is ten times slower in one round changes no ratio; the warm-up does not count."""
    runners, units = {"a": scripted(9, 2, 20, 3)}, {"b": scripted(1, 1, 10, 1)}
    row = measuring.take_turns(runners, units, budget=60, rounds=(3, 3))
    assert row["ratios"] == {"a / b": {"median": 2.0, "low": 2.0, "high": 2.5}}
    assert (row["seconds"], row["rounds"]) == ({"a": 3, "b": 1}, 3)


def test_budget_and_memory_are_limits():
    def too_large():
        raise torch.OutOfMemoryError("no")

    runners, units = {"a": scripted(2.0, 2.0)}, {"b": too_large, "c": scripted(1.0, 1.0)}
    row = measuring.take_turns(runners, units, budget=0, rounds=(2, 9))
    assert row["rounds"] == 2 and row["out_of_memory"] == ["b"] and list(row["ratios"]) == ["a / c"]


def test_flops():
    weight = torch.ones(8, 16)
    runners = {"a": lambda: (torch.ones(4, 8) @ weight).sum().item()}
    assert measuring.take_turns(runners, {}, budget=0, rounds=(1, 1), flops=True)["flops"] == {"a": 2 * 4 * 8 * 16}


def test_copy_bandwidth_of_this_machine():
    assert 1e8 < rows.copy_bandwidth("cpu", size=2**24, times=3) < 1e13


def rise_of_a_block():
    with_peak = measuring.Peak("cpu")
    block = torch.ones(2**24)  # 64 MiB
    del block
    return {"rise": with_peak.rise()}


def test_peak_sees_what_is_gone_again():
    """In a process of its own: where other tests have freed as much, and the process has kept it, nothing rises."""
    assert 60 * 2**20 < measuring.in_fresh_process(rise_of_a_block)["rise"] < 90 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.slow
def test_freed_memory_is_kept():
    code = (
        "import sys, psutil, torch\n"
        "from benchmarks.speed import keep_freed_memory\n"
        "keep_freed_memory() if sys.argv[1] == 'keep' else None\n"
        "before = psutil.Process().memory_info().rss\n"
        "block = torch.ones(2**24)\n"
        "del block\n"
        "print(psutil.Process().memory_info().rss - before)"
    )
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, check=True, cwd=ROOT).stdout)
        for how in ("keep", "give back")
    )
    assert given_back < 2**25 < kept  # of 64 MiB


def test_attaching_a_loaded_model_takes_no_copy():
    """At 18 MB per expert; its real size, in a fresh process, is the benchmark's."""
    case = CASE.with_width(512)
    row = fresh.attach(case)
    assert row["expert_bytes"] == 4 * sum(p.numel() for p in llama(case).parameters())
    assert row["peak_bytes"] - row["stitch_bytes"] < row["expert_bytes"] / 2


@pytest.mark.parametrize("name", SMOKE.processes)
def test_memory_rows(name):
    """Here in one process, so only what does not depend on that."""
    row = fresh.peak(name, SMOKE, CASE)
    one = 4 * sum(p.numel() for p in llama(fresh.case_of(name, CASE)).parameters())
    assert row["seconds"] > 0 and row["peak_bytes"] >= 0
    count = 1 if name.endswith("LoRA") else 1 + CASE.experts
    assert count * one <= row["model_bytes"] <= 1.6 * count * one


def test_stitches_in_the_models_dtype_or_in_float32():
    for dtype in ("float32", "bfloat16"):
        model, *_ = models(speed.replace(CASE, dtype="bfloat16", stitch_dtype=dtype))
        found = {p.dtype for name, p in model.named_parameters() if ".stitch_layer." in name}
        assert found == {getattr(torch, dtype)} and model.dtype == torch.bfloat16


@pytest.mark.slow
def test_rows_of_processes_and_compiled_steps(run, tmp_path):
    results, page = run("--only=attaching,compiled,lora_compiled,sizes")
    rows = results["rows"]
    files = {name: row["load"]["file_bytes"] for name, row in rows["sizes"].items()}
    assert files["experts = 1"] < files["base"] < files["stitches = 4"] and files["stitches = 1"] < files["base"]
    assert all(row["training"]["peak_bytes"] > 0 and row["attach"]["seconds"] > 0 for row in rows["sizes"].values())
    assert "| experts = 1 |" in page and (tmp_path / "speed" / "sizes.png").stat().st_size > 1000
    assert rows["attaching"]["load, adapter and experts"]["file_bytes"] > 10_000
    assert {"stitched / E", "hub alone / E"} == rows["lora_compiled"]["decode, 1 sequence"]["ratios"].keys()
    compiled = rows["compiled"]["decode, 1 sequence"]
    read = compiled["bytes_read"]["stitched"]
    share = read / compiled["bytes_per_second"] * SMOKE.tokens / compiled["seconds"]["stitched"]
    assert compiled["share_of_bandwidth"]["stitched"] == pytest.approx(share, rel=1e-3)
    assert "## Attaching" in page and "MiB" in page


# --- presets and the page -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [("base", 97e6, 98e6), ("paper", 3.0e9, 3.1e9), ("large", 8e9, 8.1e9), ("lora", 8e9, 8.1e9)],
)
def test_presets_have_models_of_their_size(preset, low, high):
    """The paper's 2.7B are without embeddings, which are 0.4B more."""
    case = PRESETS[preset].case
    meta = llama(speed.replace(case, device="meta"))
    assert low < sum(p.numel() for p in meta.parameters()) < high
    assert meta.dtype == getattr(torch, case.dtype)


def test_targets_take_the_worst_row(tmp_path):
    rows = {"prefill": {}, "memory": {}}
    for name, median in {"1 x 8 tokens": 1.01, "4 x 8 tokens": 1.2}.items():
        ratios = {"stitched / E": {"median": median, "low": median, "high": median}}
        rows["prefill"][name] = {"ratios": ratios, "seconds": {"stitched": median, "E": 1.0}, "rounds": 3}
    for pattern, peak in {"alternating": 100, "experts_into_hub": 60}.items():
        rows["memory"][f"training, {pattern}"] = {"peak_bytes": peak, "model_bytes": 10, "seconds": 1.0}
    found = {text: value for text, _, value in target_values(rows) if value is not None}
    assert sorted(found.values()) == [0.6, 1.2]
    settings = speed.settings_of(speed.Arguments(preset="smoke"), SMOKE, CASE)
    write_page({"settings": settings, "rows": rows}, tmp_path / "speed.json")
    page = (tmp_path / "speed.md").read_text()
    assert "| prefill, in E | 1.06 | 1.200 | **not met** |" in page and "0.600 | **met** |" in page

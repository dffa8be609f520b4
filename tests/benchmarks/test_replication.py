"""The replication's pieces do what their names say: baselines against brute force, scores against real generation."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import benchmarks
from benchmarks.replication import claims, cost, data, ensembles, evaluation, jobs, methods, mixtures, training
from peft_bts import toy


ROOT = Path(benchmarks.__file__).parent.parent
VOCABULARY = 40


def llama(seed, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, tie_word_embeddings=True, bos_token_id=0,
                         eos_token_id=0, pad_token_id=0, **sizes, **options)  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


TOKENS = torch.randint(1, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(0))
PROMPT = torch.full((3,), 4)


@pytest.fixture
def zoo(tmp_path):
    folders = {}
    for number, name in enumerate(["seed", "code", "math"]):
        folders[name] = tmp_path / name
        llama(number).save_pretrained(folders[name])
    return methods.Models(folders, "cpu")


EXPERTS = ["code", "math"]


@pytest.fixture(scope="module")
def tokenizer():
    letters = {"<|end|>": 0, **{chr(97 + i): i + 1 for i in range(26)}, **{d: 27 + int(d) for d in "0123456789"}}
    letters |= {"Ġ": 37, "=": 38, "+": 39}
    base = Tokenizer(models.BPE(vocab=letters, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    end = "<|end|>"
    base.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=base, bos_token=end, eos_token=end, pad_token=end,
                                   padding_side="left")  # fmt: skip


# --- Ensembles ------------------------------------------------------------------------------------------------------


def test_btm_is_bayes_rule():
    """Against the rule spelled out, in plain probabilities, token by token."""
    parts = [llama(seed) for seed in range(3)]
    actual = ensembles.BTM(parts)(TOKENS, PROMPT).exp()
    p = [model(input_ids=TOKENS).logits.double().softmax(-1) for model in parts]
    for row, place in itertools.product(range(len(TOKENS)), range(TOKENS.shape[1])):
        likelihood = [
            math.prod(p[m][row, t, TOKENS[row, t + 1]].item() for t in range(place)) for m in range(len(parts))
        ]
        expected = sum(p[m][row, place] * likelihood[m] / sum(likelihood) for m in range(len(parts)))
        torch.testing.assert_close(actual[row, place].double(), expected, rtol=1e-3, atol=1e-6)


def test_btm_does_not_look_ahead():
    predict, changed = ensembles.BTM([llama(0), llama(1)]), TOKENS.clone()
    changed[:, 6:] = 1
    torch.testing.assert_close(predict(TOKENS, PROMPT)[:, :6], predict(changed, PROMPT)[:, :6])


def memoriser(word):
    """A model that expects nothing but `word`."""
    model = llama(0)
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, 32), requires_grad=False)
        model.model.norm.weight.zero_()
        model.lm_head = nn.Linear(32, VOCABULARY).requires_grad_(False)
        model.lm_head.bias.zero_()[word] = 5.0
    return model


def test_routing_finds_the_model_with_the_smallest_loss():
    parts = [memoriser(3), memoriser(7)]
    router = ensembles.Routing(parts)
    blocks = torch.full((64, 2, 16), 3)
    blocks[::2] = 7
    router.fit(blocks, learning_rate=1e-2, seed=0)
    assert router.choose(blocks[:4, 0], torch.full((4,), 8)).argmax(1).tolist() == [1, 0, 1, 0]
    predicted = router(blocks[:4, 0], torch.full((4,), 8))
    for row, model in enumerate([parts[1], parts[0], parts[1], parts[0]]):
        torch.testing.assert_close(predicted[row], model(input_ids=blocks[row : row + 1, 0]).logits[0].log_softmax(-1))


def test_routing_decides_by_the_prompt_alone():
    router, changed = ensembles.Routing([llama(0), llama(1)]), TOKENS.clone()
    changed[:, 4:] = 1
    torch.testing.assert_close(router.choose(TOKENS, PROMPT), router.choose(changed, PROMPT))
    changed[:, 3] = 1
    assert not torch.allclose(router.choose(TOKENS, PROMPT), router.choose(changed, PROMPT))


def test_soup_is_the_mean_of_all_weights(zoo):
    mixed = methods.soup(zoo, EXPERTS).state_dict()
    states = [model.state_dict() for model in zoo.load_all(EXPERTS)]
    assert len(states) == 3
    for key, value in mixed.items():
        torch.testing.assert_close(value, torch.stack([state[key] for state in states]).mean(0))


# --- Mixtures -------------------------------------------------------------------------------------------------------


def twins(parts=("mlp",)):
    """Three models whose `parts` are alike."""
    made = [llama(seed) for seed in range(3)]
    for model, part in itertools.product(made[1:], parts):
        for layer, first in zip(model.model.layers, made[0].model.layers):
            getattr(layer, part).load_state_dict(getattr(first, part).state_dict())
    return made


@torch.no_grad()
def randomise_routers(model):
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, mixtures.Router):
            module.score.weight.normal_()
    return model


@pytest.mark.parametrize("kind", ["soft", "sample"])
def test_btx_of_equal_ffns_is_the_average_model(kind):
    """Whatever the routers say: weights of a mixture sum to one."""
    expected = toy.average_weights(twins())(input_ids=TOKENS).logits
    mixed = randomise_routers(mixtures.btx(twins(), kind))
    for mode in (True, False):
        torch.testing.assert_close(mixed.train(mode)(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def test_bam_of_equal_experts_is_the_average_model():
    parts = ("mlp", "self_attn")
    expected = toy.average_weights(twins(parts))(input_ids=TOKENS).logits
    mixed = randomise_routers(mixtures.bam_adapters(twins(parts)))
    torch.testing.assert_close(mixed(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def test_soft_mixture_against_the_sum_spelled_out():
    layer = randomise_routers(mixtures.MixedFFN([nn.Linear(32, 32) for _ in range(3)], 32))
    x = torch.randn(2, 5, 32)
    weights = (x @ layer.router.score.weight.T).softmax(-1)
    expected = sum(weights[..., m : m + 1] * layer.ffns[m](x) for m in range(3))
    torch.testing.assert_close(layer(x), expected)


def test_sampled_mixture_runs_the_chosen_ffn():
    layer = randomise_routers(mixtures.MixedFFN([nn.Linear(32, 32) for _ in range(3)], 32, "sample")).eval()
    x = torch.randn(2, 5, 32)
    chosen = (x @ layer.router.score.weight.T).argmax(-1)
    assert len(chosen.unique()) > 1
    for row, place in itertools.product(range(2), range(5)):
        torch.testing.assert_close(layer(x)[row, place], layer.ffns[chosen[row, place]](x[row, place]))
    layer.train()(x).square().sum().backward()
    assert layer.router.score.weight.grad.abs().sum() > 0  # drawing does not cut the router off


def test_what_is_trained(zoo):
    """BTX: everything. BAM adapters: projections and routers. BTS: stitches. LoRA: as much as BTS."""
    counts = {name: methods.count_parameters(build(zoo, EXPERTS)) for name, build in methods.TRAINED.items()
              if name != "bts_hub_math"}  # fmt: skip
    assert counts["btx_soft"]["trained"] == counts["btx_soft"]["total"] == counts["btx_soft"]["active"]
    ffn = 3 * 32 * 48
    assert counts["btx_sample"]["total"] - counts["btx_sample"]["active"] == 4 * 2 * ffn
    assert counts["bam_adapters"]["trained"] == 4 * 2 * (3 * 32**2 + 3 * 32)  # layers x (FFN, attention) x models
    per_rank = 4 * (4 * 64 + 3 * 80)
    assert abs(counts["lora"]["trained"] - counts["bts"]["trained"]) <= per_rank / 2
    assert counts["bts"]["trained"] == 2 * (5 * 32**2 + 3 * 32) + 2 * (4 * 32**2 + 2 * 32)
    assert counts["routing"]["trained"] == 3 * 33
    assert counts["routing"]["active"] == zoo.load("seed").num_parameters() + 3 * 33


def test_methods_come_ready_to_be_tested(zoo):
    """In eval mode: BTX draws no FFN."""
    for name, build in methods.TRAINED.items():
        if name != "routing" and name != "bts_hub_math":
            assert not any(module.training for module in build(zoo, EXPERTS).modules()), name


@pytest.mark.parametrize("name", ["lora", "btx_sample", "bam_adapters", "bts_token_r8", "routing"])
def test_trained_weights_come_back(zoo, name):
    method = methods.TRAINED[name](zoo, EXPERTS)
    torch.manual_seed(5)
    with torch.no_grad():
        for module in methods.modules_of(method):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    again = methods.load_trained(methods.TRAINED[name](zoo, EXPERTS), methods.trained_weights(method))
    outs = [(evaluation.predictor(m) if isinstance(m, nn.Module) else m)(TOKENS, PROMPT) for m in (method, again)]
    assert torch.equal(*outs)


def test_start_as_the_seed(zoo):
    seed, stitched = zoo.load("seed"), methods.TRAINED["bts_init_near_seed"](zoo, EXPERTS)
    identity = methods.TRAINED["bts"](zoo, EXPERTS)
    log_p = [model(input_ids=TOKENS).logits.log_softmax(-1) for model in (seed, stitched, identity)]
    near, far = ((log_p[0] - other).abs().mean() for other in log_p[1:])
    assert near < 0.2 * far


# --- Data and evaluation --------------------------------------------------------------------------------------------


def test_numbers():
    assert [data.esperanto_number(n) for n in (0, 7, 10, 21, 100, 347, 999)] == [
        "nul", "sep", "dek", "dudek unu", "cent", "tricent kvardek sep", "naucent naudek nau"
    ]  # fmt: skip
    values = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    for n in range(1, 4000):
        letters = [values[letter] for letter in data.roman_number(n)] + [0]
        assert n == sum(-a if a < b else a for a, b in itertools.pairwise(letters))
    assert (347, "+", 8, "5530") in data.sums() and (100, "-", 1, "9900") in data.sums()
    assert data.cross_item((347, "+", 8, "5530"), steps=True) == ("tricent kvardek sep plus ok =", " 347+8=5530")


def test_test_items_are_not_trained_on():
    from random import Random

    from benchmarks.replication.presets import PRESETS

    items = data.make_items(PRESETS["smoke"], Random(0))
    for domain in items["test"]:
        parts = [{prompt for prompt, _ in items[split][domain]} for split in ("train", "validation", "test")]
        assert all(not a & b for a, b in itertools.combinations(parts, 2)), domain


def test_rows_of_items(tokenizer):
    rows = data.item_rows(tokenizer, [("1+1=", "2"), ("ab=", "cde")])
    assert rows.tokens[0].tolist() == [0, 28, 39, 28, 38, 29, 0, 0] and rows.prompt.tolist() == [5, 4]
    assert rows.labels[0].tolist() == [-100] * 5 + [29, 0, -100]
    assert rows.labels[1].tolist() == [-100] * 4 + [3, 4, 5, 0]


def test_rows_of_three_domains(tokenizer):
    code = torch.arange(1, 9).view(1, 1, 8).expand(1, 2, 8)
    answers, pieces = data.three_rows(tokenizer, code, {"lang": [("a=", "b")], "math": [("1=", "2")]})
    assert answers.tokens[0].tolist() == [0, 1, 38, 2, 0, 1, 2, 0, 28, 38, 29, 0]
    assert answers.labels[0].tolist() == [-100] * 3 + [2, 0] + [-100] * 5 + [29, 0]
    assert torch.equal(answers.tokens, pieces.tokens)
    assert pieces.labels[0].tolist() == [-100] * 5 + [1, 2] + [-100] * 5


def test_score_is_what_generation_does(tokenizer):
    """Exact matches against `generate`; the loss and the token accuracy against plain loops."""
    model = llama(3)
    prompts = ["1+1=", "ab=", "a b", "0", "zz="]
    items = [(p, toy.complete(model, tokenizer, [p], max_new_tokens=3)[0]) for p in prompts[:3]] + [
        ("0", "q"),
        ("zz=", "a"),
    ]
    expected = sum(
        toy.complete(model, tokenizer, [prompt], max_new_tokens=len(answer) + 1)[0] == answer
        for prompt, answer in items
    )
    result = evaluation.score(evaluation.predictor(model), data.item_rows(tokenizer, items), batch=2)
    assert result["exact"] == pytest.approx(100 * expected / 5)
    losses, hits = [], []
    for prompt, answer in items:
        asked = tokenizer(prompt)["input_ids"]
        given = tokenizer(answer, add_special_tokens=False)["input_ids"] + [0]
        log_p = model(input_ids=torch.tensor([asked + given])).logits[0].log_softmax(-1)
        losses += [-log_p[len(asked) - 1 + i, token].item() for i, token in enumerate(given)]
        hits += [log_p[len(asked) - 1 + i].argmax().item() == token for i, token in enumerate(given)]
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert result["token"] == pytest.approx(100 * sum(hits) / len(hits))


def test_mix_keeps_the_shares():
    blocks = {"a": torch.zeros(5, 2, 4), "b": torch.ones(50, 2, 4)}
    rows = training.mix(blocks, {"a": 0.25, "b": 0.75}, 40, seed=0)
    assert len(rows) == 40 and rows[:, 0, 0].sum() == 30
    assert 2 < rows[:20, 0, 0].sum() < 18  # in random order
    assert torch.equal(rows, training.mix(blocks, {"a": 0.25, "b": 0.75}, 40, seed=0))


def test_switching_blocks_have_two_domains():
    blocks = {domain: torch.full((3, 2, 8), i) for i, domain in enumerate(data.DOMAINS)}
    rows = data.switching_blocks(blocks, 24)
    pairs = {(int(row[0, 0]), int(row[0, -1])) for row in rows}
    assert len(pairs) == 12 and all(a != b for a, b in pairs)
    assert all(row[0].tolist() == [a] * 4 + [b] * 4 for row in rows for a, b in [(int(row[0, 0]), int(row[0, -1]))])


def test_training_lowers_the_loss_and_pauses():
    model, seen = llama(0).requires_grad_(True), []
    blocks = torch.randint(1, 5, (40, 1, 8)).expand(-1, 2, -1)
    before = model(input_ids=blocks[:, 0], labels=blocks[:, 1]).loss.item()
    result = training.train(model, blocks, steps=10, learning_rate=1e-2, desc="", pauses=[5, 10], at_pause=seen.append)
    assert result["loss"] < 0.7 * before and seen == [5, 10] and not model.training


# --- Costs ----------------------------------------------------------------------------------------------------------


def test_peak_memory():
    kilobyte = torch.zeros(256)
    with cost.PeakMemory() as memory:
        one = kilobyte + 1
        two = one * 2
        del one
        two.view(16, 16).add_(1)
    assert memory.peak == 2048 and memory.now == 1024


# --- Verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "difference, relation, expected",
    [
        (2.0, "better", "reproduced"), (0.5, "better", "tie"), (-0.5, "better", "tie"),
        (-2.0, "better", "not reproduced"),
        (2.0, "as good", "reproduced"), (-0.5, "as good", "reproduced"), (-2.0, "as good", "not reproduced"),
    ],
)  # fmt: skip
def test_verdict(difference, relation, expected):
    assert claims.verdict(difference, 1.0, relation) == expected


def test_margin_of_one_set_counts_test_data_and_training():
    a, b = claims.Sample([50.0], se=0.3), claims.Sample([40.0], se=0.4)
    assert claims.margin(a, b) == pytest.approx(2 * 0.5)
    assert claims.margin(claims.Sample([50.0], se=0.3, sd=1.2), b) == pytest.approx(2 * 1.3)


def test_margin_of_several_sets_is_a_confidence_interval():
    """Paired: what all methods of a set share does not count."""
    a, b = claims.Sample([10.0, 50.0, 90.0], 9.0), claims.Sample([9.0, 48.0, 87.0], 9.0)
    assert claims.margin(a, b) == pytest.approx(4.30 * 1.0 / 3**0.5)


@pytest.mark.parametrize(
    "a, b, expected",
    [(60.0, 50.0, "reproduced"), (50.0, 60.0, "not reproduced"), (0.4, 0.0, "tie"), (2.0, 0.0, "reproduced")],
)
def test_a_claim_is_judged_by_its_own_results(a, b, expected):
    def method(value):
        return {"average": {"values": [value]}, "se": 0.1}

    claim = claims.better("x", "text", (2.0, 1.0), claims.main("bts"), claims.main("seed"))
    results = {"methods": {"bts": method(a), "seed": method(b)}, "repeats": {"sd": 0.1, "domains": {}}}
    judged = claims.judge_one(claim, results)
    assert judged["verdict"] == expected and judged["ours"] == [a, b] and judged["paper"] == [2.0, 1.0]
    assert judged["margin"] == pytest.approx(2 * (0.01 + 0.01 + 0.01) ** 0.5)


def test_methods_against_the_papers_form():
    averages = {"bts": 50.0, "bts_token": 50.1, "dense": 60.0, "soup": 10.0}
    methods = {name: {"average": {"values": [value]}, "se": 0.1} for name, value in averages.items()}
    compared = claims.compare({"methods": methods, "repeats": {"sd": 0.1, "domains": {}}})
    outcomes = {name: row["outcome"] for name, row in compared.items()}
    assert outcomes == {"bts": "tie", "bts_token": "tie", "dense": "better", "soup": "worse"}
    assert compared["dense"]["difference"] == pytest.approx(10.0)


# --- Jobs -----------------------------------------------------------------------------------------------------------


def test_finished_jobs_are_skipped_and_needs_come_first(tmp_path):
    store, order = jobs.Store(tmp_path), []

    def job(name, *needs):
        return jobs.Job(name, lambda: order.append(name) or {"name": name}, [*needs])

    work = [job("late", "early"), job("early"), job("other/deep", "late")]
    jobs.run(work, store)
    assert order == ["early", "late", "other/deep"] and store.read("other/deep")["name"] == "other/deep"
    jobs.run(work, store)
    assert len(order) == 3
    store.path("late").unlink()
    jobs.run(work, store)
    assert order[3:] == ["late"]


def test_a_failed_job_leaves_no_result(tmp_path):
    store = jobs.Store(tmp_path)
    with pytest.raises(ZeroDivisionError):
        jobs.run([jobs.Job("bad", lambda: {"x": 1 / 0})], store)
    assert not store.has("bad")
    jobs.run([jobs.Job("bad", lambda: {"x": 1})], store)
    assert store.read("bad")["x"] == 1


@pytest.mark.slow
def test_processes_share_the_work(tmp_path):
    """No piece is done twice."""
    script = f"""
import time
from pathlib import Path
from benchmarks.replication import jobs
def work(i):
    with open({str(tmp_path / "log")!r}, "a") as file: file.write(f"{{i}}\\n")
    time.sleep(0.02)
    return {{}}
jobs.run([jobs.Job(str(i), lambda i=i: work(i)) for i in range(20)], jobs.Store(Path({str(tmp_path)!r})))
"""
    runs = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, cwd=ROOT) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(20))


# --- All of it ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smoke(tmp_path):
    """Every study, claim, table and plot, in a few steps each; a second run finds all of it done."""
    command = [sys.executable, "-m", "benchmarks.replicate", "--preset", "smoke",
               "--cache_dir", str(tmp_path / "cache"), "--results", str(tmp_path / "out.json")]  # fmt: skip
    run = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert {"seed", "expert_code", "soup", "btm", "routing", "dense", "lora", "btx_soft", "btx_sample", "bam_adapters",
            "bts", "bts_token"} <= results["methods"].keys()  # fmt: skip
    for method in results["methods"].values():
        assert set(method["average"]) == {"mean", "sd", "n", "values"} and math.isfinite(method["average"]["mean"])
    assert {claim["verdict"] for claim in results["claims"]} <= {"reproduced", "tie", "not reproduced"}
    report = (tmp_path / "out.md").read_text()
    assert all(claim["text"] in report for claim in results["claims"])
    for name in ("averages", "prompts", "switching"):
        assert f"(out/{name}.png)" in report and (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cache/**/*.json")}
    assert len(done) > 90
    again = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr[-2000:]
    assert done == {path: path.stat().st_mtime_ns for path in done}

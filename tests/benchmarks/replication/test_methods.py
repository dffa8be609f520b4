"""Every way to combine models: against brute force, and what of it is trained."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.replication.branching.trained import Models
from benchmarks.replication.measures.answers import greedy
from benchmarks.replication.methods import builders, cost, ensembles, mixtures, parameters
from benchmarks.replication.methods.registry import TRAINED
from benchmarks.replication.methods.streams import stream_of
from benchmarks.replication.methods.token_router import TokenRouter
from benchmarks.replication.work.measuring import predictor_of
from peft_bts import toy


VOCABULARY = 40


def llama(seed, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, tie_word_embeddings=True, bos_token_id=0,
                         eos_token_id=0, pad_token_id=0, **sizes, **options)  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


TOKENS = torch.randint(1, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(0))
PROMPT = torch.full((3,), 4)
EXPERTS = ["python", "maths"]


@pytest.fixture
def zoo(tmp_path):
    folders = {}
    for number, name in enumerate(["seed", *EXPERTS]):
        folders[name] = tmp_path / name
        llama(number).save_pretrained(folders[name])
    return Models(folders, "cpu")


# --- Ensembles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgetting", [1.0, 0.7])
def test_btm_is_bayes_rule(forgetting):
    """Against the rule spelled out, in plain probabilities, token by token; also where older tokens count less."""
    parts = [llama(seed) for seed in range(3)]
    actual = ensembles.BTM(parts, forgetting)(TOKENS, PROMPT).exp()
    p = [model(input_ids=TOKENS).logits.double().softmax(-1) for model in parts]
    for row, place in itertools.product(range(len(TOKENS)), range(TOKENS.shape[1])):
        likelihood = [
            math.prod(p[m][row, t, TOKENS[row, t + 1]].item() ** forgetting ** (place - 1 - t) for t in range(place))
            for m in range(len(parts))
        ]
        expected = sum(p[m][row, place] * likelihood[m] / sum(likelihood) for m in range(len(parts)))
        torch.testing.assert_close(actual[row, place].double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sizes", [(10,), (4, 1, 1, 4)], ids=str)
@pytest.mark.parametrize("forgetting", [1.0, 0.7])
@torch.no_grad()
def test_btm_in_steps_is_btm_at_once(forgetting, sizes):
    predict = ensembles.BTM([llama(0), llama(1)], forgetting)
    stream, whole, end = stream_of(predict, TOKENS, PROMPT), predict(TOKENS, PROMPT), 0
    for size in sizes:
        end += size
        torch.testing.assert_close(stream(TOKENS[:, end - size : end]), whole[:, end - 1], rtol=1e-4, atol=1e-4)


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
    mixed = builders.soup(zoo, EXPERTS).state_dict()
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
    counts = {name: parameters.count_parameters(build(zoo, EXPERTS)) for name, build in TRAINED.items()}
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
    for name, build in TRAINED.items():
        if name not in ("routing", "token_router"):  # no FFN is drawn there
            assert not any(module.training for module in build(zoo, EXPERTS).modules()), name


@pytest.mark.parametrize(
    "name", ["lora", "btx_sample", "bam_adapters", "bts_token_r8", "outputs", "routing", "token_router"]
)
def test_trained_weights_come_back(zoo, name):
    method = TRAINED[name](zoo, EXPERTS)
    torch.manual_seed(5)
    with torch.no_grad():
        for module in parameters.modules_of(method):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    again = parameters.load_trained(TRAINED[name](zoo, EXPERTS), parameters.trained_weights(method))
    outs = [predictor_of(m)(TOKENS, PROMPT) for m in (method, again)]
    assert torch.equal(*outs)


def test_start_as_the_seed(zoo):
    seed, stitched = zoo.load("seed"), TRAINED["bts_init_near_seed"](zoo, EXPERTS)
    identity = TRAINED["bts"](zoo, EXPERTS)
    log_p = [model(input_ids=TOKENS).logits.log_softmax(-1) for model in (seed, stitched, identity)]
    near, far = ((log_p[0] - other).abs().mean() for other in log_p[1:])
    assert near < 0.2 * far


# --- The router by token, and streams -------------------------------------------------------------------------------


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
    """Streams with caches, of prompts of several lengths, against whole sequences without."""
    router = random_router()
    if kind == "sequence":
        router = ensembles.Routing(list(router.models))
        torch.nn.init.normal_(router.router.weight, std=20.0)
        assert len(router.choose(TOKENS, torch.full((3,), TOKENS.shape[1])).argmax(-1).unique()) > 1
    prompts = [row[: len(row) - place] for place, row in enumerate(TOKENS)]
    said = greedy(partial(stream_of, router), prompts, -1, "test", longest=4)
    for prompt, answer in zip(prompts, said):
        tokens = prompt
        assert len(answer) == 4
        for token in answer:
            if kind == "token":
                logits = router(input_ids=tokens[None]).logits
            else:
                logits = router(tokens[None], torch.tensor([len(prompt)]))
            assert token == logits[0, -1].argmax()
            tokens = torch.cat([tokens, torch.tensor([token])])


# --- Costs ----------------------------------------------------------------------------------------------------------


def test_peak_memory():
    kilobyte = torch.zeros(256)
    with cost.PeakMemory() as memory:
        one = kilobyte + 1
        two = one * 2
        del one
        two.view(16, 16).add_(1)
    assert memory.peak == 2048 and memory.now == 1024

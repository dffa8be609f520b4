"""torch.compile sees through a stitched model: one graph, the same numbers, nothing stale after a change."""

import pytest
import torch
from accelerate.utils import compile_regions
from peft import get_peft_model
from torch._dynamo.utils import counters
from transformers import CompileConfig

from peft_bts import StitchConfig
from tests.helpers.zoo import tiny_model


torch.set_num_threads(1)

IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS).masked_fill(torch.arange(8) < torch.tensor([[0], [3]]), 0)
OTHERS = [pytest.param(arch, marks=pytest.mark.slow) for arch in ("gpt2", "gemma3_text", "qwen3")]

MIXTURES = [
    {"output": "mixture"},
    {"output": "mixture", "num_stitches": 0},
    {"output": "mixture", "num_stitches": 0, "evidence": 0.8},
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(arch, **options):
    """Two layers with a stitch of either kind (compiling takes time), an expert of the hub's kind and of another."""
    torch.manual_seed(0)
    options = {"num_stitches": 2, "init_weights": False, "task_type": "CAUSAL_LM", "output": "hub"} | options
    model = get_peft_model(tiny_model(arch, layers=2), StitchConfig(**options))
    model.attach_expert("same", tiny_model(arch, seed=1, layers=2, width=48))
    model.attach_expert("other", tiny_model("llama", seed=2, layers=1))
    return model.eval()


def compiled(model, **options):
    return torch.compile(model, fullgraph=True, backend="aot_eager", **options)


def logits(model, ids=IDS, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [pytest.param(None, marks=pytest.mark.slow), LEFT], ids=["full", "left"])
@pytest.mark.parametrize("arch", ["llama", *OTHERS])
@torch.no_grad()
def test_forward_in_one_graph(arch, mask):
    """`fullgraph=True` raises at any graph break; a user gets the speed-up of a compiled hub, and the same logits."""
    model = make(arch)
    fast, expected = compiled(model), logits(model, attention_mask=mask)
    for _ in range(2):  # side by side, as in generate(): eager prefill, compiled steps
        close(logits(fast, attention_mask=mask), expected)
        assert torch.equal(logits(model, attention_mask=mask), expected)
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_no_graph_break():
    """What `torch._dynamo.explain` tells a user who wonders why compiling does not help."""
    explained = torch._dynamo.explain(make("llama"))(input_ids=IDS, use_cache=False)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.parametrize("arch", ["llama", *OTHERS])
def test_gradients(arch):
    """A compiled training step trains the same weights by the same gradients."""
    model = make(arch).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(logits(model).square().mean(), weights)
    actual = torch.autograd.grad(logits(compiled(model)).square().mean(), weights)
    close(actual, expected)
    assert all(gradient.any() for gradient in expected)


@pytest.mark.parametrize(
    "options", [MIXTURES[0], *(pytest.param(other, marks=pytest.mark.slow) for other in MIXTURES[1:])], ids=str
)
def test_output_mixture(options):
    """All models' heads, in the same graph: the logits, and the gradients of the gates."""
    model = make("llama", **options)
    with torch.no_grad():
        close(logits(compiled(model), attention_mask=LEFT), logits(model, attention_mask=LEFT))
    assert counters["stats"]["unique_graphs"] == 1
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    actual, expected = (
        torch.autograd.grad(logits(each).exp().square().mean(), weights) for each in (compiled(model), model)
    )
    close(actual, expected)
    assert all(gradient.any() for gradient in expected)


@pytest.mark.parametrize(
    ("arch", "options"),
    [("llama", {}), *(pytest.param("llama", options, marks=pytest.mark.slow) for options in MIXTURES)]
    + [pytest.param(other.values[0], {}, marks=pytest.mark.slow) for other in OTHERS],
    ids=str,
)
def test_static_cache_decodes_without_recompiling(arch, options):
    """generate() with a static cache compiles the decoding step once, as for the hub alone, not once per token."""
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # generate() compiles on accelerators only, unless told so
    asked = {"input_ids": IDS, "attention_mask": LEFT, "cache_implementation": "static", "do_sample": False}
    hub, model = tiny_model(arch, layers=2), make(arch, **options)

    def graphs(model, tokens):
        counters.clear()
        torch._dynamo.reset()
        expected = model.generate(**asked, max_new_tokens=tokens)
        assert counters["stats"]["unique_graphs"] == 0
        actual = model.generate(**asked, max_new_tokens=tokens, compile_config=compile_config)
        assert torch.equal(actual, expected)
        return counters["stats"]["unique_graphs"]

    assert graphs(model, 7) == graphs(hub, 7) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, *MIXTURES], ids=str)
@torch.no_grad()
def test_a_step_with_a_dynamic_cache(options):
    """In one graph, too."""
    model = make("llama", **options)
    fast, expected = compiled(model), model(input_ids=IDS).logits
    cache = model(input_ids=IDS[:, :6], use_cache=True).past_key_values
    for place in (6, 7):
        step = fast(input_ids=IDS[:, place : place + 1], past_key_values=cache, use_cache=True).logits
        close(step[:, 0], expected[:, place])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, *MIXTURES], ids=str)
@torch.no_grad()
def test_other_lengths_do_not_recompile_forever(options):
    """Lengths are dynamic after the second one, as in any compiled language model."""
    model = make("llama", **options)
    fast = compiled(model)
    for length in (8, 7):
        logits(fast, IDS[:, :length])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (6, 5, 4):
            close(logits(fast, IDS[:, :length]), logits(model, IDS[:, :length]))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_follows_every_change():
    """Switching, disabling, attaching and detaching after compiling must not run a stale graph."""
    model = make("llama")
    model.add_adapter("two", StitchConfig(task_type="CAUSAL_LM", num_stitches=1, init_weights=False))
    model.set_adapter("two")
    model.attach_expert("third", tiny_model("llama", seed=3, layers=2))
    fast, seen = compiled(model), []

    def check():
        seen.append(logits(model))
        close(logits(fast), seen[-1])

    check()
    model.set_adapter("default")
    check()
    with model.disable_adapter():
        check()
        assert torch.equal(seen[-1], logits(tiny_model("llama", layers=2)))
    model.attach_expert("third", tiny_model("llama", seed=3, layers=2))
    check()
    model.detach_expert("same")
    check()
    next(p for p in model.parameters() if p.requires_grad).add_(1)
    check()
    assert len({tuple(x.flatten().tolist()) for x in seen}) == len(seen)


@pytest.mark.parametrize("stitched", [1, 2], ids=["some", "all"])
@torch.no_grad()
def test_regional_compilation(stitched):
    """accelerate compiles layer by layer (`use_regional_compilation`), stitched hub layers among them."""
    model = make("llama", num_stitches=stitched)
    expected = logits(model)
    close(logits(compile_regions(model, backend="aot_eager")), expected)
    assert counters["stats"]["unique_graphs"] > 0

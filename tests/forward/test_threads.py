"""Servers run one model in several threads; each call must get the answer that it would get alone, bitwise."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model

from peft_bts import StitchConfig
from tests.helpers.zoo import tiny_model


torch.set_num_threads(1)

THREADS, ROUNDS = 8, 2


@pytest.fixture(autouse=True)
def impatient_threads():
    """Let threads take turns a thousand times as often, so that they do meet inside a forward."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def make(arch="llama", *, seed=0, experts=("llama", "qwen3"), **options):
    torch.manual_seed(seed)
    options = {"num_stitches": 4, "init_weights": False, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(tiny_model(arch, seed=seed), StitchConfig(**options))
    for i, expert in enumerate(experts):
        model.attach_expert(f"e{i}", tiny_model(expert, seed=10 * seed + i + 1, layers=4 + i, width=32 + 16 * i))
    return model.eval()


def inputs(i):
    """Thread i's own batch: another size, other tokens, left padding for some."""
    ids = torch.randint(3, 64, (1 + i % 2, 5 + i), generator=torch.Generator().manual_seed(i))
    mask = torch.ones_like(ids)
    if i % 3 == 0:
        mask[:, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def forward(model, i):
    return model(**inputs(i), use_cache=False).logits


@torch.no_grad()
def generate(model, i):
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**inputs(i), max_new_tokens=5, **options).logits)


@torch.no_grad()
def static(model, i):
    return model.generate(**inputs(i), max_new_tokens=5, do_sample=False, cache_implementation="static")


@torch.no_grad()
def beams(model, i):
    return model.generate(**inputs(i), max_new_tokens=5, num_beams=3, do_sample=False)


def gradients(model, i):
    """Of this call's loss alone: threads that train share parameters, but must not share what `backward` walks."""
    weights = [p for p in model.parameters() if p.requires_grad]
    loss = model(**inputs(i), labels=inputs(i)["input_ids"], use_cache=False).loss
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)])


def in_threads(calls):
    """Run all calls at once, each in a thread of its own, several times over; a list of results for each."""
    start = threading.Barrier(len(calls), timeout=60)

    def repeat(call):
        start.wait()
        return [call() for _ in range(ROUNDS)]

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(repeat, call) for call in calls]]


def check(calls):
    expected = [call() for call in calls]
    for results, result in zip(in_threads(calls), expected):
        assert all(torch.equal(r, result) for r in results)


@pytest.mark.parametrize("output", ["hub", "mixture"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("call", [forward, generate, static, beams])
def test_one_model_in_many_threads(arch, call, output):
    """A shared run, tape or cache would hand one user the hidden states of another."""
    model = make(arch, output=output)
    check([lambda i=i: call(model, i) for i in range(THREADS)])


def test_forward_and_generate_at_once():
    """Cached and uncached calls of one model, mixed."""
    model = make()
    check([lambda i=i: (forward, generate)[i % 2](model, i) for i in range(THREADS)])


def test_models_that_share_an_expert():
    """Two stitched models and the expert itself, called by itself, share one expert object between threads."""
    shared = tiny_model("llama", seed=99)
    models = [make(seed=0), make("gpt2", seed=1, experts=["gpt2"])]
    for model in models:
        model.attach_expert("shared", shared)
    check([lambda i=i: forward([*models, shared][i % 3], i) for i in range(THREADS)])


def test_two_adapters_of_two_models():
    """Two models, each with its own active adapter, side by side."""
    models = [make(seed=0), make("gpt2", seed=1)]
    for model in models:
        model.add_adapter("other", StitchConfig(task_type="CAUSAL_LM", num_stitches=1, init_weights=False))
        model.set_adapter("other")
        model.attach_expert("law", tiny_model("qwen3", seed=5))
    models[0].set_adapter("default")
    check([lambda i=i: generate(models[i % 2], i) for i in range(THREADS)])


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["stored", "recomputed", "reentrant"])
def test_training_in_threads(checkpointing):
    """Forward and backward in train mode (data-parallel wrappers do that): every thread gets its own gradients."""
    model = make().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    if checkpointing:  # torch.autograd.grad does not work with it: compare sums of gradients
        weights = [p for p in model.parameters() if p.requires_grad]

        def backward(i):
            model(**inputs(i), labels=inputs(i)["input_ids"], use_cache=False).loss.backward()

        for i in range(THREADS):
            backward(i)
        expected = [p.grad * ROUNDS for p in weights]
        model.zero_grad()
        in_threads([lambda i=i: backward(i) for i in range(THREADS)])
        torch.testing.assert_close([p.grad for p in weights], expected, rtol=1e-3, atol=1e-5)
    else:
        check([lambda i=i: gradients(model, i) for i in range(THREADS)])


def test_an_error_in_one_thread_stays_there():
    """A bad request must not spoil the requests beside it, nor those after it in the same thread."""
    model = make()

    def after_an_error(i):
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 4), 10_000))
        return forward(model, i)

    expected = [forward(model, i) for i in range(THREADS)]
    results = in_threads([lambda i=i: forward(model, i) if i % 2 else after_an_error(i) for i in range(THREADS)])
    for result, alone in zip(results, expected):
        assert all(torch.equal(r, alone) for r in result)

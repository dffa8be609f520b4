"""Hub and experts on several threads: the same to the bit as in turn, with as many threads for an operation."""

import copy
import gc
import pickle
import threading
import time

import pytest
import torch
from accelerate import disk_offload

from tests.helpers.generation import NAMES, decode
from tests.helpers.models import FAMILIES, IDS, LEFT, fresh, logits, stitch


def three(arch="llama", **config):
    return stitch(fresh(arch), {name: fresh(arch, seed=i) for i, name in enumerate(NAMES, 1)}, **config)


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("arch", FAMILIES)
def test_the_same_to_the_bit(arch, threads):
    model = three(arch)
    want, plain = decode(model), logits(model)
    with model.parallel_streams(threads):
        for _ in range(3):
            assert torch.equal(decode(model), want)
            assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    "config",
    [
        {"pattern": "experts_into_hub"},
        {"expert_streams": "projected"},
        {"output": "mixture"},
        {"output": "mixture", "num_stitches": 0},
        {"output": "mixture", "num_stitches": 0, "evidence": 0.8},
    ],
    ids=str,
)
def test_patterns(config):
    model = three(**config)
    want = decode(model)
    with model.parallel_streams(3):
        assert torch.equal(decode(model), want)


def ran_in(model, name):
    threads = set()
    layer = model.base_model.experts["default"][name].layers[0]
    layer.register_forward_hook(lambda *_: threads.add(threading.current_thread().name))
    return threads


def test_experts_run_on_other_threads_and_only_for_inference():
    model = three()
    ran = [ran_in(model, name) for name in NAMES]
    with model.parallel_streams(4):
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert set().union(*ran) == {threading.current_thread().name}
        for threads in ran:
            threads.clear()
        for _ in range(20):
            logits(model)
    assert any(name.startswith("expert") for name in set().union(*ran))


def test_autocast_and_inference_mode_hold_on_other_threads():
    model = three()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = logits(model)
    with model.parallel_streams(2), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model), want)
    with torch.inference_mode():
        want = model(input_ids=IDS).logits
        with model.parallel_streams(2):
            got = model(input_ids=IDS).logits
    assert got.is_inference() and torch.equal(got, want)


def test_an_error_leaves_the_model_as_it_was():
    model = three()
    want = logits(model)
    layer = model.base_model.experts["default"]["lang"].layers[1]

    def fail(*_):
        raise ValueError("no luck")

    hook = layer.register_forward_pre_hook(fail)
    with model.parallel_streams(2):
        with pytest.raises(ValueError, match="no luck"):
            logits(model)
        hook.remove()
        assert torch.equal(logits(model), want)
        hook = model.base_model.model.model.layers[1].register_forward_pre_hook(fail)  # the hub's
        with pytest.raises(ValueError, match="no luck"):
            logits(model)
        hook.remove()
        assert torch.equal(logits(model), want)


def test_after_an_error_no_thread_goes_on():
    """What threads have begun is waited for: nobody computes, or writes to a cache, when the caller has the error."""
    model, begun, ended = three(), [], []
    first = threading.Event()

    def begin(*_):
        begun.append(threading.get_ident())
        first.set()
        time.sleep(0.2)

    def fail(*_):
        assert first.wait(60)
        raise ValueError("no luck")

    layer = model.base_model.experts["default"]["lang"].layers[1]
    layer.register_forward_pre_hook(begin)
    layer.register_forward_hook(lambda *_: ended.append(threading.get_ident()))
    model.base_model.model.model.layers[1].register_forward_pre_hook(fail)
    with model.parallel_streams(4):
        with pytest.raises(ValueError, match="no luck"):
            logits(model)
        assert len(begun) == 1 and begun == ended != [threading.get_ident()]


def test_many_callers():
    model = three()
    inputs = [torch.randint(3, 64, (1, 10), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    want = [logits(model, ids) for ids in inputs]
    got = [None] * len(inputs)

    def call(i):
        for _ in range(5):
            got[i] = logits(model, inputs[i])

    with model.parallel_streams(3):
        callers = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert all(torch.equal(one, other) for one, other in zip(got, want))


def test_threads_come_and_go():
    model = three()
    before, running = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(2)
    try:
        with model.parallel_streams(2):
            assert torch.get_num_threads() == 1
            logits(model)
            with pytest.raises(RuntimeError, match="already"), model.parallel_streams(2):
                pass
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    gc.collect()
    assert threading.active_count() == running
    for wrong in (1, 2.5, "2"):
        with pytest.raises(ValueError, match="threads"), model.parallel_streams(wrong):
            pass
    logits(model)


def test_generate():
    model = three()
    options = {"attention_mask": LEFT, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        want = model.generate(input_ids=IDS, **options, **more)
        with model.parallel_streams(2):
            assert torch.equal(model.generate(input_ids=IDS, **options, **more), want)


def test_copies_have_no_threads():
    model = three()
    with model.parallel_streams(2):
        twin = copy.deepcopy(model)
        pickle.dumps(model)
        assert torch.equal(logits(twin), logits(model))
        with twin.parallel_streams(2):
            assert torch.equal(logits(twin), logits(model))


def test_leaving_while_another_thread_generates():
    model = three()
    options = {"input_ids": IDS, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want, got = model.generate(**options), []
    for moment in range(5):
        begun = threading.Event()
        hook = model.base_model.model.model.layers[0].register_forward_hook(lambda *_, begun=begun: begun.set())
        with model.parallel_streams(2):
            caller = threading.Thread(target=lambda: got.append(model.generate(**options)))
            caller.start()
            begun.wait()
            time.sleep(0.003 * moment)
        caller.join()
        hook.remove()
    assert len(got) == 5 and all(torch.equal(tokens, want) for tokens in got)


def test_offloaded_experts(tmp_path):
    # accelerate brings a layer's weights and takes them away again: two threads must not be in one layer.
    model = three(num_stitches=2)
    with model.drop_experts(max_active_experts=1):
        want = decode(model)
    for name in NAMES:
        disk_offload(model.base_model.experts["default"][name].model, tmp_path / name, torch.device("cpu"))
    with model.parallel_streams(4), model.drop_experts(max_active_experts=1):
        for _ in range(4):
            assert torch.equal(decode(model), want)

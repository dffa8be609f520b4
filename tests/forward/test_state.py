"""A forward's state ends with the forward: calls that are refused, stopped or nested leave nothing behind."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model

from peft_bts import StitchLayer, trace_gates
from tests.helpers.bad_input import config, refused, stitched
from tests.helpers.gradients import backward
from tests.helpers.models import FAMILIES, IDS, LEFT, assert_near, expected_logits, fresh, logits, pristine, stitch
from tests.helpers.reference import decoder_layers


# ------------------------------------------------------------------------------------------------------- refused calls


def test_no_expert():
    """A stitched model without experts has nothing to stitch; a message says how to get one."""
    model = get_peft_model(fresh("llama"), config())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"No expert is attached.*attach_expert.*StitchConfig\(experts="):
            model(input_ids=IDS)
    with pytest.raises(ValueError, match="No expert is attached"):
        model.generate(input_ids=IDS, max_new_tokens=2)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(pristine("llama")))
    model.attach_expert("a", fresh("llama", seed=1))
    expected = expected_logits(model, pristine("llama"), {"a": pristine("llama", seed=1)})
    assert_near(logits(model), expected, 1e-4)


def test_inputs_embeds_of_another_width():
    """Embeddings of the hub's width are nothing that an expert of another width could read."""
    model = stitch(fresh("llama"), {"a": fresh("llama", seed=1), "wide": fresh("llama", seed=2, width=48)})
    embeds = torch.zeros(2, 12, 32)
    with refused(model, match=r"inputs_embeds has width 32, but expert 'wide'.*48.*input_ids"):
        model(inputs_embeds=embeds)
    with model.disable_adapter():
        model(inputs_embeds=embeds)


def test_a_layer_by_itself():
    """A stitched layer works inside a forward of the hub only; called alone, it says so."""
    model = stitched()
    layer = next(module for module in model.modules() if isinstance(module, StitchLayer))
    x = torch.zeros(1, 3, 32)
    call = {"position_embeddings": (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))}
    for _ in range(2):
        with refused(model, match="layer 0 was called by itself.*disable_adapter", error=RuntimeError):
            layer(x, **call)
    with model.disable_adapter():
        assert torch.equal(layer(x, **call), layer.base_layer(x, **call))


@pytest.mark.parametrize("arch", FAMILIES)
def test_bad_calls_of_the_hub(arch):
    """Calls that the hub itself refuses leave nothing behind, either."""
    model = stitch(fresh(arch), {"a": fresh("llama", seed=1)})
    for call in ({}, {"input_ids": IDS + 1000}, {"input_ids": IDS, "attention_mask": torch.ones(3, 5, 7)}):
        before = logits(model)
        with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
            model(**call)
        assert torch.equal(logits(model), before)


# ------------------------------------------------------------------------------------------------ interrupted forwards


class Halt(Exception):
    pass


def places(arch="llama"):
    """A stitched model, its first expert, and modules in whose middle a forward may be stopped or disturbed."""
    hub, expert = fresh(arch), fresh("gpt2", seed=1, width=48)
    model = stitch(hub, {"a": expert, "b": fresh("llama", seed=2)}, num_stitches=3)
    hub_layers, expert_layers = decoder_layers(hub)[1], decoder_layers(expert)[1]
    inner = getattr(hub_layers[2], "base_layer", hub_layers[2])
    return (
        model,
        expert,
        {
            "embedding": hub.get_input_embeddings(),
            "first hub layer": hub_layers[0],
            "third hub layer": hub_layers[2],
            "inside a hub layer": next(iter(inner.children())),
            "expert's embedding": expert.get_input_embeddings(),
            "expert's first layer": expert_layers[0],
            "expert's last layer": expert_layers[-1],
            "stitch": next(x for x in hub_layers if isinstance(x, StitchLayer)).stitch_layer["default"],
            "head": hub.get_output_embeddings(),
        },
    )


PLACES = list(places()[2])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [Halt, KeyboardInterrupt])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_interrupted_forward(arch, error, place):
    """After a forward that stopped anywhere, by an error or Ctrl-C, the next one is right."""
    model, _, modules = places(arch)
    before = logits(model, attention_mask=LEFT)

    def stop(module, args):
        raise error

    for _ in range(3):
        hook = modules[place].register_forward_pre_hook(stop)
        with pytest.raises(error):
            model(input_ids=IDS)
        with pytest.raises(error):
            model.generate(input_ids=IDS[:1], max_new_tokens=3)
        hook.remove()
        assert torch.equal(logits(model, attention_mask=LEFT), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(pristine(arch)))


def test_interruptions_leave_nothing():
    """States of forwards that Ctrl-C ended are let go of by the next forward, and no layer takes them for its own."""
    model, _, modules = places()

    def stop(module, args):
        raise KeyboardInterrupt

    for _ in range(3):
        hook = modules["third hub layer"].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=IDS)
        hook.remove()
    logits(model)
    layer = next(module for module in model.modules() if isinstance(module, StitchLayer))
    with pytest.raises(RuntimeError, match="called by itself"):
        layer(torch.zeros(1, 3, 32), position_embeddings=(torch.ones(1, 3, 8), torch.zeros(1, 3, 8)))


@pytest.mark.parametrize(
    "place", ["embedding", "third hub layer", "expert's first layer", "expert's last layer", "head"]
)
@pytest.mark.parametrize("error", [Halt, KeyboardInterrupt])
@pytest.mark.parametrize("threads", [2, 4])
def test_interrupted_while_experts_run_on_threads(threads, error, place):
    """Neither the threads nor what they had begun spoil the next forward; nor is one of them left behind."""
    model, _, modules = places()
    before, running = logits(model, attention_mask=LEFT), threading.active_count()

    def stop(module, args):
        raise error

    with model.parallel_streams(threads):
        for _ in range(2):
            hook = modules[place].register_forward_pre_hook(stop)
            with pytest.raises(error):
                logits(model)
            hook.remove()
            assert torch.equal(logits(model, attention_mask=LEFT), before)
    assert torch.equal(logits(model, attention_mask=LEFT), before)
    assert threading.active_count() == running


@pytest.mark.parametrize("end", ["it returns", "an error", "Ctrl-C"])
def test_states_are_let_go_of(end):
    """When a forward is over, by whatever end, none of its hidden states stays in memory."""
    model, expert, modules = places()
    states = []
    for layer in (*decoder_layers(model.get_base_model())[1], *decoder_layers(expert)[1]):
        layer.register_forward_hook(
            lambda layer, args, output: states.append(weakref.ref(output if torch.is_tensor(output) else output[0]))
        )

    def stop(module, args):
        raise {"an error": Halt, "Ctrl-C": KeyboardInterrupt}[end]

    if end == "it returns":
        logits(model)
    else:
        hook = modules["head"].register_forward_pre_hook(stop)
        with pytest.raises((Halt, KeyboardInterrupt)):
            logits(model)
        hook.remove()
        hook = modules["third hub layer"].register_forward_pre_hook(stop)
        with pytest.raises((Halt, KeyboardInterrupt)):
            logits(model)
        hook.remove()
        logits(model)  # torch skips hooks after Ctrl-C: it is the next forward that clears up
    gc.collect()
    assert len(states) > 6 and not [state for state in states if state() is not None]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("error", [Halt, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["inside a hub layer", "expert's last layer"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_interrupted_backward(place, error, use_reentrant):
    """With gradient checkpointing the backward pass runs layers again: stopped there, the next step is still right."""
    model, _, modules = places()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    expected = backward(model)

    def stop(module, args):
        raise error

    for _ in range(2):
        loss = model(input_ids=IDS).logits.square().mean()
        hook = modules[place].register_forward_pre_hook(stop)
        with pytest.raises(error):
            loss.backward()
        hook.remove()
        del loss
        actual = backward(model)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_interrupted_forward_in_a_trace():
    """A trace has the gates of the forwards that came to an end, and of no other."""
    model, _, modules = places()

    def stop(module, args):
        raise KeyboardInterrupt

    with trace_gates(model) as expected:
        logits(model)
    with trace_gates(model) as trace:
        for place in ("third hub layer", "expert's last layer"):
            hook = modules[place].register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                logits(model)
            hook.remove()
        logits(model)
    assert len(trace.sequences) == len(expected.sequences) == len(IDS)
    for one, other in zip(trace.sequences, expected.sequences):
        assert all(torch.equal(gates, others) for gates, others in zip(one.gates, other.gates, strict=True))


# -------------------------------------------------------------------------------------------- forwards within forwards


def nested_calls(model, expert):
    """What may be called in the middle of a forward."""

    def disabled():
        with model.disable_adapter():
            logits(model, IDS[:1])

    def failing():
        with pytest.raises(ValueError, match="inputs_embeds"):
            model(inputs_embeds=torch.zeros(1, 3, 32))

    return {
        "itself": lambda: logits(model, IDS[:1, :5]),
        "generate": lambda: model.generate(input_ids=IDS[:1], max_new_tokens=2),
        "disabled": disabled,
        "expert": lambda: logits(expert, IDS[:1]),
        "expert with hidden states": lambda: expert(input_ids=IDS[:1], output_hidden_states=True),
        "failing": failing,
    }


CALLS = ["itself", "generate", "disabled", "expert", "expert with hidden states", "failing"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", CALLS)
def test_forward_within_a_forward(call, place):
    """A forward in the middle of a forward (a hook that probes, a callback that samples) disturbs neither."""
    model, expert, modules = places()
    calls, before, depth = nested_calls(model, expert), logits(model), [0]

    def nest(module, args):
        if depth[0] == 0:
            depth[0] += 1
            with torch.no_grad():
                calls[call]()
            depth[0] -= 1
            nest.count += 1

    nest.count = 0
    hook = modules[place].register_forward_pre_hook(nest)
    for i in range(2):
        assert torch.equal(logits(model), before)
        assert nest.count == i + 1
    hook.remove()
    assert torch.equal(logits(model), before)


def test_interrupted_forward_within_a_forward():
    """The outer forward goes on rightly even if a hook swallows the Ctrl-C of an inner one."""
    hub, expert = fresh("llama"), fresh("llama", seed=1)
    model = stitch(hub, {"a": expert}, num_stitches=2)
    before = logits(model)

    def stop(module, args):
        raise KeyboardInterrupt

    def nest(module, args):
        outer.remove()
        inner = decoder_layers(expert)[1][-1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            logits(model, IDS[:1])
        inner.remove()

    outer = decoder_layers(hub)[1][2].register_forward_pre_hook(nest)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("place", ["third hub layer", "expert's first layer", "stitch"])
def test_three_forwards_deep(place):
    """Each of the nested forwards is right, though the innermost one is stopped and the middle one swallows that."""
    model, _, modules = places()
    inputs = [IDS, IDS[:1, :7], IDS[1:, 3:]]
    expected, depth, results = [logits(model, ids) for ids in inputs], 0, {}

    def nest(module, args):
        nonlocal depth
        if depth == 2:
            raise KeyboardInterrupt
        depth += 1
        try:
            with torch.no_grad():
                results[depth] = logits(model, inputs[depth])
        except KeyboardInterrupt:
            assert depth == 2
        finally:
            depth -= 1

    hook = modules[place].register_forward_pre_hook(nest)
    assert torch.equal(logits(model), expected[0])
    hook.remove()
    assert list(results) == [1] and torch.equal(results[1], expected[1])
    assert torch.equal(logits(model, inputs[2]), expected[2])


def test_generate_within_generate():
    """At every step of a generation another one runs, with a cache of its own; the tokens of both are as alone."""
    model, _, modules = places()
    options, inner = {"max_new_tokens": 4, "do_sample": False}, []
    alone = model.generate(input_ids=IDS, attention_mask=LEFT, **options)
    inner_alone = model.generate(input_ids=IDS[:1, :5], **options)

    def nest(module, args):
        hook.remove()
        inner.append(model.generate(input_ids=IDS[:1, :5], **options))
        watch()

    def watch():
        nonlocal hook
        hook = modules["third hub layer"].register_forward_pre_hook(nest)

    hook = modules["third hub layer"].register_forward_pre_hook(nest)
    assert torch.equal(model.generate(input_ids=IDS, attention_mask=LEFT, **options), alone)
    hook.remove()
    assert len(inner) == 4 and all(torch.equal(tokens, inner_alone) for tokens in inner)


def test_another_thread_in_the_middle_of_a_forward():
    """A thread that a hook starts runs forwards of its own; the one under way here is none of its business."""
    model, _, modules = places()
    before, before_there = logits(model), logits(model, IDS[:1, :7])
    layer = next(module for module in model.modules() if isinstance(module, StitchLayer))
    x, call = torch.zeros(1, 3, 32), {"position_embeddings": (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))}

    def there():
        with torch.no_grad(), pytest.raises(RuntimeError, match="called by itself"):
            layer(x, **call)
        return logits(model, IDS[:1, :7])

    def start(module, args):
        hook.remove()
        with ThreadPoolExecutor(1) as pool:
            results.append(pool.submit(there).result(timeout=60))

    results = []
    for place in PLACES:
        hook = modules[place].register_forward_pre_hook(start)
        assert torch.equal(logits(model), before)
    assert len(results) == len(PLACES) and all(torch.equal(result, before_there) for result in results)


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_backbone_by_itself(arch):
    """Called without its head, as to get embeddings of texts, the backbone gives the stitched states."""
    model = stitch(fresh(arch), {"a": fresh("llama", seed=1)}, num_stitches=2)
    base, head_reads = model.get_base_model(), []
    hook = base.get_output_embeddings().register_forward_pre_hook(lambda head, args: head_reads.append(args[0]))
    logits(model)
    hook.remove()
    with torch.no_grad():
        states = base.base_model(input_ids=IDS).last_hidden_state
        plain = pristine(arch).base_model(input_ids=IDS).last_hidden_state
    assert torch.equal(states, head_reads[0])
    assert states.shape == plain.shape and not torch.allclose(states, plain, atol=1e-2)

"""What generate() gives back besides tokens: scores, logits, hidden states and attentions, the hub's alone."""

import copy

import pytest
import torch

from tests.helpers.generation import NEW, members, model_of, new_model, tokens, uncached
from tests.helpers.models import IDS, assert_near, fresh, pristine, stitch
from tests.helpers.zoo import ARCHITECTURES


@pytest.mark.parametrize(
    "name",
    ["llama", "bloom", "gpt_oss", "llama<mistral+gpt2", "qwen3_next<mistral+llama", "llama@0", "gpt2<mistral+llama@2"],
)
def test_outputs(name):
    """Scores, logits, hidden states and attentions are the hub's, step by step; experts add none."""
    hub = members(name)[0]
    model = new_model(name)
    model.set_attn_implementation("eager")  # the only one that returns its weights
    pristine_eager = copy.deepcopy(pristine(hub))
    pristine_eager.set_attn_implementation("eager")
    wanted = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
        "output_attentions": True,
        "repetition_penalty": 1.2,
    }
    actual, expected, plain = tokens(model, **wanted), uncached(model, **wanted), tokens(pristine_eager, **wanted)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_near(torch.stack(actual.logits), torch.stack(expected.logits), 1e-4)
    assert_near(torch.stack(actual.scores), torch.stack(expected.scores), 1e-4)
    for part in ("hidden_states", "attentions"):
        assert len(actual[part]) == NEW
        for step, full, hubs in zip(actual[part], expected[part], plain[part]):
            assert [tensor.shape for tensor in step] == [tensor.shape for tensor in hubs]
            for tensor, whole in zip(step, full):
                last = (..., slice(-1, None), slice(None))  # the last query; windows cut the keys of a cached step
                keys = min(tensor.shape[-1], whole.shape[-1])
                assert_near(tensor[last][..., -keys:], whole[last][..., -keys:], 1e-4)


def test_beam_outputs():
    model = model_of("llama<mistral+gpt2")
    wanted = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 3, "num_return_sequences": 3}
    actual, expected = tokens(model, **wanted), uncached(model, **wanted)
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(actual.beam_indices, expected.beam_indices)
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_hidden_states_at_a_stitch(arch):
    """As docs/inference.md says: entry i is what hub layer i gets, behind any stitch; the last one is normed."""
    model = stitch(fresh(arch), {"a": fresh(arch, seed=1)}, layers_to_stitch=[1, 3], pattern="experts_into_hub")
    decoder, inputs = model.base_model._decoder, {}

    def note(module, args, kwargs):
        inputs[module] = args[0] if args else kwargs["hidden_states"]

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder.layers]
    hooks += [decoder.backbone.register_forward_hook(lambda module, args, output: inputs.update(last=output[0]))]
    with torch.no_grad():
        out = model(input_ids=IDS, output_hidden_states=True)
        some = model(input_ids=IDS, output_hidden_states=False)
    for hook in hooks:
        hook.remove()
    expected = [inputs[layer] for layer in decoder.layers] + [inputs["last"]]
    assert len(out.hidden_states) == len(expected)
    assert all(torch.equal(state, other) for state, other in zip(out.hidden_states, expected))
    assert torch.equal(out.logits, some.logits)


def test_hidden_states_after_an_expert_was_asked_for_its_own():
    """Asking an expert leaves hooks in its layers; they must not add to what the hub collects."""
    expert, hub = fresh("llama", seed=1), fresh("llama")
    for model in (expert, hub):
        model(input_ids=IDS, output_hidden_states=True)
    model = stitch(hub, {"a": expert})
    expected = stitch(fresh("llama"), {"a": fresh("llama", seed=1)})
    for a, b in zip(tokens_states(model), tokens_states(expected), strict=True):
        assert torch.equal(a, b)


def tokens_states(model):
    with torch.no_grad():
        return model(input_ids=IDS, output_hidden_states=True).hidden_states

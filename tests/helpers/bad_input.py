"""What tests of bad input share: an error must come, name the thing, and leave every model as it was."""

import copy
from contextlib import contextmanager

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from peft_bts import StitchConfig
from tests.helpers.models import fresh, logits, stitch


TOKENS = [f"t{i}" for i in range(64)]


def config(**options):
    return StitchConfig(task_type="CAUSAL_LM", **options)


def stitched(**options):
    return stitch(fresh("llama"), {"a": fresh("llama", seed=1)}, **options)


def save(folder, tokens=TOKENS, vocab=64, seed=0, arch="llama", base=None):
    """A tiny model, and beside it, unless `tokens` is None, a tokenizer of these tokens in order."""
    model = fresh(arch, seed=seed, vocab=vocab) if base is None else base
    model.save_pretrained(folder)
    if tokens is not None:
        words = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token=tokens[0]).save_pretrained(folder)
    return str(folder)


def picture(model):
    """All that a user could find changed: modules, hooks, flags, every weight's bits, configs."""
    return {
        "modules": [
            (name, type(module), module.training, list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ],
        "weights": {
            name: (tensor.requires_grad, tensor.dtype, tensor.detach().clone())
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        },
        "configs": {name: copy.deepcopy(c.to_dict()) for name, c in getattr(model, "peft_config", {}).items()},
        "active": copy.deepcopy(getattr(model, "active_adapter", None)),
    }


def same_picture(before, after, flags=True):
    assert after["modules"] == before["modules"]
    assert after["weights"].keys() == before["weights"].keys()
    for name, (grad, dtype, tensor) in before["weights"].items():
        now = after["weights"][name]
        assert now[1] == dtype and torch.equal(now[2], tensor), name
        assert now[0] == grad or not flags, f"requires_grad of {name} is {now[0]}"
    assert after["configs"] == before["configs"] and after["active"] == before["active"]


@contextmanager
def refused(*models, match, error=ValueError, flags=True):
    """What is done inside raises, with a message of this form, and leaves no trace in any of the models.

    With `flags=False` weights may have been frozen, as PEFT leaves them behind `unload()`.
    """
    before = [(picture(model), logits(model)) for model in models]
    with pytest.raises(error, match=match):
        yield
    for model, (old, old_logits) in zip(models, before):
        same_picture(old, picture(model), flags)
        assert torch.equal(logits(model), old_logits)


def flags(expert):
    return expert.training, [parameter.requires_grad for parameter in expert.parameters()]


@contextmanager
def expert_refused(model, expert, match, error=ValueError):
    """As `refused`; the expert's model also keeps its training mode and trainable weights."""
    expert.train()
    next(expert.parameters()).requires_grad_(False)
    before = flags(expert), picture(expert)
    with refused(model, match=match, error=error):
        yield
    assert flags(expert) == before[0]
    same_picture(before[1], picture(expert))


def load(adapter, **kwargs):
    return AutoPeftModelForCausalLM.from_pretrained(adapter / "adapter", **kwargs)


@contextmanager
def every_load_refused(adapter, match):
    """`match` is what a new model, a plain hub and a stitched model get; the hub and the model are unchanged."""
    hub = AutoModelForCausalLM.from_pretrained(adapter / "hub")
    with pytest.raises(ValueError, match=match):
        load(adapter)
    with pytest.raises(ValueError, match=match):
        load(adapter, low_cpu_mem_usage=True)
    with refused(hub, match=match, flags=False):
        PeftModel.from_pretrained(hub, adapter / "adapter")
    model = stitched()
    with refused(model, match=match):
        model.load_adapter(adapter / "adapter", adapter_name="second")
    yield
    assert load(adapter) is not None

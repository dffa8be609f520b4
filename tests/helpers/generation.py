"""What the tests of generate() share: compositions by name, their tokens, and those of the reference."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch
import transformers
from transformers import DynamicCache

from tests.helpers.models import IDS, LEFT, adapter_file, fresh, logits, pristine, stitch
from tests.helpers.reference import reference_forward


NEW = 6
REPEATING = IDS[:1, [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2]]  # for prompt lookup to find
SAME = [
    "llama",
    "mistral",  # windows only, shorter than the prompt
    "gemma3_text",
    "gpt2",
    "bloom",
    "falcon",
    "opt",
    "gpt_oss",
    "qwen3_moe",
    "deepseek_v3",
    "qwen3_next",
]
MIXED = [  # hub<expert+expert: every kind of state beside every kind of hub
    "llama<mistral+gpt2",
    "llama<gemma3_text+bloom",
    "llama<qwen3_next+gpt2",
    "llama<lfm2+deepseek_v3",
    "gpt2<mistral+llama",
    "bloom<falcon+llama",
    "mistral<llama+gpt2",
    "qwen3_next<mistral+llama",
    "gemma3_text<qwen3_next+llama",
    "opt<gpt_oss+bloom",
]
# With output="mixture", behind the @ the number of stitches.
MIXED += ["llama@0", "gemma3_text@2", "llama<mistral+gpt2@2", "gpt2<mistral+llama@0"]
NAMES = ["code", "lang", "math"]  # of experts, where all are of one architecture
STATEFUL = {"qwen3_next", "bamba"}  # a recurrence cannot be rolled back


def members(name):
    """Hub and experts of a composition; `llama` alone means a llama with two llamas."""
    hub, _, experts = name.partition("@")[0].partition("<")
    return hub, experts.split("+") if experts else [hub, hub]


def expert_models(name, make):
    return {chr(97 + i): make(arch, seed=i + 1, layers=3 * (i + 1)) for i, arch in enumerate(members(name)[1])}


def new_model(name, **options):
    output = {"num_stitches": int(name.partition("@")[2]), "output": "mixture"} if "@" in name else {}
    return stitch(fresh(members(name)[0]), expert_models(name, fresh), **{"num_stitches": 2} | output | options)


@cache
def model_of(name):
    """Shared by the tests; whatever they generate must leave no trace in it."""
    return new_model(name)


@cache
def leaning(name):
    """A model that mostly says what its hub says, so that one is a good assistant to the other."""
    model = new_model(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("gate.for_hub.bias"):
                parameter.add_(4.0)
    return model


def tokens(model, ids=IDS, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(input_ids=ids, **options)


def uncached(model, ids=IDS, **options):
    return tokens(model, ids, use_cache=False, **options)


@cache
def greedily(name, *, repeating=False, row=None, start=0):
    """What greedy search without a cache makes of the prompts in use here: most tests compare with that."""
    ids = REPEATING if repeating else IDS if row is None else IDS[row : row + 1, start:]
    return uncached(model_of(name), ids)


def error_of(call):
    try:
        call()
    except Exception as error:
        return error
    return None


def check_like_plain(check, model, archs):
    """`check(model)`, unless transformers itself fails it with a plain model of one of these architectures.

    For what older versions of transformers get wrong; only looked at when the stitched model fails.
    """
    try:
        check(model)
    except Exception:
        for arch in archs:
            if error := error_of(lambda arch=arch: check(fresh(arch))):
                pytest.skip(f"transformers {transformers.__version__} cannot do this with a plain {arch}: {error!r}")
        raise


def everyone(name):
    hub, experts = members(name)
    return dict.fromkeys([hub, *experts])


@contextmanager
def nothing_computed(model):
    """Fail if any module of the hub or of an expert that has weights of its own is called."""
    called = []

    def note(module, args):
        called.append(type(module).__name__)

    leaves = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    hooks = [leaf.register_forward_pre_hook(note) for leaf in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    assert not called


def refuses(model, match, call):
    """`call` raises a ValueError before anything is computed, and the model is as good as before."""
    before = logits(model)
    with nothing_computed(model), pytest.raises(ValueError, match=match):
        call()
    assert torch.equal(logits(model), before)


class WithCache:
    """A plain model, for the reference, that keeps its own cache."""

    def __init__(self, model, make_cache):
        self._model, self._cache = model, make_cache(model.config)

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, **kwargs):
        return self._model(**kwargs | {"use_cache": True, "past_key_values": self._cache})


def reference_tokens(model, name, ids=IDS, only=None, make_cache=None):
    """Greedy search by the reference: plain models, and the stitches of the adapter's file.

    only: leave the other experts out. make_cache: give each plain model a cache of its own; else there is none.
    """
    tensors, config = adapter_file(model)
    hub, experts = pristine(members(name)[0]), expert_models(name, pristine)
    for gone in set(experts) - set(only or experts):
        del experts[gone]
        tensors = {key: value for key, value in tensors.items() if f".{gone}." not in key}
    if make_cache:
        hub = WithCache(hub, make_cache)
        experts = {key: WithCache(expert, make_cache) for key, expert in experts.items()}
    new = ids
    with torch.no_grad():
        for _ in range(NEW):
            step = reference_forward(hub, experts, tensors, config, new if make_cache else ids)
            new = step[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], dim=1)
    return ids


@torch.no_grad()
def decode(model):
    """The logits of padded rows that are read in three steps, the middle one of a single token."""
    cache = DynamicCache(config=model.config)
    out, mask, ids = [], LEFT, IDS
    for step in (slice(0, 8), slice(8, 9), slice(9, 12)):
        kwargs = (
            {} if model.config.model_type == "bloom" else {"position_ids": (mask.cumsum(-1) - 1).clamp(0)[:, step]}
        )
        out.append(
            model(input_ids=ids[:, step], attention_mask=mask[:, : step.stop], past_key_values=cache, **kwargs).logits
        )
    return torch.cat(out, 1)

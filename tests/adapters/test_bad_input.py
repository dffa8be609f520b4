"""Bad input gets an error that names the thing and says what to do, and everything stays usable as it was."""

import copy
import json
import re
import shutil
from contextlib import contextmanager, suppress

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertLMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from peft_bts import StitchConfig, StitchLayer
from tests.helpers.models import (
    FAMILIES,
    IDS,
    LEFT,
    assert_near,
    expected_logits,
    fresh,
    logits,
    pristine,
    randomize,
    stitch,
)
from tests.helpers.reference import decoder_layers
from tests.helpers.zoo import UNSUPPORTED


TOKENS = [f"t{i}" for i in range(64)]


def config(**options):
    return StitchConfig(task_type="CAUSAL_LM", **options)


def stitched(**options):
    return stitch(fresh("llama"), {"a": fresh("llama", seed=1)}, **options)


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


# ------------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_stitches": 0}, r"num_stitches.*at least 1.*0"),
        ({"num_stitches": -2}, r"num_stitches.*at least 1.*-2"),
        ({"num_stitches": 2.0}, r"num_stitches.*whole number.*2\.0"),
        ({"num_stitches": True}, r"num_stitches.*whole number.*True"),
        ({"num_stitches": "4"}, r"num_stitches.*whole number.*'4'"),
        ({"r": 0}, r"r must be.*at least 1.*0"),
        ({"r": 1.5}, r"r must be.*whole number.*1\.5"),
        ({"gate": "head"}, r"gate must be one of channel, token.*'head'"),
        ({"pattern": "hub_into_experts"}, r"pattern must be one of alternating, experts_into_hub"),
        ({"expert_streams": "mixed"}, r"expert_streams must be one of intact, projected"),
        ({"gate_dropout": 1.0}, r"gate_dropout.*\[0, 1\).*1\.0"),
        ({"gate_dropout": -0.1}, r"gate_dropout.*\[0, 1\).*-0\.1"),
        ({"layers_to_stitch": []}, r"layers_to_stitch.*0-based.*\[\]"),
        ({"layers_to_stitch": [2, 1, 3]}, r"layers_to_stitch.*rising.*\[2, 1, 3\]"),
        ({"layers_to_stitch": [1, 1, 3]}, r"layers_to_stitch.*rising.*\[1, 1, 3\]"),
        ({"layers_to_stitch": [-1, 3]}, r"layers_to_stitch.*\[-1, 3\]"),
        ({"layers_to_stitch": [0.5, 3]}, r"layers_to_stitch.*\[0\.5, 3\]"),
        ({"experts": ["org/a"]}, r"experts must be a dict.*list"),
        ({"experts": {"a": 3}}, r"'a'.*int.*id, a path or a dict"),
        ({"experts": {"a": torch.nn.Linear(1, 1)}}, r"'a'.*Linear.*attach_expert\('a', "),
        ({"experts": {"a": {"model": "x", "trust_remote_code": True}}}, r"'a'.*\['trust_remote_code'\].*model, rev"),
        ({"experts": {"a": {"path": "x"}}}, r"'a'.*\['path'\].*model, rev"),
        ({"experts": {"hub": "x"}}, r"'hub' is taken"),
        ({"experts": {"a.b": "x"}}, r"'a\.b'.*letters, digits and '_'"),
    ],
    ids=str,
)
def test_config(options, match):
    """Options that mean nothing are refused when they are written down, not deep in a training run."""
    with pytest.raises(ValueError, match=match):
        config(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_stitches": 5}, r"num_stitches=5.*4 layers.*at most 4"),
        ({"layers_to_stitch": [1, 2]}, r"layers_to_stitch=\[1, 2\].*last layer, 3.*4 layers"),
        ({"layers_to_stitch": [1, 4]}, r"layers_to_stitch=\[1, 4\].*last layer, 3.*4 layers"),
        ({"experts": {"a": "/no/such/folder"}}, r"'a' could not be loaded from '/no/such/folder'"),
    ],
    ids=str,
)
def test_config_that_does_not_fit_the_hub(options, match):
    """What only the hub can refuse is refused before the hub is touched, for the first adapter and for a second."""
    hub = fresh("llama")
    with refused(hub, match=match):
        get_peft_model(hub, config(**options))
    model = stitched()
    with refused(model, match=match):
        model.add_adapter("second", config(**options))
    model.add_adapter("second", config())


KEY_PARTS = ["stitch_layer", "gate", "proj", "up", "down", "base_model", "model", "layers", "for_a"]


@pytest.mark.parametrize("name", KEY_PARTS)
def test_adapter_names_in_keys(name):
    """Adapter names that are parts of tensor names would lose weights at saving."""
    hub, model = fresh("llama"), stitched()
    with refused(hub, match=rf"[Aa]dapter name '{name}'"):
        get_peft_model(hub, config(), adapter_name=name)
    with refused(model, match=rf"[Aa]dapter name '{name}'"):
        model.add_adapter(name, config())


@pytest.mark.parametrize("name", ["a.b", "keys"])
def test_adapter_names_that_torch_cannot_have(name):
    """No module can have such a name; the model survives the attempt."""
    model = stitched()
    with refused(model, match=re.escape(name), error=(KeyError, ValueError)):
        model.add_adapter(name, config())
    model.add_adapter("second", config())


# --------------------------------------------------------------------------------------------------- the expert's name


@pytest.mark.parametrize("name", ["", "a.b", "a-b", "a b", "ä", "a/b", "code\n", 3, None, "hub"], ids=repr)
def test_illegal_names(name):
    """A name that cannot be part of a tensor's name is refused, with the rule."""
    model, expert = stitched(), fresh("llama", seed=2)
    match = "'hub' is taken" if name == "hub" else f"{re.escape(repr(name))}.*letters, digits and '_'"
    with refused(model, expert, match=match):
        model.attach_expert(name, expert)


def test_taken_name():
    """A second expert of the same name would silently replace the first."""
    model, expert = stitched(), fresh("llama", seed=2)
    with refused(model, expert, match=r"'default' has an expert 'a' already; detach it first, or choose another name"):
        model.attach_expert("a", expert)


def test_unknown_name():
    """Detaching or selecting an expert that is not there names those that are."""
    model = stitched()
    with refused(model, match=r"'default' has no expert 'b'; it has \['a'\]"):
        model.detach_expert("b")
    with refused(model, match=r"no expert \['b'\].*\['a'\]"):
        model.set_active_experts(["a", "b"])
    with refused(model, match=r"At least one expert.*disable_adapter"):
        model.set_active_experts([])


NAMES = ["eval", "half", "items", "type", "keys", "forward", "weight", "bias", "default", "for_a", "gate", "0", "Hub"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_words_of_torch(name, tmp_path):
    """Experts called like methods and modules work: saved, loaded, beside others, detached."""
    model = stitch(fresh("llama"), {"a": fresh("llama", seed=1), name: fresh("gpt2", seed=2)})
    experts = {"a": pristine("llama", seed=1), name: pristine("gpt2", seed=2)}
    before = logits(model)
    assert_near(before, expected_logits(model, pristine("llama"), experts), 1e-4)

    folders = {}
    for other, expert in experts.items():
        folders[other] = str(tmp_path / "models" / other)
        expert.save_pretrained(folders[other])
    model.save_pretrained(tmp_path / "adapter")
    saved = StitchConfig.from_pretrained(tmp_path / "adapter")
    for other, folder in folders.items():
        saved.experts[other]["model"] = folder
    loaded = PeftModel.from_pretrained(fresh("llama"), tmp_path / "adapter", config=saved)
    assert torch.equal(logits(loaded), before)

    model.detach_expert(name)
    remaining = {"a": experts["a"]}
    assert_near(logits(model), expected_logits(model, pristine("llama"), remaining), 1e-4)


# --------------------------------------------------------------------------------------------------- the expert itself


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


@pytest.mark.parametrize("arch", UNSUPPORTED)
def test_state_space_models(arch, tmp_path):
    """Mamba and its like keep their state inside the layers: refused as hub, expert, path and reference."""
    hub, model, expert = fresh(arch), stitched(), fresh(arch)
    match = f"{arch}.*(past_key_values|state)"
    with pytest.raises(ValueError, match=f"The hub.*{match}"):
        get_peft_model(hub, config())
    same_picture(picture(fresh(arch)), picture(hub))
    with expert_refused(model, expert, f"'new'.*{match}"):
        model.attach_expert("new", expert)
    expert.save_pretrained(tmp_path)
    with refused(model, match=f"'new'.*{match}"):
        model.attach_expert("new", str(tmp_path))
    hub = fresh("llama")
    with refused(hub, match=f"'new'.*{match}"):
        get_peft_model(hub, config(experts={"new": str(tmp_path)}))


class Plain(torch.nn.Module):
    """A model without a config, or a list of layers."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 8)
        self.head = torch.nn.Linear(8, 64)

    def forward(self, input_ids=None, **kwargs):
        return self.head(self.embed(input_ids))


def foreign_models():
    size = {"num_layers": 2, "num_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 16, "vocab_size": 64}
    bert = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    return {
        "plain": Plain(),
        "t5": AutoModelForSeq2SeqLM.from_config(T5Config(**size, decoder_start_token_id=0)),
        "bert": BertLMHeadModel(BertConfig(vocab_size=64, is_decoder=True, **bert)),
    }


@pytest.mark.parametrize("kind", ["plain", "t5", "bert"])
def test_unknown_architectures(kind):
    """Models without one list of decoder layers that takes tokens are refused by name, as hub and as expert."""
    model, hub, expert = stitched(), foreign_models()[kind], foreign_models()[kind]
    before = picture(hub)
    what = {"plain": "Plain"}.get(kind, kind)
    with pytest.raises(ValueError, match=f"The hub.*{what}.*architecture"):
        get_peft_model(hub, config(num_stitches=1))
    same_picture(before, picture(hub))
    with expert_refused(model, expert, f"'new'.*{what}.*architecture"):
        model.attach_expert("new", expert)


def test_hub_and_stitched_models_as_experts():
    """The hub itself, or anything with stitches inside, cannot be an expert."""
    model, other = stitched(), stitched()
    for wrong in (model, model.base_model, model.get_base_model(), other, other.get_base_model()):
        with refused(model, other, match=r"'new' is the hub itself, or another stitched model"):
            model.attach_expert("new", wrong)


@pytest.mark.parametrize("wrong", [3, None, ["a"], {"path": "x"}, {"model": None}], ids=repr)
def test_not_a_model(wrong):
    """Anything else than a model, an id, a path or a reference is refused, by name."""
    model = stitched()
    with refused(model, match="'new'"):
        model.attach_expert("new", wrong)


def test_an_expert_that_breaks():
    """An expert that cannot run a forward is found at attach, and given back as it came."""
    model, expert = stitched(), fresh("gpt2", seed=2)

    def fail(module, args):
        raise ZeroDivisionError("on purpose")

    hook = expert.transformer.h[1].mlp.register_forward_pre_hook(fail)
    with expert_refused(model, expert, "on purpose", error=Exception):
        model.attach_expert("new", expert)
    hook.remove()
    model.attach_expert("new", expert)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(("layers", "width"), [(4, 48), (6, 16)])
def test_projected_streams_need_equal_widths(layers, width, tmp_path):
    """`expert_streams="projected"` hands on states of the hub's width."""
    model = stitched(expert_streams="projected")
    expert = fresh("llama", seed=2, layers=layers, width=width)
    match = rf"'new' has width {width}, the hub 32.*projected.*intact"
    with expert_refused(model, expert, match):
        model.attach_expert("new", expert)
    expert.save_pretrained(tmp_path)
    hub = fresh("llama")
    with refused(hub, match=match):
        get_peft_model(hub, config(expert_streams="projected", experts={"new": str(tmp_path)}))


def test_init():
    """Unknown starts, and starts that need a bias where there is none, are refused before anything is made."""
    expert = fresh("llama", seed=2)
    for model, init, match in [
        (stitched(), "open", r"'zero', 'hub' or 'closed', got 'open'"),
        (stitched(gate_bias=False), "hub", r"init='hub'.*gate_bias=False.*'zero'"),
        (stitched(gate_bias=False), "closed", r"init='closed'.*gate_bias=False.*'zero'"),
    ]:
        with expert_refused(model, expert, match):
            model.attach_expert("new", expert, init=init)


# ------------------------------------------------------------------------------------------------------- tokenizers


def save(folder, tokens=TOKENS, vocab=64, seed=0, arch="llama", base=None):
    """A tiny model, and beside it, unless `tokens` is None, a tokenizer of these tokens in order."""
    model = fresh(arch, seed=seed, vocab=vocab) if base is None else base
    model.save_pretrained(folder)
    if tokens is not None:
        words = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token=tokens[0]).save_pretrained(folder)
    return str(folder)


SWAPPED = [*TOKENS[:10], TOKENS[11], TOKENS[10], *TOKENS[12:]]
OTHER_WORD = [*TOKENS[:20], "other", *TOKENS[21:]]


@pytest.mark.parametrize("how", ["path", "object", "config", "dict"])
@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (SWAPPED, r"'new' has another tokenizer than the hub.*('t10'.*11|'t11'.*10).*expected (10|11)"),
        (OTHER_WORD, r"'new' has another tokenizer than the hub.*20.*'other'.*'t20'"),
        ([*TOKENS[1:], TOKENS[0]], r"'new' has another tokenizer than the hub"),
    ],
    ids=["swapped", "other word", "shifted"],
)
def test_other_tokenizers(tmp_path, tokens, match, how):
    """An expert that reads other words out of the hub's ids would be noise: refused, with an example."""
    hub = AutoModelForCausalLM.from_pretrained(save(tmp_path / "hub"))
    path = save(tmp_path / "expert", tokens, seed=2)
    if how == "config":
        with refused(hub, match=match):
            get_peft_model(hub, config(experts={"new": path}))
        return
    model = stitch(hub, {"a": fresh("llama", seed=1)})
    expert = {"path": path, "object": AutoModelForCausalLM.from_pretrained(path), "dict": {"model": path}}[how]
    with refused(model, match=match):
        model.attach_expert("new", expert)


@pytest.mark.parametrize(
    ("tokens", "vocab", "hub_tokens", "hub_vocab"),
    [
        (TOKENS, 64, TOKENS, 64),
        (TOKENS, 80, TOKENS, 64),  # padded with unused embeddings
        (TOKENS, 64, TOKENS, 80),
        (TOKENS[:60], 64, TOKENS[:60], 80),
        ([*TOKENS, "<chat>", "<end>"], 66, TOKENS, 64),  # the expert got tokens of its own, which the hub never says
        (TOKENS[:62], 64, TOKENS, 64),  # the hub got two that the expert has embeddings, but no words, for
        (None, 64, TOKENS, 64),
        (TOKENS, 64, None, 64),
        (None, 80, None, 64),
    ],
)
def test_tokenizers_that_fit(tmp_path, tokens, vocab, hub_tokens, hub_vocab):
    """Vocabularies that only pad differently are no obstacle, and unknown tokenizers need only enough embeddings."""
    hub = AutoModelForCausalLM.from_pretrained(save(tmp_path / "hub", hub_tokens, hub_vocab))
    path = save(tmp_path / "expert", tokens, vocab, seed=2)
    model = get_peft_model(hub, config(experts={"new": path}))
    model.attach_expert("again", AutoModelForCausalLM.from_pretrained(path))
    assert logits(randomize(model)).isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "hub_tokens", "match"),
    [
        (TOKENS[:48], TOKENS, r"'new' has 48 token embeddings.*ids up to 63"),
        (TOKENS[:48], None, r"'new' has 48 token embeddings, the hub 64.*no tokenizer"),
        (None, TOKENS, r"'new' has 48 token embeddings, the hub 64.*no tokenizer"),
        (None, None, r"'new' has 48 token embeddings, the hub 64.*no tokenizer"),
    ],
)
def test_too_few_embeddings(tmp_path, tokens, hub_tokens, match):
    """Ids that the hub may see and the expert has no embedding for would crash some day in training."""
    hub = AutoModelForCausalLM.from_pretrained(save(tmp_path / "hub", hub_tokens))
    path = save(tmp_path / "expert", tokens, vocab=48, seed=2)
    model = stitch(hub, {"a": fresh("llama", seed=1)})
    with refused(model, match=match):
        model.attach_expert("new", path)


# ------------------------------------------------------------------------------------------------ references and files


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter of two experts; folders `hub`, `code`, `math` and `adapter`."""
    save(tmp_path / "hub", None)
    experts = {
        "code": save(tmp_path / "code", None, seed=1),
        "math": save(tmp_path / "math", None, seed=2, arch="gpt2"),
    }
    hub = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    model = randomize(get_peft_model(hub, config(experts=experts, num_stitches=2))).eval()
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "logits.pt")
    return tmp_path


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


def replace_as_documented(adapter, name, source):
    """What the message says to do."""
    config = StitchConfig.from_pretrained(adapter / "adapter")
    config.experts[name]["model"] = str(source)
    return AutoPeftModelForCausalLM.from_pretrained(adapter / "adapter", config=config)


def test_lost_expert(adapter):
    """An expert that is no longer there: which, where it was, and how to say where it is now."""
    shutil.move(adapter / "code", adapter / "moved")
    match = rf"(?s)'code' could not be loaded from '{adapter}/code'.*config\.experts\[.code.\]\[.model.\] = "
    with pytest.raises(ValueError, match=match) as error:
        load(adapter)
    for line in (
        "config = StitchConfig.from_pretrained(",
        'config.experts["code"]["model"] = ',
        "AutoPeftModelForCausalLM.from_pretrained(",
    ):
        assert line in str(error.value)
    assert torch.equal(
        logits(replace_as_documented(adapter, "code", adapter / "moved")), torch.load(adapter / "logits.pt")
    )
    with every_load_refused(adapter, match):
        shutil.move(adapter / "moved", adapter / "code")


def test_lost_expert_of_the_hub():
    """An id that the Hub does not have, or cannot be asked for: named with its revision."""
    model = stitched()
    with refused(model, match=r"(?s)'new' could not be loaded from 'org/nothing' at revision 'v2'.*"):
        model.attach_expert("new", "org/nothing", revision="v2")
    with refused(model, match=r"(?s)'new' could not be loaded from 'org/nothing'"):
        model.attach_expert("new", {"adapter": "org/nothing"})


def test_broken_expert(adapter):
    """A folder that has a config but no weights, or no model at all."""
    (adapter / "code" / "model.safetensors").rename(adapter / "weights")
    match = rf"(?s)'code' could not be loaded from '{adapter}/code'"
    with every_load_refused(adapter, match):
        (adapter / "weights").rename(adapter / "code" / "model.safetensors")
    (adapter / "empty").mkdir()
    model = stitched()
    with refused(model, match=rf"'new' could not be loaded from '{adapter}/empty'"):
        model.attach_expert("new", str(adapter / "empty"))


def test_expert_that_came_from_nowhere(tmp_path):
    """An expert attached as an object has no place to be loaded from; the message says how to give it one."""
    hub = AutoModelForCausalLM.from_pretrained(save(tmp_path / "hub", None))
    model = stitch(hub, {"code": fresh("llama", seed=1)})
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"(?s)'code' has no reference.*config\.experts\[.code.\]\[.model.\] = "):
        load(tmp_path)
    path = save(tmp_path / "expert", None, seed=1)
    assert torch.equal(logits(replace_as_documented(tmp_path, "code", path)), logits(model))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": 6}, r"num_hidden_layers is 6, expected 4"),
        ({"width": 48}, r"hidden_size is 48, expected 32"),
        ({"vocab": 80}, r"vocab_size is 80, expected 64"),
        ({"arch": "qwen3"}, r"model_type is 'qwen3', expected 'llama'"),
    ],
    ids=str,
)
def test_changed_expert(adapter, options, match):
    """Another model in the place of the one that the stitches were trained for."""
    kept = adapter / "kept"
    shutil.move(adapter / "code", kept)
    save(adapter / "code", None, base=fresh(**({"arch": "llama", "seed": 1} | options)))
    with every_load_refused(adapter, rf"(?s)'code' is not the one.*{match}.*config\.experts\[.code.\]"):
        shutil.rmtree(adapter / "code")
        shutil.move(kept, adapter / "code")


KEY = "base_model.model.model.layers.{}.stitch_layer.{}"


def drop(tensors):
    del tensors[KEY.format(1, "gate.code.weight")]


def drop_an_expert(tensors):
    for key in [key for key in tensors if ".math." in key]:
        del tensors[key]


def add_an_expert(tensors):
    tensors[KEY.format(3, "gate.law.weight")] = torch.zeros(32, 32)


def add_a_layer(tensors):
    tensors[KEY.format(2, "gate.code.weight")] = torch.zeros(32, 32)


def add_nonsense(tensors):
    tensors["base_model.model.model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 32)


def reshape(tensors):
    tensors[KEY.format(3, "gate.hub.weight")] = torch.zeros(1, 32)


def empty(tensors):
    tensors.clear()
    tensors["nothing"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (drop, r"missing: .*layers\.1\.stitch_layer\.gate\.code\.weight"),
        (drop_an_expert, r"missing: .*\.math\."),
        (add_an_expert, r"not part of this adapter: .*layers\.3\.stitch_layer\.gate\.law\.weight"),
        (add_a_layer, r"not part of this adapter: .*layers\.2\.stitch_layer\.gate\.code\.weight"),
        (add_nonsense, r"not part of this adapter: .*layers\.0\.mlp\.up_proj\.weight"),
        (reshape, r"layers\.3\.stitch_layer\.gate\.hub\.weight has shape \(1, 32\), expected \(32, 32\)"),
        (empty, r"missing: .*\(?"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_that_do_not_fit(adapter, edit, match):
    """Every tensor that is missing, extra or misshapen is named; nothing is half loaded."""
    file = adapter / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    wrong = dict(tensors)
    edit(wrong)
    match = rf"(?s)do not fit stitch adapter.*{match}.*nothing was loaded"

    untouched = load(adapter)
    with refused(untouched, match=match):  # nobody has run it yet, it is no less the user's
        set_peft_model_state_dict(untouched, wrong)
    other = randomize(load(adapter), seed=1)
    other_before = logits(other)
    with refused(other, match=match):
        set_peft_model_state_dict(other, wrong)
    assert torch.equal(logits(other), other_before)

    save_file(wrong, file)
    with every_load_refused(adapter, match):
        save_file(tensors, file)


def test_a_failed_load_keeps_a_model_that_was_never_run(adapter):
    """Weights that do not fit a model just made are refused; the model stays stitched."""
    model = load(adapter)
    with pytest.raises(ValueError, match="do not fit"):
        set_peft_model_state_dict(model, {"nothing": torch.zeros(1)})
    assert torch.equal(logits(model), torch.load(adapter / "logits.pt"))

    hub = AutoModelForCausalLM.from_pretrained(adapter / "hub")
    model = get_peft_model(hub, config(experts={"code": str(adapter / "code")}))
    with pytest.raises(ValueError, match="do not fit"):
        set_peft_model_state_dict(model, {"nothing": torch.zeros(1)})
    assert [name for name, module in model.named_modules() if isinstance(module, StitchLayer)]
    assert not torch.equal(logits(model), logits(pristine("llama")))


def test_a_failed_load_leaves_the_hub_trainable(adapter):
    """A hub on which an adapter could not be loaded is what it was, its weights not frozen."""
    hub = AutoModelForCausalLM.from_pretrained(adapter / "hub")
    path = adapter / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gate": "token"}))
    with refused(hub, match="do not fit stitch adapter"):
        PeftModel.from_pretrained(hub, adapter / "adapter")


@pytest.mark.parametrize(
    "options",
    [{"num_stitches": 4}, {"gate": "token"}, {"gate_bias": False}, {"r": 4}, {"layers_to_stitch": [0, 3]}],
    ids=str,
)
def test_config_of_another_adapter(adapter, options):
    """A config and a file that do not belong together."""
    path = adapter / "adapter" / "adapter_config.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | options))
    with every_load_refused(adapter, "do not fit stitch adapter"):
        path.write_text(text)


@pytest.mark.parametrize(
    ("hub", "match"),
    [
        ({"width": 48}, r"gate\.hub\.weight has shape \(32, 32\), expected \(48, 48\)"),
        ({"layers": 6}, r"missing: .*layers\.2\.stitch_layer"),
        ({"layers": 1}, r"num_stitches=2 does not fit a hub of 1 layers"),
        ({"arch": "gpt2"}, r"missing: .*transformer\.h\.1\.stitch_layer"),
    ],
    ids=str,
)
def test_another_hub(adapter, hub, match):
    """An adapter on a hub of other depth, width or architecture than its own."""
    hub = fresh(**({"arch": "llama"} | hub))
    with refused(hub, match=rf"(?s){match}", flags=False):
        PeftModel.from_pretrained(hub, adapter / "adapter")


def bring_code(folder, flag, **auto_map):
    """Put a module into a model's folder that leaves a flag when it is imported, and makes nothing that works."""
    (folder / "evil.py").write_text(f"open({str(flag)!r}, 'w')\nraise ImportError('evil')\n")
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).exists():
            content = json.loads((folder / file).read_text())
            model_type = {} if "AutoTokenizer" in auto_map else {"model_type": "evil"}
            content |= {"auto_map": auto_map, "tokenizer_class": "Evil"} | model_type
            (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize("answer", ["y", "n"])
def test_references_run_no_code(adapter, monkeypatch, answer):
    """A folder or id that a downloaded config names cannot make a loader run its code, nor ask whether to."""
    asked, flag = [], adapter / "flag"
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or answer)
    shutil.copytree(adapter / "code", adapter / "evil")
    bring_code(adapter / "evil", flag, AutoConfig="evil.C", AutoModelForCausalLM="evil.M")
    path = adapter / "adapter" / "adapter_config.json"
    text = path.read_text()
    path.write_text(text.replace(f"{adapter}/code", f"{adapter}/evil"))
    with suppress(Exception):
        load(adapter)
    assert not flag.exists() and not asked
    with every_load_refused(adapter, rf"(?s)'code' could not be loaded from '{adapter}/evil'"):
        path.write_text(text)


def test_trust_cannot_be_asked_for(adapter):
    """A downloaded config cannot say that its experts are to be trusted."""
    path = adapter / "adapter" / "adapter_config.json"
    text = path.read_text()
    trusting = json.loads(text)
    trusting["experts"]["code"]["trust_remote_code"] = True
    path.write_text(json.dumps(trusting))
    with every_load_refused(adapter, r"'code'.*\['trust_remote_code'\]"):
        path.write_text(text)


def test_tokenizers_run_no_code(tmp_path, monkeypatch):
    """Comparing tokenizers loads none that brings code along, and does not ask whether to."""
    asked, flag = [], tmp_path / "flag"
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    path = save(tmp_path / "expert")
    bring_code(tmp_path / "expert", flag, AutoTokenizer=["evil.T", "evil.T"])
    hub = AutoModelForCausalLM.from_pretrained(save(tmp_path / "hub"))
    model = stitch(hub, {"a": fresh("llama", seed=1)})
    with suppress(Exception):
        model.attach_expert("new", path)
    assert not flag.exists() and not asked


def test_a_path_means_its_files(adapter):
    """A path is loaded, even if a model that once came from there, and was changed since, is an expert already."""
    changed = AutoModelForCausalLM.from_pretrained(adapter / "code")
    with torch.no_grad():
        changed.lm_head.weight.zero_()
        changed.model.layers[1].mlp.down_proj.weight.zero_()
    model = stitch(fresh("llama"), {"changed": changed})
    model.attach_expert("code", str(adapter / "code"))
    randomize(model)
    expected = expected_logits(model, pristine("llama"), {"changed": changed, "code": pristine("llama", seed=1)})
    assert_near(logits(model), expected, 1e-4)


def test_adapters_that_cannot_be_experts(tmp_path, adapter):
    """A stitch adapter or a soft prompt in the place of an expert."""
    prompt = get_peft_model(fresh("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompt.save_pretrained(tmp_path / "prompt")
    model = stitched()
    for folder, kind in [(tmp_path / "prompt", "PROMPT_TUNING"), (adapter / "adapter", "STITCH")]:
        with refused(model, match=rf"(?s)'new'.*{folder}.*{kind}.*cannot be experts"):
            model.attach_expert("new", str(folder))


def test_lora_of_another_hub(tmp_path):
    """A LoRA that does not fit the hub it claims to be of."""
    lora = get_peft_model(fresh("llama", width=48), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    model = stitched()
    with refused(model, match="'new'", error=(ValueError, RuntimeError)):
        model.attach_expert("new", str(tmp_path))


# ----------------------------------------------------------------------------------------------- forwards and the rest


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


def test_merging():
    """No single model's weights can express a stitched model: merging is refused, unloading works."""
    model = stitched()
    for merge in (model.merge_and_unload, model.merge_adapter, model.base_model.merge_and_unload):
        with refused(model, match=r"cannot be merged into the hub.*unload\(\)"):
            merge()
    assert torch.equal(logits(model.unload()), logits(pristine("llama")))


def test_two_active_adapters():
    """One adapter at a time: two schedules cannot both run."""
    model = stitched()
    model.add_adapter("second", config(num_stitches=2))
    with refused(model, match=r"Only one stitch adapter.*\['default', 'second'\]"):
        model.base_model.set_adapter(["default", "second"])
    with refused(model, match="adapter_names"):
        model(input_ids=IDS, adapter_names=["default", "second"])
    with refused(model, match="third", error=(ValueError, KeyError)):
        model.set_adapter("third")
    with refused(model, match="third", error=(ValueError, KeyError)):
        model.delete_adapter("third")


def test_mixed_model():
    """PEFT's mixed models take no stitches, and say so."""
    hub = fresh("llama")
    with refused(hub, match="STITCH"):
        get_peft_model(hub, config(), mixed=True)


def test_direct_injection(adapter):
    """Ways round `get_peft_model` would lose the experts; PEFT refuses them, and the hub stays whole."""
    hub = fresh("llama")
    with refused(hub, match="STITCH.*get_peft_model"):
        inject_adapter_in_model(config(experts={"code": str(adapter / "code")}), hub)
    with refused(hub, match="STITCH.*get_peft_model"):
        hub.load_adapter(str(adapter / "adapter"))
    with pytest.raises(ValueError, match=r"STITCH.*get_peft_model"):
        AutoModelForCausalLM.from_pretrained(adapter / "adapter")


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


# ----------------------------------------------------------------------------------------------- interrupted forwards


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


@pytest.mark.parametrize("arch", FAMILIES)
def test_bad_calls_of_the_hub(arch):
    """Calls that the hub itself refuses leave nothing behind, either."""
    model = stitch(fresh(arch), {"a": fresh("llama", seed=1)})
    for call in ({}, {"input_ids": IDS + 1000}, {"input_ids": IDS, "attention_mask": torch.ones(3, 5, 7)}):
        before = logits(model)
        with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
            model(**call)
        assert torch.equal(logits(model), before)

"""Names and models that cannot be experts get an error that says why; everything stays usable as it was."""

import copy
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM, BertConfig, BertLMHeadModel, T5Config

from peft_bts import StitchConfig
from tests.helpers.bad_input import config, expert_refused, picture, refused, same_picture, stitched
from tests.helpers.models import assert_near, expected_logits, fresh, logits, pristine, stitch
from tests.helpers.zoo import UNSUPPORTED


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


ATTRIBUTES = vars(torch.nn.Module())


@torch.no_grad()
def test_every_name_that_modules_know():
    """Names of methods and class attributes work in all that torch does to modules; those of each instance do not."""
    expert = fresh("llama", seed=1)
    model = stitched()
    for name in sorted(set(dir(torch.nn.Module())) - set(ATTRIBUTES)):
        model.attach_expert(name, expert)
    before = logits(model)
    model.train().eval()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    assert twin.half().base_model.experts["default"]["half"].model.dtype == torch.float16
    for name in ATTRIBUTES:
        with refused(model, match=rf"'{name}' is taken: every module"):
            model.attach_expert(name, expert)
    with pytest.raises(ValueError, match="'training' is taken"):
        config(experts={"training": "org/model"})


@pytest.mark.parametrize("name", ["training", "eval", "items", "_modules"])
def test_adapter_names_that_modules_know(name):
    """PEFT keeps stitches by adapter in a module, too."""
    hub = fresh("llama")
    with refused(hub, match=f"Adapter name {name!r} is taken"):
        get_peft_model(hub, config(), adapter_name=name)
    model = stitched()
    with refused(model, match=f"Adapter name {name!r} is taken"):
        model.add_adapter(name, config())


# --------------------------------------------------------------------------------------------------- the expert itself


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

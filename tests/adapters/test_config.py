"""Options that mean nothing, and adapter names that would lose weights, are refused before a hub is touched."""

import re

import pytest
import torch
from peft import get_peft_model

from tests.helpers.bad_input import config, refused, stitched
from tests.helpers.models import fresh


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_stitches": 0, "output": "hub"}, r"num_stitches.*at least 1.*0"),
        ({"num_stitches": -2, "output": "hub"}, r"num_stitches.*at least 1.*-2"),
        ({"num_stitches": -2}, r"num_stitches.*at least 0.*-2"),
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
        ({"gate_dropout": "0.1"}, r"gate_dropout.*number.*'0\.1'"),
        ({"gate_dropout": None}, r"gate_dropout.*number.*None"),
        ({"gate_bias": "no"}, r"gate_bias must be True or False.*'no'"),
        ({"init_weights": None}, r"init_weights must be True or False.*None"),
        ({"layers_to_stitch": []}, r"layers_to_stitch.*0-based.*\[\]"),
        ({"layers_to_stitch": [2, 1, 3]}, r"layers_to_stitch.*rising.*\[2, 1, 3\]"),
        ({"layers_to_stitch": [1, 1, 3]}, r"layers_to_stitch.*rising.*\[1, 1, 3\]"),
        ({"layers_to_stitch": [-1, 3]}, r"layers_to_stitch.*\[-1, 3\]"),
        ({"layers_to_stitch": 3}, r"layers_to_stitch must be a rising list.*3"),
        ({"layers_to_stitch": "13"}, r"layers_to_stitch must be a rising list.*'13'"),
        ({"layers_to_stitch": [0.5, 3]}, r"layers_to_stitch.*\[0\.5, 3\]"),
        ({"modules_to_save": "down_proj"}, r"modules_to_save must be a list.*'down_proj'"),
        ({"modules_to_save": ["lm_head", 3]}, r"modules_to_save must be a list.*3"),
        ({"modules_to_save": [""]}, r"modules_to_save must be a list.*\['']"),
        ({"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\] means nothing.*num_stitches"),
        ({"target_modules": "all-linear"}, r"target_modules='all-linear' means nothing"),
        ({"experts": ["org/a"]}, r"experts must be a dict.*list"),
        ({"experts": {"a": 3}}, r"'a'.*int.*id, a path or a dict"),
        ({"experts": {"a": torch.nn.Linear(1, 1)}}, r"'a'.*Linear.*attach_expert\('a', "),
        ({"experts": {"a": {"model": "x", "trust_remote_code": True}}}, r"'a'.*\['trust_remote_code'\].*model, rev"),
        ({"experts": {"a": {"path": "x"}}}, r"'a'.*\['path'\].*model, rev"),
        ({"experts": {"a": {"model": "x", "config": "llama"}}}, r"'a' has config='llama'; expected a dict"),
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
        ({"r": 65}, r"r=65 is above the hub's width, 32"),
        ({"r": 10**9}, r"r=1000000000 is above the hub's width"),
        ({"modules_to_save": ["nonexist"]}, r"has 'nonexist', and no module of the hub has a name that ends so"),
        ({"modules_to_save": ["lm_head", "mlp"]}, r"'mlp'.*'mlp\.gate_proj', 'mlp\.up_proj', 'mlp\.down_proj'\."),
        ({"modules_to_save": ["input_layernorm"]}, r"'input_layernorm'.*nothing; leave it out"),
        ({"modules_to_save": ["layers.3"]}, r"'layers\.3'.*a decoder layer with a stitch behind it"),
        ({"modules_to_save": ["layers"]}, r"'layers'.*something that holds one"),
        ({"modules_to_save": ["layers.3.mlp.up_proj"]}, r"called 'model\.layers\.3\.base_layer\.mlp\.up_proj'"),
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


KEY_PARTS = [
    "stitch_layer",
    "stitch_output",
    "evidence_weight",
    "gate",
    "proj",
    "up",
    "down",
    "base_model",
    "model",
    "layers",
    "for_a",
]


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

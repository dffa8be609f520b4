"""What most tests share: inputs, stitched models with random stitches, and what the reference says of them.

Models come from the zoo. The package gets its own copies; the reference gets ones that the package never touches.
"""

import copy
import functools
import json
import os
import tempfile

import torch
from peft import get_peft_model
from safetensors.torch import load_file

from peft_bts import StitchConfig
from tests.helpers.reference import reference_forward
from tests.helpers.zoo import tiny_model


IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
RIGHT = torch.ones_like(IDS).masked_fill(torch.arange(12) >= torch.tensor([[12], [8]]), 0)
LEFT = RIGHT.flip(1)
MASKS = {"full": None, "left": LEFT, "right": RIGHT}
FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "bloom", "bamba"]  # one for each shape of decoder loop


pristine = functools.cache(tiny_model)  # for the reference, which only reads


def fresh(arch, **options):
    """A copy that the package may wrap and freeze."""
    return copy.deepcopy(pristine(arch, **options))


def both(arch, **options):
    """The same model twice: for the package, and for the reference."""
    return fresh(arch, **options), pristine(arch, **options)


def randomize(model, seed=0):
    """Make every stitch weight matter: gates far from uniform, projections near the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".stitch_layer." in name or ".stitch_output." in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((noise / parameter.shape[-1] ** 0.5).to(parameter.dtype))
    return model


def stitch(hub, attach, *, autocast_adapter_dtype=True, **config):
    """A stitched model in eval mode, of the paper's form unless told otherwise, made the way users make it.

    Its stitches are random.
    """
    config = StitchConfig(task_type="CAUSAL_LM", **{"output": "hub"} | config)
    model = get_peft_model(hub, config, autocast_adapter_dtype=autocast_adapter_dtype)
    for name, expert in attach.items():
        model.attach_expert(name, expert)
    return randomize(model).eval()


def adapter_file(model):
    """The tensors and the config that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with open(os.path.join(folder, "adapter_config.json")) as file:
            return load_file(os.path.join(folder, "adapter_model.safetensors")), json.load(file)


def expected_logits(model, hub, experts, input_ids=IDS, **kwargs):
    """What the reference makes of the adapter file of `model` and of models that `model` never touched."""
    tensors, config = adapter_file(model)
    with torch.no_grad():
        return reference_forward(hub, experts, tensors, config, input_ids, **kwargs)


def cache_layers(cache):
    """The layers of the hub's and of all experts' caches: those of the experts are held by one more layer."""
    return [one for layer in cache.layers for one in getattr(layer, "layers", [layer])]


@torch.no_grad()
def logits(model, input_ids=IDS, **kwargs):
    return model(input_ids=input_ids, **kwargs).logits


def assert_near(actual, expected, tolerance):
    """Equal up to `tolerance` times the largest expected value; NaN is never equal."""
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"off by {error:.1e} of the largest value"

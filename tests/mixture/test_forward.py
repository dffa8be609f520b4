"""`output="mixture"`: the logits are the log probabilities that the reference makes of the plain models' own logits."""

import inspect

import pytest
import torch

from tests.helpers.models import (
    FAMILIES,
    IDS,
    LEFT,
    MASKS,
    adapter_file,
    assert_near,
    both,
    expected_logits,
    fresh,
    logits,
    pristine,
    stitch,
)
from tests.helpers.reference import reference_forward
from tests.helpers.zoo import ARCHITECTURES, NO_FLOAT64_PADDING


FLOAT64, FLOAT32 = 1e-5, 2e-4  # of the largest log probability; norms pass through float32 even in float64
ALONE = {"num_stitches": 0}
STITCHED = {"num_stitches": 2}


def check(hub, experts, *, tolerance=FLOAT64, input_ids=IDS, call=None, dtype=torch.float64, **options):
    """Mix zoo models, given as (arch, options), and compare with the reference."""
    hub, plain_hub = both(hub[0], dtype=dtype, **hub[1])
    pairs = {name: both(arch, dtype=dtype, **kwargs) for name, (arch, kwargs) in experts.items()}
    model = stitch(hub, {name: pair[0] for name, pair in pairs.items()}, output="mixture", **options)
    actual = logits(model, input_ids, **(call or {}))
    expected = expected_logits(
        model, plain_hub, {name: pair[1] for name, pair in pairs.items()}, input_ids, **(call or {})
    )
    assert actual.dtype == dtype
    assert_near(actual, expected, tolerance)
    torch.testing.assert_close(actual.exp().sum(-1), torch.ones_like(actual[..., 0]))
    return model


def precision(archs, mask):
    float32 = mask is not None and any(name in NO_FLOAT64_PADDING for name in archs)
    return {"dtype": torch.float32, "tolerance": FLOAT32} if float32 else {"dtype": torch.float64}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architecture(arch, mask):
    """Every architecture as hub and as expert, with what it does to logits, of unequal depths and widths."""
    experts = {"a": (arch, {"seed": 1}), "b": (arch, {"seed": 2, "layers": 6, "width": 48})}
    mask = MASKS[mask]
    for options in (ALONE, STITCHED):
        check((arch, {}), experts, call={"attention_mask": mask}, **options, **precision([arch], mask))

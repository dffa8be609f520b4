"""Configurations that nobody thought of, against the reference."""

import random

import pytest
import torch

from tests.helpers.models import IDS, MASKS, assert_near, both, expected_logits, logits, stitch
from tests.helpers.zoo import ARCHITECTURES, NO_FLOAT64_PADDING


FLOAT64, FLOAT32 = 1e-5, 2e-4  # as in test_forward.py


def configuration(number):
    """A hub, experts, options and a mask, all drawn at random; the same for the same number."""
    rng = random.Random(number)
    layers = rng.randint(3, 7)
    archs = rng.choices(ARCHITECTURES, k=rng.randint(2, 4))
    if rng.random() < 0.4:
        archs = archs[:1] * len(archs)
    mixture = rng.random() < 0.3
    options = {
        "output": "mixture" if mixture else "hub",
        "num_stitches": rng.randint(0 if mixture else 1, layers),
        "pattern": rng.choice(["alternating", "experts_into_hub"]),
        "expert_streams": rng.choice(["intact", "intact", "projected"]),
        "gate": rng.choice(["channel", "token"]),
        "gate_bias": rng.random() < 0.5,
        "gate_dropout": rng.choice([0.0, 0.3]),  # the models are in eval mode
        "r": rng.choice([None, None, 1, 5, 32]),
        "init_weights": rng.random() < 0.5,
    }
    if mixture and number % 2:
        options["evidence"] = [0.5, 0.9, 1.0][number % 3]
    if rng.random() < 0.3:
        options["layers_to_stitch"] = sorted({*rng.sample(range(layers), rng.randint(1, layers)), layers - 1})
    same_width = options["expert_streams"] == "projected"
    models = {}
    for index, arch in enumerate(archs[1:], start=1):
        width = 32 if same_width else rng.choice([32, 48])
        models[f"e{index}"] = arch, {"seed": index, "layers": rng.randint(2, 8), "width": width}
    return (archs[0], {"layers": layers}), models, options, rng.choice(list(MASKS)), rng.random() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("number", range(60))
def test_any_configuration(number):
    """The same logits as the reference, in one go and, where that is drawn, with a cache and in two parts."""
    (arch, sizes), experts, options, mask, cached = configuration(number)
    archs = [arch, *(expert for expert, _ in experts.values())]
    float32 = mask != "full" and any(name in NO_FLOAT64_PADDING for name in archs)
    dtype, tolerance = (torch.float32, FLOAT32) if float32 else (torch.float64, FLOAT64)
    hub, plain_hub = both(arch, dtype=dtype, **sizes)
    pairs = {name: both(expert, dtype=dtype, **kwargs) for name, (expert, kwargs) in experts.items()}
    model = stitch(hub, {name: pair[0] for name, pair in pairs.items()}, **options)
    call = {} if mask == "full" else {"attention_mask": MASKS[mask]}
    expected = expected_logits(model, plain_hub, {name: pair[1] for name, pair in pairs.items()}, **call)
    assert_near(logits(model, **call), expected, tolerance)
    with model.disable_adapter():
        assert torch.equal(logits(model, **call), logits(plain_hub, **call))
    if cached and mask == "full":
        with torch.no_grad():
            first = model(input_ids=IDS[:, :7], use_cache=True)
            second = model(input_ids=IDS[:, 7:], past_key_values=first.past_key_values)
        assert_near(torch.cat([first.logits, second.logits], dim=1), expected, max(tolerance, 1e-4))

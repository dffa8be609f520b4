"""Gradients of stitched models, by name of the weight."""

from tests.helpers.models import IDS, assert_near


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def backward(model, **call):
    """The gradients of a loss on every logit, by name of the weight."""
    model.zero_grad()
    loss = model(input_ids=IDS, **call).logits.double().square().mean()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    assert not [n for n, p in model.named_parameters() if p.grad is not None and n not in gradients]
    return gradients


def close(actual, expected, tolerance):
    assert actual.keys() == expected.keys() and expected
    for name in expected:
        assert expected[name].abs().max() > 0
        assert_near(actual[name], expected[name], tolerance)

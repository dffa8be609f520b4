"""A method's weights: how many there are, and those that were trained, to keep and to load."""

from typing import Union

import torch
from torch import nn

from .ensembles import BTM, Routing
from .mixtures import MixedFFN


Method = Union[nn.Module, BTM, Routing]


def modules_of(method: Method) -> list[nn.Module]:
    if isinstance(method, nn.Module):
        return [method]
    return [*method.models, *([method.router] if isinstance(method, Routing) else [])]


def count_trained(method: Method) -> int:
    return sum(p.numel() for module in modules_of(method) for p in module.parameters() if p.requires_grad)


def count_parameters(method: Method) -> dict[str, int]:
    """Trained, total, and those that work on one token."""
    total = sum({p: p.numel() for module in modules_of(method) for p in module.parameters()}.values())
    idle = 0
    if isinstance(method, Routing):
        idle = sum(p.numel() for model in method.models[1:] for p in model.parameters())
    elif isinstance(method, nn.Module):
        for module in method.modules():
            if isinstance(module, MixedFFN) and module.router.kind == "sample":
                idle += sum(p.numel() for ffn in module.ffns[1:] for p in ffn.parameters())
    return {"trained": count_trained(method), "total": total, "active": total - idle}


def trained_weights(method: Method) -> dict[str, torch.Tensor]:
    module = method.router if isinstance(method, Routing) else method
    return {name: p.detach().cpu().clone() for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trained(method: Method, weights: dict[str, torch.Tensor]) -> Method:
    module = method.router if isinstance(method, Routing) else method
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if parameters.keys() != weights.keys():
        raise ValueError(f"weights do not fit: {sorted(parameters.keys() ^ weights.keys())[:4]} ...")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    return method

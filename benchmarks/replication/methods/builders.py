"""How methods are built from the seed and the experts of a set, and what of them is trained."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from peft_bts import StitchConfig
from peft_bts.stitch import HUB, ExpertsIntoHub, HubIntoExperts
from peft_bts.toy import average_weights

from .ensembles import BTM, Routing
from .mixtures import MixedFFN


@dataclass
class Models:
    """The trained seed and experts of one set, as folders."""

    folders: dict[str, Path]
    device: str

    def load(self, name: str) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(self.folders[name]).to(self.device).eval().requires_grad_(False)

    def load_all(self, experts: list[str]) -> list[LlamaForCausalLM]:
        return [self.load(name) for name in ["seed", *experts]]


# --- Nothing trained, or only a router ------------------------------------------------------------------------------


def soup(models: Models, experts: list[str]) -> nn.Module:
    return average_weights(models.load_all(experts)).to(models.device).requires_grad_(False)


def btm(models: Models, experts: list[str]) -> BTM:
    return BTM(models.load_all(experts))


def routing(models: Models, experts: list[str]) -> Routing:
    return Routing(models.load_all(experts))


# --- Trained --------------------------------------------------------------------------------------------------------


def dense(models: Models, experts: list[str], start: str = "seed") -> nn.Module:
    return models.load(start).requires_grad_(True)


def lora(models: Models, experts: list[str]) -> nn.Module:
    """A LoRA of all linear layers of the seed, of the rank whose weights are as many as the stitches', nearly."""
    model = models.load("seed")
    per_rank = sum(sum(m.weight.shape) for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    rank = max(1, round(count_trained(stitched()(models, experts)) / per_rank))
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules="all-linear")
    return get_peft_model(model, config).eval()


def stitched(hub: str = "seed", init: str = "identity", **options: Any) -> Callable:
    """Branch-Train-Stitch. `init`: "identity" (StitchConfig's), "torch" (random), "near_seed" (gates shut)."""

    def build(models: Models, experts: list[str]) -> nn.Module:
        beside = {name: str(models.folders[name]) for name in ["seed", *experts] if name != hub}
        model = models.load(hub)
        chosen = dict(options)
        if chosen.get("num_stitches") == "L":
            chosen["num_stitches"] = model.config.num_hidden_layers
        config = StitchConfig(task_type="CAUSAL_LM", experts=beside, init_weights=init != "torch", **chosen)
        model = get_peft_model(model, config)
        if init == "near_seed":
            shut_gates(model)
        return model.eval()

    return build


@torch.no_grad()
def shut_gates(model: nn.Module) -> None:
    """Start as the hub alone, nearly: it listens to itself (99%), and the experts hear nothing of it."""
    for stitch in model.modules():
        if isinstance(stitch, ExpertsIntoHub):
            stitch.gate.of(HUB).bias.fill_(6.0)
        elif isinstance(stitch, HubIntoExperts):
            for name in stitch.experts:
                stitch.gate.of(name).bias.fill_(-6.0)


# --- Parameters -----------------------------------------------------------------------------------------------------

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

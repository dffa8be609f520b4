"""How methods are built from the seed and the experts of a set; what of them is to be trained requires gradients."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_bts import StitchConfig
from peft_bts.stitch import HUB, ExpertsIntoHub, HubIntoExperts
from peft_bts.toy import average_weights

from ..branching.trained import Models
from .ensembles import BTM, Routing
from .parameters import Method, count_trained
from .token_router import TokenRouter


Build = Callable[[Models, list[str]], Method]


# --- Nothing trained, or only a router ------------------------------------------------------------------------------


def alone(name: str) -> Build:
    """The seed, or an expert, alone."""
    return lambda models, experts: models.load(name)


def soup(models: Models, experts: list[str]) -> nn.Module:
    return average_weights(models.load_all(experts)).to(models.device).requires_grad_(False)


def btm(forgetting: float = 1.0) -> Build:
    return lambda models, experts: BTM(models.load_all(experts), forgetting)


def routing(models: Models, experts: list[str]) -> Routing:
    return Routing(models.load_all(experts))


def token_router(models: Models, experts: list[str]) -> TokenRouter:
    return TokenRouter(models.load_all(experts)).to(models.device)


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


def stitched(hub: str = "seed", init: str = "identity", **options: Any) -> Build:
    """Branch-Train-Stitch, in the paper's form where no option says otherwise.

    `init`: "identity" (StitchConfig's), "torch" (random), "near_seed" (gates shut).
    """

    def build(models: Models, experts: list[str]) -> nn.Module:
        beside = {name: str(models.folders[name]) for name in ["seed", *experts] if name != hub}
        model = models.load(hub)
        chosen = {"output": "hub", **options}
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

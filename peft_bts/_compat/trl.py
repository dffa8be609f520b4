"""Adaptations to TRL's insides (1.16.0). The library itself is optional, and imported only where it calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


# From the arguments of a causal LM by name (but labels), targets (B, T), and what is wanted of the log probabilities
# (N, V) at N tokens and their targets (N,), to what the causal LM returns, and what was found, (B, T) each.
MeasureTokens = Callable[
    [dict[str, Any], Tensor, Callable[[Tensor, Tensor], tuple[Tensor, ...]]], tuple[Any, list[Tensor]]
]


# Arguments of the fused head that the causal LM does not take.
_OWN = ("fused_lm_head", "labels", "shift_labels", "num_items_in_batch")


def is_fused(forward: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a call asks for the fused head that TRL's trainers give a model (`add_fused_lm_head`)."""
    return bool(kwargs.get("fused_lm_head")) and "original_forward" in _settings(forward)


def fused_output(forward: Callable[..., Any], measure: MeasureTokens, kwargs: dict[str, Any]) -> Any:
    """Return what TRL's fused head returns, of other logits than those of the model's own head.

    TRL's trainers replace the model's `forward`. With `fused_lm_head=True` theirs calls the backbone, multiplies its
    states by the weight of the head, and returns log probabilities of the labels, with statistics: here they are of
    the distribution that `measure` knows.

    It could be removed if the fused head asked the model for its logits, chunk by chunk.

    Args:
        forward: TRL's `forward`, which holds the temperature and which statistics its trainer wants.
        measure: Runs the model over the tokens that have targets.
        kwargs: Those of the call.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    settings = _settings(forward)
    call = {name: value for name, value in kwargs.items() if name not in _OWN}
    if getattr(settings["text_config"], "output_router_logits", False):
        call.setdefault("output_router_logits", True)
    shifted = kwargs.get("shift_labels")
    targets_BT = kwargs["labels"][:, 1:] if shifted is None else shifted
    wanted = ["log_probs", *(name for name in settings["outputs"] if name != "log_probs")]
    out, found = measure(
        {**call, "use_cache": False}, targets_BT, partial(_statistics, wanted, settings["temperature"])
    )
    per_token = dict(zip(wanted, found))
    mask = (targets_BT != -100).to(found[0].device)
    number = kwargs.get("num_items_in_batch")
    loss = -per_token["log_probs"].sum() / (mask.sum().clamp(min=1) if number is None else number)
    aux_loss = out.get("aux_loss") if call.get("output_router_logits") else None
    if aux_loss is not None:
        loss = loss + getattr(settings["text_config"], "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **per_token)


def _settings(forward: Callable[..., Any]) -> dict[str, Any]:
    """Return what TRL's `forward` closes over: `temperature`, `outputs`, `text_config`, `original_forward`."""
    function = getattr(forward, "__func__", None)
    return {} if function is None else dict(inspect.getclosurevars(function).nonlocals)


def _statistics(wanted: list[str], temperature: float, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, ...]:
    """The wanted fields of `FusedCausalLMOutput`, (N,) each, as its docstring defines them."""
    scaled_NV = logits_NV / temperature
    logp_NV = scaled_NV.log_softmax(dim=-1)
    detached_NV = logp_NV.detach()
    finite_NV = logp_NV.masked_fill(detached_NV == -torch.inf, 0.0)  # 0 log 0 is 0, and so is its gradient
    compute: dict[str, Callable[[], Tensor]] = {
        "log_probs": lambda: logp_NV.gather(1, targets_N[:, None])[:, 0],
        "entropy": lambda: -(logp_NV.exp() * finite_NV).sum(dim=-1),
        "log_sum_sq_probs": lambda: (2 * detached_NV).logsumexp(dim=-1),
        "mean_logits": lambda: scaled_NV.detach().mean(dim=-1),
        "is_top1": lambda: detached_NV.argmax(dim=-1) == targets_N,
    }
    return tuple(compute[name]() for name in wanted)

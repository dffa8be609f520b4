"""States of models over processes in training: who has one sends it, and gradients come back the same way.

Between two stitches every model runs where its weights are. At a stitch all processes get all states, and all compute
the stitch, and behind the last one the loss: so each has the whole gradient of all stitch weights, and optimisers,
clipping, DDP and saving find what they find in one process. Of the states, each process has the gradients of those
whose models it runs, and computes no others. What a new state's gradient lacks, where its model is not, is the way
through that model's layers. It is fetched from the process that has them, in the backward pass of `enter`.

All processes take part in the same collectives in the same order: one in the forward of each stitch, one in the
backward of each, and the latter are a chain, since each waits for the gradients of the one behind. So the graphs have
the same shape everywhere: what was received is `linked` to what stands for it, although no gradient goes that way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from .processes import Processes


def meet(processes: Processes, tensors: Sequence[Tensor], owners: Sequence[int], point: object) -> list[Tensor]:
    """Give every process the states that the owners have: its own as they are, others' without a gradient.

    Args:
        processes: Those that take part.
        tensors: A state for each model; where the model is not, anything of the same shape.
        owners: The process that each model is on.
        point: Tells this exchange from others; what is sent at one always has the same dtypes.
    """
    dtypes = processes.agreed_dtypes(point, [tensor.dtype for tensor in tensors], owners)
    received = processes.from_owners([tensor.detach() for tensor in tensors], owners, dtypes)
    return [tensor if owner == processes.index else value for tensor, owner, value in zip(tensors, owners, received)]


def linked(tensor: Tensor, before: Sequence[Tensor]) -> Tensor:
    """The same tensor; its backward pass goes on to those `before` it, with no gradient for them."""
    before = [one for one in before if one.requires_grad]
    return _Linked.apply(tensor, *before) if before and torch.is_grad_enabled() else tensor


def enter(processes: Processes, tensors: Sequence[Tensor], owners: Sequence[int]) -> list[Tensor]:
    """The same states, from which every model goes on where it is: gradients will come from the owners.

    Args:
        processes: Those that take part.
        tensors: A state for each model, the same in all processes.
        owners: The process that each model is on.
    """
    needed = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
    entered = list(tensors)
    if needed and torch.is_grad_enabled():
        new = _Entered.apply(processes, [owners[i] for i in needed], *(tensors[i] for i in needed))
        for i, tensor in zip(needed, new):
            entered[i] = tensor
    return entered


class _Linked(torch.autograd.Function):
    """The identity, that needs a gradient if any of those before it does."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *before: Tensor) -> Tensor:
        ctx.before = len(before)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        return gradient, *[None] * ctx.before


class _Entered(torch.autograd.Function):
    """The identity, whose gradients are those of the owners."""

    @staticmethod
    def forward(ctx: Any, processes: Processes, owners: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.processes, ctx.owners = processes, owners
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        dtypes = [gradient.dtype for gradient in gradients]
        return None, None, *ctx.processes.from_owners(gradients, ctx.owners, dtypes)

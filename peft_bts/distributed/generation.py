"""`generate()` over several processes: all of them choose the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel

from .processes import Processes


@contextmanager
def generation_in_step(processes: Processes, hub: PreTrainedModel, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Keep processes in step while each of them generates the same text.

    Every process chooses the tokens by itself, from what the first one has: its logits, which may differ from others'
    in the last bits, and its random numbers. So all modes of `generate()` work, which a broadcast of tokens would have
    to know one by one.

    Args:
        processes: The processes.
        hub: The causal LM whose `generate` is called.
        kwargs: Those of the call.

    Raises:
        ValueError: For a limit in seconds, which processes do not reach at the same token.
    """
    config = kwargs.get("generation_config") or hub.generation_config
    if (kwargs.get("max_time") or getattr(config, "max_time", None)) is not None:
        raise ValueError(
            "max_time is not supported under expert_parallel(): the processes would stop at different tokens. Use "
            "max_new_tokens."
        )
    torch.set_rng_state(processes.first_ones(torch.get_rng_state()))
    if hub.device.type == "cuda":
        torch.cuda.set_rng_state(processes.first_ones(torch.cuda.get_rng_state(hub.device)), hub.device)
    drafting: Optional[nn.Module] = kwargs.get("assistant_model")
    with ExitStack() as stack:
        for model in (hub, drafting):
            if isinstance(model, nn.Module):
                hook = model.register_forward_hook(lambda module, args, out: _with_first_logits(processes, out))
                stack.callback(hook.remove)
        yield


def _with_first_logits(processes: Processes, out: Any) -> Any:
    if isinstance(out, tuple):
        return (processes.first_ones(out[0]), *out[1:])
    out.logits = processes.first_ones(out.logits)
    return out

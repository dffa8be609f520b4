"""`MixedHead`: the hub's causal LM speaks for all models (`output="mixture"`).

It stands in for the `forward` of the hub's causal LM. The hub's own `forward` runs the models as always; then the
logits are made of what all of them say: log probabilities of the mixture, in chunks of tokens, so that the logits of
all models for all tokens are never in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..mixture import OutputMixture, log_probs, mix
from .head import ModelHead
from .hooks import Body, ForwardRunner, InstanceForward


# How many logits of one model are made at a time: 64 MiB of float32.
_CHUNK = 2**24

_IGNORED = -100  # of labels, as everywhere in transformers
_LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels")


class MixedHead(InstanceForward):
    """Stands in for the `forward` of a hub's causal LM.

    Args:
        hub: The causal LM.
        runner: Runs the forwards of its backbone.
        active: Says what a forward that starts now uses: the gates, and whether there are stitches besides. `None`
            where the hub speaks alone.
        head: The hub's own head.
    """

    def __init__(
        self,
        hub: PreTrainedModel,
        runner: ForwardRunner,
        active: Callable[[], Optional[tuple[OutputMixture, bool]]],
        head: ModelHead,
    ) -> None:
        super().__init__(hub)
        self._hub, self._runner, self._active, self._head = hub, runner, active, head

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        active = self._active()
        if active is None:
            return self._forward(*args, **kwargs)
        gates, stitched = active
        call = self._by_name(args, kwargs)
        labels, keep = call.pop("labels", None), call.pop("logits_to_keep", 0)
        as_tuple = call.pop("return_dict", None) is False
        loss_arguments = {name: call[name] for name in _LOSS_ARGUMENTS if name in call}
        # The hub's logits are made below, in chunks; here its own head has as little to do as possible.
        little = {"logits_to_keep": 1} if "logits_to_keep" in self.__signature__.parameters else {}
        with torch.no_grad() if not stitched and self._nothing_trained(call) else nullcontext():
            out, body = self._runner.await_body(partial(self._forward, **call, **little, return_dict=True))
        names = sorted(body.experts.by_name)
        body.state.see_output(body.hub_BTD, gates)
        log_gates_BTM = gates.log_gates(body.hub_BTD, names, _present_tokens(body))
        body.state.note_output_gates(names, log_gates_BTM.detach())
        body.state.finish()
        positions = slice(-keep, None) if isinstance(keep, int) else keep
        targets_BT = None
        if labels is not None:
            targets_BT = _next_tokens(labels, loss_arguments.get("shift_labels"))[:, positions]
        logits, log_likelihood_BT = self._mix(body, names, log_gates_BTM, positions, targets_BT, out.logits.shape[-1])
        loss = None
        if targets_BT is not None and log_likelihood_BT is not None:
            loss_function = self._hub.loss_function
            if loss_function is ForCausalLMLoss:  # the same number, with no gradient the size of the vocabulary
                loss = _mean(-log_likelihood_BT, targets_BT != _IGNORED, loss_arguments.get("num_items_in_batch"))
            else:
                loss = loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_arguments)
        rest = {name: value for name, value in out.items() if name not in ("loss", "logits")}
        mixed = type(out)(loss=loss, logits=logits, **rest)
        return mixed.to_tuple() if as_tuple else mixed

    def _nothing_trained(self, call: dict[str, Any]) -> bool:
        """Whether the gates alone are trained: what the models compute then needs no gradient."""
        embeds = call.get("inputs_embeds")
        return not (embeds is not None and embeds.requires_grad) and not any(
            p.requires_grad for name, p in self._module.named_parameters() if "stitch_output." not in name
        )

    def _mix(
        self,
        body: Body,
        names: Sequence[str],
        log_gates_BTM: Tensor,
        positions: Union[slice, Tensor],
        targets_BT: Optional[Tensor],
        vocab: int,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """The mixture's log probabilities at some T' positions, (B, T', V); and of targets (B, T'), if given."""
        states = [body.hub_BTD, *(body.experts.by_name[name] for name in names)]
        states = [state[:, positions].flatten(0, 1) for state in states]  # (N, D) each
        log_gates_NM = log_gates_BTM[:, positions]
        batch, tokens = log_gates_NM.shape[:2]
        log_gates_NM = log_gates_NM.flatten(0, 1)
        targets_N = None if targets_BT is None else targets_BT.to(log_gates_NM.device).flatten()
        run = partial(self._chunk, [body.state.composition.experts[name] for name in names], vocab)
        if torch.is_grad_enabled() and (log_gates_NM.requires_grad or any(state.requires_grad for state in states)):
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        size = max(1, _CHUNK // vocab)
        pieces = [
            run(log_gates_NM[start : start + size], targets, *(state[start : start + size] for state in states))
            for start in range(0, len(log_gates_NM), size)
            for targets in [None if targets_N is None else targets_N[start : start + size]]
        ]
        logits_BTV = torch.cat([mixed_NV for mixed_NV, _ in pieces]).unflatten(0, (batch, tokens))
        if targets_N is None:
            return logits_BTV, None
        of_targets_NM = torch.cat([piece for _, piece in pieces if piece is not None])
        log_likelihood_N = (log_gates_NM.to(of_targets_NM.dtype) + of_targets_NM).logsumexp(dim=-1)
        return logits_BTV, log_likelihood_N.unflatten(0, (batch, tokens))

    def _chunk(
        self, experts: Sequence[Any], vocab: int, log_gates_NM: Tensor, targets_N: Optional[Tensor], *states: Tensor
    ) -> tuple[Tensor, Optional[Tensor]]:
        hub_ND, *others = states
        logits = [self._head.logits(hub_ND[None]), *(e.logits(state[None]) for e, state in zip(experts, others))]
        logps = [log_probs(logits_1NV[0].to(log_gates_NM.device), vocab) for logits_1NV in logits]
        mixed_NV = mix(log_gates_NM, logps)
        if targets_N is None:
            return mixed_NV, None
        index_N1 = targets_N.clamp(min=0)[:, None]
        return mixed_NV, torch.cat([logp_NV.gather(1, index_N1) for logp_NV in logps], dim=1)


def _present_tokens(body: Body) -> Optional[dict[str, Tensor]]:
    """Which tokens each expert takes part in, (B, T) and boolean by name; `None`: all."""
    if body.experts.present is None:
        return None
    shape = body.hub_BTD.shape[:2]
    return {name: present_B[:, None].expand(shape) for name, present_B in body.experts.present.items()}


def _next_tokens(labels: Tensor, shift_labels: Optional[Tensor]) -> Tensor:
    """What every token is to predict, (B, T), as `ForCausalLMLoss` has it."""
    return F.pad(labels, (0, 1), value=_IGNORED)[:, 1:] if shift_labels is None else shift_labels


def _mean(values: Tensor, counted: Tensor, number: Union[int, Tensor, None]) -> Tensor:
    """The sum of the values that count, by `number`, or else by how many they are."""
    counted = counted.to(values.device)
    total = torch.where(counted, values, 0.0).sum()
    if number is None:
        return total / counted.sum()
    return total / (number.to(total.device) if isinstance(number, Tensor) else number)

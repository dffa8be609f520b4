"""`MixedHead`: the hub's causal LM speaks for all models (`output="mixture"`).

It stands in for the `forward` of the hub's causal LM. The hub's own `forward` runs the models as always; then the
logits are made of what all of them say: log probabilities of the mixture, in chunks of tokens, so that the logits of
all models for all tokens are never in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..mixture import OutputMixture, evidence, log_probs, mix
from ..stitch import HUB
from .cache import cached_tokens, held_expert_caches
from .composition import StitchableExpert
from .decoder import text_config
from .evidence import Following, Memory, follow
from .head import ModelHead
from .hooks import Body, ForwardRunner, InstanceForward


# How many logits of one model are made at a time: 64 MiB of float32.
_CHUNK = 2**24

_IGNORED = -100  # of labels, as everywhere in transformers

# From what is said by the models that run in this process to what all say, the hub's first; in one process the same.
Share = Callable[[list[Tensor]], list[Tensor]]
# What is wanted of a chunk of tokens: from the gates' logarithms (N, M), each model's log probabilities (N, V), the
# targets (N,), if there are any, and how to share what is read of the models, to tensors (N, ...).
Read = Callable[[Tensor, list[Tensor], Optional[Tensor], Share], tuple[Tensor, ...]]
Measure = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # the same from the mixture's log probabilities and targets


class _Ready(NamedTuple):
    """The models' states and gates before any head has run.

    Attributes:
        states: What the hub's head reads, and the states behind the last layers of the experts, (B, T, D_i).
        experts: The experts, in the order of their states.
        log_gates_BTM: Logarithms of the gates.
        vocab: The hub's vocabulary.
        share: How processes share what their models say.
        spread: Whether there are several.
        last_BMV: With evidence and a cache, and without gradients: what each model says of the token that comes next.
    """

    states: list[Tensor]
    experts: list[StitchableExpert]
    log_gates_BTM: Tensor
    vocab: int
    share: Share
    spread: bool
    last_BMV: Optional[Tensor] = None


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
        call = self._by_name(args, kwargs)
        labels, keep = call.pop("labels", None), call.pop("logits_to_keep", 0)
        as_tuple = call.pop("return_dict", None) is False
        out, ready = self._run_models(call, *active)
        positions = slice(-keep, None) if isinstance(keep, int) else keep

        def select(of_tokens: Tensor) -> Tensor:
            return of_tokens[:, positions].flatten(0, 1)

        batch, tokens = ready.log_gates_BTM[:, positions].shape[:2]
        loss = None
        logits_NV: Optional[Tensor]
        if labels is None and ready.last_BMV is not None and ready.log_gates_BTM.shape[1] == 1 and tokens == 1:
            logits_NV = mix(select(ready.log_gates_BTM), list(ready.last_BMV.unbind(1)))  # said already
        elif labels is None:
            (logits_NV,) = self._in_chunks(ready, select, None, _mixture)
        else:
            loss_arguments = {name: call[name] for name in call if name not in self.__signature__.parameters}
            ignored = loss_arguments.get("ignore_index", _IGNORED)
            targets_N = select(_next_tokens(labels, loss_arguments.get("shift_labels"), ignored))
            known = targets_N != ignored
            usual_loss = self._hub.loss_function is ForCausalLMLoss
            # Where processes would have to send each other all logits only to train, there are none.
            read = _targets if usual_loss and ready.spread and torch.is_grad_enabled() else _mixture_and_targets
            found = self._in_chunks(ready, select, targets_N.masked_fill(~known, 0), read)
            logits_NV, of_targets_NM = (None if read is _targets else found[0]), found[-1]
            if usual_loss:
                # The same number, with no gradient the size of the vocabulary.
                log_likelihood_N = (select(ready.log_gates_BTM).to(of_targets_NM.dtype) + of_targets_NM).logsumexp(-1)
                loss = _mean(-log_likelihood_N, known, loss_arguments.get("num_items_in_batch"))
            else:
                assert logits_NV is not None
                logits = logits_NV.unflatten(0, (batch, tokens))
                loss = self._hub.loss_function(logits=logits, labels=labels, vocab_size=ready.vocab, **loss_arguments)
            if out.get("aux_loss") is not None:  # of a hub that is a mixture of experts, as its own forward adds it
                loss = loss + self._hub.router_aux_loss_coef * out["aux_loss"].to(loss.device)
        rest = {name: value for name, value in out.items() if name not in ("loss", "logits")}
        logits = None if logits_NV is None else logits_NV.unflatten(0, (batch, tokens))
        mixed = type(out)(loss=loss, logits=logits, **rest)
        return mixed.to_tuple() if as_tuple else mixed

    def measure(self, call: Mapping[str, Any], targets_BT: Tensor, measure: Measure) -> tuple[Any, list[Tensor]]:
        """Run the models and say something of each token of a batch, without logits of all tokens at once.

        Args:
            call: The arguments of the causal LM by name, but labels.
            targets_BT: What the first T tokens of each sequence are to predict; -100: nothing. Such are left out.
            measure: From the mixture's log probabilities at some tokens, (N, V), and their targets (N,), to tensors
                (N,).

        Returns:
            What the causal LM returns, whose logits are meaningless; and what `measure` has found, (B, T) each, zero
            where there is no target.
        """
        active = self._active()
        assert active is not None  # the caller has seen to it
        out, ready = self._run_models(dict(call), *active)
        counted_BT = targets_BT != _IGNORED

        def select(of_tokens: Tensor) -> Tensor:
            return of_tokens[:, : counted_BT.shape[1]][counted_BT.to(of_tokens.device)]

        def read(
            log_gates_NM: Tensor, logps: list[Tensor], targets_N: Optional[Tensor], share: Share
        ) -> tuple[Tensor, ...]:
            assert targets_N is not None
            return measure(mix(log_gates_NM, share(logps)), targets_N)

        found = self._in_chunks(ready, select, targets_BT[counted_BT], read)
        spread = [values_N.new_zeros(counted_BT.shape) for values_N in found]
        # Scattering keeps a batch without any target connected to the weights: its gradient is zero, not missing.
        return out, [
            zeros.masked_scatter(counted_BT.to(zeros.device), values_N) for zeros, values_N in zip(spread, found)
        ]

    def _run_models(self, call: dict[str, Any], gates: OutputMixture, stitched: bool) -> tuple[Any, _Ready]:
        """Return what the hub's causal LM returns, and what its head and the experts' are to read."""
        # The hub's logits are made later, in chunks; here its own head has as little to do as possible.
        little = {"logits_to_keep": 1} if "logits_to_keep" in self.__signature__.parameters else {}
        alone = torch.is_grad_enabled() and not stitched and self._nothing_trained(call)
        following = self._follow(call, gates)
        with torch.no_grad() if alone else nullcontext():
            out, body = self._runner.await_body(partial(self._forward, **call | little | {"return_dict": True}))
        names = sorted(body.experts.by_name)
        body.state.see_output(body.hub_BTD, gates)
        log_gates_BTM = gates.log_gates(body.hub_BTD, names, _present_tokens(body))
        states = [body.hub_BTD, *(body.experts.by_name[name] for name in names)]
        experts = [body.state.composition.experts[name] for name in names]
        executor = body.state.executor
        share = partial(executor.share, [HUB, *names])
        ready = _Ready(states, experts, log_gates_BTM, out.logits.shape[-1], share, executor.spread)
        if following is not None:
            ready = self._with_evidence(ready, call["input_ids"], gates, following, body)
        body.state.note_output_gates(names, ready.log_gates_BTM.detach())
        body.state.finish()
        return out, ready

    def _follow(self, call: dict[str, Any], gates: OutputMixture) -> Optional[Following]:
        """How the tokens of a call follow each other, where the gates need to know; see `follow` for errors."""
        if gates.forgetting is None or call.get("input_ids") is None:  # the latter is refused later
            return None
        cache = call.get("past_key_values")
        held = held_expert_caches(cache)
        memory = None if held is None else held.memory
        return follow(call, text_config(self._hub), cached_tokens(cache), memory)

    def _with_evidence(
        self, ready: _Ready, tokens_BT: Tensor, gates: OutputMixture, at: Following, body: Body
    ) -> _Ready:
        """Have the gates see what the tokens up to each one tell of the models, and the cache keep it.

        All heads read all tokens for that. Evidence is taken as it is: no gradient goes back through it.
        """
        assert gates.forgetting is not None
        held = held_expert_caches(body.state.cache)
        memory = None if held is None else held.memory
        grad, device = torch.is_grad_enabled(), ready.log_gates_BTM.device
        at = Following(*(part.to(device) for part in at))
        tokens_BT, batch = tokens_BT.to(device), torch.arange(len(tokens_BT), device=device)
        with torch.no_grad():
            wide = torch.promote_types(ready.log_gates_BTM.dtype, torch.float32)
            told_BTM = torch.zeros_like(ready.log_gates_BTM, dtype=wide)
            if memory is not None:  # of the first token that is no padding
                first_B1 = at.text_BT.long().argmax(dim=1, keepdim=True)
                index_BM1 = tokens_BT.gather(1, first_B1)[:, None].expand(*memory.expected_BMV.shape[:2], 1)
                told_BTM = told_BTM + memory.expected_BMV.gather(2, index_BM1)[:, None, :, 0]
            if tokens_BT.shape[1] > 1:
                targets_N = tokens_BT.gather(1, at.next_BT)[:, :-1].flatten()
                (found_NM,) = self._in_chunks(ready, lambda values: values[:, :-1].flatten(0, 1), targets_N, _targets)
                before_BT1 = at.before_BT.clamp(min=0)[..., None]
                found_BTM = found_NM.unflatten(0, (len(batch), -1))
                found_BTM = found_BTM.gather(1, before_BT1.expand(-1, -1, found_BTM.shape[2]))
                told_BTM = torch.where(at.before_BT[..., None] >= 0, found_BTM.to(told_BTM.dtype), told_BTM)
            told_BTM = torch.where(at.told_BT[..., None], told_BTM, 0.0)
            before_BM = None if memory is None else memory.evidence_BM
            first_BT = at.text_BT & ~at.told_BT
            evidence_BTM = evidence(told_BTM, at.text_BT, first_BT, gates.forgetting, before_BM)
            if held is not None:
                last_B = at.last_B.clamp(min=0)
                (last_BMV,) = self._in_chunks(ready, lambda values: values[batch, last_B], None, _each)
                any_B = at.last_B >= 0
                held.memory = Memory(evidence_BTM[:, -1].contiguous(), last_BMV, any_B, gates.forgetting)
                if memory is not None:  # rows of nothing but padding keep what they had
                    expected_BMV = torch.where(any_B[:, None, None], last_BMV, memory.expected_BMV)
                    held.memory = replace(held.memory, expected_BMV=expected_BMV, begun_B=memory.begun_B | any_B)
                ready = ready if grad else ready._replace(last_BMV=last_BMV)
        return ready._replace(log_gates_BTM=gates.with_evidence(ready.log_gates_BTM, evidence_BTM))

    def _nothing_trained(self, call: dict[str, Any]) -> bool:
        """Return whether the gates alone are trained: what the models compute then needs no gradient."""
        embeds = call.get("inputs_embeds")
        return not (embeds is not None and embeds.requires_grad) and not any(
            p.requires_grad for name, p in self._hub.named_parameters() if "stitch_output." not in name
        )

    def _in_chunks(
        self, ready: _Ready, select: Callable[[Tensor], Tensor], targets_N: Optional[Tensor], read: Read
    ) -> tuple[Tensor, ...]:
        """Read what all models say at N tokens, some tokens at a time; with gradients, the heads run again for them.

        Args:
            ready: What the heads are to read.
            select: From a value per token of the batch, (B, T, ...), to those of N tokens, (N, ...).
            targets_N: What each of them is to predict, if that is asked for.
            read: What is wanted of them.
        """
        states, log_gates_NM = [select(state) for state in ready.states], select(ready.log_gates_BTM)
        targets_N = None if targets_N is None else targets_N.to(log_gates_NM.device)
        run = partial(self._chunk, ready, read)
        if torch.is_grad_enabled() and (log_gates_NM.requires_grad or any(state.requires_grad for state in states)):
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        size = max(1, _CHUNK // ready.vocab)
        if len(log_gates_NM) <= size:  # no loop: compiled, it would make a graph for every number of tokens
            return run(log_gates_NM, targets_N, *states)
        pieces = [
            run(log_gates_NM[start : start + size], targets, *(state[start : start + size] for state in states))
            for start in range(0, len(log_gates_NM), size)
            for targets in [None if targets_N is None else targets_N[start : start + size]]
        ]
        return tuple(torch.cat(parts) for parts in zip(*pieces))

    def _chunk(
        self,
        ready: _Ready,
        read: Read,
        log_gates_NM: Tensor,
        targets_N: Optional[Tensor],
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        hub_ND, *others = states
        logits = [self._head.logits(hub_ND[None]), *(e.logits(state[None]) for e, state in zip(ready.experts, others))]
        logps = [log_probs(logits_1NV[0].to(log_gates_NM.device), ready.vocab) for logits_1NV in logits]
        return read(log_gates_NM, logps, targets_N, ready.share)


def _mixture(
    log_gates_NM: Tensor, logps: list[Tensor], targets_N: Optional[Tensor], share: Share
) -> tuple[Tensor, ...]:
    """The mixture's log probabilities, (N, V)."""
    return (mix(log_gates_NM, share(logps)),)


def _targets(
    log_gates_NM: Tensor, logps: list[Tensor], targets_N: Optional[Tensor], share: Share
) -> tuple[Tensor, ...]:
    """Each model's log probabilities of the targets, (N, M)."""
    assert targets_N is not None
    return (torch.cat(share([logp_NV.gather(1, targets_N[:, None]) for logp_NV in logps]), dim=1),)


def _each(log_gates_NM: Tensor, logps: list[Tensor], targets_N: Optional[Tensor], share: Share) -> tuple[Tensor, ...]:
    """Each model's log probabilities, (N, M, V)."""
    return (torch.stack(share(logps), dim=1),)


def _mixture_and_targets(
    log_gates_NM: Tensor, logps: list[Tensor], targets_N: Optional[Tensor], share: Share
) -> tuple[Tensor, ...]:
    """The mixture's log probabilities, (N, V), and each model's of the targets, (N, M)."""
    return *_mixture(log_gates_NM, logps, None, share), *_targets(log_gates_NM, logps, targets_N, share)


def _present_tokens(body: Body) -> Optional[dict[str, Tensor]]:
    """Return which tokens each expert takes part in, (B, T) and boolean by name; `None`: all."""
    if body.experts.present is None:
        return None
    shape = body.hub_BTD.shape[:2]
    return {name: present_B[:, None].expand(shape) for name, present_B in body.experts.present.items()}


def _next_tokens(labels: Tensor, shift_labels: Optional[Tensor], ignored: int) -> Tensor:
    """Return what every token is to predict, (B, T), as `ForCausalLMLoss` has it."""
    return F.pad(labels, (0, 1), value=ignored)[:, 1:] if shift_labels is None else shift_labels


def _mean(values: Tensor, counted: Tensor, number: Union[int, Tensor, None]) -> Tensor:
    """The sum of the values that count, by `number`, or else by how many they are."""
    counted = counted.to(values.device)
    total = torch.where(counted, values, 0.0).sum()
    if number is None:
        return total / counted.sum()
    return total / (number.to(total.device) if isinstance(number, Tensor) else number)

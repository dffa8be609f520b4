"""What every model says about every token of some text: models loaded one at a time, one pass over the text each."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .._compat.peft import CausalLM, base_model
from ..experts.loading import load_expert, resolve_reference
from ..forward.decoder import find_decoder, text_config
from ..forward.head import ModelHead
from ..forward.placement import place_for_stitch
from ..mixture import log_probs
from ..reference import as_reference


Source = Union[CausalLM, str, os.PathLike[str], dict[str, Any]]

# How many logits are made at a time: 64 MiB of float32.
_CHUNK = 2**24


class ModelLoader:
    """Hub and experts by name, loaded when they are asked for and not kept.

    Args:
        hub, experts: Models, ids, paths or reference dicts; a model object is used as it is, where it is.
        dtype: Of the models that are loaded.
        device: Where they are put.
    """

    def __init__(self, hub: Source, experts: Mapping[str, Source], dtype: str, device: str) -> None:
        self._hub, self._experts, self._dtype, self._device = hub, experts, dtype, device

    def hub(self) -> PreTrainedModel:
        """The hub."""
        if isinstance(self._hub, nn.Module):
            return cast(PreTrainedModel, self._hub)
        reference = as_reference("seed", self._hub)
        where = {key: reference[key] for key in ("revision", "subfolder") if reference.get(key)}
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            reference["model"], dtype=self._dtype, device_map=self._device, trust_remote_code=False, **where
        )
        return model.eval()

    def expert(self, name: str, like: torch.dtype) -> CausalLM:
        """An expert, in the dtype of the hub where it is loaded here."""
        source = self._experts[name]
        if isinstance(source, nn.Module):
            return source
        reference = resolve_reference(name, source)
        if reference.get("model") is None:  # a LoRA on the hub's own weights
            return load_expert(name, reference, self.hub()).eval()
        # Of its hub, `load_expert` then asks device and dtype only, which any module has.
        place = cast(PreTrainedModel, nn.Linear(1, 1, device=self._device, dtype=like))
        return load_expert(name, reference, place).eval()


class WeightAverage:
    """The uniform average of the models' weights, summed up model by model, with adapters merged.

    Attributes:
        obstacle: Why there is no average; `None` as long as there is one.
    """

    def __init__(self) -> None:
        self.obstacle: Optional[str] = None
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, what: str, model: CausalLM) -> None:
        """Add a model; `what` is what the obstacle calls it."""
        if self.obstacle is not None:
            return
        plain = base_model(model) if isinstance(model, PeftModel) else model
        if getattr(plain, "is_quantized", False):
            self._stop(f"{what} is quantised")
            return
        if isinstance(model, PeftModel):
            plain = copy.deepcopy(model).merge_and_unload()  # a copy: the model may be the caller's own
        state = {name: value.detach().cpu() for name, value in plain.state_dict().items()}
        if self._count and {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in self._sums.items()}:
            self._stop(f"{what} has weights of other names or shapes than the hub")
            return
        for name, value in state.items():
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            self._sums[name] = self._sums[name] + wide if self._count else wide.clone()
        self._count += 1

    def fill(self, hub: PreTrainedModel) -> None:
        """Write the average into a model of the hub's shapes."""
        hub.load_state_dict({name: value / self._count for name, value in self._sums.items()})

    def _stop(self, obstacle: str) -> None:
        self.obstacle, self._sums = obstacle, {}


@dataclass
class Reading:
    """A model's statements about rows of tokens, by row; a row of T tokens has T - 1 that are predicted.

    Attributes:
        log_likelihoods: The log probability of each predicted token, (T - 1,), at least float32, on the CPU.
        states: What the model's head reads before each of them, (T - 1, D), in the model's dtype, on the CPU; empty
            unless asked for.
        vocab: How many tokens the model knows.
    """

    log_likelihoods: list[Tensor]
    states: list[Tensor]
    vocab: int


@torch.no_grad()
def read(
    model: CausalLM,
    what: str,
    rows: Sequence[Sequence[int]],
    *,
    vocab: Optional[int] = None,
    batch_size: int = 8,
    keep_states: bool = False,
    advance: Callable[[int], Any] = lambda rows: None,
) -> Reading:
    """Run a model over rows of at least two tokens, each by itself, from the longest to the shortest.

    Args:
        model: The model; its mode is put back afterwards.
        what: What to call it in errors.
        rows: Token ids.
        vocab: Over how many tokens the probabilities are; `None` for all that the model knows.
        batch_size: Rows per forward pass.
        keep_states: Whether to keep the states that the head reads.
        advance: Told how many rows have just been read.

    Raises:
        ValueError: If the model is of an unknown architecture.
    """
    plain = base_model(model) if isinstance(model, PeftModel) else model
    decoder = find_decoder(plain, what)
    head = ModelHead(plain, decoder.backbone_path, ())
    chunk = max(1, _CHUNK // text_config(plain).vocab_size)
    empty = torch.empty(0)
    found = Reading([empty] * len(rows), [empty] * len(rows) if keep_states else [], vocab or 0)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)  # little padding
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = _padded([rows[row] for row in batch], plain.device)
            hidden = decoder.backbone(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            predicted = mask[:, 1:].bool()
            states_ND = hidden[:, :-1][predicted.to(hidden.device)]
            targets_N = ids[:, 1:][predicted]
            pieces = []
            for states, targets in zip(states_ND.split(chunk), targets_N.split(chunk)):
                logits = head.logits(states[None])[0]
                found.vocab = found.vocab or logits.shape[-1]
                logp = log_probs(logits, found.vocab)
                pieces.append(logp.gather(1, targets.to(logp.device)[:, None])[:, 0].cpu())
            counts = predicted.sum(1).tolist()
            by_row = torch.cat(pieces).split(counts)
            for row, log_likelihoods in zip(batch, by_row):
                found.log_likelihoods[row] = log_likelihoods
            if keep_states:
                for row, states in zip(batch, states_ND.cpu().split(counts)):
                    found.states[row] = states
            advance(len(batch))
    finally:
        model.train(training)
    return found


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that models beside this one are loaded in."""
    return place_for_stitch(model)[1]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, int64 and of shape (B, T), padded on the right."""
    mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    ids = torch.zeros_like(mask)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)

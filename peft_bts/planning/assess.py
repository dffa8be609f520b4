"""Does combining these models pay? Measured before any stitch is trained, from one pass over the data per model."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

import numpy as np
import torch
from peft import PeftModel
from peft.utils import infer_device
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..experts.blueprint import hub_blueprint, no_weights
from ..experts.compatibility import check_compatibility
from ..experts.loading import read_configs, resolve_reference
from ..forward.decoder import text_config
from ..reference import as_reference
from ..stitch import HUB
from .assessment import Assessment, DomainSize, Gain, Losses
from .gate_fit import Tokens, fit_gates
from .token_losses import ModelLoader, Source, WeightAverage, dtype_of, read


Document = Union[str, Sequence[int]]

_SMALLEST = 4  # documents of a domain: two that fit the gates, one of them held out, and two that test
_HELD_OUT = 5  # of the documents that fit, every fifth is held out to stop in time
_RESAMPLES = 1000
# Columns beside those of the models. No expert can have such a name: it would have no spaces.
_AVERAGE, _GATES = "average of weights", "output gates"
_PER_DOCUMENT, _PER_TOKEN = "best per document", "best per token"


def assess(
    hub: Source,
    experts: Mapping[str, Source],
    data: Mapping[str, Sequence[Document]],
    *,
    tokenizer: Optional[PreTrainedTokenizerBase] = None,
    sequence_length: Optional[int] = None,
    max_tokens: Optional[int] = 32768,
    batch_size: int = 8,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    device: Optional[str] = None,
    progress: bool = True,
) -> Assessment:
    """Measure whether combining models pays, before any stitch is trained.

    The models are loaded one at a time and read the data once. Then output gates, those of
    `StitchConfig(output="mixture", num_stitches=0)`, are fitted on every other document of each domain and tested on
    the rest, where all else is measured too. Each domain counts alike, whatever its size.

    The verdict compares means over domains, in nats per token, each difference with a 95% interval from a bootstrap
    over documents. A difference counts if it is at least 0.01 and its interval is above 0.

    - `"nothing"`: the gates' gain over the best single model does not count. (The best single model is the one with
      the lowest loss on the documents that the gates are fitted on.)
    - `"stitches"`: that gain counts, and so does the gates' gain over the best model of each document, which an
      oracle picks: the models complete one another inside documents.
    - `"gates"`: the first gain counts and the second does not. To know which model fits a document is enough, and
      gates on the outputs know it.

    Args:
        hub: A loaded model, an id, a path, or a reference dict (`model`, `revision`, `subfolder`).
        experts: The experts by name, the same, or a LoRA of the hub by its id or path.
        data: The documents of each domain, texts or token ids; at least four of two tokens in each. They are cut into
            rows of `sequence_length` tokens, no row sees another, and the first token of a row is not predicted.
        tokenizer: Reads texts; `None` for the one beside the hub.
        sequence_length: Tokens per row; `None` for 1024, or fewer if a model has fewer positions.
        max_tokens: How many tokens of each domain are read at most; `None` for all. For each of them the hub's last
            hidden state is kept in memory.
        batch_size: Rows per forward pass.
        dtype: Of models that are loaded here; experts are loaded in the hub's.
        device: Where they are put; `None` for the accelerator if there is one, or else the CPU.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: Before anything is loaded: if there is no expert, no data, too little of it, or an expert does not
            fit the hub.
    """
    _check_sizes(sequence_length=sequence_length, max_tokens=max_tokens, batch_size=batch_size)
    positions, vocab = _check_models(hub, experts)
    texts = _check_data(data)
    longest = min([1024, *positions.values()]) if sequence_length is None else sequence_length
    for who, limit in positions.items():
        if longest > limit:
            raise ValueError(f"sequence_length={longest} is more than the {limit} positions of the {who}.")
    if texts and tokenizer is None:
        tokenizer = _hub_tokenizer(hub)
    domains = {
        name: _Domain.of(name, documents, tokenizer, longest, max_tokens, vocab) for name, documents in data.items()
    }
    names = sorted(experts)
    fit_seconds, obstacle = _run(
        ModelLoader(hub, experts, dtype, device or infer_device()), names, domains, batch_size, progress
    )
    return _result(names, domains, fit_seconds, obstacle, longest)


class _Domain:
    """The documents of a domain, in rows, and what models say about them.

    Attributes:
        rows, owner: Token ids of each row, and the number of its document.
        documents: How many documents there are; those with even numbers fit the gates, the others test them.
        tokens, size: How many tokens the documents have, and how many bytes of UTF-8 (`None` without texts).
        columns: Log probabilities of all predicted tokens, row after row, by model, each (N,).
        states: What the hub's head reads before them, (N, D).
    """

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.owner: list[int] = []
        self.documents, self.tokens = 0, 0
        self.size: Optional[int] = 0
        self.columns: dict[str, Tensor] = {}
        self.states = torch.empty(0)

    @classmethod
    def of(
        cls,
        name: str,
        documents: Sequence[Document],
        tokenizer: Optional[PreTrainedTokenizerBase],
        length: int,
        max_tokens: Optional[int],
        vocab: Mapping[str, int],
    ) -> _Domain:
        """Tokenize documents with the special tokens that the tokenizer adds, until there are `max_tokens` tokens."""
        domain = cls()
        left = math.inf if max_tokens is None else max_tokens
        who, size = min(vocab.items(), key=lambda known: known[1])  # the hub comes first
        for document in documents:
            if isinstance(document, str):
                assert tokenizer is not None
                ids = list(tokenizer(document, verbose=False)["input_ids"])
            else:
                ids = [int(token) for token in document]
            if ids and not 0 <= min(ids) <= max(ids) < size:
                wrong = min(ids) if min(ids) < 0 else max(ids)
                known = f"the {who} knows ids from 0 to {size - 1}"
                raise ValueError(f"Domain {name!r} has the token id {wrong}; {known}.")
            if len(ids) > left:
                ids = ids[: int(left)]
                if isinstance(document, str) and tokenizer is not None:
                    document = str(tokenizer.decode(ids, skip_special_tokens=True))
            rows = [ids[start : start + length] for start in range(0, len(ids), length)]
            rows = [row for row in rows if len(row) > 1]
            if rows:
                domain.rows += rows
                domain.owner += [domain.documents] * len(rows)
                domain.documents += 1
                domain.tokens += len(ids)
                if not isinstance(document, str):
                    domain.size = None
                elif domain.size is not None:
                    domain.size += len(document.encode())
            left -= len(ids)
            if left <= 0:
                break
        if domain.documents < _SMALLEST:
            limit = "" if max_tokens is None else f" within its first {max_tokens} tokens"
            raise ValueError(
                f"Domain {name!r} has {domain.documents} document(s) of two tokens or more{limit}; expected at least "
                f"{_SMALLEST}, since gates are fitted on one half and tested on the other. Give more documents: in a "
                ".jsonl file each row is one, and any other file is one altogether."
            )
        return domain

    @property
    def of_token(self) -> Tensor:
        """The number of each predicted token's document, (N,)."""
        return torch.tensor(self.owner).repeat_interleave(torch.tensor([len(row) - 1 for row in self.rows]))

    def part(self, names: Sequence[str], tokens: Tensor) -> Tokens:
        """Return what the hub and the named experts say about chosen tokens, a boolean (N,)."""
        log_likelihoods = torch.stack([self.columns[name][tokens] for name in (HUB, *names)], dim=-1)
        return Tokens(self.states[tokens], log_likelihoods)


def _run(
    loader: ModelLoader, names: list[str], domains: dict[str, _Domain], batch_size: int, progress: bool
) -> tuple[float, Optional[str]]:
    """Fill the domains' columns. Returns the seconds that the fit took, and why there is no average of weights."""
    rows = [row for domain in domains.values() for row in domain.rows]
    average = WeightAverage()
    vocab: Optional[int] = None
    like = torch.float32
    with tqdm(total=len(rows) * (2 + len(names)), desc="assess", unit=" rows", disable=not progress) as bar:
        for name in (HUB, *names, _AVERAGE):
            if name == _AVERAGE:
                if average.obstacle is not None:
                    bar.total -= len(rows)
                    break
                model: Any = loader.hub()
                model = copy.deepcopy(model)  # it may be the caller's own
                average.fill(model)
            else:
                model = loader.hub() if name == HUB else loader.expert(name, like)
                average.add("The hub" if name == HUB else f"Expert {name!r}", model)
            bar.set_postfix_str(name)
            found = read(
                model,
                "The hub" if name == HUB else f"Expert {name!r}",
                rows,
                vocab=vocab,
                batch_size=batch_size,
                keep_states=name == HUB,
                advance=bar.update,
            )
            if name == HUB:
                vocab, like = found.vocab, dtype_of(model)
            del model
            start = 0
            for domain in domains.values():
                end = start + len(domain.rows)
                domain.columns[name] = torch.cat(found.log_likelihoods[start:end])
                if name == HUB:
                    domain.states = torch.cat(found.states[start:end])
                start = end
        bar.refresh()
    return _fit(names, domains), average.obstacle


def _fit(names: list[str], domains: dict[str, _Domain]) -> float:
    """Fit gates on the documents with even numbers, and apply them to all. Returns the seconds that the fit took."""
    start = time.perf_counter()
    fitted, held_out = [], []
    for domain in domains.values():
        of_token = domain.of_token
        fits = of_token % 2 == 0
        held = fits & (of_token // 2 % _HELD_OUT == 0)
        fitted.append(domain.part(names, fits & ~held))
        held_out.append(domain.part(names, held))
    gates = fit_gates(fitted, held_out, names)
    seconds = time.perf_counter() - start
    for domain in domains.values():
        domain.columns[_GATES] = gates.log_likelihoods(
            domain.part(names, torch.ones_like(domain.of_token, dtype=torch.bool))
        )
    return seconds


@dataclass
class _Sums:
    """Sums over the tokens of each tested document, (documents,), float64.

    Attributes:
        tokens: How many there are.
        nats: Losses by column.
    """

    tokens: np.ndarray[Any, Any]
    nats: dict[str, np.ndarray[Any, Any]]

    def mean(self, column: str) -> float:
        """The loss per token."""
        return float(self.nats[column].sum() / self.tokens.sum())


def _sums(names: Sequence[str], domain: _Domain, half: int) -> _Sums:
    """Sums over documents whose number modulo 2 is `half`, with both oracles."""
    of_token = domain.of_token
    chosen = of_token % 2 == half
    document = (of_token[chosen] // 2).numpy()
    losses = {name: -column[chosen].double().numpy() for name, column in domain.columns.items()}
    losses[_PER_TOKEN] = np.stack([losses[name] for name in (HUB, *names)]).min(axis=0)
    nats = {name: np.bincount(document, weights=values) for name, values in losses.items()}
    nats[_PER_DOCUMENT] = np.stack([nats[name] for name in (HUB, *names)]).min(axis=0)
    return _Sums(np.bincount(document).astype(np.float64), nats)


def _result(
    names: list[str], domains: dict[str, _Domain], fit_seconds: float, obstacle: Optional[str], length: int
) -> Assessment:
    tested = {name: _sums(names, domain, half=1) for name, domain in domains.items()}
    fitted = {name: _sums(names, domain, half=0) for name, domain in domains.items()}
    by_domain = {name: _losses(names, [tested[name]], [fitted[name]]) for name in domains}
    mean = _losses(names, list(tested.values()), list(fitted.values()))
    data = {
        name: DomainSize(
            documents=domain.documents,
            tested=len(tested[name].tokens),
            predicted_tokens=int(tested[name].tokens.sum()),
            bytes_per_token=None if domain.size is None else domain.size / domain.tokens,
        )
        for name, domain in domains.items()
    }
    return Assessment(by_domain, mean, data, fit_seconds, obstacle, length)


def _losses(names: list[str], tested: list[_Sums], fitted: list[_Sums]) -> Losses:
    """Means over domains of the loss per token."""

    def mean(sums: list[_Sums], column: str) -> float:
        return float(np.mean([one.mean(column) for one in sums]))

    best = min((HUB, *names), key=lambda name: mean(fitted, name))
    return Losses(
        models={name: mean(tested, name) for name in (HUB, *names)},
        weight_average=mean(tested, _AVERAGE) if _AVERAGE in tested[0].nats else None,
        best_model=best,
        best_per_document=mean(tested, _PER_DOCUMENT),
        best_per_token=mean(tested, _PER_TOKEN),
        output_gates=mean(tested, _GATES),
        gain=_gain(tested, best),
        gain_over_documents=_gain(tested, _PER_DOCUMENT),
    )


def _gain(domains: list[_Sums], over: str) -> Gain:
    """Return by how much the gates' loss is lower, with a bootstrap interval over the documents of each domain."""
    generator = np.random.default_rng(0)
    resampled = np.zeros(_RESAMPLES)
    value = 0.0
    for sums in domains:
        gains = sums.nats[over] - sums.nats[_GATES]
        value += gains.sum() / sums.tokens.sum() / len(domains)
        for i in range(_RESAMPLES):
            chosen = generator.integers(len(gains), size=len(gains))
            resampled[i] += gains[chosen].sum() / sums.tokens[chosen].sum() / len(domains)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Gain(float(value), float(low), float(high))


def _check_sizes(**sizes: Optional[int]) -> None:
    for option, value in sizes.items():
        least = 1 if option == "batch_size" else 2
        if value is None and option != "batch_size":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{option} must be a whole number of at least {least}, got {value!r}.")


def _check_models(hub: Source, experts: Mapping[str, Source]) -> tuple[dict[str, int], dict[str, int]]:
    """Compare hub and experts by their configs alone. Returns the positions and the vocabulary of each, hub first."""
    if not experts:
        raise ValueError("No expert is given, so there is nothing to combine. Name at least one in `experts`.")
    for who, model in {"The hub": hub, **{f"Expert {name!r}": expert for name, expert in experts.items()}}.items():
        if isinstance(model, PreTrainedConfig):
            raise ValueError(f"{who} is a config, which has no weights; give a model, an id or a path.")
    if isinstance(hub, PeftModel):
        raise ValueError(
            "The hub is a PEFT model; expected a plain causal language model. Merge its adapter (`merge_and_unload`) "
            "first, or give its base as the hub and the adapter as an expert."
        )
    for name, expert in experts.items():
        check_compatibility(hub, expert, name=name).raise_errors()
    if isinstance(hub, nn.Module):
        seed: Any = hub
    else:
        with no_weights():
            seed = hub_blueprint(hub)
    config = text_config(seed)
    configs = {"hub": config}
    with no_weights():
        configs |= {f"expert {name!r}": _config(name, expert, config) for name, expert in experts.items()}
    limits = {who: getattr(known, "max_position_embeddings", None) for who, known in configs.items()}
    vocab = {who: known.vocab_size for who, known in configs.items()}
    return {who: limit for who, limit in limits.items() if limit}, vocab


def _config(name: str, expert: Source, hub_config: Any) -> Any:
    """Return an expert's config, without loading the expert."""
    if isinstance(expert, nn.Module):
        return text_config(expert)
    config = read_configs(name, resolve_reference(name, as_reference(name, expert)))[0] or hub_config
    return config.get_text_config(decoder=True)


def _check_data(data: Mapping[str, Sequence[Document]]) -> bool:
    """Look for mistakes in the data. Returns whether any of it is text."""
    if not data:
        raise ValueError("No data is given. Give the documents of at least one domain, such as {'code': [text, ...]}.")
    texts = False
    for name, documents in data.items():
        if isinstance(documents, (str, bytes, os.PathLike)):
            raise ValueError(
                f"Domain {name!r} is a {type(documents).__name__}; expected a list of documents, each a text or a "
                "list of token ids."
            )
        if len(documents) < _SMALLEST:
            raise ValueError(
                f"Domain {name!r} has {len(documents)} document(s); expected at least {_SMALLEST}, since gates are "
                "fitted on one half and tested on the other. In a .jsonl file each row is a document, and any other "
                "file is one altogether."
            )
        texts = texts or any(isinstance(document, str) for document in documents)
    return texts


def _hub_tokenizer(hub: Source) -> PreTrainedTokenizerBase:
    """The tokenizer beside the hub."""
    where: dict[str, Any] = {}
    if isinstance(hub, nn.Module):
        source = getattr(hub.config, "_name_or_path", "")
    else:
        reference = as_reference("seed", hub)
        source = reference["model"]
        where = {key: reference[key] for key in ("revision", "subfolder") if reference.get(key)}
    try:
        if not source:
            raise ValueError("the model object came from no id or path")
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer was found beside the hub ({source!r}): {error}. Give one as `tokenizer`, or token "
            "ids as data."
        ) from error
    return found

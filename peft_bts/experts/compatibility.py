"""Does this expert fit this hub? The one place that decides.

`check_compatibility` answers before any weight is loaded or downloaded; `attach_expert` asks the same question of the
loaded models.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer

from .._compat.peft import CausalLM, base_model, peft_type_name
from ..formatting import as_text, table
from ..forward.decoder import find_decoder, text_config, token_embeddings
from ..forward.layer import StitchLayer
from ..reference import check_expert_name
from .blueprint import ModelLike, expert_blueprint, hub_blueprint, no_weights
from .loading import how_to_replace
from .lora_base import another_base


# What stitches are made for; kept in the reference, compared at every later load.
SIZES = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_SPECIAL = ("bos", "eos", "pad")


@dataclass(frozen=True)
class ModelFacts:
    """The facts by which a hub and its expert are compared.

    Attributes:
        source: Id or path that the model came from.
        model_type: Architecture, as in its config.
        num_layers, width: Number of decoder layers; channels of their hidden states.
        embedding_rows: Number of token embeddings.
        tokens: Number of tokens that its tokenizer knows; `None` where no tokenizer lies beside the model.
        adapter: Kind of the adapter on top of it, such as `"LORA"`.
    """

    source: Optional[str]
    model_type: str
    num_layers: int
    width: int
    embedding_rows: int
    tokens: Optional[int]
    adapter: Optional[str] = None


@dataclass
class CompatibilityReport:
    """The result of comparing an expert with a hub; `str(report)` is for people.

    Attributes:
        name: The expert's.
        hub, expert: What was compared; `None` for a model that could not be read or is of an unknown architecture.
        errors: Why the two cannot be stitched, each with what was found, what was expected, and what to do.
        warnings: What may make the expert's outputs wrong, though nothing proves it.
        notes: Differences that stitching bridges, but one may want to know of.
    """

    name: str
    hub: Optional[ModelFacts] = None
    expert: Optional[ModelFacts] = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the expert can be attached."""
        return not self.errors

    def raise_errors(self) -> None:
        """Raise `ValueError` with all errors, if there are any."""
        if self.errors:
            raise ValueError("\n".join(self.errors))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def parts(self) -> list[Any]:
        """Return what rich prints: the verdict, the models side by side, and all that was found."""
        models = {"hub": self.hub, f"expert {self.name!r}": self.expert}
        known = {who: dataclasses.asdict(facts) for who, facts in models.items() if facts is not None}
        rows = [
            (fact.name.replace("_", " "), *(facts[fact.name] for facts in known.values()))
            for fact in dataclasses.fields(ModelFacts)
            if any(facts[fact.name] is not None for facts in known.values())
        ]
        verdict = f"Expert {self.name!r} {'fits' if self.ok else 'does not fit'} the hub."
        parts: list[Any] = [verdict, table("", ["", *known], rows, left=1 + len(known))] if known else [verdict]
        for kind, texts in (("error", self.errors), ("warning", self.warnings), ("note", self.notes)):
            parts += [f"{kind}: {text}" for text in texts]
        return parts

    def __str__(self) -> str:
        return as_text(*self.parts())


def check_compatibility(
    hub: ModelLike,
    expert: ModelLike,
    *,
    name: str = "expert",
    expert_streams: Literal["intact", "projected"] = "intact",
) -> CompatibilityReport:
    """Compare an expert with a hub, from their config and tokenizer files alone.

    No weight is read, and none downloaded, of a model that is given by id or path.

    Args:
        hub: A loaded model, an id, a path, a reference dict (`model`, `revision`, `subfolder`), or a config.
        expert: The same, or the id or path of a LoRA of the hub.
        name: The expert's name in the report.
        expert_streams: As in `StitchConfig`; `"projected"` needs equal widths.

    Raises:
        ValueError: If the hub's config cannot be read, or `name` cannot be an expert's.
    """
    check_expert_name(name)
    with no_weights():
        hub = _inner_hub(hub) if isinstance(hub, nn.Module) else hub_blueprint(hub)
        if not isinstance(expert, nn.Module):
            try:
                expert = expert_blueprint(name, expert, hub)
            except ValueError as error:
                return CompatibilityReport(name, errors=[str(error)])
        return compare(name, expert, hub, expert_streams=expert_streams)


def compare(
    name: str,
    expert: CausalLM,
    hub: CausalLM,
    *,
    expected: Optional[dict[str, Any]] = None,
    expert_streams: str = "intact",
) -> CompatibilityReport:
    """Compare the models themselves, loaded or blueprints. Nothing is changed, no weight is looked at.

    Args:
        name: The expert's name, for errors.
        expert, hub: The models.
        expected: Sizes that an adapter was made for, as its reference to the expert has them.
        expert_streams: As in `StitchConfig`.
    """
    report = CompatibilityReport(name)
    if expert is hub or any(isinstance(module, StitchLayer) for module in expert.modules()):
        report.errors.append(f"Expert {name!r} is the hub itself, or another stitched model; attach a plain model.")
        return report
    for model, what in ((hub, "The hub"), (expert, f"Expert {name!r}")):
        try:
            find_decoder(model, what)
        except ValueError as error:
            report.errors.append(str(error))
    if report.ok:
        tokenizers = _tokenizer(expert), _tokenizer(hub)
        shared = False
        if isinstance(expert, PeftModel):
            shared = token_embeddings(expert).weight is token_embeddings(hub).weight
            whose = "of the hub, whose weights it shares" if shared else "on a model of its own"
            report.notes.append(f"{peft_type_name(expert.peft_type)} adapter {whose}.")
            proven, suspected = another_base(name, expert)
            report.errors += [] if proven is None else [proven]
            report.warnings += [] if suspected is None else [suspected]
        facts = _facts(expert, tokenizers[0]), _facts(hub, tokenizers[1])
        report.expert, report.hub = facts
        _compare_sizes(report, *facts, sizes(expert), expected or {}, expert_streams)
        if not shared:
            _compare_tokens(report, *facts, *tokenizers)
        _note_differences(report, *facts, text_config(expert), text_config(hub), *tokenizers)
    return report


def sizes(expert: CausalLM) -> dict[str, Any]:
    """Return what stitches for this expert are made for, as it is kept in the reference."""
    return {key: getattr(text_config(expert), key, None) for key in SIZES}


def _inner_hub(model: CausalLM) -> CausalLM:
    if isinstance(model, PeftModel) and any(isinstance(module, StitchLayer) for module in model.modules()):
        return base_model(model)
    return model


def _facts(model: CausalLM, tokenizer: Optional[_Tokenizer]) -> ModelFacts:
    config = text_config(model)
    return ModelFacts(
        source=getattr(config, "_name_or_path", "") or None,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        embedding_rows=token_embeddings(model).weight.shape[0],
        tokens=None if tokenizer is None else len(tokenizer.ids),
        adapter=peft_type_name(model.peft_type) if isinstance(model, PeftModel) else None,
    )


def _compare_sizes(
    report: CompatibilityReport,
    of_expert: ModelFacts,
    of_hub: ModelFacts,
    found: dict[str, Any],
    expected: dict[str, Any],
    streams: str,
) -> None:
    name = report.name
    wrong = [f"{k} is {found[k]!r}, expected {expected[k]!r}" for k in SIZES if expected.get(k, found[k]) != found[k]]
    if wrong:
        report.errors.append(
            f"Expert {name!r} is not the one that the adapter was made with: {'; '.join(wrong)}. "
            + how_to_replace(name)
        )
    if streams == "projected" and of_expert.width != of_hub.width:
        report.errors.append(
            f"Expert {name!r} has width {of_expert.width}, the hub {of_hub.width}: expert_streams='projected' "
            "hands the hub's width back to the expert, which needs equal widths. Use expert_streams='intact'."
        )


def _compare_tokens(
    report: CompatibilityReport,
    of_expert: ModelFacts,
    of_hub: ModelFacts,
    theirs: Optional[_Tokenizer],
    ours: Optional[_Tokenizer],
) -> None:
    """Would the expert read other tokens out of the hub's ids?

    Vocabularies that only pad differently are fine. Where a tokenizer is unknown, the expert needs as many embeddings
    as the hub.
    """
    name, rows, hub_rows = report.name, of_expert.embedding_rows, of_hub.embedding_rows
    if theirs is None or ours is None:
        if rows < hub_rows:
            report.errors.append(
                f"Expert {name!r} has {rows} token embeddings, the hub {hub_rows}, and no tokenizer lies beside both "
                "to show that only padding differs. Save the tokenizers with the models, or use an expert of the "
                "hub's vocabulary."
            )
        else:
            came_from = [of_expert.source if theirs is None else None, of_hub.source if ours is None else None]
            texts = report.warnings if any(came_from) else report.notes
            who = f"expert {name!r}" if ours else "the hub" if theirs else f"expert {name!r} and the hub"
            texts.append(
                f"No tokenizer lies beside {who}, so only the numbers of embeddings were compared. "
                f"If expert {name!r} reads other words out of the hub's ids, its outputs are noise: save the "
                "tokenizers beside the models to have that checked."
            )
        return
    for token, id_ in ours.ids.items():
        if theirs.ids.get(token, id_) != id_:
            report.errors.append(
                f"Expert {name!r} has another tokenizer than the hub: token {token!r} is id {theirs.ids[token]}, "
                f"expected {id_} as in the hub. Stitched models read the same token ids; use an expert that was "
                "trained from the same seed."
            )
            return
    their_tokens = {id_: token for token, id_ in theirs.ids.items()}
    for token, id_ in ours.ids.items():
        if their_tokens.get(id_, token) != token:
            report.errors.append(
                f"Expert {name!r} has another tokenizer than the hub: id {id_} is {their_tokens[id_]!r}, expected "
                f"{token!r} as in the hub. Stitched models read the same token ids."
            )
            return
    if max(ours.ids.values()) >= rows:
        report.errors.append(
            f"Expert {name!r} has {rows} token embeddings, but the hub's tokenizer has ids up to "
            f"{max(ours.ids.values())}. Resize the expert's embeddings, or use a hub without the added tokens."
        )
    if unknown := [token for token in ours.ids if token not in theirs.ids]:
        report.notes.append(
            f"{_some(unknown)} of the hub's tokenizer {_are(unknown)} unknown to the expert's: it may never have "
            "learned what stands in these rows of its embeddings."
        )
    if unused := [token for token in theirs.ids if token not in ours.ids]:
        report.notes.append(f"{_some(unused)} of the expert's tokenizer {_are(unused)} never said by the hub's.")


def _note_differences(
    report: CompatibilityReport,
    of_expert: ModelFacts,
    of_hub: ModelFacts,
    expert: Any,
    hub: Any,
    theirs: Optional[_Tokenizer],
    ours: Optional[_Tokenizer],
) -> None:
    note = report.notes.append
    if of_expert.model_type != of_hub.model_type:
        note(f"Another architecture: {of_expert.model_type}, the hub is {of_hub.model_type}.")
    if of_expert.num_layers != of_hub.num_layers:
        note(
            f"Another depth: {of_expert.num_layers} layers, the hub has {of_hub.num_layers}; stitches meet the expert "
            "at the same fraction of its depth."
        )
    if of_expert.width != of_hub.width:
        note(
            f"Another width: {of_expert.width}, the hub has {of_hub.width}; the projections between them start as a "
            "cut or padded identity."
        )
    if of_expert.embedding_rows != of_hub.embedding_rows:
        note(f"Another number of token embeddings: {of_expert.embedding_rows}, the hub has {of_hub.embedding_rows}.")
    longest, hubs_longest = (getattr(c, "max_position_embeddings", None) or 0 for c in (expert, hub))
    if 0 < longest < hubs_longest:
        note(f"Made for sequences of up to {longest} tokens, the hub for {hubs_longest}.")
    for kind in _SPECIAL:
        their_token, our_token = (getattr(config, f"{kind}_token_id", None) for config in (expert, hub))
        if theirs is not None and ours is not None:
            their_token, our_token = theirs.special[kind], ours.special[kind]
        if their_token != our_token:
            note(f"Another {kind} token: {their_token!r}, the hub has {our_token!r}, which is what counts.")
    if theirs is not None and ours is not None and theirs.chat_template != ours.chat_template:
        note(
            "Another chat template than the hub's: prompts will be written as the hub's tokenizer writes them."
            if theirs.chat_template and ours.chat_template
            else "Only the expert has a chat template: prompts in its form have to be written with its tokenizer."
            if theirs.chat_template
            else "Only the hub has a chat template: the expert may not know its form."
        )


def _some(tokens: list[str]) -> str:
    shown = ", ".join(map(repr, tokens[:3])) + (", ..." if len(tokens) > 3 else "")
    return f"{len(tokens)} token{'s'[: len(tokens) > 1]} ({shown})"


def _are(tokens: list[str]) -> str:
    return "is" if len(tokens) == 1 else "are"


@dataclass(frozen=True)
class _Tokenizer:
    """The compared parts of a tokenizer: token -> id, special tokens by kind, the chat template."""

    ids: dict[str, int]
    special: dict[str, Optional[str]]
    chat_template: Any


def _tokenizer(model: nn.Module) -> Optional[_Tokenizer]:
    """The tokenizer beside a model, or `None` where none is known."""
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", "")
    if not source:
        return None
    if not os.path.isdir(source):
        return _read_tokenizer(source, getattr(config, "_commit_hash", None))
    files = [os.path.join(source, file) for file in _TOKENIZER_FILES]
    stamps = tuple((os.path.getmtime(file), os.path.getsize(file)) for file in files if os.path.isfile(file))
    return _read_tokenizer(os.path.abspath(source), None, stamps) if stamps else None


@functools.lru_cache(
    maxsize=8
)  # every expert is compared with the same hub, and large vocabularies take a second to read
def _read_tokenizer(
    source: str, revision: Optional[str], stamps: tuple[tuple[float, int], ...] = ()
) -> Optional[_Tokenizer]:
    """`stamps`, the times and sizes of local files, are there for the cache to notice changes."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # no tokenizer there, out of reach, or one that needs code from the repo
        return None
    special = {kind: getattr(tokenizer, f"{kind}_token", None) for kind in _SPECIAL}
    ids = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))  # the same first difference every time
    return _Tokenizer(ids, special, getattr(tokenizer, "chat_template", None))

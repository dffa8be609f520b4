"""What the model card of an adapter says about its experts, beside what PEFT and Trainer write."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn

from .._compat.bitsandbytes import num_weights
from ..formatting import human


if TYPE_CHECKING:
    from ..config import StitchConfig

_BEGIN, _END = "<!-- peft_bts: begin -->", "<!-- peft_bts: end -->"
_SECTION = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_EXPERT_ROW = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)


@dataclass
class CardFacts:
    """What a card can say only while the model is at hand.

    Attributes:
        parameters: Numbers of weights: of the `"hub"`, each expert (what it adds to the hub), and the `"stitches"`.
        results: The user's `model.card_results`: row -> metric -> value.
    """

    parameters: dict[str, int] = field(default_factory=dict)
    results: dict[str, dict[str, float]] = field(default_factory=dict)


def card_after_peft(model: PeftModel, folder: str, tags: list[str]) -> None:
    """Complete the card that PEFT has just written."""
    _note_facts(model)
    update_model_card(next(iter(model.peft_config.values())), folder, tags=tags)


def card_before_upload(model: PeftModel, folder: str, repo_id: str) -> None:
    """Complete the card that is to be uploaded: that of the repository, or an empty one."""
    model.create_or_update_model_card(folder)
    update_model_card(next(iter(model.peft_config.values())), folder, repo_id=repo_id)


def _note_facts(model: PeftModel) -> None:
    """Leave the facts with the configs of a stitched model, for the cards that are about to be written for them.

    Raises:
        ValueError: If `model.card_results` is not a dict of dicts.
    """
    results = getattr(model, "card_results", None) or {}
    if not isinstance(results, dict) or not all(isinstance(row, dict) for row in results.values()):
        raise ValueError(f"model.card_results is {results!r}; expected {{row: {{metric: value}}}}.")
    for adapter, config in model.peft_config.items():
        counted: set[int] = set()
        stitches = {name: weight for name, weight in model.named_parameters() if ".stitch_layer." in name}
        numbers = {
            "stitches": _count(counted, (p for name, p in stitches.items() if f".stitch_layer.{adapter}." in name))
        }
        counted.update(map(id, stitches.values()))  # other adapters' are nobody's here
        numbers["hub"] = _count(counted, model.get_base_model().parameters())
        for name, expert in sorted(model.base_model.experts[adapter].items()):
            numbers[name] = _count(counted, expert.model.parameters())
        config.card_facts = CardFacts(numbers, results)


def _count(counted: set[int], weights: Iterable[nn.Parameter]) -> int:
    """The number of parameters in those weights that are not in `counted`, which they are added to."""
    new = [weight for weight in weights if id(weight) not in counted]
    counted.update(map(id, new))
    return sum(map(num_weights, new))


def update_model_card(
    config: StitchConfig, save_directory: str, *, tags: Iterable[str] = (), repo_id: Optional[str] = None
) -> None:
    """Add metadata and the section on experts and loading to the README.md of an adapter folder, if there is one.

    An adapter with a name of its own is saved in a subfolder; its section goes into a card beside its weights.

    Args:
        config: The adapter's.
        save_directory: Its folder.
        tags: More tags to have.
        repo_id: Where it is being pushed to.
    """
    path = os.path.join(save_directory, "README.md")
    if not os.path.isfile(path):
        parent = os.path.join(os.path.dirname(os.path.abspath(save_directory)), "README.md")
        if not os.path.isfile(parent):
            return
        card = ModelCard.load(parent)
        if card.data.get("library_name") != "peft":
            return
    else:
        card = ModelCard.load(path)
    gone = {name for section in _SECTION.findall(card.text) for name in _EXPERT_ROW.findall(section)}
    names = {"stitch", "branch-train-stitch", *config.experts}
    card.data.tags = sorted(({*(card.data.tags or []), *tags} - gone) | names)
    card.data["base_model_relation"] = "adapter"
    text = _SECTION.sub("", card.text).rstrip()
    card.text = f"{text}\n\n{_BEGIN}\n{_section(config, repo_id)}\n{_END}\n"
    card.save(path)


def _section(config: StitchConfig, repo_id: Optional[str]) -> str:
    facts = getattr(config, "card_facts", CardFacts())
    parameters = {name: human(count) for name, count in facts.parameters.items()}
    stitches = f" ({parameters['stitches']} parameters)" if parameters else ""
    rows = [
        ("seed", _code(config.base_model_name_or_path), config.revision or "", "", parameters.get("hub", "")),
        *(
            (f"`{name}`", _source(ref), ref.get("revision") or "", _sizes(ref), parameters.get(name, ""))
            for name, ref in sorted(config.experts.items())
        ),
    ]
    metrics = list(dict.fromkeys(metric for row in facts.results.values() for metric in row))
    results = [
        "## Results",
        "",
        _table(["", *metrics], [(name, *(row.get(m, "") for m in metrics)) for name, row in facts.results.items()]),
        "",
    ]
    return "\n".join(
        [
            "## Stitched experts",
            "",
            "This is a Branch-Train-Stitch adapter ([arXiv 2502.00075](https://arxiv.org/abs/2502.00075)): small "
            f"layers that combine a frozen seed model with frozen experts. It holds the stitches only{stitches}; the "
            "models are loaded from where this table says.",
            "",
            _table(["expert", "model", "revision", "architecture", "parameters"], rows),
            "",
            *(results if facts.results else []),
            "## Load",
            "",
            "```python",
            "import peft_bts  # registers the method with PEFT: pip install peft_bts",
            "from peft import AutoPeftModelForCausalLM",
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id or "path or id of this adapter"}")',
            "```",
        ]
    )


def _table(columns: list[str], rows: Iterable[tuple]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _source(reference: dict[str, Any]) -> str:
    if reference.get("adapter"):
        return f"{_code(reference['adapter'])} (LoRA on {_code(reference.get('model') or 'the seed')})"
    return _code(reference.get("model"), reference.get("subfolder"))


def _sizes(reference: dict[str, Any]) -> str:
    sizes = reference.get("config") or {}
    if not sizes:
        return ""
    return f"{sizes['model_type']}, {sizes['num_hidden_layers']} layers of width {sizes['hidden_size']}"


def _code(source: Any, subfolder: Optional[str] = None) -> str:
    if not source:
        return "(a model object; give its place in the config before sharing)"
    return f"`{source}`" + (f", `{subfolder}`" if subfolder else "")

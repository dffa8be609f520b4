"""The part of an adapter's model card about its experts, beside what PEFT and Trainer write."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, Optional

from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn

from .._compat.bitsandbytes import num_weights
from ..config import StitchConfig
from ..formatting import human
from ..install import how_to_install
from ..keys import file_key, is_stitch_weight
from ..model import stitch_tuner


_BEGIN, _END = "<!-- peft_bts: begin -->", "<!-- peft_bts: end -->"
# Never across another beginning: where a mark was deleted, what a user wrote in between stays.
_SECTION = re.compile(rf"\n*{re.escape(_BEGIN)}(?:(?!{re.escape(_BEGIN)}).)*?{re.escape(_END)}", re.DOTALL)
_EXPERT_ROW = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)


def card_after_peft(model: PeftModel, folder: str, tags: list[str]) -> None:
    """Complete the card that PEFT has just written, with what is true of the first adapter."""
    update_model_card(model, _first_adapter(model), folder, tags=tags)


def card_before_upload(model: PeftModel, folder: str, repo_id: str) -> None:
    """Complete the card that is to be uploaded: that of the repository, or an empty one."""
    model.create_or_update_model_card(folder)
    update_model_card(model, _first_adapter(model), folder, repo_id=repo_id)


def update_model_card(
    model: PeftModel, adapter: str, folder: str, *, tags: Iterable[str] = (), repo_id: Optional[str] = None
) -> None:
    """Add metadata and the section on experts, results and loading to the README.md of an adapter's folder.

    An adapter with a name of its own lies in a subfolder, where PEFT writes no card. It gets a copy of the card above
    it, with a section of its own.

    Args:
        model: The stitched model. Its `card_results`, if the user has set them, go onto the card.
        adapter: The name of the adapter.
        folder: Where the adapter is saved.
        tags: More tags to have.
        repo_id: Where the adapter is being pushed to.

    Raises:
        ValueError: If `model.card_results` is not a dict of dicts.
    """
    path = os.path.join(folder, "README.md")
    above = os.path.join(os.path.dirname(os.path.abspath(folder)), "README.md")
    card = ModelCard.load(path if os.path.isfile(path) else above)
    gone = {name for section in _SECTION.findall(card.text) for name in _EXPERT_ROW.findall(section)}
    names = {"stitch", "branch-train-stitch", *stitch_tuner(model).peft_config[adapter].experts}
    card.data.tags = sorted(({*(card.data.tags or []), *tags} - gone) | names)
    card.data["base_model_relation"] = "adapter"
    text = _SECTION.sub("", card.text).rstrip()
    card.text = f"{text}\n\n{_BEGIN}\n{_section(model, adapter, repo_id)}\n{_END}\n"
    card.save(path)


def _first_adapter(model: PeftModel) -> str:
    return next(iter(model.peft_config))


def _parameters(model: PeftModel, adapter: str) -> dict[str, str]:
    """Numbers of weights: of the `"stitches"`, the `"hub"`, and what each expert adds to these."""
    counted: set[int] = set()

    def count(weights: Iterable[nn.Parameter]) -> int:
        new = [weight for weight in weights if id(weight) not in counted]
        counted.update(map(id, new))
        return sum(map(num_weights, new))

    stitches = {name: weight for name, weight in model.named_parameters() if is_stitch_weight(name)}
    numbers = {"stitches": count(p for name, p in stitches.items() if file_key(name, adapter))}
    counted.update(map(id, stitches.values()))  # other adapters' are nobody's here
    numbers["hub"] = count(model.get_base_model().parameters())
    for name, expert in sorted(stitch_tuner(model).experts[adapter].items()):
        numbers[name] = count(expert.model.parameters())
    return {name: human(number) for name, number in numbers.items()}


def _results(model: PeftModel) -> dict[str, dict[str, Any]]:
    """The user's `model.card_results`: row -> metric -> value."""
    results = getattr(model, "card_results", None) or {}
    if not isinstance(results, dict) or not all(isinstance(row, dict) for row in results.values()):
        raise ValueError(f"model.card_results is {results!r}; expected {{row: {{metric: value}}}}.")
    return results


def _holds(config: StitchConfig) -> str:
    if config.output != "mixture":
        return "the stitches"
    also = "" if config.evidence is None else "; they also see how well each has predicted the tokens so far"
    gates = f"output gates (its logits are log probabilities of a mixture of what all models say{also})"
    return gates if config.num_stitches == 0 and not config.layers_to_stitch else f"the stitches and {gates}"


def _section(model: PeftModel, adapter: str, repo_id: Optional[str]) -> str:
    config = stitch_tuner(model).peft_config[adapter]
    parameters, results = _parameters(model, adapter), _results(model)
    rows = [
        ("seed", _code(config.base_model_name_or_path), config.revision or "", "", parameters["hub"]),
        *(
            (f"`{name}`", _source(ref), ref.get("revision") or "", _sizes(ref), parameters[name])
            for name, ref in sorted(config.experts.items())
        ),
    ]
    metrics = list(dict.fromkeys(metric for row in results.values() for metric in row))
    results_table = [
        "## Results",
        "",
        _table(["", *metrics], [(name, *(row.get(m, "") for m in metrics)) for name, row in results.items()]),
        "",
    ]
    return "\n".join(
        [
            "## Stitched experts",
            "",
            "This is a Branch-Train-Stitch adapter ([arXiv 2502.00075](https://arxiv.org/abs/2502.00075)): small "
            f"layers that combine a frozen seed model with frozen experts. It holds {_holds(config)} only "
            f"({parameters['stitches']} parameters); the models are loaded from where this table says.",
            "",
            _table(["expert", "model", "revision", "architecture", "parameters"], rows),
            "",
            *(results_table if results else []),
            "## Load",
            "",
            f"It needs [PEFT](https://github.com/huggingface/peft) and peft_bts: {how_to_install()}.",
            "",
            "```python",
            "import peft_bts  # registers the method with PEFT",
            "from peft import AutoPeftModelForCausalLM",
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id or "path or id of this adapter"}")',
            "```",
        ]
    )


def _table(columns: list[str], rows: Iterable[tuple[Any, ...]]) -> str:
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

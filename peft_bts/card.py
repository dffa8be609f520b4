"""What the model card of an adapter says about its experts, beside what PEFT writes."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard


if TYPE_CHECKING:
    from .config import StitchConfig

_BEGIN, _END = "<!-- peft_bts: begin -->", "<!-- peft_bts: end -->"


def update_model_card(config: StitchConfig, save_directory: str) -> None:
    """Add tags and the section on experts and loading to the README.md of an adapter folder, if there is one.

    An adapter with a name of its own is saved in a subfolder; its section goes into a card beside its weights.
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
    tags = set(card.data.tags or []) | {"stitch", "branch-train-stitch", *config.experts}
    card.data.tags = sorted(tags)
    section = f"{_BEGIN}\n{_section(config)}\n{_END}"
    text = re.sub(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}", "", card.text, flags=re.DOTALL).rstrip()
    card.text = f"{text}\n\n{section}\n"
    card.save(path)


def _section(config: StitchConfig) -> str:
    rows = [
        f"| `{name}` | {_source(reference)} | {reference.get('revision') or ''} | {_sizes(reference)} |"
        for name, reference in sorted(config.experts.items())
    ]
    return "\n".join(
        [
            "## Stitched experts",
            "",
            "This is a Branch-Train-Stitch adapter ([arXiv 2502.00075](https://arxiv.org/abs/2502.00075)): small "
            "layers that combine a frozen seed model with frozen experts. It holds the stitches only; the models are "
            "loaded from where this table says.",
            "",
            "| expert | model | revision | architecture |",
            "| --- | --- | --- | --- |",
            f"| seed | {_code(config.base_model_name_or_path)} | {config.revision or ''} | |",
            *rows,
            "",
            "## Load",
            "",
            "```python",
            "import peft_bts  # registers the method with PEFT: pip install peft_bts",
            "from peft import AutoPeftModelForCausalLM",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("path or id of this adapter")',
            "```",
        ]
    )


def _source(reference: dict[str, Any]) -> str:
    if reference.get("adapter"):
        return f"{_code(reference['adapter'])} (LoRA on {_code(reference.get('model') or 'the seed')})"
    return _code(reference.get("model"))


def _sizes(reference: dict[str, Any]) -> str:
    sizes = reference.get("config") or {}
    if not sizes:
        return ""
    return f"{sizes['model_type']}, {sizes['num_hidden_layers']} layers of width {sizes['hidden_size']}"


def _code(source: Any) -> str:
    return f"`{source}`" if source else "(a model object; give its place in the config before sharing)"

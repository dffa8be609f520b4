"""What `train` writes into the card of an adapter: the data, the losses before and after, and how it was made."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from huggingface_hub import ModelCard

from .recipe import Recipe


Losses = dict[str, dict[str, float]]  # row of the table -> domain -> loss

_BEGIN, _END = "<!-- peft_bts train: begin -->", "<!-- peft_bts train: end -->"
_SECTION = re.compile(rf"\n*{_BEGIN}.*?{_END}", re.DOTALL)


def write_training_section(
    folder: str, recipe: Recipe, command: str, losses: Losses, sizes: Mapping[str, Mapping[str, int]], steps: int
) -> None:
    """Put a section on training into the README.md of an adapter's folder, in the place of an earlier one.

    Args:
        folder: The adapter's.
        recipe: What it was trained by.
        command: What made it.
        losses: In nats per token.
        sizes: Rows of tokens by domain, `"training"` and `"evaluation"`.
        steps: How many steps were trained.
    """
    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path)
    text = _SECTION.sub("", card.text).rstrip()
    card.text = f"{text}\n\n{_BEGIN}\n{_section(recipe, command, losses, sizes, steps)}\n{_END}\n"
    card.save(path)


def _section(recipe: Recipe, command: str, losses: Losses, sizes: Mapping[str, Mapping[str, int]], steps: int) -> str:
    total = sum(domain.weight for domain in recipe.domains.values())
    data = [["domain", "training data", "share of the mix", "rows", "evaluation data", "rows"]]
    for name in dict.fromkeys((*recipe.domains, *recipe.evaluation)):
        domain, count = recipe.domains.get(name), sizes.get(name, {})
        trained = domain is not None and domain.weight > 0
        data.append(
            [
                name,
                f"`{domain.source}`" if domain is not None and trained else "",
                f"{domain.weight / total:.1%}" if domain is not None and trained else "",
                str(count.get("training", "")),
                f"`{recipe.evaluation[name]}`" if name in recipe.evaluation else "held out",
                str(count.get("evaluation", "")),
            ]
        )
    domains = list(dict.fromkeys(domain for row in losses.values() for domain in row))
    table = [["", *domains]] + [
        [row, *(f"{found[domain]:.4f}" if domain in found else "" for domain in domains)]
        for row, found in losses.items()
    ]
    return "\n".join(
        [
            "## Training",
            "",
            f"The stitches were trained for {steps:,} steps, by this command:",
            "",
            "```bash",
            command,
            "```",
            "",
            f"A row is {recipe.data.block_size} tokens.",
            "",
            *_table(data),
            "",
            "Losses on the evaluation data, in nats per token:",
            "",
            *_table(table),
            "",
            "<details><summary>The recipe</summary>",
            "",
            "```yaml",
            recipe.to_yaml().rstrip(),
            "```",
            "",
            "</details>",
        ]
    )


def _table(rows: list[list[str]]) -> list[str]:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return [f"| {' | '.join(line)} |" for line in lines]

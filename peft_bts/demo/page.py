"""What the demo shows, as HTML: every token in the colour of the model that it was chosen by most.

Texts are escaped. There is no script: pointing at a token shows what is in the page already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any, Optional

from ..config import HUB_INTO_EXPERTS
from ..gates.labels import stitch_name, token_texts
from ..gates.sequences import TracedStitch
from .generation import Answer


_CONTEXT = 8  # tokens of the prompt that the first new one is decoded with: tokenizers drop a space at the start


@dataclass
class Turn:
    """A prompt, and what followed it.

    Attributes:
        prompt: The text.
        answers: By panel, `"stitched"` or `"hub"`.
        texts: What each token of an answer adds to its text.
    """

    prompt: str
    answers: dict[str, Answer] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """How answers are shown.

    Attributes:
        stitches: Those of the model.
        colours: By model.
        shown: The stitch whose gates are the colours.
        chat: Whether prompts and answers are messages of a chat, or one text.
    """

    stitches: Sequence[TracedStitch]
    colours: Mapping[str, str]
    shown: int = -1
    chat: bool = False


def style() -> str:
    """The style sheet, as an element of a page."""
    return f"<style>{files('peft_bts.demo').joinpath('style.css').read_text(encoding='utf-8')}</style>"


def answer_texts(answer: Answer, tokenizer: Any, *, finished: bool = True) -> list[str]:
    """Return what each token of an answer adds to its text; special tokens add nothing.

    Args:
        answer: What was generated.
        tokenizer: The tokenizer.
        finished: Whether no more tokens come; if they do, the beginning of a character is not shown yet.
    """
    context = answer.prompt_ids[-_CONTEXT:]
    special = set(tokenizer.all_special_ids)
    texts = token_texts([*context, *answer.token_ids], tokenizer)[len(context) :]
    if not finished:
        while texts and texts[-1] == "\ufffd":
            texts.pop()
    return ["" if token in special else text for token, text in zip(answer.token_ids, texts)]


def legend_html(look: Look, active: Sequence[str]) -> str:
    """The models with their colours; those that take no part are crossed out."""
    entries = [
        f'<span class="bts-model{"" if name in active else " bts-off"}" style="--c:{colour}">'
        f"<i></i>{escape(name)}</span>"
        for name, colour in look.colours.items()
    ]
    if look.stitches[look.shown].kind == HUB_INTO_EXPERTS:
        meaning = "A token has the colour of the expert that took most from the hub when it was chosen."
    else:
        meaning = "A token has the colour of the model that had most say in choosing it."
    return (
        f'{style()}<div class="bts-legend">{"".join(entries)}<span class="bts-soft">{meaning} '
        "The stronger the colour, the larger the gate. Point at a token for all its gates.</span></div>"
    )


def panel_html(turns: Sequence[Turn], panel: str, look: Look) -> str:
    """All turns in one of the panels, `"stitched"` or `"hub"`."""
    shown = [_turn_html(turn, panel, look) for turn in turns if panel in turn.answers]
    return f'<div class="bts-panel">{"".join(shown)}</div>'


def _turn_html(turn: Turn, panel: str, look: Look) -> str:
    answer, texts = turn.answers[panel], turn.texts[panel]
    prompt = f'<span class="bts-prompt">{escape(turn.prompt)}</span>'
    spans = "".join(
        _token_html(text, token, gates, look) for text, token, gates in zip(texts, answer.token_ids, answer.gates)
    )
    text = f'<div class="bts-tokens">{"" if look.chat else prompt}{spans}</div>'
    speed = answer.tokens_per_second
    figures = [f"{len(answer.token_ids)} tokens"] + ([f"{speed:.1f} tokens/s"] if speed is not None else [])
    means = _means(answer, look)
    figures += [f"{name} {100 * mean:.0f}%" for name, mean in means.items()]
    bar = "".join(
        f'<i style="--c:{look.colours[name]};width:{100 * mean / sum(means.values()):.1f}%"></i>'
        for name, mean in means.items()
        if mean > 0
    )
    bar = f'<div class="bts-bar">{bar}</div>' if bar else ""
    message = f'<div class="bts-message">{prompt}</div>' if look.chat else ""
    soft = f'<div class="bts-soft bts-figures">{escape(" · ".join(figures))}</div>'
    return f'<div class="bts-turn">{message}<div class="bts-answer">{text}{bar}{soft}</div></div>'


def _means(answer: Answer, look: Look) -> dict[str, float]:
    """The mean gate of every model at the stitch that is shown; of a model left out, zero."""
    place = _place(look)
    given = [gates[place] for gates in answer.gates if place in gates]
    names = look.stitches[look.shown].models
    return {name: sum(gates.get(name, 0.0) for gates in given) / len(given) for name in names} if given else {}


def _token_html(text: str, token: int, gates: Mapping[int, Mapping[str, float]], look: Look) -> str:
    if not text:
        return ""
    shown = escape(text).replace("\n", '<span class="bts-soft">↵</span>\n')
    of_stitch = gates.get(_place(look))
    if not of_stitch:
        return f"<span>{shown}</span>"
    strongest = max(of_stitch, key=lambda name: of_stitch[name])
    colour = f"--c:{look.colours[strongest]};--g:{of_stitch[strongest]:.2f}"
    return (
        f'<span class="bts-token" data-model="{escape(strongest)}" tabindex="0" style="{colour}">{shown}'
        f"{_gates_html(text, token, gates, look)}</span>"
    )


def _gates_html(text: str, token: int, gates: Mapping[int, Mapping[str, float]], look: Look) -> str:
    """What pointing at a token shows: a line per stitch, a column per model."""
    names = list(look.colours)
    head = "".join(f"<b>{escape(name)}</b>" for name in names)
    rows = "".join(
        f"<em{' class=bts-now' if place == _place(look) else ''}>{escape(stitch_name(stitch))}</em>"
        + "".join(_cell_html(gates.get(place, {}).get(name), look.colours[name]) for name in names)
        for place, stitch in enumerate(look.stitches)
    )
    said = f"<em><code>{escape(visible(text))}</code> id {token}</em>"
    return f'<span class="bts-gates" style="--n:{len(names)}">{said}{head}{rows}</span>'


def _cell_html(gate: Optional[float], colour: str) -> str:
    return '<u style="--g:0"></u>' if gate is None else f'<u style="--c:{colour};--g:{gate:.2f}">{gate:.2f}</u>'


def visible(text: str) -> str:
    """A token's text with signs for what would not be seen at its ends."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")


def _place(look: Look) -> int:
    return range(len(look.stitches))[look.shown]

"""What figures and pages of gates share: colours of models, texts of tokens, names of stitches."""

from __future__ import annotations

from itertools import cycle
from typing import Any, Optional

from ..config import OUTPUT_MIXTURE
from ..stitch import HUB
from .sequences import TracedStitch


HUB_COLOUR = "#999999"
# Okabe and Ito: told apart with every kind of colour blindness. More experts than that share colours.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442")


def colours(stitches: list[TracedStitch]) -> dict[str, str]:
    """A colour for each model, the same in all views; the hub is grey."""
    experts = sorted({name for stitch in stitches for name in stitch.models} - {HUB})
    return {HUB: HUB_COLOUR, **dict(zip(experts, cycle(COLOURS)))}


def token_texts(token_ids: list[Optional[int]], tokenizer: Any) -> list[str]:
    """Return what each token adds to the text; without a tokenizer, the ids.

    Decoding tokens one by one would lose spaces, and characters that several tokens share: those come with their last
    token, and the others add nothing. A character that is never completed is `�`, on every one of its tokens.
    """
    if tokenizer is None:
        return ["?" if token is None else str(token) for token in token_ids]
    texts: list[str] = []
    before = shown = 0  # tokens [before:shown] are the context that the next token is decoded in
    for end in range(1, len(token_ids) + 1):
        if token_ids[end - 1] is None:
            texts[shown:] = ["\ufffd"] * (end - 1 - shown)
            texts.append("?")
            before = shown = end
            continue
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        context = tokenizer.decode(token_ids[before:shown], **options)
        text = tokenizer.decode(token_ids[before:end], **options)
        if text.endswith("\ufffd") and end - shown < 4:  # UTF-8 has at most 4 bytes
            texts.append("")
            continue
        texts.append(text[len(context) :])
        before, shown = shown, end
    texts[shown:] = ["\ufffd"] * (len(texts) - shown)
    return texts


def stitch_name(stitch: TracedStitch) -> str:
    """Return what a stitch is called below a figure, such as `experts into hub behind layer 3`."""
    if stitch.kind == OUTPUT_MIXTURE:
        return "output mixture"
    return f"{stitch.kind.replace('_', ' ')} behind layer {stitch.layer}"

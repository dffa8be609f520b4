"""Gates on a page: every token in the colour of the model that rules it. The template is page.html."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from .labels import colours, stitch_name, token_texts
from .sequences import GateSequence, TracedStitch


def to_html(stitches: list[TracedStitch], sequences: list[GateSequence], tokenizer: Any) -> str:
    """Fill the template of the page, see `GateTrace.to_html`.

    All texts are data of the page (JSON), never its markup.

    Args:
        stitches, sequences: What was traced.
        tokenizer: To show the tokens' texts; `None` for their ids.
    """
    data = {
        "colours": colours(stitches),
        "stitches": [
            {"name": stitch_name(stitch), "kind": stitch.kind, "models": stitch.models} for stitch in stitches
        ],
        "sequences": [
            {
                "domain": sequence.domain,
                "ids": sequence.token_ids,
                "texts": token_texts(sequence.token_ids, tokenizer),
                "generated": sequence.generated,
                "gates": [
                    [[None if gate != gate else round(gate, 3) for gate in token] for token in gates.tolist()]
                    for gates in sequence.gates
                ],
            }
            for sequence in sequences
        ],
    }
    # In a script element, only `<` could end the data.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = files("peft_bts.gates").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", text).replace("__SPACED__", "ids" if tokenizer is None else "text")

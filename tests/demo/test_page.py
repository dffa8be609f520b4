"""What the demo shows: texts, colours, bars and numbers, as HTML that no text can break out of."""

import re
from html.parser import HTMLParser

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_bts.demo.generation import Answer
from peft_bts.demo.page import Look, Turn, answer_texts, legend_html, panel_html
from peft_bts.gates.labels import colours
from peft_bts.gates.sequences import TracedStitch


STITCHES = [
    TracedStitch(1, "hub_into_experts", ("code", "math")),
    TracedStitch(3, "experts_into_hub", ("hub", "code", "math")),
    TracedStitch(4, "output_mixture", ("hub", "code", "math")),
]
GATES = [
    {
        0: {"code": 0.9, "math": 0.2},
        1: {"hub": 0.1, "code": 0.3, "math": 0.6},
        2: {"hub": 0.5, "code": 0.3, "math": 0.2},
    },
    {0: {"math": 0.4}, 1: {"hub": 0.7, "math": 0.3}, 2: {"hub": 0.25, "math": 0.75}},
]
COLOURS = colours(STITCHES)


class Parsed(HTMLParser):
    """The elements, each as (tag, attributes, the classes around it), and the text outside of tables of gates."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(html)
        assert self.open == []  # all are closed

    def handle_starttag(self, tag, attributes):
        self.open.append((tag, dict(attributes).get("class")))
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if "bts-gates" not in [name for _, name in self.open]:
            self.text += data

    def of_class(self, name):
        return [attributes for _, attributes in self.elements if attributes.get("class") == name]


def panel(texts=("one", " two"), prompt="Say", gates=GATES, seconds=0.5, **look):
    turn = Turn(prompt, {"stitched": Answer([1], [5, 6], gates, seconds)}, {"stitched": list(texts)})
    return Parsed(panel_html([turn], "stitched", Look(STITCHES, COLOURS, **look)))


@pytest.mark.parametrize(
    ("shown", "models", "strengths", "bar"),
    [
        (0, ["code", "math"], ["0.90", "0.40"], {"code": 45, "math": 30}),
        (1, ["math", "hub"], ["0.60", "0.70"], {"hub": 40, "code": 15, "math": 45}),
        (-1, ["hub", "math"], ["0.50", "0.75"], {"hub": 37.5, "code": 15, "math": 47.5}),
    ],
)
def test_colours(shown, models, strengths, bar):
    """A token has the colour of its largest gate at the stitch that is shown, as strong as the gate is large."""
    page = panel(shown=shown)
    tokens = page.of_class("bts-token")
    assert [token["data-model"] for token in tokens] == models
    expected = [f"--c:{COLOURS[model]};--g:{gate}" for model, gate in zip(models, strengths)]
    assert [token["style"] for token in tokens] == expected
    widths = re.findall(r"<i style=\"--c:(#\w+);width:([\d.]+)%", panel_of(shown))
    total = sum(bar.values())
    assert widths == [(COLOURS[name], f"{100 * share / total:.1f}") for name, share in bar.items()]
    assert page.text.startswith("Sayone two2 tokens · 2.0 tokens/s · ")
    assert all(f"{name} {share:.0f}%" in page.text for name, share in bar.items())


def panel_of(shown):
    turn = Turn("Say", {"stitched": Answer([1], [5, 6], GATES, 0.5)}, {"stitched": ["one", " two"]})
    return panel_html([turn], "stitched", Look(STITCHES, COLOURS, shown=shown))


def test_all_gates_of_a_token():
    """Pointing at it shows a line per stitch, with nothing for models that took no part."""
    second = panel_of(1).split('class="bts-gates"')[2]
    assert "<code>·two</code> id 6" in second
    names = re.findall(r"<em( class=bts-now)?>([a-z][^<]*)</em>", second)
    assert [name for _, name in names] == [
        "hub into experts behind layer 1",
        "experts into hub behind layer 3",
        "output mixture",
    ]
    assert [bool(now) for now, _ in names] == [False, True, False]
    assert re.findall(r"<u[^>]*>([\d.]*)</u>", second) == ["", "", "0.40", "0.70", "", "0.30", "0.25", "", "0.75"]


def test_texts_are_no_markup():
    evil = '<img src=x onerror="alert(1)">&amp;'
    page = panel(texts=(evil, evil), prompt=evil)
    assert {tag for tag, _ in page.elements} <= {"div", "span", "i", "em", "b", "u", "code"}
    assert page.text.startswith(3 * evil)


def test_chats_and_the_hub_alone():
    """Prompts become messages; without gates there are neither colours nor bars."""
    page = panel(chat=True)
    assert page.of_class("bts-message") and page.text.startswith("Sayone two")
    page = panel(gates=[{}, {}], seconds=0.0)
    assert not page.of_class("bts-token") and not page.of_class("bts-bar") and page.text == "Sayone two2 tokens"
    assert panel_html([], "hub", Look(STITCHES, COLOURS)) == '<div class="bts-panel"></div>'


def test_legend():
    """All models with their colours, those that are off crossed out, and what a colour means at this stitch."""
    legend = legend_html(Look(STITCHES, COLOURS), ["hub", "math"])
    models = re.findall(r'class="bts-model( bts-off)?" style="--c:(#\w+)"><i></i>(\w+)<', legend)
    assert [(bool(off), name) for off, _, name in models] == [(False, "hub"), (True, "code"), (False, "math")]
    assert [colour for _, colour, _ in models] == list(COLOURS.values())
    assert "most say in choosing it" in legend and "most from the hub" not in legend
    assert "most from the hub" in legend_html(Look(STITCHES, COLOURS, shown=0), [])


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({character: i for i, character in enumerate([*alphabet, "<end>"])}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def test_characters_of_several_tokens(tokenizer):
    """They come with their last token, and are not there before; the end of a text is not shown."""
    prompt, ids = tokenizer("Hé")["input_ids"], tokenizer(" wörld")["input_ids"]
    whole = answer_texts(Answer(prompt, [*ids, tokenizer.eos_token_id]), tokenizer)
    assert whole == [" ", "w", "", "ö", "r", "l", "d", ""]
    assert answer_texts(Answer(prompt, ids[:3]), tokenizer, finished=False) == [" ", "w"]
    assert answer_texts(Answer(prompt, ids[:3]), tokenizer) == [" ", "w", "\ufffd"]

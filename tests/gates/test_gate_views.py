"""Figures and pages of gates show the recorded values, whatever the tokens are."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peft_bts import trace_gates
from peft_bts.gates.labels import token_texts
from tests.helpers.models import IDS, LEFT, fresh, logits, stitch


NASTY = ["</script><script>document.title = 'run'</script>", "<!--<script>",
         "<img src=x onerror=document.title='run'>", "$\\frac$", "\n", "\t", "&lt;",
         "'\"", "[bold]", "\u2028", "  ", "é"]  # fmt: skip


class NastyTokenizer:
    """Tokens that would be markup, script or formulas where texts are not kept apart from them."""

    def decode(self, ids, **options):
        return "".join(NASTY[token % len(NASTY)] for token in ids)


@pytest.fixture(scope="module", params=["hub", "mixture"])
def trace(request):
    experts = {"code": fresh("llama", seed=1), "math": fresh("gpt2", seed=2)}
    model = stitch(fresh("llama"), experts, output=request.param)
    with trace_gates(model) as trace:
        with trace.domain("<b>math $x"):
            model.generate(IDS, attention_mask=LEFT, max_new_tokens=4, do_sample=False)
        with trace.domain("code"), model.set_active_experts(["code"]):
            logits(model)
    return trace


def byte_tokenizer():
    """A byte-level BPE with few merges: characters beyond ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["hello world"] * 9, trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def test_token_texts():
    """Spaces stay, and a character of several tokens comes with its last one."""
    tokenizer, text = byte_tokenizer(), "hello  world, ä 日 🙂!\n"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) > len(text.split())
    assert "".join(texts) == text
    assert texts.count("🙂") == 1 and texts[texts.index("🙂") - 3 : texts.index("🙂")] == [""] * 3
    cut = [*ids[: texts.index("🙂")], None, *tokenizer("日")["input_ids"][:2]]  # amid two characters
    assert token_texts(cut, tokenizer)[-6:] == ["\ufffd"] * 3 + ["?"] + ["\ufffd"] * 2
    broken = tokenizer("日")["input_ids"][:2] * 3  # never completed
    assert len(token_texts([*broken, *ids], tokenizer)) == 6 + len(ids)
    shown = "".join(token_texts([*broken, *ids], tokenizer))
    assert shown.endswith("\ufffdhello  world, ä 日 🙂!\n")
    assert token_texts([5, None], None) == ["5", "?"]


# ------------------------------------------------------------------------------------------------------------ figures


def test_plot_over_tokens(trace):
    """By default the last stitch, for the first sequence of each domain."""
    figure = trace.plot(tokenizer=NastyTokenizer())
    figure.savefig(io.BytesIO(), format="png")  # a `$` is no formula: it would raise here
    assert len(figure.axes) == 2
    for axes, sequence in zip(figure.axes, [trace.sequences[0], trace.sequences[2]]):
        lines = {line.get_label(): torch.tensor(line.get_ydata()) for line in axes.get_lines()}
        assert list(lines) == ["hub", "code", "math"]
        for name, gates in zip(lines, sequence.gates[-1].T):
            torch.testing.assert_close(lines[name], gates, check_dtype=False, equal_nan=True)
        assert len(axes.get_xticklabels()) == len(sequence)
        assert len(axes.patches) == sum(sequence.generated)
    other = trace.plot(stitch=0, sequences=[1])
    assert [line.get_label() for line in other.axes[0].get_lines()] == ["code", "math"]
    assert [text.get_text() for text in other.axes[0].get_xticklabels()] == list(
        map(str, trace.sequences[1].token_ids)
    )


def test_plot_domains(trace):
    figure = trace.plot(by="domain")
    figure.savefig(io.BytesIO(), format="png")
    shown = figure.axes[0].get_images()[0].get_array().tolist()
    for values, row in zip(shown, trace.table().rows, strict=True):
        expected = [row["gates"].get(name, math.nan) for name in ("hub", "code", "math")]
        assert [math.nan if value is None else value for value in values] == pytest.approx(expected, nan_ok=True)


def test_errors(trace, monkeypatch):
    with pytest.raises(ValueError, match="'token' or 'domain'"):
        trace.plot(by="expert")
    with pytest.raises(IndexError):
        trace.plot(stitch=7)
    model = stitch(fresh("llama"), {"code": fresh("llama", seed=1)})
    with trace_gates(model) as empty:
        pass
    for call in (empty.plot, empty.to_html):
        with pytest.raises(ValueError, match="Nothing was recorded"):
            call()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs matplotlib: `pip install "\.\[viz\]"`'):
        trace.plot()


# -------------------------------------------------------------------------------------------------------------- pages


class Page(HTMLParser):
    """Tags with their attributes, and what is in script elements."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


def test_page_holds_the_gates_and_no_foreign_markup(trace, tmp_path):
    """Texts are data: no token or label makes an element; nothing is loaded from elsewhere."""
    page = trace.to_html(tmp_path / "gates.html", tokenizer=NastyTokenizer())
    assert (tmp_path / "gates.html").read_text(encoding="utf-8") == page
    parsed, plain = Page(page), Page(trace.to_html())
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in plain.tags]  # whatever the texts are
    assert [attributes.get("type") for tag, attributes in parsed.tags if tag == "script"] == ["application/json", None]
    assert not any({"src", "href", "onerror"} & attributes.keys() for _, attributes in parsed.tags)
    assert not re.search(r"https?:|url\(|@import|fetch\(", page)
    data = json.loads(parsed.scripts[0])
    assert [one["domain"] for one in data["sequences"]] == ["<b>math $x"] * 2 + ["code"] * 2
    for one, sequence in zip(data["sequences"], trace.sequences, strict=True):
        assert one["texts"] == [NASTY[token % len(NASTY)] for token in sequence.token_ids]
        assert one["generated"] == sequence.generated
        for shown, gates in zip(one["gates"], sequence.gates, strict=True):
            shown = torch.tensor([[math.nan if gate is None else gate for gate in token] for token in shown])
            torch.testing.assert_close(shown, gates, atol=6e-4, rtol=0, equal_nan=True)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_page_in_a_browser(trace, tmp_path):
    """Every token is there, as text, in the colour of its dominant model; no token's script has run."""
    trace.to_html(tmp_path / "gates.html", tokenizer=NastyTokenizer())
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    command = [CHROMIUM, *options, (tmp_path / "gates.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>Gates</title>" in dom and dom.count("<script") == 2 and "<img" not in dom
    spans = re.findall(
        r'<span class="(\w*)" data-sequence="(\d)" data-token="\d+" style="--c: (\S+); --g: ([\d.]+);', dom
    )
    assert len(spans) == sum(map(len, trace.sequences))
    colours = {"hub": "#999999", "code": "#E69F00", "math": "#56B4E9"}
    expected = []
    for i, sequence in enumerate(trace.sequences):
        for generated, gates in zip(sequence.generated, sequence.gates[-1].nan_to_num(-1)):
            best = ("hub", "code", "math")[gates.argmax()]
            expected.append(("generated" if generated else "", str(i), colours[best], gates.max().item()))
    for (*shown, gate), (*right, value) in zip(spans, expected, strict=True):
        assert shown == right and float(gate) == pytest.approx(value, abs=6e-4)

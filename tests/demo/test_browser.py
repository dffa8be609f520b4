"""The demo in Chromium: a text is typed, tokens come in colours, an expert is switched off."""

import re

import pytest
from transformers import AutoModelForCausalLM

from peft_bts.demo import make_demo
from tests.helpers.browser import CHROMIUM, DRIVER, page_at, served
from tests.helpers.models import stitch
from tests.helpers.text import save_model, word_tokenizer


pytest.importorskip("gradio", reason="needs peft_bts[demo]")
pytest.importorskip("selenium", reason="needs peft_bts[test]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and its driver are not installed"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    seed, code, math = (
        AutoModelForCausalLM.from_pretrained(save_model(root / name, seed=number))
        for number, name in enumerate(("seed", "code", "math"))
    )
    model = stitch(seed, {"code": code, "math": math}, output="mixture")
    model.generation_config.eos_token_id = None
    with served(make_demo(model, word_tokenizer(), title="tiny")) as address, page_at(address) as page:
        page.set("#tokens", 40)
        yield page


def answered(page, prompt, panel="stitched"):
    """Generate, wait for the end, and return the line below the text."""
    number = len(page.figures(panel)) + 1
    page.ask(prompt)

    def done():
        figures = page.figures(panel)
        return len(figures) == number and re.match(r"40 tokens · [\d.]+ tokens/s", figures[-1])

    page.until(done)
    return page.figures(panel)[-1]


def painted(colour):
    """The red, green and blue of a colour as the browser has it, however it writes it."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", colour.replace("color(srgb", ""))]
    return tuple(round(255 * n) if "srgb" in colour else round(n) for n in numbers[:3])


def test_the_whole_page(page, tmp_path):
    """One visit, from the first prompt to the last switch."""
    page.click("#mode input[value='Complete']")
    page.rest()  # a change of mode ends what is running
    page.watch()
    figures = answered(page, "w5 w9 w3")
    assert any(0 < count < 40 for count in page.watched())  # they come one after the other
    assert all(f"{name} " in figures for name in ("hub", "code", "math"))
    tokens = page.tokens()
    assert len(tokens) == 40
    legend = dict(zip(("hub", "code", "math"), [(153, 153, 153), (230, 159, 0), (86, 180, 233)]))
    assert {model: painted(colour) for model, colour in tokens} == {m: legend[m] for m, _ in tokens}
    assert len({model for model, _ in tokens}) > 1

    text = page.point_at(3)
    assert "output mixture" in text and "experts into hub behind layer 3" in text and "math" in text
    picture = tmp_path / "page.png"
    page.driver.save_screenshot(str(picture))
    assert picture.stat().st_size > 10_000

    page.switch("math")
    page.until(lambda: [e.text for e in page.all("#legend .bts-off")] == ["math"])
    figures = answered(page, "w5 w9 w3")
    assert {model for model, _ in page.tokens()} <= {"hub", "code"} and "math 0%" in figures
    page.switch("code")  # nobody is left: the hub alone, without colours
    figures = answered(page, "w5 w9 w3")
    assert not page.tokens() and "hub" not in figures

    page.switch("math")
    page.click("#compare input")
    answered(page, "w5 w9 w3", "alone")
    assert page.tokens() and not page.tokens("alone") and len(page.figures()) == 4


def test_a_chat_is_stopped_and_cleared(page):
    """Turns follow each other; Stop ends a generation."""
    page.click("#mode input[value='Chat']")
    page.until(lambda: not page.figures())
    page.rest()
    answered(page, "w5")
    answered(page, "w7 w7")
    assert [element.text for element in page.all("#stitched .bts-message")] == ["w5", "w7 w7"]
    page.ask("w9")
    page.click("#stop")
    page.click("#clear")
    page.until(lambda: not page.all("#stitched .bts-turn"))

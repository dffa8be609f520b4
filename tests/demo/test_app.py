"""What the demo does with prompts, chats, switches and limits, without a browser; and the command."""

import sys

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_bts.demo.app import Demo
from peft_bts.demo.generation import Choice
from peft_bts_cli import app as program
from tests.helpers.models import fresh, stitch
from tests.helpers.text import save_model, word_tokenizer


def make(**options):
    model = stitch(fresh("llama"), {"code": fresh("llama", seed=1), "math": fresh("llama", seed=2)}, **options)
    model.generation_config.eos_token_id = None
    return Demo(model, word_tokenizer())


EVERYBODY = Choice(("code", "math"), max_active_experts=2, max_new_tokens=5)


def answered(demo, prompt, turns=(), choice=EVERYBODY, chat=False, compare=False):
    *_, turns = demo.answer(prompt, turns, choice, chat=chat, compare=compare)
    return turns


def test_completing():
    """Every prompt is a text of its own, below those before; the hub alone beside it, if asked for."""
    demo = make()
    (turn,) = answered(demo, "w5 w9", compare=True)
    assert list(turn.answers) == ["stitched", "hub"] and turn.answers["stitched"].prompt_ids == [5, 9]
    assert turn.answers["stitched"].gates[0] and turn.answers["hub"].gates == [{}] * 5
    assert [len(texts) for texts in turn.texts.values()] == [5, 5]
    assert demo.experts == ["code", "math"]
    before, after = answered(demo, "w7", [turn])
    assert before is turn and list(after.answers) == ["stitched"]
    assert after.answers["stitched"].prompt_ids == [7]


def test_chatting():
    """The template has all turns; the hub reads its own answers, and ours where it was not asked."""
    demo, tokenizer = make(), word_tokenizer()
    turns = answered(demo, "w5", chat=True)
    turns = answered(demo, "w6", turns, chat=True, compare=True)
    turns = answered(demo, "w7", turns, chat=True, compare=True)
    said = [{panel: "".join(texts) for panel, texts in turn.texts.items()} for turn in turns]

    def ids(*answers):
        messages = []
        for word, answer in zip(("w5", "w6", "w7"), (*answers, None)):
            messages.append({"role": "user", "content": word})
            messages += [] if answer is None else [{"role": "assistant", "content": answer}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    assert turns[2].answers["stitched"].prompt_ids == ids(said[0]["stitched"], said[1]["stitched"])
    assert turns[2].answers["hub"].prompt_ids == ids(said[0]["stitched"], said[1]["hub"])


def test_html():
    """Panels and legend follow the switches."""
    demo = make(output="mixture")
    turns = answered(demo, "w5", choice=Choice(("math",), max_new_tokens=5), compare=True)
    legend, stitched, alone = demo.html(turns, ["math"], 4, False)
    assert "bts-off" in legend and "<style>" in legend
    assert stitched.count('class="bts-token"') == 5 and "data-model" not in alone and "5 tokens" in alone
    assert demo.html(turns, ["math"], 0, False)[1] != stitched


@pytest.mark.parametrize(
    ("prompt", "match"), [("", "There is no prompt"), (" ".join(["w5"] * 200), r"has 200 tokens.*models take \d+")]
)
def test_prompts_that_do_not_work(prompt, match):
    demo = make()
    with pytest.raises(ValueError, match=match):
        answered(demo, prompt)
    assert answered(demo, "w5")


def test_the_end_of_the_positions():
    """No more tokens than the models have positions for."""
    demo = make()
    (turn,) = answered(demo, " ".join(["w5"] * (demo.longest - 2)))
    assert len(turn.answers["stitched"].token_ids) == 2


def test_the_command(tmp_path, monkeypatch):
    """It serves the adapter on this machine alone, unless it is told otherwise."""
    gradio = pytest.importorskip("gradio", reason="needs peft_bts[demo]")
    adapter = saved(tmp_path)
    served = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: served.append((self, options)))
    result = CliRunner().invoke(program, ["demo", adapter, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    ((app, options),) = served
    assert options == {"server_name": "127.0.0.1", "server_port": None, "share": False}
    labels = [block.label for block in app.blocks.values() if getattr(block, "label", None)]
    assert {"Prompt", "Experts", "Mode", "The hub alone beside it"} <= set(labels)
    CliRunner().invoke(program, ["demo", adapter, "--device", "cpu", "--host", "0.0.0.0", "--port", "80"])
    assert served[1][1] == {"server_name": "0.0.0.0", "server_port": 80, "share": False}


def test_without_gradio(tmp_path, monkeypatch):
    """It says what to install, before anything is loaded."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(program, ["demo", str(tmp_path)])
    assert result.exit_code == 1 and 'pip install ".[demo]"' in result.stderr and "gradio" in result.stderr


def saved(root):
    """A small adapter with its models on disk."""
    hub = AutoModelForCausalLM.from_pretrained(save_model(root / "seed"))
    model = stitch(hub, {}, experts={"code": save_model(root / "code", seed=1)})
    model.save_pretrained(root / "adapter")
    word_tokenizer().save_pretrained(root / "adapter")
    return str(root / "adapter")

"""Tables lose nothing, however narrow the terminal is."""

import io

import pytest
import typer
from rich.console import Console

from peft_bts.formatting import as_text, table
from peft_bts.gates.table import GateTable
from peft_bts_cli import app


COLUMNS = [
    "model",
    *(f"{domain} {key}" for domain in ("code", "math", "law", "bio") for key in ("loss", "perplexity")),
]
ROWS = [[who, *(f"{number / 7 + 2 * i:.4g}" for number in range(8))] for i, who in enumerate(("hub", "[code]", "all"))]


def on_terminal(part, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(part, markup=False, highlight=False)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [30, 50, 80, 200])
def test_no_cell_is_cut_or_broken(width):
    text = on_terminal(table("Losses", COLUMNS, ROWS), width)
    assert max(map(len, text.splitlines())) <= width
    words = text.replace("\n", " ")
    assert not [cell for row in (COLUMNS, *ROWS) for cell in row if f" {cell} " not in f" {words} "]
    assert "…" not in text


def test_a_table_that_fits_stays_as_it_is():
    lines = on_terminal(table("Losses", COLUMNS, ROWS, caption="in nats"), 200).splitlines()
    assert lines[0].strip() == "Losses" and lines[-1].strip() == "in nats"
    assert lines[2].split()[:3] == ["model", "code", "loss"] and lines[4].split() == ROWS[0]


def test_a_table_that_is_too_wide_is_turned():
    lines = on_terminal(table("Losses", COLUMNS, ROWS), 60).splitlines()
    assert lines[2].split() == ["model", "hub", "[code]", "all"]
    assert lines[4].split() == ["code", "loss", *(row[1] for row in ROWS)]


def test_only_what_is_longer_than_a_line_is_broken():
    path = "/a/very/long/path" * 5
    text = on_terminal(table("", ["name", "path"], [["code", path]], left=2), 40)
    assert path in "".join(line.removeprefix(" path").strip() for line in text.splitlines())


def test_plain_text_has_no_width():
    """What goes into a file has every row of a table, and every sentence, on one line."""
    sentence = "word " * 60
    lines = as_text(table("Losses", COLUMNS * 3, [row * 3 for row in ROWS]), sentence, width=None).splitlines()
    assert [line.split() for line in lines if "hub" in line] == [ROWS[0] * 3]
    assert sentence.strip() in lines


@pytest.mark.parametrize("width", [40, 80])
def test_gates_on_a_narrow_terminal(width):
    names = ["hub", "code", "mathematics", "translation"]
    row = {"layer": 11, "kind": "experts_into_hub", "tokens": 1234, "entropy": 0.321, "normalised_entropy": 0.654}
    row |= {"gates": {n: 0.111 * (i + 1) for i, n in enumerate(names)}, "dominant": dict.fromkeys(names, 0.25)}
    text = on_terminal(GateTable(("domain",), [{**row, "domain": d} for d in ("code", "prose")]), width)
    for number in ("0.111 (25%)", "0.222 (25%)", "0.333 (25%)", "0.444 (25%)", "0.321", "0.654", "1234"):
        assert text.count(number) == 2, text


@pytest.mark.parametrize("command", [command.callback.__name__ for command in app.registered_commands])
def test_help_has_every_option(command, monkeypatch):
    """On 60 columns, too."""
    monkeypatch.setenv("COLUMNS", "60")
    name = next(c.name or c.callback.__name__ for c in app.registered_commands if c.callback.__name__ == command)
    group = typer.main.get_command(app)
    context = group.make_context("peft-bts", [name], resilient_parsing=True)
    context.terminal_width = 60
    one = group.commands[name]
    text = one.get_help(type(context)(one, info_name=name, parent=context, terminal_width=60))
    options = [option for parameter in one.params for option in (*parameter.opts, *parameter.secondary_opts)]
    assert not [option for option in options if option.startswith("--") and option not in text]

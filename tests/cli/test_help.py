"""Help, the version and usage errors come at once: what takes seconds to import is imported by commands that run."""

import subprocess
import sys

from peft_bts import __version__


ASK = """
import sys
from typer.main import get_command
from typer.testing import CliRunner
from peft_bts_cli import app

def ask(*arguments, code=0):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.output

text = ask("--help")
for name in get_command(app).commands:
    assert name in text
    if name != "train":  # its help is that of transformers' dataclasses
        assert "Usage: " in ask(name, "--help")
print(ask("--version").strip())
assert "'adapter'" in ask("gates", code=2) and "--hub" in ask("plan", code=2)
print(*({"torch", "transformers", "peft", "peft_bts", "rich", "yaml"} & {*sys.modules}))
"""


def test_nothing_slow_is_imported():
    result = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"peft_bts {__version__}", ""]

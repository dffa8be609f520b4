"""`python -m peft_bts`: the command line, see `peft_bts/cli`."""

from .cli import app


app(prog_name="peft-bts")

"""`python -m peft_bts`: the command line, see `peft_bts_cli`."""

from peft_bts_cli import app


app(prog_name="peft-bts")

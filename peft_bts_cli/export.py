"""`peft-bts export`: the hub, the experts and the stitches as one checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Adapter, Dtype, Result, stitch_config


def export(
    adapter: Adapter,
    folder: Annotated[str, typer.Argument(help="Where to write the checkpoint.")],
    dtype: Dtype = "auto",
) -> Result:
    """Load an adapter with its models, and write them as one standalone checkpoint."""
    from peft import AutoPeftModelForCausalLM

    stitch_config(adapter)  # says what is wrong with it before anything is loaded
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype)
    model.export(folder)
    return Result([f"Wrote {folder}. Load it with `import peft_bts` and AutoModelForCausalLM."], {"folder": folder})

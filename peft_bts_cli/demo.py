"""`peft-bts demo`: a stitched model in the browser."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .common import Adapter, Device, Dtype, Result


def demo(
    adapter: Adapter,
    host: Annotated[
        str, typer.Option(help="The address to listen at. 0.0.0.0: whoever reaches this machine can use it.")
    ] = "127.0.0.1",
    port: Annotated[Optional[int], typer.Option(help="Default: the first free one from 7860 on.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> Result:
    """Generate in the browser: tokens appear in the colours of the models that chose them. Ctrl+C ends it."""
    from peft_bts.demo import make_demo
    from peft_bts.gates.extras import needs

    from .texts import load

    needs("gradio", extra="demo")  # said before anything is loaded
    model, tokenizer = load(adapter, dtype, device)
    make_demo(model, tokenizer, title=adapter).launch(server_name=host, server_port=port, share=False)
    return Result(["The demo has ended."], {"adapter": adapter})

"""`peft-bts push`: an adapter, and the models that exist only here, onto the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import Adapter, Result, stitch_config


def push(
    adapter: Adapter,
    hub_model_id: Annotated[
        Optional[str], typer.Argument(metavar="[ID]", help="The adapter's id on the Hub, such as org/stitch.")
    ] = None,
    push_experts_to: Annotated[
        Optional[str],
        typer.Option("--experts-to", help="Where experts go that exist only here, such as 'org/seed-{name}'."),
    ] = None,
    push_seed_to: Annotated[
        Optional[str], typer.Option("--seed-to", help="Where the seed goes, if it exists only here.")
    ] = None,
    hub_private_repo: Annotated[
        Optional[bool], typer.Option("--private/--public", help="For repositories that are made now.")
    ] = None,
) -> Result:
    """Upload an adapter to the Hub, with its card and tokenizer, and before it experts that exist only here."""
    if hub_model_id is None:
        raise typer.BadParameter("name the adapter's id on the Hub, such as org/stitch.", param_hint="ID")
    from peft import AutoPeftModelForCausalLM

    from peft_bts.sharing.push import push_adapter, push_experts

    if not Path(adapter).is_dir():
        raise ValueError(f"There is no folder {adapter} to push.")
    stitch_config(adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto")
    uploaded = {}
    if push_experts_to is not None or push_seed_to is not None:
        uploaded = push_experts(model, push_experts_to or {}, seed=push_seed_to, private=hub_private_repo)
    uploaded["adapter"] = push_adapter(model, adapter, hub_model_id, private=hub_private_repo)
    return Result([f"Uploaded {what}: {place}" for what, place in uploaded.items()], {"uploaded": uploaded})

"""`peft-bts plan`: what will stitching these models take?"""

from __future__ import annotations

from typing import Annotated, Literal, Optional

import typer

from ..config import StitchConfig
from ..planning.estimate import plan as make_plan
from .common import Experts, Hub, Result, by_name


def plan(
    hub: Hub,
    expert: Experts,
    num_stitches: Annotated[int, typer.Option(help="Number of stitch layers.")] = 4,
    layers_to_stitch: Annotated[
        Optional[list[int]], typer.Option(help="A 0-based hub layer that gets a stitch; repeat the option for more.")
    ] = None,
    pattern: Annotated[Literal["alternating", "experts_into_hub"], typer.Option()] = "alternating",
    expert_streams: Annotated[Literal["intact", "projected"], typer.Option()] = "intact",
    gate: Annotated[
        Literal["channel", "token"], typer.Option(help="One gate value per channel, or one per token.")
    ] = "channel",
    gate_bias: Annotated[bool, typer.Option(help="Whether the gates have biases.")] = True,
    gate_dropout: Annotated[float, typer.Option(help="Dropout on the gate logits in training.")] = 0.0,
    r: Annotated[Optional[int], typer.Option("--r", help="Rank of the projections; full if not given.")] = None,
    batch_size: Annotated[int, typer.Option()] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
) -> Result:
    """Count parameters, memory, operations and the adapter's size, from config files, before downloading weights."""
    config = StitchConfig(
        task_type="CAUSAL_LM",
        num_stitches=num_stitches,
        layers_to_stitch=layers_to_stitch or None,
        pattern=pattern,
        expert_streams=expert_streams,
        gate=gate,
        gate_bias=gate_bias,
        gate_dropout=gate_dropout,
        r=r,
    )
    estimate = make_plan(hub, by_name(expert), config, batch_size=batch_size, sequence_length=sequence_length)
    return Result(estimate.tables(), estimate.to_dict())

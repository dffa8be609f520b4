"""`peft-bts plan`: what stitching given models will take."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

import typer

from .common import Experts, Hub, Result, models_by_name


def plan(
    hub: Hub,
    expert: Experts,
    num_stitches: Annotated[int, typer.Option(help="Number of stitch layers.")] = 4,
    layers_to_stitch: Annotated[
        Optional[list[int]],
        typer.Option(help="A hub layer that gets a stitch, from 0. Repeat the option for every layer."),
    ] = None,
    pattern: Annotated[
        Literal["alternating", "experts_into_hub"],
        typer.Option(help="The kinds of stitches: both in turn, or Experts-into-Hub alone."),
    ] = "alternating",
    expert_streams: Annotated[
        Literal["intact", "projected"],
        typer.Option(help="Whether Experts-into-Hub leaves experts' states or projects them."),
    ] = "intact",
    output: Annotated[
        Literal["hub", "mixture"], typer.Option(help="Whether all heads are mixed, or the hub's speaks alone.")
    ] = "mixture",
    evidence: Annotated[
        Optional[float], typer.Option(help="Forgetting factor of the evidence that output gates see. Default: none.")
    ] = None,
    gate: Annotated[
        Literal["channel", "token"], typer.Option(help="One gate value per channel, or per token.")
    ] = "channel",
    gate_bias: Annotated[bool, typer.Option(help="Whether the gates have biases.")] = True,
    gate_dropout: Annotated[float, typer.Option(help="Dropout on the logits of the gates in training.")] = 0.0,
    r: Annotated[Optional[int], typer.Option("--r", help="Rank of the projections. Default: full matrices.")] = None,
    modules_to_save: Annotated[
        Optional[list[str]],
        typer.Option(help="A module of the hub that is trained and saved, too. Repeat the option for every module."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
    quantization: Annotated[
        Optional[Literal["4bit", "8bit"]], typer.Option(help="Count hub and experts as bitsandbytes quantises them.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Count what a training step keeps with it.")
    ] = False,
) -> Result:
    """Count parameters, memory, operations and the size of the adapter. Reads config files only, no weights."""
    from peft_bts.config import StitchConfig
    from peft_bts.planning.estimate import plan as make_plan
    from peft_bts.reference import as_source

    config = StitchConfig(
        task_type="CAUSAL_LM",
        num_stitches=num_stitches,
        layers_to_stitch=layers_to_stitch or None,
        pattern=pattern,
        expert_streams=expert_streams,
        output=output,
        evidence=evidence,
        gate=gate,
        gate_bias=gate_bias,
        gate_dropout=gate_dropout,
        r=r,
        modules_to_save=modules_to_save or None,
    )
    estimate = make_plan(
        as_source(hub),
        models_by_name(expert),
        config,
        batch_size=batch_size,
        sequence_length=sequence_length,
        quantization=quantization,
        gradient_checkpointing=gradient_checkpointing,
    )
    return Result(estimate.tables(), estimate.to_dict())

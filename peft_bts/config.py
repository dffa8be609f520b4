"""`StitchConfig`: what a stitched model is made of, and where its stitches sit."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, Optional

from peft import PeftConfig, PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES

from .places import to_file
from .reference import as_reference, without_placement


EXPERTS_INTO_HUB: Final = "experts_into_hub"
HUB_INTO_EXPERTS: Final = "hub_into_experts"
StitchKind = Literal["experts_into_hub", "hub_into_experts"]
OUTPUT_MIXTURE: Final = "output_mixture"  # in traces, beside the kinds of stitches
# What the tuner fills in, and adapter files therefore hold: the decoder layers; or PEFT's word for none.
_OUR_TARGETS = rf".*\\\.\((\d+\|)*\d+\)|{DUMMY_TARGET_MODULES}"


@dataclass
class StitchConfig(PeftConfig):
    """Configuration of a Branch-Train-Stitch adapter (arXiv 2502.00075).

    Args:
        experts (`dict[str, str | dict]`): The experts by name: a repo id, a path, or a dict with `model` and
            optionally `revision`, `subfolder`, `adapter` (a LoRA on top of `model`), `quantization_config` (of
            transformers), and for this machine only `device_map`, `max_memory`, `offload_folder`. They are loaded,
            frozen, when the adapter is made. Loaded models are attached later, by `model.attach_expert(name, model)`.
        num_stitches (`int`): K. With L hub layers they sit after layers s, 2s, ..., (K-1)s and L, where s = L // K.
            0, with `output="mixture"` only: no stitches, gates on the outputs alone.
        layers_to_stitch (`list[int]`, *optional*): 0-based hub layers that get a stitch, instead of `num_stitches`;
            the last must be the hub's last layer.
        pattern (`str`): `"alternating"` (the paper): counted from the end, Experts-into-Hub and Hub-into-Experts take
            turns. `"experts_into_hub"`: every stitch is of that kind; the experts then run without any gradient.
        expert_streams (`str`): What an Experts-into-Hub stitch does to the experts' own states: `"intact"` leaves
            them, `"projected"` replaces them by their projections (eq. 3 to the letter; needs equal widths).
        output (`str`): `"mixture"`: the logits are log probabilities of a mixture of all models' distributions, each
            by its own head, with one gate per token and model. `"hub"` (the paper): the hub's head speaks alone.
        evidence (`float`, *optional*): With `output="mixture"`: the output gates also see how well each model has
            predicted the tokens so far. The value, above 0 and up to 1, is the forgetting factor: with every further
            token, what an earlier one has shown is multiplied by it. 0.8 did best where text changes its domain; 1
            never forgets. `None`: the gates see the hub's state alone.
        gate (`str`): `"channel"` (the paper): one gate value per channel. `"token"`: one per token and model.
        gate_bias (`bool`): Whether the gates have a bias, which starts at zero.
        gate_dropout (`float`): Dropout on the gate logits in training (eq. 3).
        r (`int`, *optional*): Rank of the projections: identity + up @ down, of which only up and down are trained
            and stored. `None`: full matrices.
        init_weights (`bool`): `True`: projections start as the identity and gates at zero. `False`: random (tests).
        modules_to_save (`list[str]`, *optional*): Modules of the hub to train and save besides the stitches.
        target_modules (`str`, *optional*): Filled in by PEFT's machinery; leave it alone.
        save_embedding_layers (`bool`): Filled in when the adapter is saved: whether that was done with
            `save_embedding_layers=True`, so that the file holds the hub's embedding layers, which loading replaces.
    """

    experts: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Experts by name: an id, a path, or a dict with `model`, `revision`, ..."},
    )
    num_stitches: int = field(default=4, metadata={"help": "Number of stitch layers, K."})
    layers_to_stitch: Optional[list[int]] = field(
        default=None, metadata={"help": "0-based hub layers that get a stitch, ending with the last layer."}
    )
    pattern: Literal["alternating", "experts_into_hub"] = field(
        default="alternating", metadata={"help": "Kinds of the stitches: alternating, or all Experts-into-Hub."}
    )
    expert_streams: Literal["intact", "projected"] = field(
        default="intact", metadata={"help": "Whether Experts-into-Hub leaves the experts' states or projects them."}
    )
    output: Literal["hub", "mixture"] = field(
        default="mixture",
        metadata={"help": "Whether all models' distributions are mixed, or the hub's head speaks alone (the paper)."},
    )
    evidence: Optional[float] = field(
        default=None,
        metadata={
            "help": "Have output gates see how well each model has predicted the tokens so far: the forgetting factor "
            "per token, such as 0.8. None: they see the hub's state alone."
        },
    )
    gate: Literal["channel", "token"] = field(
        default="channel", metadata={"help": "One gate value per channel, or one per token."}
    )
    gate_bias: bool = field(default=True, metadata={"help": "Whether the gates have a bias."})
    gate_dropout: float = field(default=0.0, metadata={"help": "Dropout on the gate logits."})
    r: Optional[int] = field(default=None, metadata={"help": "Rank of the projections; None for full matrices."})
    init_weights: bool = field(
        default=True, metadata={"help": "Identity projections and zero gates (True), or random weights (False)."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules of the hub to train and save besides the stitches."}
    )
    target_modules: Optional[str] = field(
        default=None, metadata={"help": "Set by the tuner from the stitch schedule; not meant to be set by users."}
    )
    save_embedding_layers: bool = field(
        default=False,
        metadata={"help": "Set when saving: whether the file holds the hub's embedding layers, too."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["STITCH"]
        if not isinstance(self.experts, dict):
            raise ValueError(f"experts must be a dict of name -> id, path or dict, got {type(self.experts).__name__}.")
        self.experts = {name: as_reference(name, value) for name, value in self.experts.items()}
        for option, allowed in (
            ("pattern", ("alternating", EXPERTS_INTO_HUB)),
            ("expert_streams", ("intact", "projected")),
            ("output", ("hub", "mixture")),
            ("gate", ("channel", "token")),
        ):
            if getattr(self, option) not in allowed:
                raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {getattr(self, option)!r}.")
        least = 0 if self.output == "mixture" else 1
        if not _is_int(self.num_stitches) or self.num_stitches < least:
            also = "" if least == 0 else " (0 goes with output='mixture': gates on the outputs alone)"
            raise ValueError(
                f"num_stitches must be a whole number of at least {least}{also}, got {self.num_stitches!r}."
            )
        if self.r is not None and (not _is_int(self.r) or self.r < 1):
            raise ValueError(f"r must be None or a whole number of at least 1, got {self.r!r}.")
        if not _is_number(self.gate_dropout) or not 0.0 <= self.gate_dropout < 1.0:
            raise ValueError(f"gate_dropout must be a number in [0, 1), got {self.gate_dropout!r}.")
        if self.evidence is not None:
            if not _is_number(self.evidence) or not 0.0 < self.evidence <= 1.0:
                raise ValueError(f"evidence must be None or a number above 0 and up to 1, got {self.evidence!r}.")
            if self.output != "mixture":
                raise ValueError(
                    f"evidence={self.evidence!r} is for output gates, which there are with output='mixture' only, and "
                    f"output is {self.output!r}."
                )
        for option in ("gate_bias", "init_weights"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"{option} must be True or False, got {getattr(self, option)!r}.")
        if self.layers_to_stitch is not None:
            layers = list(self.layers_to_stitch) if isinstance(self.layers_to_stitch, Iterable) else []
            if not layers or not all(map(_is_int, layers)) or layers != sorted(set(layers)) or layers[0] < 0:
                raise ValueError(
                    f"layers_to_stitch must be a rising list of 0-based layer numbers, got {self.layers_to_stitch!r}."
                )
            self.layers_to_stitch = layers
        if self.modules_to_save is not None:
            names = self.modules_to_save
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
                raise ValueError(
                    "modules_to_save must be a list of names of the hub's modules, such as ['lm_head'], got "
                    f"{names!r}."
                )
        if self.target_modules is not None and not re.fullmatch(_OUR_TARGETS, str(self.target_modules)):
            raise ValueError(
                f"target_modules={self.target_modules!r} means nothing to stitches: which layers they sit behind "
                "follows from num_stitches or layers_to_stitch. Leave it out."
            )

    _folder: ClassVar[Optional[str]] = None  # where this is being saved

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json. Models beside or below the folder are written relative to it (places.py).

        Args:
            save_directory: The folder.
            **kwargs: As for `PeftConfig.save_pretrained`.
        """
        saved: Any = copy.copy(self)
        saved._folder = save_directory
        super(StitchConfig, saved).save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The config as it is saved: without the experts' places on this machine."""
        values = super().to_dict()
        values["experts"] = {name: without_placement(ref) for name, ref in values["experts"].items()}
        for option in ("evidence", "save_embedding_layers"):  # rare ones, which older releases do not know
            if not values[option]:
                del values[option]
        return values if self._folder is None else to_file(values, self._folder)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def stitch_schedule(config: StitchConfig, num_layers: int) -> dict[int, StitchKind]:
    """List the stitches in order, as 0-based hub layer -> kind (paper, section 2.2).

    Raises `ValueError` where the config does not fit a hub of `num_layers` layers.
    """
    if config.layers_to_stitch is not None:
        layers = config.layers_to_stitch
        if layers[-1] != num_layers - 1:
            raise ValueError(
                f"layers_to_stitch={layers} must end with the hub's last layer, {num_layers - 1} (the hub has "
                f"{num_layers} layers): only the last layer's state reaches the hub's head."
            )
    else:
        stitches = config.num_stitches
        if stitches == 0:
            return {}
        if stitches > num_layers:
            raise ValueError(
                f"num_stitches={stitches} does not fit a hub of {num_layers} layers; use at most {num_layers}."
            )
        step = num_layers // stitches
        layers = [step * k - 1 for k in range(1, stitches)] + [num_layers - 1]
    kinds: list[StitchKind] = [
        EXPERTS_INTO_HUB if config.pattern == EXPERTS_INTO_HUB or from_end % 2 == 0 else HUB_INTO_EXPERTS
        for from_end in reversed(range(len(layers)))
    ]
    return dict(zip(layers, kinds))


def check_rank(config: StitchConfig, hub_width: int) -> None:
    """Warn of a rank above the hub's width, where full matrices take less.

    Raises:
        ValueError: If it is above twice the width: sizes are not believed before any weight is made.
    """
    if config.r is None or config.r <= hub_width:
        return
    message = (
        f"r={config.r} is above the hub's width, {hub_width}: no projection has such a rank, and full matrices "
        "(r=None) take less. Use a smaller r, or None."
    )
    if config.r > 2 * hub_width:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def expert_boundary(hub_layers_done: int, hub_layers: int, expert_layers: int) -> int:
    """Return how many layers an expert has run when the hub has run `hub_layers_done` of its `hub_layers`."""
    return round(hub_layers_done * expert_layers / hub_layers)

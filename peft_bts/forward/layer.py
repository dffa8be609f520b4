"""`StitchLayer`: a hub decoder layer with a stitch behind it."""

from __future__ import annotations

from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .._compat.transformers import replace_captured_hidden_state
from ..mixture import OutputMixture
from ..modules import TypedModuleDict
from ..stitch import Stitch
from .hooks import ForwardRunner, checkpoint_function
from .placement import place_for_stitch


class AdapterPart(BaseTunerLayer):
    """Base of whatever adapters add in one place of a hub: PEFT looks for it to switch adapters, or turn them off."""


class StitchLayer(nn.Module, AdapterPart):
    """Runs the wrapped decoder layer, then the active adapter's stitch on its hidden states.

    Args:
        base_layer: The hub's decoder layer.
        index: Its 0-based place in the hub.
        runner: Where the forward under way is found.

    Attributes:
        stitch_layer: The stitches by adapter name. An adapter that has none here passes the layer through.
    """

    adapter_layer_names = ("stitch_layer",)

    def __init__(self, base_layer: nn.Module, index: int, runner: ForwardRunner) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self.stitch_layer: TypedModuleDict[Stitch] = TypedModuleDict()
        self.merged_adapters: list[str] = []  # never any; PEFT asks
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # The hub's loop reads `attention_type` and the like. Libraries mark modules that they have treated by
            # private attributes: those of the layer are not ours.
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and shape of return value as the wrapped layer's."""
        out = self.base_layer(*args, **kwargs)
        stitch = self.active_stitch()
        if stitch is None:
            return out
        return behind_layer(self._runner, self.index, self.base_layer, stitch, out)

    def active_stitch(self) -> Optional[Stitch]:
        """The active adapter's stitch; `None` if it has none here, or adapters are disabled."""
        if self.disable_adapters:
            return None
        for adapter in self.active_adapters:
            if adapter in self.stitch_layer:
                return self.stitch_layer[adapter]
        return None

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Optional[torch.device], None]:
        # PEFT would look for `base_layer.weight`. No dtype: loaded stitches have theirs already, and a round trip
        # through the hub's half precision would lose bits.
        return place_for_stitch(base_layer)[0], None


class StitchOutput(TypedModuleDict[OutputMixture], AdapterPart):
    """The output mixtures of a hub, by adapter name; the hub has it as `stitch_output`. `MixedHead` uses them.

    Args:
        active: Names of the adapters that are active now.
    """

    adapter_layer_names = ("mixtures",)
    weight = bias = None  # type: ignore[assignment]  # PEFT would ask a wrapped layer for them, and there is none

    def __init__(self, active: list[str]) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []  # never any; PEFT asks
        self._active_adapter = active

    @property
    def mixtures(self) -> StitchOutput:
        """Where PEFT finds the adapters: in this dict itself, since nothing is wrapped."""
        return self


def output_mixtures(hub: nn.Module) -> StitchOutput:
    """The output mixtures of a hub that has some."""
    mixtures = hub.stitch_output
    assert isinstance(mixtures, StitchOutput)
    return mixtures


def behind_layer(runner: ForwardRunner, index: int, layer: nn.Module, stitch: Stitch, out: Any) -> Any:
    """Apply the stitch behind a hub layer to what the layer has returned.

    Args:
        runner: Where the forward under way is found.
        index: The layer's 0-based place in the hub.
        layer: The layer.
        stitch: The stitch.
        out: What the layer has returned: hidden states (B, T, D), or a tuple that starts with them.

    Returns:
        The same, with the stitched hidden states.

    Raises:
        RuntimeError: If the layer was called outside of a forward of the whole hub.
    """
    hidden = out[0] if isinstance(out, tuple) else out
    if torch.compiler.is_compiling() and runner.current() is None:
        # Layers are compiled one by one, inside a forward that is not: tracing cannot see that forward's state.
        new = torch.compiler.disable(_stitched)(runner, index, layer, stitch, hidden)
    else:
        new = _stitched(runner, index, layer, stitch, hidden)
    replace_captured_hidden_state(hidden, new)
    return (new, *out[1:]) if isinstance(out, tuple) else new


def _stitched(runner: ForwardRunner, index: int, layer: nn.Module, stitch: Stitch, hidden: Tensor) -> Tensor:
    state = runner.current()
    if state is None:
        raise RuntimeError(
            f"Hub layer {index} was called by itself. A stitched layer works only inside a forward of the "
            "whole hub, since the experts run beside it; use `model.disable_adapter()` to call single layers."
        )
    return state.apply_stitch(index, stitch, hidden, checkpoint_function(layer))

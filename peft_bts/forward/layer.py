"""`StitchLayer`: a hub decoder layer with a stitch behind it."""

from __future__ import annotations

from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .._compat.transformers import replace_captured_hidden_state
from .placement import place_for_stitch
from .state import Runs, checkpoint_function


class StitchLayer(nn.Module, BaseTunerLayer):
    """Runs the wrapped decoder layer, then the active adapter's stitch on its hidden states.

    Args:
        base_layer: The hub's decoder layer.
        index: Its 0-based place in the hub.
        runs: Where the forward under way is found (`Runs` opens and closes it).

    Attributes:
        stitch_layer: The stitches by adapter name. An adapter that has none here passes the layer through.
    """

    adapter_layer_names = ("stitch_layer",)

    def __init__(self, base_layer: nn.Module, index: int, runs: Runs) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self.stitch_layer = nn.ModuleDict()
        self.merged_adapters: list[str] = []  # never any; PEFT asks
        self._runs = runs

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
        stitch = self._active_stitch()
        if stitch is None:
            return out
        hidden = out[0] if isinstance(out, tuple) else out
        if torch.compiler.is_compiling() and self._runs.current() is None:
            # Layers are compiled one by one, inside of a forward that is not: tracing cannot see that forward's run.
            new = torch.compiler.disable(self._cross)(stitch, hidden, args, kwargs)
        else:
            new = self._cross(stitch, hidden, args, kwargs)
        replace_captured_hidden_state(hidden, new)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    def _cross(self, stitch: nn.Module, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        run = self._runs.current()
        if run is None or run.plan is None:
            raise RuntimeError(
                f"Hub layer {self.index} was called by itself. A stitched layer works only inside a forward of the "
                "whole hub, since the experts run beside it; use `model.disable_adapter()` to call single layers."
            )
        return run.cross(self.index, stitch, hidden, args, kwargs, checkpoint_function(self.base_layer))

    def _active_stitch(self) -> Optional[nn.Module]:
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

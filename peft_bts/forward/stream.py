"""An expert's forward under way: its hidden states, and the layer calls that are still to be made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, Optional, Protocol

import torch
from torch import Tensor

from .._compat.transformers import no_output_capture


# The hub's gradient checkpointing function: calls a layer, and calls it anew in the backward pass.
Checkpoint = Callable[..., Any]


class Layers(Protocol):
    """Decoder layers, by their place: a list of modules, or what stands for one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Callable[..., Any]: ...


class LayerCall(NamedTuple):
    """A recorded call of a decoder layer: hidden states (B, T, D), and its other arguments."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stream:
    """A model's forward under way.

    Args:
        layers: The decoder layers.
        calls: For each layer, what it is called with; of the hidden states only the first layer's are used.

    Attributes:
        state: The hidden states, (B, T, D_i).
    """

    def __init__(self, layers: Layers, calls: list[LayerCall]) -> None:
        self.layers, self.calls = layers, calls
        self.state: Tensor = calls[0].hidden
        self._done = 0

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def advance(self, layers_done: int, checkpoint: Optional[Checkpoint] = None) -> Tensor:
        """Run layers until `layers_done` of them are done; return the hidden states.

        Args:
            checkpoint: The hub's gradient checkpointing function, if it is on: layers whose input carries a gradient
                run under it.
        """
        if self._done < layers_done:
            # Dynamo keeps the collector elsewhere, and has no hooks of an earlier life to shield it from.
            with nullcontext() if torch.compiler.is_compiling() else no_output_capture():
                for i in range(self._done, layers_done):
                    self.state = self._run(i, checkpoint)
            self._done = layers_done
        return self.state

    def _run(self, i: int, checkpoint: Optional[Checkpoint]) -> Tensor:
        layer, (_, args, kwargs) = self.layers[i], self.calls[i]
        if checkpoint is not None and self.state.requires_grad:
            out = checkpoint(_WithKwargs(layer, kwargs), self.state, *args)
        else:
            out = layer(self.state, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class _WithKwargs:
    """A layer with its keyword arguments bound, for checkpoint functions that take positional arguments only."""

    def __init__(self, layer: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self.layer, self.kwargs = layer, kwargs

    def __call__(self, *args: Any) -> Any:
        return self.layer(*args, **self.kwargs)

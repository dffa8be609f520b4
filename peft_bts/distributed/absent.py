"""What stands for a model in processes that do not run it: none of it has weights of decoder layers."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .._compat.peft import CausalLM
from ..forward.cache import count_tokens
from ..forward.decoder import Decoder, text_config, token_embeddings
from ..forward.expert import Expert
from ..forward.recorder import StandIn
from ..forward.stream import Checkpoint, Stream


class AbsentLayer(StandIn):
    """In the place of a decoder layer of the hub. It hands the hidden states on in the layer's own shape.

    The real ones come at the next stitch. It counts tokens in the hub's cache, as the layer would.

    Args:
        layer: The layer, on the meta device or about to be dropped: attributes are looked up there.
        hub: The causal LM.
        index: The layer's place.

    Attributes:
        placed_like: A module that has the device and dtype which the layer would have.
        returns: Size of the tuple that the layer returns, `None` for a tensor; unknown until the stitched model is
            made.
    """

    def __init__(self, layer: nn.Module, hub: PreTrainedModel, index: int) -> None:
        super().__init__()
        self.__dict__.update(_layer=layer.to("meta"), _hub=hub)  # not as submodules
        self._index = index
        self.ready = False
        self.returns: Optional[int] = None

    def _original(self) -> nn.Module:
        return self.__dict__["_layer"]

    @property
    def placed_like(self) -> nn.Module:
        return token_embeddings(self.__dict__["_hub"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.ready:
            raise RuntimeError(
                "This process does not hold the hub's layers (`expert_parallel`), so the hub cannot run by itself. "
                "Make the stitched model first, and call that in all processes; inside of `disable_adapter()` it runs "
                "the hub alone."
            )
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None:
            count_tokens(cache, self._index, hidden.shape[0], hidden.shape[1], hidden.device)
        return hidden if self.returns is None else (hidden, *[None] * (self.returns - 1))


def drop_layers(hub: PreTrainedModel, decoder: Decoder) -> None:
    """Put an `AbsentLayer` in the place of every decoder layer, and have loading pass over their weights."""
    for index, layer in enumerate(decoder.layers):
        decoder.layers[index] = AbsentLayer(layer, hub, index)
    ignored = hub._keys_to_ignore_on_load_unexpected
    hub._keys_to_ignore_on_load_unexpected = {*(ignored or ()), rf"(^|\.){decoder.list_name}\.\d+\."}


def has_layers(decoder: Decoder) -> bool:
    """Return whether this process has a model's layers."""
    return not any(isinstance(getattr(layer, "base_layer", layer), AbsentLayer) for layer in decoder.layers)


class AbsentExpert(Expert):
    """An expert that another process runs.

    Args:
        blueprint: The expert without weights (experts/blueprint.py).
        what, source: As for `Expert`.
        owner: The process that it is on.
    """

    def __init__(self, blueprint: CausalLM, what: str, source: Optional[dict[str, Any]], owner: int) -> None:
        super().__init__(blueprint, what, source)
        del self.model  # not a submodule: fake tensors cannot be moved or cast
        self.__dict__["model"] = blueprint
        self.owner = owner

    def _apply(self, fn: Any, recurse: bool = True) -> AbsentExpert:
        return self

    def prepare_head(self, what: str) -> None:
        """Its head is where its layers are."""

    def logits(self, state_BTD: Tensor) -> Tensor:
        """Anything of the right shape, (B, T, V_i): another process has the logits."""
        return state_BTD.new_zeros(1).expand(*state_BTD.shape[:2], text_config(self.model).vocab_size)

    def forward(
        self, call: Union[dict[str, Any], Tensor], cache: Optional[Cache] = None, hub_config: Any = None
    ) -> AbsentStream:
        assert isinstance(call, dict)  # logits are made where the expert is
        tokens: Tensor = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
        batch, length = tokens.shape[:2]
        if cache is not None:
            for index in range(self.num_layers):
                count_tokens(cache, index, batch, length, tokens.device)
        state = torch.zeros(1, device=tokens.device).expand(batch, length, self.width)
        return AbsentStream(self.layers, state)


class AbsentStream(Stream):
    """The forward of an expert that another process runs: its state is what was last received, or told."""

    def __init__(self, layers: nn.ModuleList, state: Tensor) -> None:
        self.layers, self.calls, self.state = layers, [], state

    def advance(self, layers_done: int, checkpoint: Optional[Checkpoint] = None) -> Tensor:
        return self.state

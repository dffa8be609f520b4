"""`Expert`: a frozen causal LM that runs beside the hub."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any, Optional, Union

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import Cache

from .._compat.peft import CausalLM
from .decoder import find_decoder, text_config, token_embeddings
from .head import ModelHead
from .placement import execution_device, is_dispatched
from .recorder import ArgumentRecorder, layer_return_sizes


class Expert(nn.Module):
    """A frozen causal LM that runs beside the hub.

    Args:
        model: The expert, used as it is. It is put into eval mode and frozen; `release` undoes that.
        what: What to call it in errors, e.g. `"Expert 'code'"`.
        source: What the model was loaded from, if it was loaded for this; another adapter may then share it.

    Attributes:
        width: Of its hidden states.
        num_layers: Number of its decoder layers.
        key: Tells experts apart; a copy of an expert has the same.

    Raises:
        ValueError: As `find_decoder`.
    """

    def __init__(self, model: CausalLM, what: str, source: Optional[dict[str, Any]] = None) -> None:
        super().__init__()
        self.source = source
        self.key = uuid.uuid4().hex
        self._head: Optional[ModelHead] = None
        self._decoder = decoder = find_decoder(model, what)
        self._restore = model.training, [p for p in model.parameters() if p.requires_grad]
        self.model: CausalLM = model.eval().requires_grad_(False)
        self.num_layers = len(decoder.layers)
        try:
            sizes, self.width = layer_return_sizes(decoder, self._embedding_device)
        except BaseException:
            self.release()
            raise
        self._recorder = ArgumentRecorder(decoder.backbone, decoder.list_name, decoder.layers, sizes, self.config)

    def release(self) -> CausalLM:
        """Give the model back with the training flag and the `requires_grad` flags that it came with."""
        was_training, trainable = self._restore
        for parameter in trainable:
            parameter.requires_grad_(True)
        return self.model.train(was_training)

    def train(self, mode: bool = True) -> Expert:
        """Experts have no dropout of their own, whatever the mode of the whole model."""
        return super().train(False)

    def named_modules(
        self, memo: Optional[set[nn.Module]] = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """All modules but those of a LoRA expert that PEFT would take for parts of the stitch adapter."""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if not isinstance(module, (BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)):
                yield name, module

    @property
    def layers(self) -> nn.ModuleList:
        return self._decoder.layers

    @property
    def config(self) -> Any:
        return text_config(self.model)

    @property
    def embedding_width(self) -> int:
        """Channels of its token embeddings."""
        return token_embeddings(self.model).weight.shape[1]

    @property
    def is_stateful(self) -> bool:
        """Whether it keeps recurrent states, from which tokens cannot be taken back."""
        return getattr(self.model, "_is_stateful", False)

    @property
    def _embedding_device(self) -> torch.device:
        """Where the expert's embeddings are computed."""
        embeddings = token_embeddings(self.model)
        return execution_device(embeddings) or embeddings.weight.device

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Expert:
        """An expert that accelerate has spread over devices, CPU and disk stays there when the whole model moves."""
        return self if is_dispatched(self.model) else super()._apply(fn, recurse)

    def prepare_head(self, what: str) -> None:
        """Get ready for `logits`; raises `ValueError` as `ModelHead`."""
        if self._head is None:
            self._head = ModelHead.of(self.model, what)

    def logits(self, state_BTD: Tensor) -> Tensor:
        """From hidden states behind the last layer, (B, T, D_i), to logits (B, T, V_i)."""
        return self(state_BTD)

    def forward(
        self, call: Union[dict[str, Any], Tensor], cache: Optional[Cache] = None, hub_config: Any = None
    ) -> Any:
        """Begin a forward on the arguments of the hub's call (`ArgumentRecorder.record`), or make logits of states.

        Both are the module's call, so that what hooks into modules (FSDP2) has embeddings and head at hand by then.
        """
        if isinstance(call, Tensor):
            assert self._head is not None  # made when the expert was attached
            return self._head.logits(self._head.finish(call))
        return self._recorder.record(call, cache, hub_config, self._embedding_device)

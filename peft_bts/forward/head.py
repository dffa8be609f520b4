"""From a model's last hidden states to its logits, by the model's own code.

What comes behind the last decoder layer differs with the architecture: a final norm, a projection, the head, scales,
soft caps. The modules of the backbone behind its layers are found by watching a forward once (`final_modules`); the
rest is done by the causal LM's own `forward`, over a stand-in for its backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from .._compat.peft import CausalLM, base_model
from .decoder import Decoder, find_decoder, token_embeddings
from .placement import execution_device
from .recorder import with_layers, with_modules


class ModelHead:
    """The part of a causal LM behind its decoder layers, from hidden states to logits.

    Args:
        model: The causal LM.
        backbone: Dotted path of its backbone.
        final: The modules of the backbone behind its layers, in order (`final_modules`).
    """

    def __init__(self, model: PreTrainedModel, backbone: str, final: Sequence[nn.Module]) -> None:
        self._model, self._path, self._final = model, backbone.split("."), final
        self._make()

    @classmethod
    def of(cls, model: CausalLM, what: str) -> ModelHead:
        """The head of a causal LM, or of a PEFT model around one.

        Args:
            model: The model. It runs over two tokens.
            what: What to call it in errors, e.g. `"Expert 'code'"`.

        Raises:
            ValueError: As `final_modules`.
        """
        plain = base_model(model) if isinstance(model, PeftModel) else model
        decoder = find_decoder(plain, what)
        embeddings = token_embeddings(plain)
        final = final_modules(decoder, execution_device(embeddings) or embeddings.weight.device, what)
        return cls(plain, decoder.backbone_path, final)

    @property
    def output_embeddings(self) -> nn.Module:
        """The causal LM's head in the narrow sense: the product with the vocabulary."""
        return self._model.get_output_embeddings()

    def final_names(self) -> list[str]:
        """Names of the backbone's modules behind its layers, in order."""
        names = {module: name for name, module in self._model.get_submodule(".".join(self._path)).named_children()}
        return [names[module] for module in self._final]

    def finish(self, state: Tensor) -> Tensor:
        """From behind the last decoder layer, (..., D_i), to what the head reads."""
        for module in self._final:
            state = module(state)
        return state

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """From what the head reads, (B, T, D_i), to logits (B, T, V_i)."""
        if not torch.compiler.is_compiling() and self._made_from != self._model._modules:
            self._make()  # a library has exchanged a module, the head for instance
        return self._shell(inputs_embeds=hidden_BTD, use_cache=False, return_dict=True).logits

    def _make(self) -> None:
        self._made_from = dict(self._model._modules)
        self._shell = _with_module(self._model, self._path, _Backbone())


def _with_module(module: nn.Module, path: list[str], inner: nn.Module) -> nn.Module:
    """A shallow twin of a module in which the submodule at `path` is another one."""
    if not path:
        return inner
    child = _with_module(module.get_submodule(path[0]), path[1:], inner)
    return with_modules(module, {**module._modules, path[0]: child})


class _Backbone(nn.Module):
    """Stands in for a backbone: what it is given as embeddings are its final hidden states already."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _BackboneOutput:
        return _BackboneOutput(inputs_embeds)


class _BackboneOutput:
    """A backbone's output: final hidden states, and `None` for whatever else a model hands on."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def final_modules(decoder: Decoder, device: torch.device, what: str) -> Sequence[nn.Module]:
    """The modules of a backbone that run behind its last layer, in order. Runs a forward over two tokens.

    Raises:
        ValueError: If running them one after the other does not give what the backbone returns.
    """
    calls: list[nn.Module] = []
    behind: list[Tensor] = []

    def after_last_layer(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        behind.append(output[0] if isinstance(output, tuple) else output)
        calls.clear()

    def after_child(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append(module)

    layers = [getattr(layer, "base_layer", layer) for layer in decoder.layers]  # of a hub, some are stitched already
    backbone = with_layers(decoder.backbone, decoder.list_name, layers)
    children = [child for child in decoder.backbone.children() if child is not decoder.layers]
    hooks = [child.register_forward_hook(after_child) for child in children]
    hooks.append(layers[-1].register_forward_hook(after_last_layer))
    try:
        with torch.no_grad():
            tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
            out = backbone(input_ids=tokens, use_cache=False)[0]
    finally:
        for hook in hooks:
            hook.remove()
    final, state = list(calls), behind[-1]
    with torch.no_grad():
        for module in final:
            state = module(state)
    if state.shape != out.shape or not (isinstance(out, FakeTensor) or torch.equal(state, out)):
        raise ValueError(
            f"{what} makes its final hidden states in a way that is not known: the modules "
            f"{[type(module).__name__ for module in final]} behind its last layer do not give what it returns. "
            "Use output='hub', which needs the hub's head alone."
        )
    return final

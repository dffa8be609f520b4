"""`ServedComposition`: an exported composition as vLLM runs it, on its Transformers backend.

The backend runs `StitchExportModel` itself, with vLLM's modules in the place of linear layers, norms and embeddings,
and vLLM's paged attention in every layer. What differs between the models of a composition (shapes of attention,
windows, soft caps, what their heads do) is seen to here; the backend takes a model's layers to be alike.
"""

from __future__ import annotations

import copy
import re
from functools import cached_property, partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, PreTrainedModel
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.transformers.causal import CausalMixin
from vllm.model_executor.models.utils import maybe_prefix

from ..export.config import StitchExportConfig, layer_kinds
from ..export.model import StitchExportModel
from ..forward.decoder import find_decoder, text_config
from ..forward.head import ModelHead
from ..mixture import OutputMixture, log_probs, mix
from ..stitch import HUB, PerModel
from .limits import check_layers


class ServedConfig(StitchExportConfig):
    """The same config under another name, by which `AutoModel` finds `ServedModel`."""


class ServedModel(StitchExportModel):
    """The base model as vLLM runs it. vLLM changes the class that it compiles: that is this one, and no other's."""

    config_class = ServedConfig  # type: ignore[assignment]  # a subclass of what transformers infers

    def _run_models(self, call: dict[str, Any], cache: Optional[Cache]) -> Any:
        """With an output mixture: what the heads of all models read, beside each other, (1, T, D + all D_i)."""
        run = partial(super()._run_models, call, cache)
        if self.config.final_modules is None:
            return run()
        _, body = self._runner.await_body(run)
        finals = sorted(body.experts.by_name.items())
        states = [body.hub_BTD, *(self.heads[name].finish(state_BTD) for name, state_BTD in finals)]
        return (torch.cat(states, dim=-1),)


AutoModel.register(ServedConfig, ServedModel)


class ServedComposition(CausalMixin):
    """vLLM's model class for `StitchExportForCausalLM`.

    Raises:
        ValueError: For a model in it whose layers vLLM cannot run (`limits`).
    """

    config: StitchExportConfig
    model: ServedModel

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_layers(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._names = [HUB]
        lm_heads = {HUB: self.lm_head}
        if self.config.final_modules is not None:
            self._names = self.config.names
            self.expert_heads: PerModel[nn.Module] = PerModel()
            for name in self._names[1:]:
                lm_heads[name] = self._lm_head(name, prefix)
                self.expert_heads.set(name, lm_heads[name])
            dtype = getattr(torch, self.config.stitch["dtype"])
            self.output_mixture = OutputMixture(self.config.hidden_size, self._names[1:], dtype=dtype)
        # Not in the module tree: their weights are the heads', which are in it.
        self.__dict__["_heads"] = {name: self._model_head(name, head) for name, head in lm_heads.items()}
        self._widths = [self._text_config(name).hidden_size for name in self._names]

    def _text_config(self, name: str) -> Any:
        return self.config.part(name).get_text_config(decoder=True)

    @cached_property
    def _from_config_kwargs(self) -> dict[str, Any]:
        config = copy.copy(self.config)
        config.__class__ = ServedConfig
        return {**super()._from_config_kwargs, "config": config}

    # Replaced modules

    def recursive_replace(self) -> None:
        """Put vLLM's modules into the models. The stitches stay as they are, in their own precision."""
        model = self.model
        stitches = model.stitches
        model._tp_plan = self._tensor_parallel_plan()
        del model.stitches
        try:
            super().recursive_replace()
        finally:
            model.stitches = stitches
        model.connect()

    def _vocab_embeddings(self) -> set[nn.Embedding]:
        """The token embeddings of all models (the backend would take tables of the vocabulary's size for such)."""
        backbones = self.model.backbones.values()
        tables = [backbone.get_input_embeddings() for backbone in backbones]
        return {module for table in tables for module in table.modules() if isinstance(module, nn.Embedding)}

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How linear layers are split over processes: what each model's own plan says, by place in the flat list."""
        plan: dict[str, str] = {}
        first = 0
        for name in self.config.names:
            own = self.model.backbones.of(name)
            layers = self._text_config(name).num_hidden_layers
            for path, style in (own.config.base_model_tp_plan or {}).items():
                match = re.fullmatch(r"\w+\.\*\.(.+)", path)
                if match is not None:
                    plan |= {f"layers.{first + index}.{match[1]}": style for index in range(layers)}
            first += layers
        return {re.escape(path).replace(r"\*", r"\d+") + "$": style for path, style in plan.items()}

    # Attention

    def _create_attention_instances(self, prefix: str = "") -> None:
        """Make the paged attention of every layer, in the shape of its own model, with its window and soft cap."""
        shapes, parallel = self.model_config.model_arch_config, self.parallel_config
        index = 0
        for name in self.config.names:
            own = self._text_config(name)
            for kind in layer_kinds(own):
                path, fuser = self.attention_fusers[index]
                module, shape = self.get_submodule(path), shapes[index]
                scale = fuser.scale(module)
                options: dict[str, Any] = {}
                if kind == "sliding_attention":
                    options["per_layer_sliding_window"] = own.sliding_window
                sinks = fuser.sinks(module)
                if sinks is not None:
                    options["sinks"] = sinks
                module.attn = Attention(
                    num_heads=self.model_config.get_num_attention_heads(parallel, shape),
                    num_kv_heads=self.model_config.get_num_kv_heads(parallel, shape),
                    head_size=shape.head_size,
                    scale=shape.head_size**-0.5 if scale is None else scale,
                    logits_soft_cap=getattr(own, "attn_logit_softcapping", None),
                    cache_config=self.cache_config,
                    quant_config=self.quant_config,
                    prefix=maybe_prefix(prefix, f"{path}.attn"),
                    **options,
                )
                index += 1

    # Heads

    def _causal_lm(self, name: str) -> PreTrainedModel:
        """One of the models without weights, for the code of its head."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config.part(name))

    def _lm_head(self, name: str, prefix: str) -> ParallelLMHead:
        """The product with the vocabulary of an expert, split over processes."""
        head = self._causal_lm(name).get_output_embeddings()
        return ParallelLMHead(
            head.out_features,
            head.in_features,
            bias=head.bias is not None,
            prefix=maybe_prefix(prefix, f"expert_heads.{PerModel.PREFIX}{name}"),
        )

    def _model_head(self, name: str, lm_head: nn.Module) -> ModelHead:
        """What a model does to its last hidden states, by its own code (scales, soft caps), around vLLM's head."""
        model = self._causal_lm(name)
        model.set_output_embeddings(_Vocabulary(lm_head, text_config(model).vocab_size))
        return ModelHead(model, find_decoder(model, f"Model {name!r}").backbone_path, ())

    def compute_logits(self, hidden_states: Tensor) -> Optional[Tensor]:
        """Logits (N, V) of what `forward` has returned, (N, D); with an output mixture (N, D + all D_i)."""
        states = hidden_states.split(self._widths, dim=-1)
        logits = [self._heads[name].logits(state[None])[0] for name, state in zip(self._names, states)]
        if len(logits) == 1:
            return logits[0]
        vocab = logits[0].shape[-1]
        log_gates_NM = self.output_mixture.log_gates(states[0], self._names[1:])
        return mix(log_gates_NM, [log_probs(own, vocab) for own in logits])


class _Vocabulary(nn.Module):
    """In the place of a model's head: vLLM's head, whose logits are gathered from all processes."""

    def __init__(self, lm_head: nn.Module, vocab_size: int) -> None:
        super().__init__()
        self.__dict__["_lm_head"] = lm_head  # it belongs to another module
        self._gather = LogitsProcessor(vocab_size)

    @property
    def weight(self) -> Tensor:  # some models ask its dtype
        return self.__dict__["_lm_head"].weight

    def forward(self, hidden: Tensor) -> Tensor:
        lm_head = self.__dict__["_lm_head"]
        return self._gather(lm_head, hidden, lm_head.bias)

"""A whole composition as one Hugging Face checkpoint: hub, experts and stitches in one folder.

`model.export(path)` writes it; `import peft_bts` registers its class, and `AutoModelForCausalLM.from_pretrained(path)`
loads it, without PEFT and without the models it was made from. It computes what the adapter computes.

It is shaped for serving engines (vLLM: `peft_bts.serving`): `StitchExportModel.layers` is one flat list of the
decoder layers of all models, hub first; `config.num_hidden_layers` is its length; every attention layer has the
`layer_idx` of its place in it; attention goes through transformers' attention interface; one cache has a layer for
each.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    StaticCache,
)

from ..forward.cache import cached_tokens, static_length
from ..forward.composition import Composition
from ..forward.decoder import find_decoder, text_config, token_embeddings
from ..forward.head import ModelHead
from ..forward.hooks import ForwardRunner
from ..forward.layer import behind_layer
from ..forward.masks import expert_mask
from ..forward.mixed_head import MixedHead
from ..forward.observers import observed_generation
from ..forward.recorder import ArgumentRecorder, with_layers
from ..forward.state import ForwardState, check_call
from ..forward.stream import Stream
from ..mixture import OutputMixture
from ..modules import TypedModuleDict
from ..stitch import HUB, PerModel, Stitch, make_stitch
from .config import StitchExportConfig
from .flat import FlatCall, LayerRange, check_paged_cache, flatten_cache


class StitchExportPreTrainedModel(PreTrainedModel):
    config_class = StitchExportConfig
    base_model_prefix = "model"
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]

    def _init_weights(self, module: nn.Module) -> None:
        # Layers sit outside of the backbones they were made with, which alone know how to fill their buffers.
        for owner, layers in getattr(self, "_init_owners", ()):
            if any(module is inner for layer in layers for inner in layer.modules()):
                return owner._init_weights(module)
        return super()._init_weights(module)


class StitchExportModel(StitchExportPreTrainedModel):
    """The base model: token ids to the hub's last hidden states, with every stitch on the way.

    Attributes:
        layers: Decoder layers of all models, hub first, then the experts by name.
        backbones: What else the models have (embeddings, rotary positions, norms), by name.
        stitches: By hub layer.
        heads: With an output mixture, what each model does to its last hidden states, by name.
    """

    # Of no module tree but their own: their weights are elsewhere in this one.
    heads: dict[str, ModelHead]
    _causal_lms: dict[str, tuple[PreTrainedModel, str]]  # with the paths of their backbones
    _hub: PreTrainedModel

    def __init__(self, config: StitchExportConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList()
        self.backbones: PerModel[PreTrainedModel] = PerModel()
        self.stitches: TypedModuleDict[Stitch] = TypedModuleDict()
        self._init_owners: list[tuple[PreTrainedModel, list[nn.Module]]] = []
        self._ranges: dict[str, LayerRange] = {}
        self._list_names: dict[str, str] = {}
        self.__dict__["_causal_lms"] = {}
        for name in config.names:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config.part(name))
            decoder = find_decoder(model, f"Model {name!r}")
            own, backbone = list(decoder.layers), decoder.backbone
            self._ranges[name] = LayerRange(self.layers, len(self.layers), len(own), text_config(model))
            for index, layer in enumerate(own, start=len(self.layers)):
                for module in layer.modules():
                    for attribute in {"layer_idx", "layer_id"} & module.__dict__.keys():  # gpt_neo: layer_id
                        setattr(module, attribute, index)
            self.layers.extend(own)
            setattr(backbone, decoder.list_name, nn.ModuleList())  # they are in the flat list now
            self.backbones.set(name, backbone)
            self._init_owners.append((backbone, own))
            self._list_names[name] = decoder.list_name
            if config.final_modules is not None:
                self._causal_lms[name] = (model, decoder.backbone_path)
        widths = {name: layers.config.hidden_size for name, layers in self._ranges.items()}
        experts = {name: width for name, width in widths.items() if name != HUB}
        dtype = getattr(torch, config.stitch["dtype"])
        options = {key: config.stitch[key] for key in ("gate", "gate_bias", "r")}
        for layer, kind in config.schedule:
            self.stitches[str(layer)] = make_stitch(kind, widths[HUB], experts, dtype=dtype, **options)
        # The stitches keep their precision when the models are loaded in half of theirs.
        self._keep_in_fp32_modules_strict = {"stitches"} if dtype == torch.float32 else None
        self.post_init()
        hub_arguments = inspect.signature(self.backbones.of(HUB).forward).parameters
        self._hub_takes_positions = "position_ids" in hub_arguments
        self._runner = ForwardRunner(partial(_State, self._ranges))
        self.connect()

    def connect(self) -> None:
        """Make what runs the forward from the modules that are here now; again after modules were exchanged.

        Stand-ins take the layers' places in the backbones: recorders for the experts, stitched layers for the hub.
        They live outside of the module tree; all weights are in it.
        """
        config, hub_layers = self.config, self._ranges[HUB].num_layers
        finals = config.final_modules or {}
        self.__dict__["heads"] = {
            name: ModelHead(model, path, [self.backbones.of(name).get_submodule(child) for child in finals[name]])
            for name, (model, path) in self._causal_lms.items()
        }
        experts: dict[str, _Expert] = {}
        for name in config.names:
            if name != HUB:
                backbone, layers = self.backbones.of(name), self._ranges[name]
                recorder = ArgumentRecorder(
                    backbone, self._list_names[name], layers, config.returns[name], layers.config
                )
                experts[name] = _Expert(recorder, backbone, layers, self.heads.get(name))
        self._composition = Composition(
            dict(config.schedule),
            hub_layers,
            self._ranges[HUB].config,
            experts,
            config.stitch["projected"],
            mixture=config.final_modules is not None,
        )
        stitched = [_HubLayer(self._ranges[HUB], i, self.stitches, self._runner) for i in range(hub_layers)]
        self.__dict__["_hub"] = with_layers(self.backbones.of(HUB), self._list_names[HUB], stitched)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbones.of(HUB).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbones.of(HUB).set_input_embeddings(value)

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        use_cache: Optional[bool] = None,
        **kwargs: Any,
    ) -> Any:
        """Like any base model of transformers: tokens or embeddings (B, T) to `last_hidden_state` (B, T, D)."""
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self._composition.hub_config)
        if past_key_values is not None:
            flatten_cache(past_key_values, self._ranges)
        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        if position_ids is None and not self._hub_takes_positions:
            del call["position_ids"]  # as in a call of the hub alone; the experts' are then counted
        out = self._run_models(call, past_key_values)
        if isinstance(out, tuple):
            return tuple(past_key_values if isinstance(item, Cache) else item for item in out)
        out.past_key_values = past_key_values
        return out

    def _run_models(self, call: dict[str, Any], cache: Optional[Cache]) -> Any:
        """Return what the hub's backbone returns, with the experts beside it."""
        return self._runner.run(self._composition, call, cache, partial(self._run_hub, call, cache))

    def _run_hub(self, call: dict[str, Any], cache: Optional[Cache]) -> Any:
        view = None if cache is None else self._ranges[HUB].view(cache)
        given = {name: value for name, value in call.items() if value is not None}
        if "attention_mask" in given:
            own = self._composition.hub_config
            tokens = given["inputs_embeds"] if "inputs_embeds" in given else given["input_ids"]
            given["attention_mask"] = expert_mask(
                given["attention_mask"], own, own, cached_tokens(view), tokens.shape[1]
            )
        return self._hub(past_key_values=view, use_cache=view is not None, **given)


class StitchExportForCausalLM(StitchExportPreTrainedModel, GenerationMixin):
    """The composition with the hub's head: what `AutoModelForCausalLM.from_pretrained(exported)` returns."""

    _shell: PreTrainedModel

    def __init__(self, config: StitchExportConfig) -> None:
        super().__init__(config)
        self.model = StitchExportModel(config)
        # The hub's own class knows what comes after its backbone (scaling, soft-capping, the loss). It runs with a
        # stand-in for the backbone; only its head is a weight, and that is registered here.
        shell = AutoModelForCausalLM.from_config(config.part(HUB))
        self.lm_head = shell.get_output_embeddings()
        parent, _, child = find_decoder(shell, "The hub").path.rpartition(".")[0].rpartition(".")
        setattr(shell.get_submodule(parent), child, _Backbone(self.model))
        self.__dict__["_shell"] = shell
        if config.final_modules is not None:
            self._speak_for_all(config)
        if config.tie_word_embeddings:
            embeddings = self.model.get_input_embeddings()
            name = next(name for name, module in self.named_modules() if module is embeddings)
            self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def _speak_for_all(self, config: StitchExportConfig) -> None:
        """Have the logits be those of the output mixture."""
        decoder = find_decoder(AutoModelForCausalLM.from_config(config.part(HUB)), "The hub")
        experts = [name for name in config.names if name != HUB]
        self.expert_heads: PerModel[nn.Module] = PerModel()
        for name in experts:
            self.expert_heads.set(name, self.model.heads[name].output_embeddings)
        dtype = getattr(torch, config.stitch["dtype"])
        self.output_mixture = OutputMixture(config.hidden_size, experts, dtype=dtype)
        self._keep_in_fp32_modules_strict = {"stitches", "output_mixture"} if dtype == torch.float32 else None
        head = ModelHead(self._shell, decoder.backbone_path, ())
        MixedHead(self._shell, self.model._runner, self._mixture, head).install()

    def _mixture(self) -> tuple[OutputMixture, bool]:
        return self.output_mixture, bool(self.config.schedule)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value
        self._shell.set_output_embeddings(value)

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Optional[torch.Tensor] = None, past_key_values: Optional[Cache] = None, **_: Any
    ) -> Optional[torch.Tensor]:
        """Every backbone makes its own masks; give them the padding, in the static cache's length."""
        if attention_mask is None or not isinstance(past_key_values, StaticCache):
            return attention_mask
        return F.pad(attention_mask, (0, max(0, static_length(past_key_values) - attention_mask.shape[-1])))

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        labels: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        **kwargs: Any,
    ) -> Any:
        """Like any causal LM of transformers: tokens (B, T) to logits (B, T, V), with `labels` also the loss."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            **kwargs,
        }
        return self._shell(**{name: value for name, value in given.items() if value is not None})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`."""
        with observed_generation(self.model._runner.settings.observers, self, args, kwargs):
            return super().generate(*args, **kwargs)  # type: ignore[misc]  # typed for a protocol, which no model fits

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `generate_batch` calls it. `ValueError` if an expert does not attend as the hub does."""
        check_paged_cache({name: layers.config for name, layers in self.model._ranges.items()})
        return super().init_continuous_batching(*args, **kwargs)


class _State(ForwardState):
    """A forward in which every model has a view of one flat cache."""

    def __init__(self, ranges: dict[str, LayerRange], *args: Any) -> None:
        super().__init__(*args)
        self._ranges = ranges

    def check(self) -> None:
        check_call(self.composition, self.call)

    def _expert_caches(self) -> dict[str, Cache]:
        if self.cache is None:
            return {}
        return {name: self._ranges[name].view(self.cache) for name in self.composition.experts}


class _Expert:
    """An exported expert (a `StitchableExpert`)."""

    key = "exported"

    def __init__(
        self, recorder: ArgumentRecorder, backbone: PreTrainedModel, layers: LayerRange, head: Optional[ModelHead]
    ) -> None:
        self._recorder, self._backbone, self.config, self._head = recorder, backbone, layers.config, head

    @property
    def embedding_width(self) -> int:
        return token_embeddings(self._backbone).weight.shape[1]

    @property
    def is_stateful(self) -> bool:
        return getattr(self._backbone, "_is_stateful", False)

    def __call__(self, call: dict[str, Any], cache: Optional[Cache], hub_config: Any) -> Stream:
        return self._recorder.record(call, cache, hub_config)

    def logits(self, state_BTD: Tensor) -> Tensor:
        assert self._head is not None  # asked for by mixtures only
        return self._head.logits(self._head.finish(state_BTD))


class _HubLayer(nn.Module):
    """Stands in for a layer of the hub: runs it, and the stitch behind it."""

    def __init__(
        self, layers: LayerRange, index: int, stitches: TypedModuleDict[Stitch], runner: ForwardRunner
    ) -> None:
        super().__init__()
        self.layer = layers[index].layer  # registered, so that transformers' hooks for hidden states find it
        self._index, self._runner = index, runner
        self.__dict__["_stitch"] = dict(stitches).get(str(index))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, stitch = FlatCall(self.layer)(*args, **kwargs), self.__dict__["_stitch"]
        return out if stitch is None else behind_layer(self._runner, self._index, self.layer, stitch, out)


class _Backbone(nn.Module):
    """Stand-in for the backbone that the hub's causal LM calls."""

    def __init__(self, model: StitchExportModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


AutoConfig.register(StitchExportConfig.model_type, StitchExportConfig)
AutoModel.register(StitchExportConfig, StitchExportModel)
AutoModelForCausalLM.register(StitchExportConfig, StitchExportForCausalLM)

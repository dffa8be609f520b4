"""A whole composition as one Hugging Face checkpoint: hub, experts and stitches in one folder.

`model.export(path)` writes it; `import peft_bts` registers its class, and `AutoModelForCausalLM.from_pretrained(path)`
loads it, without PEFT and without the models it was made from. It computes what the adapter computes.

It is shaped for serving engines with a Transformers backend: `StitchedModel.layers` is one flat list of the decoder
layers of all models, hub first; `config.num_hidden_layers` is its length; every attention layer has the `layer_idx` of
its place in it; attention goes through transformers' attention interface; one cache has a layer for each.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)

from .._compat.transformers import replace_captured_hidden_state
from ..config import EXPERTS_INTO_HUB
from ..forward.cache import cache_like, static_length
from ..forward.decoder import find_decoder, text_config
from ..forward.expert import Planner, cached_tokens, with_layers
from ..forward.masks import expert_mask
from ..forward.observers import generation
from ..forward.state import Plan, Run, checkpoint_function
from ..forward.thread_local import PerThread
from ..stitch import HUB, ExpertsIntoHub, HubIntoExperts, PerModel


_OURS = "_stitched_layers"  # attribute of a cache that has a layer for every decoder layer of the composition


class StitchedConfig(PreTrainedConfig):
    """Config of a standalone composition.

    Args:
        models: Config dict of every model by name: `hub`, and the experts.
        schedule: `[hub layer, kind]` of every stitch.
        stitch: Options of the stitches (`gate`, `gate_bias`, `r`), their `dtype`, and `projected`, whether
            Experts-into-Hub replaces the experts' states.
        returns: By model, what each of its layers returns: `None` for a tensor, else the size of the tuple.
    """

    model_type = "stitched"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        models: Optional[dict[str, dict]] = None,
        schedule: Optional[list] = None,
        stitch: Optional[dict] = None,
        returns: Optional[dict[str, list]] = None,
        **kwargs: Any,
    ) -> None:
        self.models, self.schedule, self.stitch, self.returns = (
            models or {},
            schedule or [],
            stitch or {},
            returns or {},
        )
        if self.models:
            parts = [self.part(name) for name in self.names]
            hub = parts[0].get_text_config(decoder=True)
            for key in ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
                if getattr(hub, key, None) is not None:
                    kwargs[key] = getattr(hub, key)
            for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                kwargs.setdefault(key, getattr(hub, key, None))
            texts = [part.get_text_config(decoder=True) for part in parts]
            kwargs["layer_types"] = [kind for text in texts for kind in _layer_kinds(text)]
            windows = [text.sliding_window for text in texts if getattr(text, "sliding_window", None)]
            kwargs["sliding_window"] = windows[0] if windows else None
            kwargs["num_hidden_layers"] = len(kwargs["layer_types"])
            kwargs.setdefault("use_cache", getattr(hub, "use_cache", True))
        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(**kwargs)

    @property
    def names(self) -> list[str]:
        """The models in the order of their layers: the hub, then the experts by name (JSON files sort their keys)."""
        return [HUB, *sorted(name for name in self.models if name != HUB)]

    def part(self, name: str) -> PreTrainedConfig:
        """The config of one model, with this config's dtype, and its kind of attention where one was asked for."""
        values = dict(self.models[name])
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        config.dtype = getattr(self, "dtype", None) or config.dtype
        if getattr(self, "_attn_implementation_internal", None) not in (None, "sdpa"):  # sdpa: each model's default
            config._attn_implementation = self._attn_implementation_internal
        return config


def _layer_kinds(config: PreTrainedConfig) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        kinds = [kind] * config.num_hidden_layers
    return list(kinds)


class StitchedPreTrainedModel(PreTrainedModel):
    config_class = StitchedConfig
    base_model_prefix = "model"
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ("past_key_values",)

    def _init_weights(self, module: nn.Module) -> None:
        # Layers sit outside of the backbones they were made with, which alone know how to fill their buffers.
        for owner, layers in getattr(self, "_init_owners", ()):
            if any(module is inner for layer in layers for inner in layer.modules()):
                return owner._init_weights(module)
        return super()._init_weights(module)


class StitchedModel(StitchedPreTrainedModel):
    """The base model: token ids to the hub's last hidden states, with every stitch on the way.

    Attributes:
        layers: Decoder layers of all models, hub first, then the experts by name.
        backbones: What else the models have (embeddings, rotary positions, norms), by name.
        stitches: By hub layer.
        observers: Told of every forward's gates (gates.py); mostly none.
    """

    observers: tuple = ()

    def __init__(self, config: StitchedConfig) -> None:
        super().__init__(config)
        self.layers, self.backbones, self.stitches = nn.ModuleList(), PerModel(), nn.ModuleDict()
        self._init_owners = []
        lanes, list_names, text_configs = {}, {}, {}
        for name in config.names:
            model = AutoModelForCausalLM.from_config(config.part(name))
            decoder = find_decoder(model, f"Model {name!r}")
            own, backbone = list(decoder.layers), decoder.backbone
            lanes[name] = _Lane(self.layers, len(self.layers), len(own), text_config(model))
            for index, layer in enumerate(own, start=len(self.layers)):
                for module in layer.modules():
                    for attribute in {"layer_idx", "layer_id"} & module.__dict__.keys():  # gpt_neo: layer_id
                        setattr(module, attribute, index)
            self.layers.extend(own)
            setattr(backbone, decoder.list_name, nn.ModuleList())  # they are in the flat list now
            self.backbones.set(name, backbone)
            self._init_owners.append((backbone, own))
            list_names[name], text_configs[name] = decoder.list_name, text_config(model)
        widths = {name: part.hidden_size for name, part in text_configs.items()}
        experts = {name: width for name, width in widths.items() if name != HUB}
        dtype = getattr(torch, config.stitch["dtype"])
        options = {key: config.stitch[key] for key in ("gate", "gate_bias", "r")}
        for layer, kind in config.schedule:
            make = ExpertsIntoHub if kind == EXPERTS_INTO_HUB else HubIntoExperts
            self.stitches[str(layer)] = make(widths[HUB], experts, dtype=dtype, **options)
        # The stitches keep their precision when the models are loaded in half of theirs.
        self._keep_in_fp32_modules_strict = {"stitches"} if dtype == torch.float32 else None
        self.post_init()
        # Stand-ins take the layers' places in the backbones: recorders for the experts, stitched layers for the hub.
        # They live outside of the module tree; all weights are in the flat list.
        self._runs = PerThread()
        self._lanes = lanes
        hub_arguments = inspect.signature(self.backbones.of(HUB).forward).parameters
        self._hub_takes_positions = "position_ids" in hub_arguments
        self._planners = {
            name: Planner(
                self.backbones.of(name), list_names[name], lanes[name], config.returns[name], text_configs[name]
            )
            for name in experts
        }
        players = [_HubLayer(lanes[HUB], i, self.stitches, self._runs) for i in range(lanes[HUB].num_layers)]
        self.__dict__["_hub"] = with_layers(self.backbones.of(HUB), list_names[HUB], players)
        self._plan = Plan(
            dict(config.schedule),
            lanes[HUB].num_layers,
            text_configs[HUB],
            {name: lanes[name] for name in experts},
            config.stitch["projected"],
        )

    def _make_layers(self, cache: Cache) -> None:
        """Give an empty cache a layer for every decoder layer, each of the kind that its own model wants."""
        if cached_tokens(cache):
            raise ValueError("The cache holds tokens of another model. Start with an empty cache.")
        own = [cache_like(cache, lane.config, f"model {name!r}") for name, lane in self._lanes.items()]
        cache.layers[:] = [layer for part in own for layer in part.layers]
        setattr(cache, _OURS, True)

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
            past_key_values = DynamicCache(config=self._plan.hub_config)
        if past_key_values is not None and not hasattr(past_key_values, _OURS):
            self._make_layers(past_key_values)
        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        if position_ids is None and not self._hub_takes_positions:
            del call["position_ids"]  # as in a call of the hub alone; the experts' are then counted
        views = {name: lane.view(past_key_values) for name, lane in self._lanes.items()}
        run = Run(self._plan, call, self._runs.get(), self.observers)
        if self.observers:
            run.cache, run.past = past_key_values, cached_tokens(views[HUB])
        self._runs.set(run)
        try:
            # All plans are made before any layer runs: they ask the cache how many tokens it held before.
            run.streams = {
                name: planner.start(call, views[name], self._plan.hub_config)
                for name, planner in self._planners.items()
            }
            given = {name: value for name, value in call.items() if value is not None}
            if attention_mask is not None:
                own, queries = self._plan.hub_config, (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
                given["attention_mask"] = expert_mask(attention_mask, own, own, cached_tokens(views[HUB]), queries)
            out = self._hub(past_key_values=views[HUB], use_cache=views[HUB] is not None, **given)
        finally:
            self._runs.set(run.outer)
        if isinstance(out, tuple):
            return tuple(past_key_values if isinstance(item, Cache) else item for item in out)
        out.past_key_values = past_key_values
        return out


class StitchedForCausalLM(StitchedPreTrainedModel, GenerationMixin):
    """The composition with the hub's head: what `AutoModelForCausalLM.from_pretrained(exported)` returns."""

    def __init__(self, config: StitchedConfig) -> None:
        super().__init__(config)
        self.model = StitchedModel(config)
        # The hub's own class knows what comes after its backbone (scaling, soft-capping, the loss). It runs with a
        # stand-in for the backbone; only its head is a weight, and that is registered here.
        shell = AutoModelForCausalLM.from_config(config.part(HUB))
        self.lm_head = shell.get_output_embeddings()
        parent, _, child = find_decoder(shell, "The hub").path.rpartition(".")[0].rpartition(".")
        setattr(shell.get_submodule(parent), child, _Backbone(self.model))
        self.__dict__["_shell"] = shell
        if config.tie_word_embeddings:
            embeddings = self.model.get_input_embeddings()
            name = next(name for name, module in self.named_modules() if module is embeddings)
            self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

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
        with generation(self.model.observers, self, args, kwargs):
            return super().generate(*args, **kwargs)


class _Lane:
    """One model's stretch of the flat list: its layers by its own count, and its view of the flat cache."""

    def __init__(self, layers: nn.ModuleList, first: int, num_layers: int, config: Any) -> None:
        self._layers, self.first, self.num_layers, self.config = layers, first, num_layers, config

    def __getitem__(self, index: int) -> _FlatCall:
        return _FlatCall(self._layers[self.first + index])

    def __len__(self) -> int:
        return self.num_layers

    def view(self, cache: Optional[Cache]) -> Optional[Cache]:
        """The cache as this model's backbone knows it: lengths are asked for by its own count of layers."""
        if cache is None:
            return None
        view = copy.copy(cache)
        view.layers = cache.layers[self.first : self.first + self.num_layers]
        view._flat = cache
        return view


class _FlatCall:
    """A layer that is called with the flat cache instead of its model's view: it counts by the flat list."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(value._flat if isinstance(value, Cache) else value for value in args)
        kwargs = {name: value._flat if isinstance(value, Cache) else value for name, value in kwargs.items()}
        return self.layer(*args, **kwargs)


class _HubLayer(nn.Module):
    """Stands in for a layer of the hub: runs it, and the stitch behind it."""

    def __init__(self, lane: _Lane, index: int, stitches: nn.ModuleDict, runs: PerThread) -> None:
        super().__init__()
        self.layer = lane[index].layer  # registered, so that transformers' hooks for hidden states find it
        self._index, self._runs = index, runs
        self.__dict__["_stitch"] = dict(stitches).get(str(index))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = _FlatCall(self.layer)(*args, **kwargs)
        if self.__dict__["_stitch"] is None:
            return out
        hidden = out[0] if isinstance(out, tuple) else out
        checkpoint = checkpoint_function(self.layer)
        new = self._runs.get().cross(self._index, self.__dict__["_stitch"], hidden, args, kwargs, checkpoint)
        replace_captured_hidden_state(hidden, new)
        return (new, *out[1:]) if isinstance(out, tuple) else new


class _Backbone(nn.Module):
    """What the hub's causal LM calls as its backbone."""

    def __init__(self, model: StitchedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


AutoConfig.register(StitchedConfig.model_type, StitchedConfig)
AutoModel.register(StitchedConfig, StitchedModel)
AutoModelForCausalLM.register(StitchedConfig, StitchedForCausalLM)

"""`StitchExportConfig`: what an exported composition is made of."""

from __future__ import annotations

from typing import Any, Optional

from transformers import AutoConfig, PreTrainedConfig

from ..stitch import HUB


class StitchExportConfig(PreTrainedConfig):
    """Config of a standalone composition.

    Args:
        models: Config dict of every model by name: `hub`, and the experts.
        schedule: `[hub layer, kind]` of every stitch.
        stitch: Options of the stitches (`gate`, `gate_bias`, `r`), their `dtype`, and `projected`, whether
            Experts-into-Hub replaces the experts' states.
        returns: By model, what each of its layers returns: `None` for a tensor, else the size of the tuple.
        final_modules: With `output="mixture"`, by model: the names of the modules between its last layer and its head.
            `None`: the hub's head speaks alone.
    """

    model_type = "stitched"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        models: Optional[dict[str, dict[str, Any]]] = None,
        schedule: Optional[list[list[Any]]] = None,
        stitch: Optional[dict[str, Any]] = None,
        returns: Optional[dict[str, list[Optional[int]]]] = None,
        final_modules: Optional[dict[str, list[str]]] = None,
        **kwargs: Any,
    ) -> None:
        self.models, self.schedule = models or {}, schedule or []
        self.stitch, self.returns, self.final_modules = stitch or {}, returns or {}, final_modules
        if self.models:
            parts = [self.part(name) for name in self.names]
            hub = parts[0].get_text_config(decoder=True)
            for key in ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
                if getattr(hub, key, None) is not None:
                    kwargs[key] = getattr(hub, key)
            for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                kwargs.setdefault(key, getattr(hub, key, None))
            texts = [part.get_text_config(decoder=True) for part in parts]
            kwargs["layer_types"] = [kind for text in texts for kind in layer_kinds(text)]
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


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Return what every layer of a model attends to: `full_attention`, `sliding_attention`, or a kind of its own."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        kinds = [kind] * config.num_hidden_layers
    return list(kinds)

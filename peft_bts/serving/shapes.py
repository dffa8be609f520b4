"""What vLLM wants to know of a model's config before it makes the model: shapes of attention, the longest sequence."""

from __future__ import annotations

from dataclasses import replace

from vllm.config.model_arch import ModelArchitectureConfig
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from ..export.config import StitchExportConfig


class CompositionShapes(ModelArchConfigConvertorBase):
    """Converts a `StitchExportConfig`: attention layers have the shapes of their own models.

    The rest (width, vocabulary, number of layers) is that of the export's config: the hub's, and the flat list's.
    """

    def convert(self, supports_multimodal: bool = True) -> ModelArchitectureConfig:
        whole = self.convert_layer(supports_multimodal)
        layers = []
        for shape in part_shapes(self.hf_config):
            layer = replace(
                whole,
                total_num_attention_heads=shape.total_num_attention_heads,
                total_num_kv_heads=shape.total_num_kv_heads,
                head_size=shape.head_size,
            )
            layers += [layer] * shape.total_num_hidden_layers
        return ModelArchitectureConfig.from_layers(layers)

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        """The shortest of the models' longest sequences."""
        limits = [shape.derived_max_model_len_and_key for shape in part_shapes(self.hf_config)]
        return min(limits, key=lambda limit: limit[0])


def part_shapes(config: StitchExportConfig) -> list[ModelArchitectureConfig]:
    """The shapes of every model by itself, the hub first, as vLLM knows them of its architecture."""
    shapes = []
    for name in config.names:
        part = config.part(name)
        convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(part.model_type, ModelArchConfigConvertorBase)
        shapes.append(convertor(part, part.get_text_config(decoder=True)).convert())
    return shapes

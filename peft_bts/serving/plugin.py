"""What vLLM calls when it starts: the class of exported compositions, and the shapes of their attention layers."""

from __future__ import annotations

from ..export.config import StitchExportConfig
from ..export.model import StitchExportForCausalLM


def register() -> None:
    """Tell vLLM of exported compositions (entry point `vllm.general_plugins`). Calling it again changes nothing."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from .shapes import CompositionShapes

    # By name: vLLM looks at a model's class in a process of its own, and imports it here when it is used.
    ModelRegistry.register_model(StitchExportForCausalLM.__name__, "peft_bts.serving.model:ServedComposition")
    MODEL_ARCH_CONFIG_CONVERTORS[StitchExportConfig.model_type] = CompositionShapes

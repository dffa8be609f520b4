"""What vLLM calls when it starts: exported compositions, the shapes of their attention layers, their limits."""

from __future__ import annotations

import warnings

from ..export.config import StitchExportConfig
from ..export.model import StitchExportForCausalLM


def register() -> None:
    """Tell vLLM of exported compositions (entry point `vllm.general_plugins`). Calling it again changes nothing.

    With a version of vLLM that it does not know, it warns and does nothing.
    """
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

        from .limits import CompositionLimits
        from .shapes import CompositionShapes
    except ImportError as error:  # vLLM calls this whatever it serves: other models are to be served all the same
        warnings.warn(
            f"Stitched models cannot be served by this version of vLLM: {error}. peft_bts needs vllm>=0.32,<0.33.",
            stacklevel=2,
        )
        return

    # By name: vLLM looks at a model's class in a process of its own, and imports it here when it is used.
    name = StitchExportForCausalLM.__name__
    ModelRegistry.register_model(name, "peft_bts.serving.model:ServedComposition")
    MODELS_CONFIG_MAP[name] = CompositionLimits
    MODEL_ARCH_CONFIG_CONVERTORS[StitchExportConfig.model_type] = CompositionShapes

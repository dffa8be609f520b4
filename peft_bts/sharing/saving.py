"""Where an adapter's models are: noted before it is saved, and asked for where a later load finds none."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any, Optional

from peft import PeftConfig, PeftModel

from .._compat.peft import base_model
from ..config import StitchConfig
from ..model import stitch_tuner
from ..reference import is_repo_id


def before_saving(model: PeftModel) -> None:
    """Note where the hub was loaded from, and warn of experts that the file cannot refer to.

    A config keeps the id of a repository, though the hub may come from a copy of it. A path gives way to the hub's.
    """
    tuner, source = stitch_tuner(model), base_model(model).name_or_path or ""
    for adapter, config in list(tuner.peft_config.items()):
        known = config.base_model_name_or_path
        if known != source and (os.path.exists(source) or is_repo_id(source)) and not is_repo_id(known):
            tuner.peft_config[adapter] = dataclasses.replace(config, base_model_name_or_path=source)
        lost = [name for name, reference in sorted(config.experts.items()) if not _has_source(reference)]
        if lost:
            note = f'model.peft_config["{adapter}"].experts["{lost[0]}"]["model"] = folder'
            warnings.warn(
                f"Adapter {adapter!r} is saved, but cannot be loaded as it is: its file does not say where "
                f"{', '.join(map(repr, lost))} can be found, which came from no id or path. Save each of these models "
                "in a folder of its own, `expert.save_pretrained(folder)`. Then attach the folder, or note it and "
                f'save again: `{note}` ("adapter" for a LoRA).',
                stacklevel=4,
            )


def _has_source(reference: Mapping[str, Any]) -> bool:
    return (reference.get("adapter") or reference.get("model")) is not None


def where_the_seed_is(adapter: str, arguments: Mapping[str, Any], error: OSError) -> Optional[str]:
    """Return what to say if `AutoPeftModelForCausalLM.from_pretrained` has not found an adapter's seed.

    Args:
        adapter: Path or id of the adapter.
        arguments: What else the method was given.
        error: What came of it.

    Returns:
        `None` if this is not about the seed of a stitch adapter.
    """
    config = arguments.get("config")
    if config is None:
        where = {**arguments.get("kwargs", {}), "revision": arguments.get("revision")}
        try:
            config = PeftConfig.from_pretrained(adapter, **where)
        except (OSError, ValueError):  # there is no such adapter
            return None
    seed = config.base_model_name_or_path
    if not isinstance(config, StitchConfig) or not isinstance(seed, str) or os.path.exists(seed):
        return None
    if seed not in str(error):
        return None
    reason = f": {error}" if is_repo_id(seed) else ", and there is no such folder."
    return (
        f"The seed of this adapter should be at {seed!r}{reason}\n"
        "If it is somewhere else, say where, and hand the config over:\n"
        f'    config = StitchConfig.from_pretrained("{adapter}")\n'
        '    config.base_model_name_or_path = "another id or path"\n'
        f'    AutoPeftModelForCausalLM.from_pretrained("{adapter}", config=config)'
    )

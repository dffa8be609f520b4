"""How an expert comes to a stitched model and leaves it again: loaded or adopted, checked, given weights in stitches.

All or nothing: whatever is wrong with an expert is found before anything of the model has changed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Optional, Union

from torch import nn
from transformers import PreTrainedModel

from .._compat.peft import CausalLM
from ..config import StitchConfig
from ..forward.expert import Expert
from ..forward.layer import StitchLayer
from ..forward.placement import place_for_stitch
from ..places import same_places
from ..reference import as_reference
from ..stitch import HUB, Init
from .compatibility import compare, sizes
from .loading import describe_model, load_expert, resolve_reference


logger = logging.getLogger(__name__)

Made = tuple[Expert, dict[str, Any]]  # an expert, and its reference


class ExpertMaker:
    """Makes `Expert`s for a hub. Experts that several adapters share are made once.

    Args:
        hub: The hub.
        present: Says which experts the model has, of all adapters.
    """

    def __init__(self, hub: PreTrainedModel, present: Callable[[], Iterable[Expert]]) -> None:
        self._hub, self._present = hub, present

    def make(
        self, name: str, model: Union[CausalLM, str, dict[str, Any]], config: StitchConfig, loading: dict[str, Any]
    ) -> Made:
        """Load or adopt, check and freeze an expert.

        Args:
            name: The expert's name.
            model: A loaded model, or an id, path or reference dict.
            config: The adapter's.
            loading: How to load an id or path.

        Raises:
            ValueError: If it cannot be loaded or does not fit; nothing is changed then.
        """
        if not isinstance(model, nn.Module):
            reference = as_reference(name, {**as_reference(name, model), **loading})
            return self.load(name, resolve_reference(name, reference), config)
        if loading:
            raise ValueError(f"Expert {name!r} is a loaded model; {sorted(loading)} apply to ids and paths only.")
        return self._adopt(name, model, describe_model(model), config)

    def load(self, name: str, reference: dict[str, Any], config: StitchConfig) -> Made:
        """The same for a reference that `resolve_reference` has looked up."""
        source = {key: value for key, value in reference.items() if key != "config"}
        wanted = same_places(source)
        sources = ((expert, expert.source) for expert in self._present())
        shared = next((expert for expert, known in sources if known and same_places(known) == wanted), None)
        model = load_expert(name, reference, self._hub) if shared is None else shared.model
        return self._adopt(name, model, reference, config, source)

    def _adopt(
        self,
        name: str,
        model: CausalLM,
        reference: dict[str, Any],
        config: StitchConfig,
        source: Optional[dict[str, Any]] = None,
    ) -> Made:
        report = compare(
            name, model, self._hub, expected=reference.get("config"), expert_streams=config.expert_streams
        )
        report.raise_errors()
        for text in report.warnings:
            warnings.warn(text, stacklevel=4)
        for note in report.notes:
            logger.info("Expert %r: %s", name, note)
        known = next((expert for expert in self._present() if expert.model is model), None)
        expert = Expert(model, f"Expert {name!r}", source) if known is None else known
        if config.output == "mixture":
            try:
                expert.prepare_head(f"Expert {name!r}")
            except BaseException:
                self.release(expert)
                raise
        return expert, {**reference, "config": sizes(model)}

    def release(self, expert: Expert) -> CausalLM:
        """Hand an expert's model back as it came, unless another adapter still uses it."""
        if any(expert is other for other in self._present()):
            return expert.model
        return expert.release()


def add_stitch_weights(layers: Iterable[StitchLayer], adapter: str, name: str, width: int, init: Init) -> None:
    """Give a new expert weights in every stitch of an adapter; on an error nothing is left.

    Args:
        layers: The adapter's stitched layers, in order.
        adapter: The adapter's name.
        name, width: The expert's name and the channels of its hidden states.
        init: Start of its gates, see `ExpertsIntoHub.add_expert`.
    """
    stitches = [(layer.stitch_layer[adapter], place_for_stitch(layer.base_layer)[0]) for layer in layers]
    if not stitches:
        return  # output gates alone
    like = stitches[-1][0].gate.of(HUB).weight  # the one weight that is there without any expert
    try:
        for stitch, device in stitches:
            stitch.add_expert(name, width, init=init, device=device, dtype=like.dtype)
            stitch.gate.of(name).requires_grad_(like.requires_grad)
            stitch.proj.of(name).requires_grad_(like.requires_grad)
    except BaseException:
        for stitch, _ in stitches:
            if name in stitch.experts:
                stitch.remove_expert(name)
        raise

"""How an expert comes to a stitched model and leaves it again: loaded or adopted, checked, given weights in stitches.

All or nothing: whatever is wrong with an expert is found before anything of the model has changed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Optional, Union

from torch import nn
from transformers import PreTrainedModel

from .._compat.peft import CausalLM
from ..config import StitchConfig
from ..distributed.absent import AbsentExpert
from ..distributed.parallel import ExpertParallel
from ..forward.expert import Expert
from ..forward.layer import StitchLayer
from ..forward.placement import place_for_stitch
from ..places import same_places
from ..reference import as_reference
from ..stitch import HUB, Init
from .compatibility import compare, sizes
from .elsewhere import Elsewhere
from .loading import describe_model, load_expert, resolve_reference


logger = logging.getLogger(__name__)

Made = tuple[Expert, dict[str, Any]]  # an expert, and its reference


class ExpertMaker:
    """Makes `Expert`s for a hub. Experts that several adapters share are made once.

    Args:
        hub: The hub.
        present: Says which experts the model has, of all adapters.
        parallel: Who runs what, where the models are spread over processes.
    """

    def __init__(
        self,
        hub: PreTrainedModel,
        present: Callable[[], Iterable[Expert]],
        parallel: Optional[ExpertParallel] = None,
    ) -> None:
        self._hub, self._present = hub, present
        self._elsewhere: Optional[Elsewhere] = None
        if parallel is not None:
            self._elsewhere = Elsewhere(hub, parallel)
            self._elsewhere.prepare_hub()

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
            return self.load({name: resolve_reference(name, reference)}, config)[name]
        if loading:
            raise ValueError(f"Expert {name!r} is a loaded model; {sorted(loading)} apply to ids and paths only.")
        reference = describe_model(model)
        if self._elsewhere is None:
            made = self._adopt(name, model, reference, config)
        else:
            self._elsewhere.place_models({name: model})
            made = self._elsewhere.here_or_there(
                name, lambda: self._adopt(name, model, reference, config), reference, config
            )
        if made[1]["model"] is None:
            warnings.warn(
                f"Expert {name!r} came from no id or path, so a saved adapter cannot say where to find it. If this "
                "one is to be saved: save the expert in a folder first, and attach the folder.",
                stacklevel=3,
            )
        return made

    def load(self, references: dict[str, dict[str, Any]], config: StitchConfig) -> dict[str, Made]:
        """The same for references that `resolve_reference` has looked up, by name."""
        if self._elsewhere is None:
            return {name: self._load(name, reference, config) for name, reference in references.items()}
        shared = {name: self._shared(reference) for name, reference in references.items()}
        self._elsewhere.place({name: references[name] for name, expert in shared.items() if expert is None})
        made: dict[str, Made] = {}
        for name, reference in references.items():
            expert = shared[name]
            if isinstance(expert, AbsentExpert):
                made[name] = expert, {**reference, "config": sizes(expert.model)}
            elif expert is not None:
                made[name] = self._load(name, reference, config)
            else:
                made[name] = self._elsewhere.here_or_there(
                    name, partial(self._load, name, reference, config), reference, config
                )
        return made

    def _load(self, name: str, reference: dict[str, Any], config: StitchConfig) -> Made:
        shared = self._shared(reference)
        model = load_expert(name, reference, self._hub) if shared is None else shared.model
        return self._adopt(name, model, reference, config, _source(reference))

    def _shared(self, reference: dict[str, Any]) -> Optional[Expert]:
        """The expert that was loaded from the same place for another adapter, if there is one."""
        wanted = same_places(_source(reference))
        sources = ((expert, expert.source) for expert in self._present())
        return next((expert for expert, known in sources if known and same_places(known) == wanted), None)

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
        if self._elsewhere is not None:
            self._elsewhere.let_go(expert)
        return expert.release()


def _source(reference: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in reference.items() if key != "config"}


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

"""Experts of a hub whose models are spread over processes: who gets which, and what the others have of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional
from weakref import WeakKeyDictionary

from peft import PeftModel
from transformers import PreTrainedModel

from .._compat.peft import CausalLM
from ..config import StitchConfig
from ..distributed.absent import AbsentExpert, has_layers
from ..distributed.parallel import ExpertParallel, loaded_whole
from ..forward.decoder import find_decoder
from ..forward.expert import Expert
from ..forward.placement import is_dispatched, place_for_stitch
from ..reference import PLACEMENT_KEYS
from .blueprint import ModelLike, expert_blueprint, hub_blueprint, no_weights
from .compatibility import compare, sizes


class Elsewhere:
    """Chooses the processes of experts, and makes what stands for those that run in another one.

    Args:
        hub: The hub, whose layers this process may not have.
        parallel: Who runs what.
    """

    def __init__(self, hub: PreTrainedModel, parallel: ExpertParallel) -> None:
        self._hub, self._parallel = hub, parallel
        self._hub_blueprint: Optional[PreTrainedModel] = None
        self._blueprints: dict[str, CausalLM] = {}
        self._owners: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        # What was placed and is there: its process and its weights. A copy of the model has nothing to free.
        self._placed: WeakKeyDictionary[Expert, tuple[int, int]] = WeakKeyDictionary()
        self._mode = no_weights()  # one for all: fake tensors of two do not mix

    def prepare_hub(self) -> None:
        """Get the hub ready for forwards over several processes.

        Raises:
            ValueError: If it is quantised, or spread over devices.
        """
        if getattr(self._hub.config, "quantization_config", None) is not None or is_dispatched(self._hub):
            raise ValueError(
                "The hub is quantised, or spread over devices or the disk by `device_map`. expert_parallel() does not "
                "support that: each model is whole, on one device of one process. Load it plainly, or run one process."
            )
        with loaded_whole(), self._mode:
            blueprint = find_decoder(self._blueprint_of_hub(), "The hub")
            self._parallel.prepare_hub(find_decoder(self._hub, "The hub"), blueprint)

    def place(self, references: Mapping[str, dict[str, Any]]) -> None:
        """Choose processes for experts that are to be loaded together, by their configs.

        Args:
            references: What `resolve_reference` has returned, by name.

        Raises:
            ValueError: If there are more processes than models, or one cannot be spread.
        """
        for name, reference in references.items():
            for key in ("quantization_config", *PLACEMENT_KEYS):
                if reference.get(key) is not None:
                    raise ValueError(
                        f"Expert {name!r} has {key}, which expert_parallel() does not support: each expert is loaded "
                        "whole, in the hub's dtype, by the process that runs it. Leave it out, or run one process."
                    )
        with_hub = [name for name, reference in references.items() if reference.get("model") is None]
        self._place(references, with_hub)

    def place_models(self, models: Mapping[str, CausalLM]) -> None:
        """The same for models that every process has loaded; those that are not to run them let go of them.

        Raises:
            ValueError: For adapters, and for models without layers.
        """
        for name, model in models.items():
            if isinstance(model, PeftModel):
                raise ValueError(
                    f"Expert {name!r} is an adapter that is loaded already. Under expert_parallel() attach it by its "
                    "id or path, so that only the process that runs it loads it."
                )
            if not has_layers(find_decoder(model, f"Expert {name!r}")):
                raise ValueError(
                    f"Expert {name!r} was loaded inside of expert_parallel() as if it were the hub, and has no layers "
                    "in some processes. Attach it by its id or path."
                )
        self._place(models, [])

    def _place(self, models: Mapping[str, ModelLike], with_hub: list[str]) -> None:
        with loaded_whole(), self._mode:
            hub = self._blueprint_of_hub()
            of_hub = {id(parameter) for parameter in hub.parameters()}
            counts = {}
            for name, model in models.items():
                blueprint = expert_blueprint(name, model, hub, hub.dtype)
                self._blueprints[name] = blueprint
                counts[name] = sum(p.numel() for p in blueprint.parameters() if id(p) not in of_hub)
        placement = self._parallel.placement
        # The same everywhere, even where one process has kept an expert that another one has let go of.
        placement.loads = self._parallel.processes.everybodys(placement.loads)[0]
        if not any(placement.loads):
            layers = find_decoder(hub, "The hub").layers
            placement.loads[placement.hub] += sum(p.numel() for p in layers.parameters())
            if models:
                placement.check_number(len(models) - len(with_hub))
        self._owners |= placement.place(counts, with_hub)
        self._counts |= counts

    def here_or_there(
        self,
        name: str,
        make: Callable[[], tuple[Expert, dict[str, Any]]],
        reference: dict[str, Any],
        config: StitchConfig,
    ) -> tuple[Expert, dict[str, Any]]:
        """Make an expert in the process that was chosen for it, and what stands for it in the others.

        Args:
            name: The expert's name.
            make: Makes it, with its reference.
            reference: Where it is from.
            config: The adapter's.

        Raises:
            ValueError: If it cannot be made, in all processes.
        """
        owner, blueprint, count = self._owners.pop(name), self._blueprints.pop(name), self._counts.pop(name)
        processes = self._parallel.processes
        with loaded_whole():
            if owner == processes.index:
                made = processes.together(make)
            else:
                made = processes.together(lambda: self._stand_in(name, blueprint, reference, config, owner))
        self._placed[made[0]] = owner, count
        return made

    def let_go(self, expert: Expert) -> None:
        """An expert has left the model, so that its process has room for another one."""
        if expert in self._placed:
            self._parallel.placement.take_away(*self._placed.pop(expert))

    def _stand_in(
        self, name: str, blueprint: CausalLM, reference: dict[str, Any], config: StitchConfig, owner: int
    ) -> tuple[Expert, dict[str, Any]]:
        source = {key: value for key, value in reference.items() if key != "config"}
        with loaded_whole(), self._mode:
            report = compare(
                name,
                blueprint,
                self._blueprint_of_hub(),
                expected=reference.get("config"),
                expert_streams=config.expert_streams,
            )
            report.raise_errors()
            expert = AbsentExpert(blueprint, f"Expert {name!r}", source, owner)
        return expert, {**reference, "config": sizes(blueprint)}

    def _blueprint_of_hub(self) -> PreTrainedModel:
        if self._hub_blueprint is None:
            self._hub_blueprint = hub_blueprint(self._hub, place_for_stitch(self._hub)[1])
        return self._hub_blueprint

"""The experts of one adapter: which there are, which of them take part, and where they meet the stitches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Optional

from torch import nn

from ..config import StitchKind
from ..forward.composition import Composition
from ..forward.expert import Expert
from ..modules import M, TypedModuleDict


class NamedModules(TypedModuleDict[M]):
    """Modules by a user's names, which may be those of attributes of `nn.Module`, such as `half`."""

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        self._modules[name] = module  # type: ignore[assignment]  # torch keeps `None` in there, too


class ExpertSet:
    """The experts of one adapter.

    Args:
        adapter: The adapter's name.
        schedule: Kinds of its stitches by hub layer (`stitch_schedule`).
        hub_layers: Number of the hub's decoder layers.
        hub_config: The hub's text config.
        projected: Whether Experts-into-Hub replaces the experts' states.
        mixture: Whether the models' distributions are mixed.
        forgetting: If their gates see how well each model has predicted the tokens so far, the forgetting factor.
        experts: The experts by name.

    Attributes:
        modules: The experts by name, as a module: they move and cast with the model that it is a part of.
        composition: What a forward runs.
    """

    def __init__(
        self,
        adapter: str,
        schedule: Mapping[int, StitchKind],
        hub_layers: int,
        hub_config: Any,
        projected: bool,
        mixture: bool,
        forgetting: Optional[float],
        experts: Mapping[str, Expert],
    ) -> None:
        self.adapter, self.schedule = adapter, schedule
        self.modules: NamedModules[Expert] = NamedModules(experts)
        self._hub_layers, self._hub_config = hub_layers, hub_config
        self._projected, self._mixture, self._forgetting = projected, mixture, forgetting
        self._left_out: frozenset[str] = frozenset()
        self._compose()

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __getitem__(self, name: str) -> Expert:
        return self.modules[name]

    @property
    def active(self) -> dict[str, Expert]:
        """The experts that take part."""
        return {name: self[name] for name in sorted(self) if name not in self._left_out}

    def by_name(self) -> dict[str, Expert]:
        """All experts by name, whether they take part or not."""
        return {name: self[name] for name in self}

    @property
    def left_out(self) -> frozenset[str]:
        """Names of experts that take no part, see `StitchModel.set_active_experts`."""
        return self._left_out

    def add(self, name: str, expert: Expert) -> None:
        """Take in an expert. It takes part."""
        self.modules[name] = expert
        self._compose()

    def remove(self, name: str) -> Expert:
        """Give up an expert. If only experts that were left out stay, they take part again."""
        expert = self[name]
        del self.modules[name]
        self.leave_out(self._left_out)
        return expert

    def leave_out(self, names: Iterable[str]) -> None:
        """Have all experts take part but these; names of experts that are gone are ignored."""
        left_out = frozenset(names) & set(self.modules)
        self._left_out = left_out if left_out < set(self.modules) else frozenset()
        self._compose()

    def _compose(self) -> None:
        self.composition = Composition(
            self.schedule,
            self._hub_layers,
            self._hub_config,
            self.active,
            self._projected,
            self.adapter,
            self._mixture,
            self._forgetting,
        )


class ActiveExperts:
    """The result of `set_active_experts`: leaving it as a context brings the former experts back."""

    def __init__(self, experts: ExpertSet, left_out_before: frozenset[str]) -> None:
        self._experts, self._before = experts, left_out_before

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        self._experts.leave_out(self._before)

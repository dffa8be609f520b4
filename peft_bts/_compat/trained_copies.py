"""Copies of hub modules that PEFT trains and saves with an adapter (`modules_to_save`).

PEFT finds them by the ends of their names, when the adapter's layers are wrapped already; what it cannot train it
refuses then, or passes over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Optional

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def check_modules_to_save(hub: nn.Module, names: Iterable[str], layers: Iterable[nn.Module]) -> None:
    """Raise `ValueError` unless PEFT will find modules of all these names in the hub, and can train them.

    Args:
        hub: The hub, with or without adapters.
        names: The adapter's `modules_to_save`.
        layers: The decoder layers that the adapter will wrap.
    """
    wrapped = {base for base in map(_base_layer, hub.modules()) if base is not None} | set(layers)
    modules = list(_modules(hub, "", wrapped))
    for name in names:
        found = [(path, parent, module) for path, parent, module in modules if path.endswith(name)]
        if not found:
            inside = (path for path, *_ in modules if path.replace(".base_layer", "").endswith(name))
            raise ValueError(
                f"modules_to_save has {name!r}, and no module of the hub has a name that ends so. "
                + next((f"That one is called {path!r}." for path in inside), "`hub.named_modules()` lists them.")
            )
        for path, parent, module in found:
            what = f"modules_to_save has {name!r}, which names {path!r}: "
            if not wrapped.isdisjoint(module.modules()):
                raise ValueError(
                    f"{what}a decoder layer with a stitch behind it, or something that holds one. PEFT cannot train "
                    "that; name modules inside of the layers."
                )
            if isinstance(module, _CONTAINERS):
                raise ValueError(f"{what}a list or dict. PEFT cannot train that; name what is in it.")
            if parent in wrapped:
                own = path.rpartition(".")[2]
                parts = [f"{own}.{part}" for part, child in module.named_children() if list(child.parameters())]
                raise ValueError(
                    f"{what}a part of a decoder layer with a stitch behind it. PEFT can train only what lies deeper "
                    f"in there: {', '.join(map(repr, parts)) or 'here, nothing; leave it out'}."
                )


def drop_trained_copies(hub: nn.Module, adapter: str, active: Iterable[str]) -> None:
    """Drop an adapter's copies of hub modules; a module without copies is itself again.

    Args:
        hub: The hub.
        adapter: The adapter's name.
        active: Names of the active adapters.
    """
    rest = [name for name in active if name != adapter]
    for path, module in list(hub.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter, rest)
            if not module._get_available_adapters():
                parent, _, child = path.rpartition(".")
                setattr(hub.get_submodule(parent), child, module.original_module)


def _base_layer(module: nn.Module) -> Optional[nn.Module]:
    """The layer that an adapter has wrapped, if this is the wrapper."""
    return module._modules.get("base_layer") if isinstance(module, BaseTunerLayer) else None


def _modules(parent: nn.Module, path: str, wrapped: set[nn.Module]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, parent, module) for all below a module of the hub, as if its layers were wrapped; PEFT's own left out."""
    for name, child in parent.named_children():
        if isinstance(child, AuxiliaryTrainingWrapper):
            child = child.original_module
        elif isinstance(child, BaseTunerLayer):
            base = _base_layer(child)
            if base is None:
                continue
            child = base
        place = f"{path}{name}"
        yield place, parent, child
        yield from _modules(child, f"{place}.base_layer." if child in wrapped else f"{place}.", wrapped)

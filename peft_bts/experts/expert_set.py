"""Experts of a stitched model come and go: `attach_expert`, `detach_expert`, `set_active_experts`.

All or nothing: whatever is wrong with an expert is found before anything of the model has changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Optional, Union

from torch import nn

from ..config import StitchConfig
from ..forward.expert import Expert
from ..forward.placement import place_for_stitch
from ..reference import as_reference, check_expert_name
from ..stitch import HUB, Init, check_init
from .compatibility import compare, sizes
from .loading import describe_model, load_expert, resolve_reference


class Attaching:
    """The part of `StitchModel` that users attach and detach experts with.

    Attributes:
        experts: Per adapter, the `Expert`s by name.
    """

    def attach_expert(
        self,
        name: str,
        model: Union[nn.Module, str, dict[str, Any]],
        *,
        revision: Optional[str] = None,
        init: Init = "zero",
        **loading: Any,
    ) -> None:
        """Add an expert to the active adapter, before or after training.

        Args:
            name: Letters, digits and `_`; not `hub`, not taken.
            model: A loaded causal LM (used as it is, no copy), or an id, path or reference dict, which is loaded
                frozen in the hub's dtype and on its device. An id or path of a LoRA of the hub shares its weights.
            revision: Branch, tag or commit, for an id.
            init: Start of the new expert's gates, see `ExpertsIntoHub.add_expert`.
            **loading: How to load an id or path: `quantization_config`, `subfolder`, `device_map`, `max_memory`,
                `offload_folder`, as for `AutoModelForCausalLM.from_pretrained`.

        Raises:
            ValueError: If the name, the model, its tokenizer or `init` does not fit; nothing is changed then.
        """
        adapter = self._single_active_adapter()
        config = self.peft_config[adapter]
        check_expert_name(name)
        if name in config.experts:
            raise ValueError(
                f"Adapter {adapter!r} has an expert {name!r} already; detach it first, or choose another name."
            )
        check_init(init, config.gate_bias)
        if revision is not None:
            loading["revision"] = revision
        expert, reference = self._make_expert(name, model, config, loading)
        layers = self._layers_of(adapter)
        like = layers[-1].stitch_layer[adapter].gate.of(HUB).weight  # the one weight that is there without any expert
        try:
            for layer in layers:
                stitch, (device, _) = layer.stitch_layer[adapter], place_for_stitch(layer.base_layer)
                stitch.add_expert(name, expert.width, init=init, device=device, dtype=like.dtype)
                stitch.gate.of(name).requires_grad_(like.requires_grad)
                stitch.proj.of(name).requires_grad_(like.requires_grad)
        except BaseException:
            for layer in layers:
                if name in layer.stitch_layer[adapter].experts:
                    layer.stitch_layer[adapter].remove_expert(name)
            self._release(expert)
            raise
        self.experts[adapter][name] = expert
        self._set_experts(adapter, {**config.experts, name: reference})

    def detach_expert(self, name: str) -> nn.Module:
        """Remove an expert and its stitch weights from the active adapter; return its model.

        The gates' softmax renormalises over the models that stay; nothing else changes.

        Raises:
            ValueError: If there is no such expert.
        """
        adapter = self._single_active_adapter()
        experts = self.experts[adapter]
        if name not in experts:
            raise ValueError(f"Adapter {adapter!r} has no expert {name!r}; it has {sorted(experts)}.")
        for layer in self._layers_of(adapter):
            layer.stitch_layer[adapter].remove_expert(name)
        expert = experts[name]
        del experts[name]
        references = {other: ref for other, ref in self.peft_config[adapter].experts.items() if other != name}
        self._set_experts(adapter, references)
        return self._release(expert)

    def set_active_experts(self, names: Optional[Iterable[str]] = None) -> _ActiveExperts:
        """Run the active adapter with some of its experts only, without detaching the others.

        The others cost nothing: they are not run, and every softmax goes over the models that are left. Saving is not
        affected. Works as a statement, until the next call, or as a context manager that goes back at its end:

            with model.set_active_experts(["code"]):
                model.generate(...)

        Args:
            names: Names of experts of the active adapter, at least one; `None` for all of them.

        Raises:
            ValueError: If there is no such expert, or `names` is empty (`disable_adapter()` runs the hub alone).
        """
        adapter = self._single_active_adapter()
        known = set(self.experts[adapter].keys())
        names = None if names is None else {names} if isinstance(names, str) else set(names)
        if names is not None and not names <= known:
            raise ValueError(f"Adapter {adapter!r} has no expert {sorted(names - known)}; it has {sorted(known)}.")
        if names is not None and not names:
            raise ValueError("At least one expert must be active; use `disable_adapter()` to run the hub alone.")
        before = self._inactive.get(adapter, set())
        self._set_inactive(adapter, set() if names is None else known - names)
        return _ActiveExperts(self, adapter, before)

    def _set_inactive(self, adapter: str, names: set[str]) -> None:
        self._inactive[adapter] = names
        self._make_plan(adapter)

    def _make_expert(
        self, name: str, model: Union[nn.Module, str, dict], config: StitchConfig, loading: dict[str, Any]
    ) -> tuple[Expert, dict[str, Any]]:
        """Load or adopt, check and freeze an expert; return it with its reference."""
        if not isinstance(model, nn.Module):
            reference = as_reference(name, {**as_reference(name, model), **loading})
            return self._load_expert(name, resolve_reference(name, reference), config)
        if loading:
            raise ValueError(f"Expert {name!r} is a loaded model; {sorted(loading)} apply to ids and paths only.")
        return self._adopt(name, model, describe_model(model), config)

    def _load_expert(
        self, name: str, reference: dict[str, Any], config: StitchConfig
    ) -> tuple[Expert, dict[str, Any]]:
        """The same for a reference that `resolve_reference` has looked up."""
        source = {key: value for key, value in reference.items() if key != "config"}
        shared = next((e for e in self._all_experts() if e.source == source), None)
        model = load_expert(name, reference, self.model) if shared is None else shared.model
        return self._adopt(name, model, reference, config, source)

    def _adopt(
        self,
        name: str,
        model: nn.Module,
        reference: dict[str, Any],
        config: StitchConfig,
        source: Optional[dict] = None,
    ) -> tuple[Expert, dict[str, Any]]:
        """The same for a loaded model."""
        compare(
            name, model, self.model, expected=reference.get("config"), expert_streams=config.expert_streams
        ).raise_errors()
        known = next((e for e in self._all_experts() if e.model is model), None)
        expert = Expert(model, f"Expert {name!r}", source) if known is None else known
        return expert, {**reference, "config": sizes(model)}

    def _all_experts(self) -> Iterator[Expert]:
        return (expert for experts in self.experts.values() for expert in experts.values())

    def _release(self, expert: Expert) -> nn.Module:
        """Hand an expert's model back as it came, unless another adapter still uses it."""
        if any(expert is other for other in self._all_experts()):
            return expert.model
        return expert.release()

    def _set_experts(self, adapter: str, references: dict[str, Any]) -> None:
        """Note an adapter's experts in its config (in a copy: callers may hold, and share, the old one)."""
        self.peft_config[adapter] = dataclasses.replace(self.peft_config[adapter], experts=references)
        self._make_plan(adapter)


class Experts(nn.ModuleDict):
    """Modules by a user's names, which may be those of attributes of `nn.Module`, such as `half`."""

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        self._modules[name] = module


class _ActiveExperts:
    """What `set_active_experts` returns: leaving it as a context brings the former experts back."""

    def __init__(self, tuner: Attaching, adapter: str, inactive_before: set[str]) -> None:
        self._tuner, self._adapter, self._before = tuner, adapter, inactive_before

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        if self._adapter in self._tuner.experts:
            self._tuner._set_inactive(self._adapter, self._before)

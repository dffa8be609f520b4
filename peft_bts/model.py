"""`StitchModel`: the tuner that PEFT puts around a hub.

It wraps the stitched layers of the hub in `StitchLayer`s, keeps the experts, and opens a `Run` for every forward.
The experts live here, beside the hub and keyed by adapter: they move and cast with the model and are never saved
(attaching.py has how they come and go).
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from contextlib import contextmanager
from typing import Any, Optional, Union

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ._compat.bitsandbytes import keep_repacked_weights
from .config import EXPERTS_INTO_HUB, StitchConfig, stitch_schedule
from .experts.expert_set import Attaching, Experts
from .experts.loading import resolve_reference
from .export.write import export_composition
from .forward.decoder import find_decoder, text_config
from .forward.layer import StitchLayer
from .forward.placement import place_for_stitch
from .forward.state import Plan, Run, Runs
from .forward.thread_local import PerThread
from .inference.dropping import new_run
from .inference.generate import Generating
from .keys import file_key, fit_to_model, stitch_weights
from .stitch import ExpertsIntoHub, HubIntoExperts, PerModel


class StitchModel(Attaching, Generating, BaseTuner):
    """Branch-Train-Stitch around a causal language model, made by `get_peft_model(hub, StitchConfig(...))`.

    Args:
        model: The hub, any decoder-only causal LM of transformers with a `past_key_values` cache. It is frozen.
        config: The `StitchConfig`, or a dict of them by adapter name.
        adapter_name: Name of the adapter.

    Attributes:
        experts: Per adapter, the `Expert`s by name.

    Raises:
        ValueError: For anything that does not fit, before the hub is changed.
    """

    prefix: str = "stitch_"
    tuner_layer_cls = StitchLayer
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state = True  # PEFT then refuses direct injection, which would lose this object and the experts

    # ---------------------------------------------------------------- adapters come and go

    def _pre_injection_hook(self, model: nn.Module, config: StitchConfig, adapter_name: str) -> None:
        # Called once, by BaseTuner.__init__, before anything else of ours.
        self._decoder = find_decoder(model, "The hub")
        self._hub_trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.experts = Experts()
        self._plans: dict[str, Plan] = {}
        self._inactive: dict[str, set[str]] = {}  # experts that `set_active_experts` left out, by adapter
        self._dropping = PerThread()
        self._droppings = 0  # how many `drop_experts` are on, in any thread: compiled code can see this
        self._runs = Runs(self._decoder.backbone, self._decoder.layers[0], self._active_plan, self._new_run)
        self._stitches_enabled = True
        keep_repacked_weights(self)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Make an adapter: find all its experts, load and check them, then wrap the hub's layers.

        On an error nothing is left.
        """
        config = self.peft_config[adapter_name]
        self._check_adapter_name(adapter_name)
        stitch_schedule(config, len(self._decoder.layers))
        # Another adapter's own config means its very experts: TRL's DPOTrainer makes a copy of the adapter so.
        owner = next((name for name in self.experts if self.peft_config.get(name) is config), None)
        if owner is not None:
            experts, references = dict(self.experts[owner].items()), config.experts
        else:
            found = {name: resolve_reference(name, reference) for name, reference in config.experts.items()}
            made = {name: self._load_expert(name, reference, config) for name, reference in found.items()}
            experts = {name: expert for name, (expert, _) in made.items()}
            references = {name: reference for name, (_, reference) in made.items()}
        self.experts[adapter_name] = Experts(experts)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self._drop_trained_copies(adapter_name)
            self._forget(adapter_name)
            self._unfreeze_without_adapters()
            raise
        if references != config.experts:
            self._set_experts(adapter_name, references)
        self._make_plan(adapter_name)
        self._runs.watch()

    def _check_adapter_name(self, name: str) -> None:
        # PEFT drops every key with `.<name of another adapter>.` in it when it saves an adapter.
        parts = {"base_model", "stitch_layer", "gate", "proj", "up", "down"}
        for path, _ in self.model.named_parameters():
            parts.update(path.split("."))
        if (name in parts and name not in self._plans) or name.isdigit() or name.startswith(PerModel.PREFIX):
            raise ValueError(
                f"Adapter name {name!r} is part of tensor names of the hub or the stitches; PEFT would drop those "
                "tensors when it saves another adapter. Choose another name, which is no number and does not start "
                f"with {PerModel.PREFIX!r}."
            )

    def _prepare_adapter_config(self, peft_config: StitchConfig, model_config: dict) -> StitchConfig:
        # A copy: the caller's config may serve another hub with another schedule.
        schedule = stitch_schedule(peft_config, len(self._decoder.layers))
        prepared = copy.copy(peft_config)
        prepared.target_modules = rf"{re.escape(self._decoder.path)}\.({'|'.join(map(str, schedule))})"
        return prepared

    def _create_and_replace(
        self,
        peft_config: StitchConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        index = int(target_name)
        layer = target if isinstance(target, StitchLayer) else StitchLayer(target, index, self._runs)
        kind = stitch_schedule(peft_config, len(self._decoder.layers))[index]
        device, dtype = place_for_stitch(layer.base_layer)
        layer.stitch_layer[adapter_name] = (ExpertsIntoHub if kind == EXPERTS_INTO_HUB else HubIntoExperts)(
            text_config(self.model).hidden_size,
            {name: expert.width for name, expert in self.experts[adapter_name].items()},
            gate=peft_config.gate,
            gate_bias=peft_config.gate_bias,
            gate_dropout=peft_config.gate_dropout,
            r=peft_config.r,
            init_weights=peft_config.init_weights,
            device=device,
            dtype=dtype,
        )
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _make_plan(self, adapter: str) -> None:
        config = self.peft_config[adapter]
        hub_layers = len(self._decoder.layers)
        names = sorted(set(self.experts[adapter].keys()) - self._inactive.get(adapter, set()))
        experts = {name: self.experts[adapter][name] for name in names}
        schedule = stitch_schedule(config, hub_layers)
        projected = config.expert_streams == "projected"
        self._plans[adapter] = Plan(schedule, hub_layers, text_config(self.model), experts, projected, adapter)

    def set_adapter(self, adapter_name: Union[str, list[str]], inference_mode: bool = False) -> None:
        """Make one adapter the active one. Raises `ValueError` for more than one."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"Only one stitch adapter can be active at a time, got {list(adapter_name)}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, with its experts. Without the last one, the hub is what it was before."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        self._drop_trained_copies(adapter_name)
        if adapter_name in self.active_adapters:
            # Chosen here, for all layers alike: they do not all know all adapters.
            rest = [name for name in self.peft_config if name != adapter_name]
            if rest:
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {rest[0]}.",
                    stacklevel=3,
                )
            self.set_adapter(rest[:1])
        active = self.active_adapters
        super().delete_adapter(adapter_name)
        self.active_adapter = active
        self._forget(adapter_name)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if not merge:  # PEFT would leave the trained copies in the hub
            for adapter in list(self.peft_config):
                self._drop_trained_copies(adapter)
        hub = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        for adapter in list(self.experts.keys()):
            self._forget(adapter)
        return hub

    def _forget(self, adapter: str) -> None:
        """Drop what is left of an adapter: stitches, wrappers that serve no other, experts, and at last the hooks."""
        for index, layer in enumerate(self._decoder.layers):
            if isinstance(layer, StitchLayer):
                if adapter in layer.stitch_layer:
                    del layer.stitch_layer[adapter]
                if not layer.stitch_layer:
                    self._decoder.layers[index] = layer.base_layer
        experts = list(self.experts[adapter].values()) if adapter in self.experts else []
        if experts or adapter in self.experts:
            del self.experts[adapter]
        for expert in experts:
            self._release(expert)
        self._plans.pop(adapter, None)
        self._inactive.pop(adapter, None)
        if not self._plans:
            self._runs.unwatch()

    def _drop_trained_copies(self, adapter: str) -> None:
        """Drop an adapter's copies of hub modules (`modules_to_save`); a module without copies is itself again."""
        for path, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                rest = [name for name in self.active_adapters if name != adapter]
                module.delete_adapter(adapter, rest)
                if not module._get_available_adapters():
                    parent, _, child = path.rpartition(".")
                    setattr(self.model.get_submodule(parent), child, module.original_module)

    def _unfreeze_without_adapters(self) -> None:
        """After a failure: PEFT had frozen the hub already."""
        if not self._plans:
            for parameter in self._hub_trainable:
                parameter.requires_grad_(True)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._stitches_enabled = enabled

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "Stitches cannot be merged into the hub: they mix the states of several models, which no weight of one "
            "model can express. Keep the adapter, or call `unload()` to get the hub back."
        )

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the classes whose modules libraries may shard or place one by one, found in this model.

        FSDP2's policy `TRANSFORMER_BASED_WRAP` takes them as its units where its config names none: decoder layers of
        hub and experts, stitches, and experts, whose call gathers what they have around their layers. A `StitchLayer`
        is no unit: it runs layers of the experts, which are units of their own.
        """
        units = [*self._all_experts()]
        for layer in self._decoder.layers:
            units += [layer.base_layer, *layer.stitch_layer.values()] if isinstance(layer, StitchLayer) else [layer]
        for expert in self._all_experts():
            units += expert.layers
        return sorted({type(unit).__name__ for unit in units})

    def _single_active_adapter(self) -> str:
        if len(self.active_adapters) != 1:
            raise ValueError(f"This needs one active adapter, found {self.active_adapters}; call `set_adapter` first.")
        return self.active_adapters[0]

    def _layers_of(self, adapter: str) -> list[StitchLayer]:
        return [x for x in self._decoder.layers if isinstance(x, StitchLayer) and adapter in x.stitch_layer]

    def export(self, path: Union[str, os.PathLike], **kwargs: Any) -> None:
        """Write the active adapter with its models as one standalone checkpoint.

        `import peft_bts; AutoModelForCausalLM.from_pretrained(path)` loads it, without PEFT and without the models it
        was made from. Only active experts are written (`set_active_experts`). LoRA experts are merged.

        Args:
            path: The folder.
            **kwargs: For `PreTrainedModel.save_pretrained`, such as `max_shard_size`.

        Raises:
            ValueError: If a model is quantised.
        """
        adapter = self._single_active_adapter()
        stitches = {layer.index: layer.stitch_layer[adapter] for layer in self._layers_of(adapter)}
        export_composition(
            path, self.model, self._plans[adapter], stitches, self.peft_config[adapter], adapter, **kwargs
        )

    # ---------------------------------------------------------------- a forward (see run.py)

    def _active_plan(self) -> Optional[Plan]:
        """What a forward that starts now runs; `None` for the hub alone."""
        if not self._stitches_enabled or not self.active_adapters:
            return None
        return self._plans.get(self.active_adapters[0])

    def _new_run(self, *args: Any) -> Run:
        if self._droppings and torch.compiler.is_compiling():
            return self._new_run_uncompiled(*args)
        return new_run(self._dropping.get(), *args)

    @torch.compiler.disable(reason="drop_experts() chooses experts by numbers: what it runs cannot be one graph")
    def _new_run_uncompiled(self, *args: Any) -> Run:
        return new_run(self._dropping.get(), *args)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        if kwargs.get("adapter_names") is not None:
            raise ValueError("Stitch adapters cannot be mixed within a batch: `adapter_names` is not supported.")
        yield

    # ---------------------------------------------------------------- adapter files (see files.py)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor], *_: Any, **__: Any
    ) -> dict[str, Tensor]:
        return stitch_weights(state_dict, adapter_name)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return file_key(key, adapter_name) or super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return fit_to_model(model, adapter_name, state_dict, with_embeddings=config.save_embedding_layers)

    def discard_adapter(self, adapter: str) -> None:
        """Undo the making of an adapter whose weights could not be loaded."""
        if len(self.peft_config) == 1:
            self.unload()
            self._unfreeze_without_adapters()
        else:
            self.delete_adapter(adapter)

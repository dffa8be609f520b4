"""`StitchTuner`: what PEFT asks of a tuner. Adapters come and go, are switched, saved and loaded.

It wraps the stitched layers of the hub in `StitchLayer`s, keeps the experts, and puts a `HubForward` in the place of
the forward of the hub's backbone. The experts live here, beside the hub and keyed by adapter: they move and cast with
the model and are never saved. What users call is in model.py.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional, Union

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._compat.bitsandbytes import keep_repacked_weights
from ._compat.peft import peft_type_name
from ._compat.trained_copies import check_modules_to_save, drop_trained_copies
from ._compat.trl import fused_output, is_fused
from .config import StitchConfig, check_rank, stitch_schedule
from .distributed.checks import check_config
from .distributed.executor import Distributed
from .distributed.parallel import parallel_of
from .experts.attaching import ExpertMaker
from .experts.expert_set import ExpertSet, NamedModules
from .experts.loading import resolve_reference
from .forward.composition import Composition
from .forward.decoder import find_decoder, text_config, token_embeddings
from .forward.expert import Expert
from .forward.head import ModelHead
from .forward.hooks import HubForward
from .forward.layer import AdapterPart, StitchLayer, StitchOutput, output_mixtures
from .forward.mixed_head import MixedHead
from .forward.placement import place_for_stitch
from .inference.dropping import DroppingPolicies
from .inference.joint_lora import JointLora
from .keys import file_key, fit_to_model, stitch_weights
from .mixture import OutputMixture
from .stitch import PerModel, make_stitch


class StitchTuner(BaseTuner):
    """The tuner of the method `STITCH`, without what users call (`StitchModel`, its one subclass).

    Attributes:
        experts: Per adapter, the `Expert`s by name.
    """

    model: PreTrainedModel  # the hub
    peft_config: dict[str, StitchConfig]  # type: ignore[assignment]  # PEFT's dict is for configs of all methods

    prefix: str = "stitch_"
    tuner_layer_cls = AdapterPart
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state = True  # PEFT then refuses direct injection, which would lose this object and the experts

    # ---------------------------------------------------------------- adapters come and go

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_is_plain(model)  # before PEFT adds to what a stitched hub already has
        super().__init__(model, *args, **kwargs)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        # Called once, by BaseTuner.__init__, before anything else of ours.
        self._decoder = find_decoder(self.model, "The hub")
        self._hub_trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.experts: NamedModules[NamedModules[Expert]] = NamedModules()
        self._expert_sets: dict[str, ExpertSet] = {}  # by adapter; their modules are in `experts`
        self._parallel = parallel_of(self.model)
        self._maker = ExpertMaker(self.model, self._all_experts, self._parallel)
        self._dropping = DroppingPolicies()
        self._forward = HubForward(
            self._decoder.backbone, self._decoder.layers[0], self._active_composition, self._dropping.make_state
        )
        self._joint_lora = JointLora(self._decoder, self._forward)
        self._forward.make_executor = self._joint_lora
        if self._parallel is not None:
            self._forward.make_executor = Distributed(self._joint_lora, self._parallel, self._hub_dtype)
            self._forward.around = self._parallel.delivery
        self._mixed_head: Optional[MixedHead] = None  # made with the first adapter that mixes outputs
        self._stitches_enabled = True
        keep_repacked_weights(self)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Make an adapter: find all its experts, load and check them, then wrap the hub's layers.

        On an error nothing is left.
        """
        config = self.peft_config[adapter_name]
        self._check_adapter_name(adapter_name)
        schedule = stitch_schedule(config, len(self._decoder.layers))
        check_rank(config, text_config(self.model).hidden_size)
        if self._parallel is not None:
            check_config(config)
        layers = [layer.base_layer if isinstance(layer, StitchLayer) else layer for layer in self._decoder.layers]
        check_modules_to_save(model, config.modules_to_save or [], [layers[index] for index in schedule])
        # Another adapter's own config means its very experts: TRL's DPOTrainer makes a copy of the adapter so.
        owner = next((name for name in self._expert_sets if self.peft_config.get(name) is config), None)
        if owner is not None:
            experts = self._expert_sets[owner].by_name()
            references = config.experts
        else:
            found = {name: resolve_reference(name, reference) for name, reference in config.experts.items()}
            made = self._maker.load(found, config)
            experts = {name: expert for name, (expert, _) in made.items()}
            references = {name: reference for name, (_, reference) in made.items()}
        hub_config, projected = text_config(self.model), config.expert_streams == "projected"
        sizes = (len(self._decoder.layers), hub_config)
        outputs = (config.output == "mixture", config.evidence)
        expert_set = ExpertSet(adapter_name, schedule, *sizes, projected, *outputs, experts)
        self.experts[adapter_name] = expert_set.modules
        self._expert_sets[adapter_name] = expert_set
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if config.output == "mixture":
                self._add_mixture(adapter_name, config)
        except BaseException:
            drop_trained_copies(self.model, adapter_name, self.active_adapters)
            self._forget(adapter_name)
            self._unfreeze_without_adapters()
            raise
        if references != config.experts:
            self._note_experts(adapter_name, references)
        self._forward.install()
        self._joint_lora.prepare(adapter_name, experts)

    def _add_mixture(self, adapter_name: str, config: StitchConfig) -> None:
        """Make an adapter's output gates; the first ones put a `MixedHead` in the place of the hub's `forward`."""
        if self._mixed_head is None:
            head = ModelHead.of(self.model, "The hub")
            self._mixed_head = MixedHead(self.model, self._forward, self._active_mixture, head)
        if not hasattr(self.model, "stitch_output"):
            self.model.stitch_output = StitchOutput(self.active_adapters)
        device, dtype = place_for_stitch(self.model.get_output_embeddings())
        gates = OutputMixture(
            text_config(self.model).hidden_size,
            list(self._expert_sets[adapter_name]),
            forgetting=config.evidence,
            init_weights=config.init_weights,
            device=device,
            dtype=dtype,
        )
        trained = adapter_name in self.active_adapters and not config.inference_mode
        output_mixtures(self.model)[adapter_name] = gates.requires_grad_(trained)
        self._mixed_head.install()

    def _check_adapter_name(self, name: str) -> None:
        # PEFT drops every key with `.<name of another adapter>.` in it when it saves an adapter.
        parts = {"base_model", "stitch_layer", "stitch_output", "gate", "proj", "up", "down", "evidence_weight"}
        for path, _ in self.model.named_parameters():
            parts.update(path.split("."))
        if hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"Adapter name {name!r} is taken: modules of torch have an attribute of that name. Choose another."
            )
        if (name in parts and name not in self._expert_sets) or name.isdigit() or name.startswith(PerModel.PREFIX):
            raise ValueError(
                f"Adapter name {name!r} is part of tensor names of the hub or the stitches; PEFT would drop those "
                "tensors when it saves another adapter. Choose another name, which is no number and does not start "
                f"with {PerModel.PREFIX!r}."
            )

    def _prepare_adapter_config(  # type: ignore[override]  # a tuner is given configs of its own class
        self, peft_config: StitchConfig, model_config: dict[str, Any]
    ) -> StitchConfig:
        # A copy: the caller's config may serve another hub with another schedule.
        schedule = stitch_schedule(peft_config, len(self._decoder.layers))
        prepared = copy.copy(peft_config)
        layers = "|".join(map(str, schedule))
        # Without stitches no layer is wrapped, which PEFT takes for a mistake unless told so.
        prepared.target_modules = rf"{re.escape(self._decoder.path)}\.({layers})" if schedule else DUMMY_TARGET_MODULES
        return prepared

    def _create_and_replace(  # type: ignore[override]  # configs of its own class
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
        layer = target if isinstance(target, StitchLayer) else StitchLayer(target, index, self._forward)
        device, dtype = place_for_stitch(layer.base_layer)
        experts = self._expert_sets[adapter_name]
        layer.stitch_layer[adapter_name] = make_stitch(
            experts.schedule[index],
            text_config(self.model).hidden_size,
            {name: experts[name].width for name in experts},
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

    def set_adapter(self, adapter_name: Union[str, list[str]], inference_mode: bool = False) -> None:
        """Make one adapter the active one. Raises `ValueError` for more than one."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"Only one stitch adapter can be active at a time, got {list(adapter_name)}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, with its experts. Without the last one, the hub is what it was before."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        drop_trained_copies(self.model, adapter_name, self.active_adapters)
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

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if not merge:  # PEFT would leave the trained copies in the hub
            for adapter in list(self.peft_config):
                drop_trained_copies(self.model, adapter, self.active_adapters)
        super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for adapter in list(self._expert_sets):
            self._forget(adapter)
        return self.model

    def _forget(self, adapter: str) -> None:
        """Drop what is left of an adapter: stitches, wrappers that serve no other, experts, and at last the hooks."""
        for index, layer in enumerate(self._decoder.layers):
            if isinstance(layer, StitchLayer):
                if adapter in layer.stitch_layer:
                    del layer.stitch_layer[adapter]
                if not layer.stitch_layer:
                    self._decoder.layers[index] = layer.base_layer
        self._joint_lora.forget(adapter)
        if adapter in self._expert_sets:
            del self.experts[adapter]
            for expert in self._expert_sets.pop(adapter).modules.values():
                self._maker.release(expert)
        if hasattr(self.model, "stitch_output"):
            mixtures = output_mixtures(self.model)
            if adapter in mixtures:
                del mixtures[adapter]
            if not mixtures:
                del self.model.stitch_output
                if self._mixed_head is not None:
                    self._mixed_head.remove()
                self._mixed_head = None
        if not self._expert_sets:
            self._forward.remove()

    def _unfreeze_without_adapters(self) -> None:
        """After a failure: PEFT had frozen the hub already."""
        if not self._expert_sets:
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
        self._refuse_parallel("Sharding a model (FSDP2, `_no_split_modules`)")
        units: list[nn.Module] = [*self._all_experts()]
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

    # ---------------------------------------------------------------- experts come and go

    def _all_experts(self) -> Iterator[Expert]:
        return (experts[name] for experts in self._expert_sets.values() for name in experts)

    def _note_experts(self, adapter: str, references: dict[str, Any]) -> None:
        """Note an adapter's experts in its config (in a copy: callers may hold, and share, the old one)."""
        self.peft_config[adapter] = dataclasses.replace(self.peft_config[adapter], experts=references)

    # ---------------------------------------------------------------- a forward (see forward/hooks.py)

    def _refuse_parallel(self, what: str) -> None:
        """Raise `ValueError` if this process does not have all models."""
        if self._parallel is not None:
            raise ValueError(
                f"{what} needs all models in one process, and these are spread over processes (expert_parallel). Load "
                "the adapter in one process, without it."
            )

    @property
    def writes_files(self) -> bool:
        """Whether this process is the one that saves, where all call `save_pretrained`: each has the whole adapter."""
        return self._parallel is None or self._parallel.is_first

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP must not copy from the first process into the others: they hold different models.

        It asks the module that it wraps, this one or the `PeftModel` around it.
        """
        if self._parallel is None:
            return []
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        frozen += [name for name, _ in self.named_buffers()]
        return [*frozen, *(f"base_model.{name}" for name in frozen)]

    def _hub_dtype(self) -> torch.dtype:
        return token_embeddings(self.model).weight.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the hub's `forward`. If TRL asks for its fused head and outputs are mixed, that is of the mixture."""
        if self._parallel is not None:
            self._parallel.check_loss_inputs(kwargs)
        if self._mixed_head is None or self._active_mixture() is None or not is_fused(self.model.forward, kwargs):
            return super().forward(*args, **kwargs)
        return fused_output(self.model.forward, self._mixed_head.measure, kwargs)

    def _active_composition(self) -> Optional[Composition]:
        """Return what a forward that starts now runs; `None` for the hub alone."""
        if not self._stitches_enabled or not self.active_adapters:
            return None
        experts = self._expert_sets.get(self.active_adapters[0])
        return None if experts is None else experts.composition

    def _active_mixture(self) -> Optional[tuple[OutputMixture, bool]]:
        """The output gates that a forward that starts now uses, and whether there are stitches besides."""
        composition = self._active_composition()
        if composition is None or not composition.mixture:
            return None
        return output_mixtures(self.model)[composition.adapter], bool(composition.schedule)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("Stitch adapters cannot be mixed within a batch: `adapter_names` is not supported.")
        yield

    # ---------------------------------------------------------------- adapter files (see keys.py)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor], *_: Any, **__: Any
    ) -> dict[str, Tensor]:
        return stitch_weights(state_dict, adapter_name)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return file_key(key, adapter_name) or super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]  # configs of its own class
        cls, model: PeftModel, config: StitchConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return fit_to_model(model, adapter_name, state_dict, with_embeddings=config.save_embedding_layers)

    def _discard_adapter(self, adapter: str) -> None:
        """Undo the making of an adapter whose weights could not be loaded."""
        if len(self.peft_config) == 1:
            self.unload()
            self._unfreeze_without_adapters()
        else:
            self.delete_adapter(adapter)


def check_is_plain(model: nn.Module) -> None:
    """Raise `ValueError` if what is to be a hub has adapters, stitches or others."""
    if isinstance(model, PeftModel):
        kind = peft_type_name(model.peft_type)
        if kind != "STITCH":
            raise ValueError(
                f"The hub is a PeftModel with a {kind} adapter, to which a stitch adapter's file could not refer. "
                "Merge it (`merge_and_unload()`), save the merged model, and take that; or take the plain model, and "
                "attach the adapter as an expert."
            )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(isinstance(layer, AdapterPart) for layer in layers):
        raise ValueError(
            "This model is stitched already. Take its stitches off first, `hub = model.unload()`, where `model` is "
            "the PeftModel that it is in; or give it a second adapter, `model.add_adapter(name, config)`."
        )
    if layers:
        raise ValueError(
            f"The hub has layers of another PEFT method ({type(layers[0]).__name__}), which a stitch adapter's file "
            "could not refer to. Merge them, save the merged model, and take that; or take the plain model, and "
            "attach the adapter as an expert."
        )

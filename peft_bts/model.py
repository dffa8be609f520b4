"""`StitchModel`: what users call on a stitched model, beside what PEFT and the hub offer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Optional, Union

from peft import PeftModel

from ._compat.peft import CausalLM
from .distributed.generation import generation_in_step
from .experts.attaching import add_stitch_weights
from .experts.expert_set import ActiveExperts
from .export.write import export_composition
from .forward.layer import output_mixtures
from .inference import generate as generation
from .inference.dropping import Dropping
from .inference.threads import parallel_streams
from .reference import check_expert_name
from .stitch import Init, check_init
from .tuner import StitchTuner


class StitchModel(StitchTuner):
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

    def describe_execution(self) -> str:
        """Say which experts of the active adapter run with the hub as one batch in inference, and why others do not.

        One line for each expert. LoRA experts of the hub do, mostly; every other expert runs by itself. Training runs
        all experts by themselves.
        """
        return self._joint_lora.describe(self._single_active_adapter())

    def experts_in_one_batch(self) -> list[str]:
        """Names of the active adapter's experts that run with the hub as one batch in inference."""
        return self._joint_lora.names(self._single_active_adapter())

    def attach_expert(
        self,
        name: str,
        model: Union[CausalLM, str, dict[str, Any]],
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
        expert, reference = self._maker.make(name, model, config, loading)
        try:
            add_stitch_weights(self._layers_of(adapter), adapter, name, expert.width, init)
        except BaseException:
            self._maker.release(expert)
            raise
        if config.output == "mixture":
            output_mixtures(self.model)[adapter].add_expert(name, init=init)
        self._expert_sets[adapter].add(name, expert)
        self._note_experts(adapter, {**config.experts, name: reference})
        self._joint_lora.prepare(adapter, self._expert_sets[adapter].by_name())

    def detach_expert(self, name: str) -> CausalLM:
        """Remove an expert and its stitch weights from the active adapter; return its model.

        The gates' softmax renormalises over the models that stay; nothing else changes.

        Raises:
            ValueError: If there is no such expert.
        """
        adapter = self._single_active_adapter()
        experts = self._expert_sets[adapter]
        if name not in experts:
            raise ValueError(f"Adapter {adapter!r} has no expert {name!r}; it has {sorted(experts)}.")
        for layer in self._layers_of(adapter):
            layer.stitch_layer[adapter].remove_expert(name)
        if self.peft_config[adapter].output == "mixture":
            output_mixtures(self.model)[adapter].remove_expert(name)
        expert = experts.remove(name)
        references = {other: ref for other, ref in self.peft_config[adapter].experts.items() if other != name}
        self._note_experts(adapter, references)
        self._joint_lora.prepare(adapter, experts.by_name())
        return self._maker.release(expert)

    def set_active_experts(self, names: Optional[Iterable[str]] = None) -> ActiveExperts:
        """Run the active adapter with some of its experts only, without detaching the others.

        The others cost nothing: they are not run, and every softmax goes over the models that are left. Saving is not
        affected. Works as a statement, until the next call, or as a context manager that goes back at its end:

            with model.set_active_experts(["code"]):
                model.generate(...)

        An expert that is attached meanwhile takes part. If the last one that takes part is detached, the others do.

        Args:
            names: Names of experts of the active adapter, at least one; `None` for all of them.

        Raises:
            ValueError: If there is no such expert, or `names` is empty (`disable_adapter()` runs the hub alone).
        """
        adapter = self._single_active_adapter()
        experts = self._expert_sets[adapter]
        known = set(experts)
        chosen = known if names is None else {names} if isinstance(names, str) else set(names)
        if not chosen <= known:
            raise ValueError(f"Adapter {adapter!r} has no expert {sorted(chosen - known)}; it has {sorted(known)}.")
        if not chosen and names is not None:
            raise ValueError("At least one expert must be active; use `disable_adapter()` to run the hub alone.")
        before = experts.left_out
        experts.leave_out(known - chosen)
        return ActiveExperts(experts, before)

    def export(self, path: Union[str, os.PathLike[str]], **kwargs: Any) -> None:
        """Write the active adapter with its models as one standalone checkpoint.

        `import peft_bts; AutoModelForCausalLM.from_pretrained(path)` loads it, without PEFT and without the models it
        was made from. Only active experts are written (`set_active_experts`). LoRA experts are merged.

        Args:
            path: The folder.
            **kwargs: For `PreTrainedModel.save_pretrained`, such as `max_shard_size`.

        Raises:
            ValueError: If a model is quantised.
        """
        self._refuse_parallel("export()")
        adapter = self._single_active_adapter()
        stitches = {layer.index: layer.stitch_layer[adapter] for layer in self._layers_of(adapter)}
        export_composition(
            path,
            self.model,
            self._expert_sets[adapter].composition,
            self._expert_sets[adapter].active,
            stitches,
            self.peft_config[adapter],
            adapter,
            **kwargs,
        )

    def generate(
        self,
        *args: Any,
        max_active_experts: Optional[int] = None,
        expert_threshold: Optional[float] = None,
        draft: Optional[Literal["hub"]] = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text, as the hub's own `generate` does.

        Args:
            max_active_experts, expert_threshold: Leave out experts meanwhile, see `drop_experts`.
            draft: `"hub"`: the hub alone, which needs no further memory for weights, drafts 2 tokens at a time
                (`num_assistant_tokens`), and the stitched model checks them in one forward. Greedy tokens stay what
                they are without drafts, and so does the distribution of sampled ones.

        Raises:
            ValueError: For drafts that would have to be taken back from an expert with recurrent states, and for
                continuous batching; with experts left out, for all that needs more than going on: beams, drafts,
                other caches than `DynamicCache`, or none.
        """
        if max_active_experts is not None or expert_threshold is not None:
            with self.drop_experts(max_active_experts, expert_threshold):
                return self.generate(*args, draft=draft, **kwargs)
        observers, dropping = self._forward.settings.observers, self._dropping.current is not None
        parallel = self._parallel
        if draft is not None and parallel is not None:
            raise ValueError(
                "draft='hub' is not supported under expert_parallel(): the hub's layers are in one process only. "
                "Generate without drafts, or pass an `assistant_model`."
            )
        with nullcontext() if parallel is None else generation_in_step(parallel.processes, self.model, kwargs):
            return generation.generate(
                self.model, self._active_composition(), observers, dropping, draft, args, kwargs
            )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The hub's `generate_batch` (continuous batching) while the adapter is disabled, else a `ValueError`."""
        if self._active_composition() is not None:
            generation.refuse_continuous_batching()
        return self.model.generate_batch(*args, **kwargs)  # type: ignore[operator]  # of `GenerationMixin`

    def drop_experts(
        self, max_active_experts: Optional[int] = None, expert_threshold: Optional[float] = None
    ) -> AbstractContextManager[None]:
        """Leave out the experts that a sequence does not listen to, while it is decoded with a cache in this thread.

        Inside of the `with`, forwards over several tokens (prompts) run all experts. Forwards over one token run, for
        every sequence of the batch by itself, the experts with the largest gates over the last few tokens (output
        gates, or those of the last stitch with `output="hub"`); the others' gates are zero. An expert whose gate opens
        again first runs over what it has missed, at once, and is where it would be had it run all along. `generate`
        takes the same arguments.

        Args:
            max_active_experts: At most so many experts per sequence and token.
            expert_threshold: Only experts with a mean gate of at least this, from 0 to 1.

        Raises:
            ValueError: If neither is given, or a value is out of range. Forwards raise it for caches other than a
                plain `DynamicCache`, and for masks and positions that are not 2D.
        """
        return self._dropping.on(Dropping(max_active_experts, expert_threshold))

    def parallel_streams(self, threads: int = 2) -> AbstractContextManager[None]:
        """Run hub and experts side by side, for inference: they need each other at stitches only.

        Inside of the `with`, forwards without gradients (`generate`, `torch.no_grad`) run on several threads. It pays
        on a CPU where one operation is too small for all cores, as in decoding. Every operation gets its share of
        PyTorch's threads (`torch.get_num_threads() // threads`), and computes what it computes with that many
        threads otherwise. Forwards with gradients, and compiled ones, run as ever.

        Args:
            threads: How many models run at a time, mostly the number of cores; at least 2.

        Raises:
            ValueError: If `threads` is out of range.
            RuntimeError: If it is on already.
        """
        self._refuse_parallel("parallel_streams()")
        if not isinstance(threads, int) or threads < 2:
            raise ValueError(f"threads must be an integer of at least 2, got {threads!r}.")
        return parallel_streams(self._forward.settings, threads)


def stitch_tuner(model: PeftModel) -> StitchModel:
    """The tuner of a PEFT model with stitch adapters.

    Raises:
        TypeError: If its adapters are of another method.
    """
    tuner = model.base_model
    if not isinstance(tuner, StitchModel):
        raise TypeError(f"This PeftModel has no stitches: its tuner is a {type(tuner).__name__}.")
    return tuner

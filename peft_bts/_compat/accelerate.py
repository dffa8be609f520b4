"""Adaptations to accelerate's insides (1.15.0)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import accelerate.accelerator
import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from .patching import function_of, replace_method


# Taken at import, before anybody's `init_empty_weights` can have replaced them.
_REGISTER = {name: function_of(nn.Module, name) for name in ("register_parameter", "register_buffer")}


@contextmanager
def real_weights() -> Iterator[None]:
    """Allocate real memory inside accelerate's `init_empty_weights`.

    With `low_cpu_mem_usage=True` PEFT makes an adapter inside of it: `nn.Module.register_parameter` is patched to send
    every new parameter to the meta device. Experts are loaded meanwhile, and they need their weights.

    It could be removed if PEFT used `init_empty_weights` around the making of adapter layers only.
    """
    patched = {name: function_of(nn.Module, name) for name in _REGISTER}
    _put(_REGISTER)
    try:
        yield
    finally:
        _put(patched)


def _put(methods: dict[str, Callable[..., Any]]) -> None:
    for name, method in methods.items():
        replace_method(nn.Module, name, method)


def offloaded_weights(module: nn.Module) -> list[Any]:
    """The maps in which accelerate's hook on a module keeps weights that are on the CPU or on disk.

    It could be removed if `copy.deepcopy` of an offloaded model shared what is not in memory.
    """
    hook = getattr(module, "_hf_hook", None)
    hooks = (hook, *getattr(hook, "hooks", ()))
    found = [getattr(one, name, None) for one in hooks for name in ("weights_map", "tied_params_map")]
    return [weights for weights in found if weights is not None]


class DataAxis(NamedTuple):
    """How data are spread over processes of which several take the same.

    Attributes:
        place: Which share this process takes.
        first: For each share, the rank of the first process that takes it.
        share: From a number to the one that the first process with this share has.
    """

    place: int
    first: Sequence[int]
    share: Callable[[int], int]


def spread_data(axis: Callable[[], Optional[DataAxis]]) -> None:
    """Have accelerate, and so Trainer, hand out data along an axis of the processes instead of to each its own.

    Metrics are gathered from one process per share. `axis` is asked at every call; `None` changes nothing.

    It could be removed if accelerate's `ParallelismConfig` had an axis for parallelism inside of a model that the
    model sees to itself.
    """
    prepare = accelerate.accelerator.prepare_data_loader
    gather = function_of(Accelerator, "gather_for_metrics")

    @functools.wraps(prepare)
    def prepare_data_loader(dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        along = axis()
        if along is None or kwargs.get("torch_device_mesh") is not None:
            return prepare(dataloader, *args, **kwargs)
        if kwargs.get("dispatch_batches"):
            raise ValueError(
                "dispatch_batches=True is not supported under expert_parallel(): it gives every process another "
                "batch. Leave it out."
            )
        sampler = getattr(dataloader, "sampler", None)
        if isinstance(sampler, RandomSampler) and sampler.generator is None:
            # accelerate sees to it where there are several shares only.
            seed = along.share(int(torch.empty((), dtype=torch.int64).random_().item()))
            sampler.generator = torch.Generator().manual_seed(seed)
        share = {"num_processes": len(along.first), "process_index": along.place, "dispatch_batches": False}
        return prepare(dataloader, *args, **{**kwargs, **share})

    @functools.wraps(gather)
    def gather_for_metrics(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        along = axis()
        if along is None:
            return gather(self, *args, **kwargs)
        everything, processes, first = self.gather, self.num_processes, list(along.first)

        def one_per_share(tensor: Tensor) -> Tensor:
            return tensor.view(processes, -1, *tensor.shape[1:])[first].flatten(0, 1)

        self.gather = lambda tensor: recursively_apply(one_per_share, everything(tensor))
        try:
            return gather(self, *args, **kwargs)
        finally:
            del self.gather

    accelerate.accelerator.prepare_data_loader = prepare_data_loader
    replace_method(Accelerator, "gather_for_metrics", gather_for_metrics)

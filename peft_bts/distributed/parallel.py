"""`expert_parallel`: around loading, it decides which process holds which model, before any of them is loaded."""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat.accelerate import DataAxis
from .._compat.transformers import when_models_are_made
from ..forward.composition import Composition
from ..forward.decoder import Decoder, find_decoder
from ..forward.expert import Expert
from ..forward.recorder import layer_return_sizes
from ..stitch import HUB
from .absent import AbsentExpert, AbsentLayer, drop_layers
from .checks import LOSS_INPUTS, check_same_inputs
from .exchange import meet
from .placement import Placement
from .processes import Processes


if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


# Of the `with` that is open; `None` where there is none, and while something is loaded whole.
_OPEN: ContextVar[Optional[ExpertParallel]] = ContextVar("expert_parallel", default=None)
_KEY = "_expert_parallel"  # of a hub that was loaded inside
_LAST: Optional[weakref.ref[ExpertParallel]] = None  # as long as there is a model of it


class ExpertParallel:
    """Who runs what of a stitched model. The hub and its tuner keep it.

    Attributes:
        processes: The processes of this model; other data are for others, where there is a data axis.
        placement: Who runs what.
        axes: The ranks of every expert axis; each gets other data.
        data_index: Which of them is this process's.
        check_inputs: Whether to compare inputs in every forward.
    """

    def __init__(self, processes: Processes, placement: Placement, axes: list[list[int]], check_inputs: bool) -> None:
        self.processes, self.placement, self.axes = processes, placement, axes
        self.data_index = axes.index(processes.ranks)
        self.check_inputs = check_inputs
        self._prepared = self._delivers = False

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        return self

    @property
    def is_first(self) -> bool:
        """Whether this is the first process of all, which writes files."""
        return dist.get_rank() == 0

    @property
    def has_hub(self) -> bool:
        """Whether this process runs the hub."""
        return self.placement.hub == self.processes.index

    def owner(self, expert: Expert) -> int:
        """The process that runs an expert."""
        return expert.owner if isinstance(expert, AbsentExpert) else self.processes.index

    def owners(self, composition: Composition) -> dict[str, int]:
        """The process that runs each model of a composition, the hub's first."""
        experts: Any = composition.experts
        return {HUB: self.placement.hub, **{name: self.owner(expert) for name, expert in experts.items()}}

    def check_loss_inputs(self, call: Mapping[str, Any]) -> None:
        """Compare what only the hub's causal LM gets of a call, if inputs are to be compared.

        Args:
            call: The causal LM's arguments by name.

        Raises:
            RuntimeError: In all processes, if they differ.
        """
        if self.check_inputs:
            check_same_inputs(self.processes, {name: call.get(name) for name in LOSS_INPUTS}, {}, {})

    # ------------------------------------------------------------------------------------------------------- the hub

    def take_hub(self, hub: nn.Module) -> None:
        """Called for every model that is made inside of the `with`: one with a head is a hub."""
        if not isinstance(hub, PreTrainedModel) or not hub.can_generate() or _KEY in hub.__dict__:
            return
        try:
            decoder = find_decoder(hub, "The hub")
        except ValueError:
            return  # it can be no hub, as making a stitched model of it will say
        hub.__dict__[_KEY] = self
        if not self.has_hub:
            drop_layers(hub, decoder)

    def prepare_hub(self, decoder: Decoder, blueprint: Decoder) -> None:
        """Get ready for forwards of a stitched model.

        Args:
            decoder: The hub's.
            blueprint: That of the hub without weights, whose layers can be called.
        """
        if self._prepared:
            return
        self._prepared = True
        sizes, _ = layer_return_sizes(blueprint, torch.device("cpu"))
        for layer, size in zip(decoder.layers, sizes):
            if isinstance(layer, AbsentLayer):
                layer.returns, layer.ready = size, True
        decoder.layers[-1].register_forward_hook(self._deliver)

    @contextmanager
    def delivery(self, composition: Optional[Composition]) -> Iterator[None]:
        """A forward of the hub's backbone: what its last layer makes, where no stitch is behind, reaches all."""
        before = self._delivers
        self._delivers = composition is None or not composition.schedule
        try:
            yield
        finally:
            self._delivers = before

    def _deliver(self, layer: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if not self._delivers:
            return None
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        kind = torch.is_autocast_enabled(hidden.device.type), torch.get_autocast_dtype(hidden.device.type)
        (hidden,) = meet(self.processes, [hidden.detach()], [self.placement.hub], ("hub", kind))
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def check_before_loading(values: dict[str, Any]) -> dict[str, Any]:
    """Raise `ValueError` if an adapter's experts do not fit the processes; called when its config has been read.

    Args:
        values: What the config file says; they are returned.
    """
    parallel, experts = _OPEN.get(), values.get("experts")
    if parallel is not None and isinstance(experts, dict):
        given = parallel.placement.given
        if given is not None and not given.keys() >= experts.keys():
            unplaced = sorted(experts.keys() - given.keys())
            raise ValueError(f"placement says nothing of the experts {unplaced}; it has {sorted(given)}.")
        own = [ref for ref in experts.values() if not isinstance(ref, dict) or ref.get("model")]
        parallel.placement.check_number(len(own))
    return values


def data_axis() -> Optional[DataAxis]:
    """Return how data are spread over the processes; `None` where no models are."""
    parallel = None if _LAST is None else _LAST()
    if parallel is None or not dist.is_initialized():
        return None
    first = [ranks[0] for ranks in parallel.axes]
    return DataAxis(parallel.data_index, first, lambda value: parallel.processes.everybodys(value)[0])


def parallel_of(hub: nn.Module) -> Optional[ExpertParallel]:
    """Who runs what, for a hub that was loaded inside of `expert_parallel()`; `None` for any other.

    Raises:
        ValueError: If a `with` is open now, and this hub was loaded before it.
    """
    found: Optional[ExpertParallel] = hub.__dict__.get(_KEY)
    if found is None and _OPEN.get() is not None:
        raise ValueError(
            "The hub was loaded before `with expert_parallel():`, so that every process holds all of it. Load it "
            "inside of the `with`."
        )
    return found


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Make models as they are, also inside of `expert_parallel()`."""
    token = _OPEN.set(None)
    try:
        yield
    finally:
        _OPEN.reset(token)


@contextmanager
def expert_parallel(
    placement: Optional[Mapping[str, int]] = None,
    mesh: Optional[DeviceMesh] = None,
    *,
    check_inputs: Optional[bool] = None,
    timeout: Optional[datetime.timedelta] = None,
) -> Iterator[None]:
    """Spread the models of a stitched model over processes: each holds and runs some of them.

        torch.distributed.init_process_group("gloo")  # or nccl; under torchrun or accelerate launch
        with peft_bts.expert_parallel():
            model = AutoPeftModelForCausalLM.from_pretrained(folder)

    Load the hub inside. No process then ever holds decoder layers of a model that it does not run; the hub's
    embeddings and head are everywhere. From there on, every process makes the same calls with the same inputs, and
    gets the same results.

    Args:
        placement: The process of each model, `{"hub": 0, "math": 1, ...}`, numbered along the expert axis. `None`: the
            hub on the first, experts by their sizes, so that the processes hold about as much.
        mesh: The processes. Along its axis `"expert"`, or its last one, the models are spread; along the others, if
            any, the data: they hold the same models. `None`: all processes are one expert axis.
        check_inputs: Whether every forward compares the inputs of the processes, which costs a small exchange. `None`:
            if TORCH_DISTRIBUTED_DEBUG is set to INFO or DETAIL.
        timeout: How long a process waits for the others; `None` for torch's default.

    Raises:
        ValueError: If there is no process group, or the placement does not fit. Nothing is loaded then.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "expert_parallel() needs a process group. Start the script by `torchrun` or `accelerate launch`, and call "
            '`torch.distributed.init_process_group("gloo")` (or "nccl") first.'
        )
    axes = _axes(mesh)
    size = len(axes[0])
    chosen = Placement(size, placement)
    mine = next(index for index, ranks in enumerate(axes) if dist.get_rank() in ranks)
    # Groups of our own: exchanges must not get in line with the gradients of DDP, which come in another order.
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in axes]
    debug = dist.get_debug_level() != dist.DebugLevel.OFF if check_inputs is None else check_inputs
    parallel = ExpertParallel(Processes(groups[mine], axes[mine]), chosen, axes, debug)
    global _LAST
    _LAST = weakref.ref(parallel)
    token = _OPEN.set(parallel)
    try:
        with when_models_are_made(_model_made):
            yield
    finally:
        _OPEN.reset(token)


def _model_made(model: nn.Module) -> None:
    parallel = _OPEN.get()
    if parallel is not None:
        parallel.take_hub(model)


def _axes(mesh: Optional[DeviceMesh]) -> list[list[int]]:
    """The ranks of every expert axis."""
    if mesh is None:
        return [list(range(dist.get_world_size()))]
    names = mesh.mesh_dim_names
    axis = names.index("expert") if names and "expert" in names else mesh.ndim - 1
    axes: list[list[int]] = (
        mesh.mesh.movedim(axis, -1).flatten(0, -2).tolist() if mesh.ndim > 1 else [mesh.mesh.tolist()]
    )
    if sorted(rank for ranks in axes for rank in ranks) != list(range(dist.get_world_size())):
        raise ValueError(
            f"The mesh has the ranks {axes}, and there are {dist.get_world_size()} processes. Give a mesh over all of "
            "them."
        )
    return axes

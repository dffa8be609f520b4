"""The processes of one stitched model, and what they do together."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .._compat.torch import silent_processes


T = TypeVar("T")
_PATIENCE = datetime.timedelta(seconds=10)  # for others to notice, too, that a collective has failed
_ALIGN = 16  # bytes: what every dtype can be viewed at


class Processes:
    """The processes that run one stitched model together.

    Args:
        group: Their process group.
        ranks: Their ranks in the world, in order.

    Attributes:
        index: This one's place among them.
        size: How many there are.
        bytes_sent: What this one has sent to others so far, for measurements.
    """

    def __init__(self, group: Any, ranks: Sequence[int]) -> None:
        self.group, self.ranks = group, list(ranks)
        self.index, self.size = self.ranks.index(dist.get_rank()), len(self.ranks)
        self.bytes_sent = 0
        accelerated = "nccl" in dist.get_backend(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if accelerated else torch.device("cpu")
        self._dtypes: dict[object, list[torch.dtype]] = {}
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return self  # copies of models run in the same processes

    def from_owners(
        self, tensors: Sequence[Tensor], owners: Sequence[int], dtypes: Sequence[torch.dtype]
    ) -> list[Tensor]:
        """Return what the owner of each tensor has in its place; the owner's own is returned as it is.

        Args:
            tensors: Of the same shapes everywhere.
            owners: Who has each.
            dtypes: The owner's dtype of each.
        """
        if self.size == 1:
            return list(tensors)
        messages = [
            _Message([(t.shape, dtype) for t, o, dtype in zip(tensors, owners, dtypes) if o == process])
            for process in range(self.size)
        ]
        longest = max(message.length for message in messages)
        mine = [tensor for tensor, owner in zip(tensors, owners) if owner == self.index]
        sent = messages[self.index].pack(mine, longest, self._device)
        everything = torch.empty(self.size * longest, dtype=torch.uint8, device=self._device)
        with self._in_step():
            dist.all_gather_single(everything, sent, group=self.group)
        self.bytes_sent += (self.size - 1) * longest
        received = [iter(message.unpack(part)) for message, part in zip(messages, everything.view(self.size, -1))]
        return [
            tensor if owner == self.index else next(received[owner]).to(tensor.device)
            for tensor, owner in zip(tensors, owners)
        ]

    def to_readers(
        self,
        tensors: Sequence[Tensor],
        owners: Sequence[int],
        dtypes: Sequence[torch.dtype],
        readers: Sequence[Collection[int]],
    ) -> list[Tensor]:
        """Send tensors to those who read them, from one process to another, without waiting until they do.

        Args:
            tensors: Of the same shapes everywhere.
            owners: Who has each.
            dtypes: The owner's dtype of each.
            readers: Who reads each.

        Returns:
            What the owner has, where it is read; elsewhere the tensors as they are.
        """
        result = list(tensors)
        receiving = []
        with self._in_step():
            for other in range(self.size):
                if other == self.index:
                    continue
                out = [i for i, owner in enumerate(owners) if owner == self.index and other in readers[i]]
                if out:
                    message = _Message([(tensors[i].shape, dtypes[i]) for i in out])
                    sent = message.pack([tensors[i] for i in out], message.length, self._device)
                    self._sending.append((_begun(dist.isend(sent, group=self.group, group_dst=other)), sent))
                    self.bytes_sent += message.length
                wanted = [i for i, owner in enumerate(owners) if owner == other and self.index in readers[i]]
                if wanted:
                    message = _Message([(tensors[i].shape, dtypes[i]) for i in wanted])
                    buffer = torch.empty(message.length, dtype=torch.uint8, device=self._device)
                    work = _begun(dist.irecv(buffer, group=self.group, group_src=other))
                    receiving.append((work, wanted, message, buffer))
            for work, wanted, message, buffer in receiving:
                work.wait()
                for i, tensor in zip(wanted, message.unpack(buffer)):
                    result[i] = tensor.to(tensors[i].device)
        return result

    def await_readers(self) -> None:
        """Wait until everything that was sent to readers has left, so that this process could end."""
        with self._in_step():
            while self._sending:
                self._sending.pop(0)[0].wait()

    def agreed_dtypes(self, point: object, dtypes: Sequence[torch.dtype], owners: Sequence[int]) -> list[torch.dtype]:
        """The dtypes that owners have, which only they know under autocast. Asked for once for each `point`.

        Raises:
            RuntimeError: If processes ask that are at different points.
        """
        if self.size == 1:
            return list(dtypes)
        if point not in self._dtypes:
            points, everybodys = zip(*self.everybodys((point, list(dtypes))))
            astray = [rank for rank, other in zip(self.ranks, points) if other != points[0]]
            if astray:
                raise RuntimeError(
                    f"The processes of one stitched model were called in different ways: process "
                    f"{', '.join(map(str, astray))} is elsewhere in its forward than process {self.ranks[0]}. All "
                    "processes of the expert axis must make the same calls, with the same adapter and experts active, "
                    "and with gradients and `trace_gates` on or off in all of them (docs/distributed.md)."
                )
            self._dtypes[point] = [everybodys[owner][i] for i, owner in enumerate(owners)]
        return self._dtypes[point]

    def everybodys(self, value: T) -> list[T]:
        """Return what every process has for `value` (small, picklable), in order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._in_step():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def first_ones(self, tensor: Tensor) -> Tensor:
        """What the first process has for a tensor, of the same shape and dtype everywhere. Without gradients."""
        if self.size == 1:
            return tensor
        sent = tensor.detach().to(self._device, copy=True).contiguous()
        with self._in_step():
            dist.broadcast(sent, self.ranks[0], group=self.group)
        if self.index == 0:
            self.bytes_sent += (self.size - 1) * sent.nbytes
        return sent.to(tensor.device)

    def together(self, work: Callable[[], T]) -> T:
        """Do something that may fail in some processes; then it fails in all of them, with the same words.

        Raises:
            ValueError: If `work` has raised an exception somewhere.
        """
        result: Optional[T] = None
        error: Optional[Exception] = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        said = self.everybodys(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        failed = [(rank, text) for rank, text in zip(self.ranks, said) if text is not None]
        if failed:
            raise ValueError(f"Process {failed[0][0]} has failed: {failed[0][1]}")
        return result  # type: ignore[return-value]  # there was no error

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Around a collective: if it fails, say which process is to blame.

        Raises:
            RuntimeError: If it fails.
        """
        try:
            yield
        except RuntimeError as error:
            silent = silent_processes(self.ranks, _PATIENCE)
            who = (
                f"process {', '.join(map(str, silent))} does not answer any more"
                if silent
                else "all of them are there still; they may have made different calls, or waited for too long"
            )
            raise RuntimeError(
                f"The processes {self.ranks} of one stitched model cannot go on together: {who}. This is process "
                f"{dist.get_rank()}; see the output of the others for the first error. ({error})"
            ) from error


def _begun(work: Optional[dist.Work]) -> dist.Work:
    assert work is not None  # as it would be outside of the group
    return work


class _Message:
    """Some tensors as bytes, one behind the other.

    Args:
        kinds: The shape and dtype of each.

    Attributes:
        length: How many bytes they take together.
    """

    def __init__(self, kinds: Sequence[tuple[torch.Size, torch.dtype]]) -> None:
        self._places, self.length = [], 0
        for shape, dtype in kinds:
            size = shape.numel() * dtype.itemsize
            self._places.append((shape, dtype, slice(self.length, self.length + size)))
            self.length += -(-size // _ALIGN) * _ALIGN

    def pack(self, tensors: Sequence[Tensor], length: int, device: torch.device) -> Tensor:
        """The tensors' bytes, in a buffer of some length on a device."""
        packed = torch.empty(length, dtype=torch.uint8, device=device)
        for tensor, (_, _, place) in zip(tensors, self._places):
            packed[place] = tensor.contiguous().view(-1).view(torch.uint8)
        return packed

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The tensors again, views of a buffer."""
        return [packed[place].view(dtype).view(shape) for shape, dtype, place in self._places]

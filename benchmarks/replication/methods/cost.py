"""What a method costs: parameters, and time, memory and FLOPs as ratios to the dense seed's.

Times are taken in turns with the dense seed's, so that a busy machine slows both alike; ratios of medians are given.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ...measuring import Runner, take_turns
from ..branching.training import autocast
from .parameters import Method, count_parameters, modules_of


TURNS = 5


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside of the `with` occupy at one time, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known and storage not in self._seen:  # neither a view nor in place
                    self._seen.add(storage)
                    size = storage.nbytes()
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, size)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def held_bytes(method: Method, optimizer: Any = None) -> int:
    """Weights and the optimizer's moments."""
    tensors = {t for module in modules_of(method) for t in (*module.parameters(), *module.buffers())}
    total = sum(t.numel() * t.element_size() for t in tensors)
    if optimizer is not None:
        total += sum(
            t.numel() * t.element_size() for t in tree_leaves(list(optimizer.state.values())) if torch.is_tensor(t)
        )
    return total


class Subject:
    """A method with two things to do: a step of training (if it is trained by gradients), and a forward."""

    def __init__(self, method: Method, tokens: torch.Tensor) -> None:
        self.method = method
        module = modules_of(method)[0]
        self.tokens = tokens.to(next(module.parameters()).device)
        self.weights = []
        if isinstance(method, torch.nn.Module):
            self.weights = [p for p in method.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(self.weights, lr=0.0) if self.weights else None

    def step(self) -> float:
        """Returns the seconds that it took, as `forward` does."""
        start = timer()
        self.method.train()
        with autocast(self.tokens.device):
            loss = self.method(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return timer() - start

    @torch.no_grad()
    def forward(self) -> float:
        start = timer()
        if isinstance(self.method, torch.nn.Module):
            self.method.eval()
            with autocast(self.tokens.device):
                self.method(input_ids=self.tokens, use_cache=False)
        else:
            self.method(self.tokens, torch.full((len(self.tokens),), self.tokens.shape[1] // 4))
        return timer() - start

    def flops(self, work: Runner) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()


def in_turns(method: Runner, dense: Runner) -> dict[str, float]:
    """Median seconds of both."""
    return take_turns({"method": method}, {"dense": dense}, budget=math.inf, rounds=(TURNS, TURNS))["seconds"]


def measure_costs(builders: dict[str, Callable[[], Method]], batch: int, length: int, vocabulary: int) -> dict:
    """Costs by method name.

    Args:
        builders: Methods by name; "seed" is trained here as a whole, for the ratios.
        batch, length, vocabulary: Of the random tokens in a step.
    """
    tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    seed = builders["seed"]()
    seed.requires_grad_(True)
    dense = Subject(seed, tokens)
    dense_costs = absolute(dense)
    costs = {}
    for name, build in tqdm(builders.items(), desc="costs", leave=False):
        subject = Subject(build(), tokens)
        mine = absolute(subject)
        row = {"parameters": count_parameters(subject.method)}
        row |= {key: mine[key] / dense_costs[key] for key in mine}
        seconds = in_turns(subject.forward, dense.forward)
        row["tokens_per_second"] = seconds["dense"] / seconds["method"]
        if name == "seed":
            seed_row = {**dense_costs, "tokens_per_second": tokens.numel() / seconds["dense"]}
        if subject.weights:
            seconds = in_turns(subject.step, dense.step)
            row["seconds_per_step"] = seconds["method"] / seconds["dense"]
        costs[name] = row
    return {"ratios": costs, "seed": seed_row}


def absolute(subject: Subject) -> dict[str, float]:
    """FLOPs per token and bytes: of a forward, and of a training step where there is one."""
    result = {"forward_flops": subject.flops(subject.forward) / subject.tokens.numel()}
    with PeakMemory() as memory:
        subject.forward()
    result["forward_bytes"] = memory.peak + held_bytes(subject.method)
    if subject.weights:
        subject.step()  # makes the moments
        result["step_flops"] = subject.flops(subject.step) / subject.tokens.numel()
        with PeakMemory() as memory:
            subject.step()
        result["step_bytes"] = memory.peak + held_bytes(subject.method, subject.optimizer)
    return result

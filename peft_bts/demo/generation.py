"""Tokens as they are generated, each with the gates that it was chosen by.

`generate()` runs in a thread of its own. transformers' streamer hands over its tokens, and an observer of the model's
forwards their gates: a token is chosen by what the stitches made of the position before it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Optional, Union

import torch
from peft import PeftModel
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..config import HUB_INTO_EXPERTS, OUTPUT_MIXTURE
from ..forward.observers import Observation
from ..gates.sequences import TracedStitch
from ..gates.trace import observed_by
from ..model import stitch_tuner
from ..stitch import HUB


# By place among the model's stitches: by model, of those that took part.
Gates = dict[int, dict[str, float]]


@dataclass(frozen=True)
class Choice:
    """How to generate.

    Attributes:
        experts: Who takes part; nobody: the hub alone, as with `stitched=False`.
        stitched: Whether the stitches take part.
        max_active_experts: At most so many experts per token; `None` for all that take part.
        max_new_tokens: Where to stop.
        temperature: Zero takes the likeliest token.
    """

    experts: Sequence[str] = ()
    stitched: bool = True
    max_active_experts: Optional[int] = None
    max_new_tokens: int = 128
    temperature: float = 0.0

    @property
    def hub_alone(self) -> bool:
        """Whether there are no gates."""
        return not self.stitched or not self.experts


@dataclass
class Answer:
    """What was generated so far.

    Attributes:
        prompt_ids: What it continues.
        token_ids: The new tokens.
        gates: Those that each token was chosen by; of the hub alone, none.
        seconds: From the first new token to the last.
    """

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    gates: list[Gates] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> Optional[float]:
        """Of decoding, without reading the prompt; `None` if there is no second token."""
        return (len(self.token_ids) - 1) / self.seconds if self.seconds > 0 else None


def stitches_of(model: PeftModel) -> list[TracedStitch]:
    """The stitches of the active adapter in their order, with output gates last."""
    tuner = stitch_tuner(model)
    composition = tuner._expert_sets[tuner._single_active_adapter()].composition
    experts = tuple(sorted(tuner.experts[model.active_adapter]))
    places: list[tuple[int, str]] = [*composition.schedule.items()]
    places += [(composition.hub_layers, OUTPUT_MIXTURE)] if composition.mixture else []
    return [
        TracedStitch(layer, kind, experts if kind == HUB_INTO_EXPERTS else (HUB, *experts)) for layer, kind in places
    ]


def stream(model: PeftModel, prompt_ids: list[int], choice: Choice, **generation: Any) -> Iterator[Answer]:
    """Generate, and yield the answer whenever it has grown; it is the same object, and grows on.

    An iterator that is closed stops the generation.

    Args:
        model: A model with a stitch adapter.
        prompt_ids: The tokens to continue, at least one.
        choice: How.
        **generation: Further arguments of `generate`, such as `eos_token_id`.

    Raises:
        ValueError: If there is no prompt, or for what `generate` refuses.
    """
    if not prompt_ids:
        raise ValueError("There is nothing to continue: the prompt has no tokens.")
    answer, running = Answer(prompt_ids), _Running(stitches_of(model))
    worker = threading.Thread(target=running.generate, args=(model, prompt_ids, choice, generation), daemon=True)
    worker.start()
    start: Optional[float] = None
    try:
        while (event := running.events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            start = event.time if start is None else start
            answer.token_ids.append(event.token_id)
            answer.gates.append(event.gates)
            answer.seconds = event.time - start
            yield answer
    finally:
        running.stopped.set()
        if threading.current_thread() is not worker:  # which may be where the garbage collector finds an iterator
            worker.join()


_ONE_AT_A_TIME = threading.Lock()  # who takes part is a setting of the model


@dataclass(frozen=True)
class _NewToken:
    token_id: int
    gates: Gates
    time: float


class _Running(BaseStreamer, StoppingCriteria):
    """One `generate()` call: its streamer, its stopping criterion, and the observer of its forwards.

    Attributes:
        events: New tokens, or an error; `None` at the end.
        stopped: Set by who wants no more tokens.
    """

    def __init__(self, stitches: list[TracedStitch]) -> None:
        self.events: SimpleQueue[Union[_NewToken, BaseException, None]] = SimpleQueue()
        self.stopped = threading.Event()
        self._places = {(stitch.layer, stitch.kind): place for place, stitch in enumerate(stitches)}
        self._gates: Gates = {}
        self._prompt_is_next = True
        self._thread: Optional[int] = None

    def generate(self, model: PeftModel, prompt_ids: list[int], choice: Choice, generation: dict[str, Any]) -> None:
        """Run to the end, or to an error, which becomes an event."""
        self._thread = threading.get_ident()
        sampling = {"do_sample": True, "temperature": choice.temperature, "top_k": 0, "top_p": 1.0}
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        options = sampling if choice.temperature > 0 else options
        try:
            with ExitStack() as stack, torch.no_grad():
                stack.enter_context(_ONE_AT_A_TIME)
                if choice.hub_alone:
                    stack.enter_context(model.disable_adapter())
                else:
                    stack.enter_context(stitch_tuner(model).set_active_experts(choice.experts))
                    stack.enter_context(observed_by(self, model))
                    if choice.max_active_experts is not None and choice.max_active_experts < len(choice.experts):
                        options["max_active_experts"] = choice.max_active_experts
                ids = torch.tensor([prompt_ids], device=model.device)
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=choice.max_new_tokens,
                    num_beams=1,
                    streamer=self,
                    stopping_criteria=StoppingCriteriaList([self]),
                    **options,
                    **generation,
                )
        except BaseException as error:  # whoever reads the events raises it
            self.events.put(error)
        self.events.put(None)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Whether to stop, for each sequence."""
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)

    def put(self, value: Tensor) -> None:
        """Take in tokens: first those of the prompt, then the new ones."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token in value.flatten().tolist():
            self.events.put(_NewToken(token, self._gates, time.perf_counter()))

    def end(self) -> None:
        """Nothing: `generate` tells the end."""

    def record(self, observation: Observation) -> None:
        """Keep the gates at the last position of a forward."""
        if threading.get_ident() != self._thread:
            return
        kinds = {observation.composition.hub_layers: OUTPUT_MIXTURE, **observation.composition.schedule}
        self._gates = {
            self._places[layer, kinds[layer]]: {name: gate[0, -1].item() for name, gate in by_model.items()}
            for layer, by_model in observation.gates.items()
        }

    def generating(self, prompt: int, ends: list[int]) -> AbstractContextManager[None]:
        """Nothing to do around the call."""
        return nullcontext()

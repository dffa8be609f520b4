"""What `assess` has found: losses, gains, and the advice that follows from them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Optional

from ..formatting import as_text, table
from ..stitch import HUB


_COUNTS = 0.01  # nats per token from which a gain counts


@dataclass(frozen=True)
class Gain:
    """The amount by which the output gates' loss is lower, in nats per token.

    Attributes:
        mean: On the tested documents.
        low, high: The 95% interval of a bootstrap over these documents.
    """

    mean: float
    low: float
    high: float

    @property
    def counts(self) -> bool:
        """Whether it is at least 0.01, with an interval above 0."""
        return self.mean >= _COUNTS and self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Losses:
    """Losses in nats per token, of one domain or as means over domains, all on the same tested documents.

    Attributes:
        models: The hub's (`"hub"`) and the experts', each alone.
        weight_average: That of one model with the mean of all models' weights, hub and experts alike; `None` if there
            is none.
        best_model: The model with the lowest loss on the documents that the gates were fitted on.
        best_per_document, best_per_token: Those of oracles that pick, among the single models, the best one for each
            document or token after the fact.
        output_gates: That of the mixture of all models' distributions by fitted gates.
        gain: Of the gates over `best_model`.
        gain_over_documents: Of the gates over `best_per_document`.
    """

    models: dict[str, float]
    weight_average: Optional[float]
    best_model: str
    best_per_document: float
    best_per_token: float
    output_gates: float
    gain: Gain
    gain_over_documents: Gain

    def columns(self) -> dict[str, Optional[float]]:
        """All losses under the names that people read."""
        experts = {f"{name} expert": loss for name, loss in self.models.items() if name != HUB}
        return {
            HUB: self.models[HUB],
            **experts,
            "average of weights": self.weight_average,
            "best per document (oracle)": self.best_per_document,
            "best per token (oracle)": self.best_per_token,
            "output gates": self.output_gates,
        }


@dataclass(frozen=True)
class DomainSize:
    """The amount of text that was read of a domain.

    Attributes:
        documents, tested: How many documents there are, and how many of them everything was tested on.
        predicted_tokens: How many tokens of those were predicted.
        bytes_per_token: Bytes of UTF-8 by tokens, special ones counted, of all documents; `None` if these were given
            as token ids.
    """

    documents: int
    tested: int
    predicted_tokens: int
    bytes_per_token: Optional[float]

    def bits_per_byte(self, loss: float) -> Optional[float]:
        """A loss in nats per token as bits per byte of text."""
        return None if self.bytes_per_token is None else loss / math.log(2) / self.bytes_per_token


@dataclass(frozen=True)
class Assessment:
    """The result of `assess`. `str(assessment)` is for people, `to_dict()` for programs.

    Attributes:
        domains: Losses by domain.
        mean: Their means over domains.
        data: How much was read of each domain.
        fit_seconds: How long fitting the gates took, besides the passes over the data.
        no_average: Why there is no average of weights; `None` if there is one.
        sequence_length: Tokens per row.
    """

    domains: dict[str, Losses]
    mean: Losses
    data: dict[str, DomainSize]
    fit_seconds: float
    no_average: Optional[str]
    sequence_length: int

    @property
    def verdict(self) -> Literal["nothing", "gates", "stitches"]:
        """What is worth training, by the rules in `assess`."""
        if not self.mean.gain.counts:
            return "nothing"
        return "stitches" if self.mean.gain_over_documents.counts else "gates"

    @property
    def advice(self) -> str:
        """The verdict in a few sentences, with the numbers it rests on."""
        mean = self.mean
        single = "the hub" if mean.best_model == HUB else f"expert {mean.best_model!r}"
        gain = f"{mean.gain} nats per token over {single}, the best single model"
        if self.verdict == "nothing":
            text = f"Nothing to gain: output gates gain {gain}."
            missed = mean.models[mean.best_model] - mean.best_per_document
            if missed >= _COUNTS:
                text += (
                    f" Picking the best model of each document would gain up to {missed:.3f}, which gates have not "
                    "learned from these documents; try again with more of them."
                )
            return text
        if self.verdict == "gates":
            return (
                f"Gates alone suffice: they gain {gain}, and {mean.gain_over_documents} over the best model of each "
                'document. Use StitchConfig(output="mixture", num_stitches=0).'
            )
        return (
            f"Stitches are worth training: output gates gain {gain}, and {mean.gain_over_documents} even over the "
            "best model of each document, so the models complete one another inside documents. Compare them with "
            'gates alone, StitchConfig(output="mixture", num_stitches=0).'
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, with losses in bits per byte, verdict and advice, ready for JSON."""
        bits = {
            name: {column: self.data[name].bits_per_byte(loss) for column, loss in _known(losses).items()}
            for name, losses in self.domains.items()
        }
        return {
            **dataclasses.asdict(self),
            "bits_per_byte": bits,
            "verdict": self.verdict,
            "advice": self.advice,
        }

    def tables(self) -> list[Any]:
        """Return what rich prints: losses by domain, gains, how much was read, and the advice."""
        domains = list(self.domains)
        losses = {name: one.columns() for name, one in self.domains.items()}
        rows = []
        for column, mean in self.mean.columns().items():
            cells = []
            for name in domains:
                loss = losses[name][column]
                cells += [_number(loss), _number(None if loss is None else self.data[name].bits_per_byte(loss))]
            rows.append((column, *cells, _number(mean)))
        gains = [
            (name, one.best_model, str(one.gain), str(one.gain_over_documents))
            for name, one in {**self.domains, "mean": self.mean}.items()
        ]
        sizes = [(name, size.documents, size.tested, size.predicted_tokens) for name, size in self.data.items()]
        headers = [header for name in domains for header in (name, "bits/byte")]
        notes = (
            f"Losses: nats per token on every other document, the gates fitted on the rest in {self.fit_seconds:.1f} "
            f"s. Documents are cut into rows of {self.sequence_length} tokens. Gains have 95% intervals over "
            "documents."
        )
        if self.no_average is not None:
            notes += f" No average of weights: {self.no_average}."
        return [
            table("Loss per token", ["", *headers, "mean"], rows),
            table(
                "What output gates gain", ["domain", "best model", "over that model", "over the best per document"],
                gains, left=2,
            ),
            table("Data", ["domain", "documents", "tested", "predicted tokens"], sizes),
            notes,
            self.advice,
        ]  # fmt: skip

    def __str__(self) -> str:
        return as_text(*self.tables())


def _known(losses: Losses) -> dict[str, float]:
    return {column: loss for column, loss in losses.columns().items() if loss is not None}


def _number(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.3f}"

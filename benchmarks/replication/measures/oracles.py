"""What could be had from several models' stored losses, without running them again: mixtures, choices, oracles.

All take losses in nats (M, total), one row per model, and return those of the combination, (total,).
"""

import numpy as np

from ..tokens.sequences import Sequences


def best_per_token(nats: np.ndarray) -> np.ndarray:
    """Each token from the model that is best at it: what no choice among the models can beat."""
    return nats.min(0)


def best_per_document(nats: np.ndarray, sequences: Sequences) -> np.ndarray:
    """Each sequence from the one model that is best at all of it: the oracle of routing by sequence."""
    return chosen(nats, sequences, sequences.sums(nats).argmin(0))


def chosen(nats: np.ndarray, sequences: Sequences, models: np.ndarray) -> np.ndarray:
    """Each sequence from the model of that number, models (N,)."""
    return np.take_along_axis(nats, np.repeat(models, np.diff(sequences.starts))[None], axis=0)[0]


def likeliest_by_prompt(nats: np.ndarray, sequences: Sequences) -> np.ndarray:
    """The model (N,) under which each sequence's prompt is likeliest; the first one where there is no prompt."""
    models = []
    for losses, prompt in zip(sequences.of(nats), sequences.prompt):
        models.append(losses[:, :prompt].sum(1, dtype=np.float64).argmin())
    return np.array(models)


def btm(nats: np.ndarray, sequences: Sequences) -> np.ndarray:
    """Branch-Train-Merge: the models' distributions, each weighted by the posterior over models given the prefix.

    The prior is uniform, and the prefix all tokens before, those that are given too.
    """
    mixed = np.zeros(nats.shape[1], np.float32)
    for start, end in zip(sequences.starts[:-1], sequences.starts[1:]):
        log_p = -nats[:, start:end].astype(np.float64)
        evidence = np.cumsum(log_p, axis=1) - log_p  # of the tokens before
        posterior = evidence - np.logaddexp.reduce(evidence, axis=0)
        mixed[start:end] = -np.logaddexp.reduce(posterior + log_p, axis=0)
    return mixed

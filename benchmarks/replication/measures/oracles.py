"""The best that choices among models could do, from their kept losses, without running them again.

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

"""BTM with any factor of forgetting, from the kept losses of the models, without running them again."""

import numpy as np

from ..tokens.sequences import Sequences


FACTORS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)


def btm_losses(nats: np.ndarray, sequences: Sequences, forgetting: float) -> np.ndarray:
    """What the models (M, total) lose together, in nats (total,): each is weighted by how well it predicted what came
    before in the sequence, and its evidence shrinks by `forgetting` with every token (`methods/ensembles.posterior`).
    """
    lengths = np.diff(sequences.starts)
    inside = np.arange(lengths.max()) < lengths[:, None]  # (N, longest)
    told = np.zeros((len(nats), *inside.shape))
    told[:, inside] = -nats
    found, evidence = np.zeros(inside.shape), np.zeros((len(nats), len(lengths), 1))
    for place in range(inside.shape[1]):
        log_p = told[:, :, place, None]
        weights = evidence - np.logaddexp.reduce(evidence, axis=0)
        found[:, place] = -np.logaddexp.reduce(weights + log_p, axis=0)[:, 0]
        evidence = forgetting * evidence + log_p
    return found[inside]

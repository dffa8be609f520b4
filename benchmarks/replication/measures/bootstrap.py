"""How sure a figure is: intervals by drawing again the sets of models, and the documents or items.

A figure is a ratio of sums, averaged over domains: bits over bytes for text, scores over items for tasks. Everything
is paired: two methods are compared within each set and on the same documents.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Interval:
    """A figure with the middle 95% of what it was in the draws."""

    value: float
    low: float
    high: float


def interval(
    amounts: dict[str, np.ndarray], sizes: dict[str, np.ndarray], draws: int = 2000, seed: int = 0
) -> Interval:
    """The average over domains of (amounts of all sets and documents) / (sizes of the documents, for every set).

    Sets and documents are drawn independently of each other: documents are the same in all sets. Sets are the same in
    all domains.

    Args:
        amounts: By domain, (sets, documents): bits, right answers, or differences of them between two methods.
        sizes: By domain, (documents,): bytes, or ones for items.

    Raises:
        ValueError: If domains, sets or documents do not match.
    """
    if amounts.keys() != sizes.keys() or not amounts:
        raise ValueError(f"amounts are of the domains {[*amounts]}, sizes of {[*sizes]}; they must be the same")
    counts = {domain: array.shape for domain, array in amounts.items()}
    if len({shape[0] for shape in counts.values()}) > 1:
        raise ValueError(f"all domains need the same sets, found (sets, documents) {counts}")
    for domain, (_, documents) in counts.items():
        if sizes[domain].shape != (documents,):
            raise ValueError(f"{domain} has amounts of {documents} documents, but sizes {sizes[domain].shape}")

    rng = np.random.default_rng(seed)
    sets = next(iter(counts.values()))[0]
    of_sets = rng.multinomial(sets, np.full(sets, 1 / sets), size=draws) / sets  # (draws, sets)
    figures, value = np.zeros(draws), 0.0
    for domain, array in amounts.items():
        documents = array.shape[1]
        of_documents = rng.multinomial(documents, np.full(documents, 1 / documents), size=draws)
        figures += ((of_sets @ array) * of_documents).sum(1) / (of_documents @ sizes[domain]) / len(amounts)
        value += array.mean(0).sum() / sizes[domain].sum() / len(amounts)
    return Interval(float(value), *(float(bound) for bound in np.percentile(figures, [2.5, 97.5])))


def paired(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], sizes: dict[str, np.ndarray], **options
) -> Interval:
    """The interval of ours less theirs; negative figures favour ours where amounts are bits."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"the methods were measured on different domains, {[*ours]} and {[*theirs]}")
    return interval({domain: ours[domain] - theirs[domain] for domain in ours}, sizes, **options)

"""What is done about torch's insides (2.13.0)."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch.distributed as dist


def silent_processes(ranks: Sequence[int], patience: datetime.timedelta) -> list[int]:
    """After a collective has failed: the ranks of those that do not say within `patience` that they have noticed.

    Errors of collectives name addresses, not ranks. Every process that calls this leaves a note in the store by which
    the processes have found each other.

    It could be removed if the errors named the ranks, or if the store of the world were public.
    """
    store = dist.distributed_c10d._get_default_store()
    silent = []
    try:
        store.set(f"peft_bts/noticed/{dist.get_rank()}", "1")
    except RuntimeError:
        return [0]  # it keeps the store
    for rank in ranks:
        try:
            store.wait([f"peft_bts/noticed/{rank}"], patience)
        except RuntimeError:  # of which DistStoreError is a kind
            silent.append(rank)
    return silent

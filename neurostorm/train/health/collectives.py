"""Small collectives of the loop: sums and means over all ranks, in float64; every rank's word; when to give up."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def sum_over_ranks(values: Sequence[float] | torch.Tensor, device: torch.device) -> list[float]:
    """Each value summed over all ranks; a collective call."""
    total = torch.as_tensor(values, dtype=torch.float64).to(device, copy=True)
    dist.all_reduce(total)
    summed: list[float] = total.tolist()
    return summed


def mean_over_ranks(values: torch.Tensor) -> list[float]:
    """Each value averaged over all ranks; a collective call."""
    return [value / dist.get_world_size() for value in sum_over_ranks(values, values.device)]


def gather(value: Any) -> list[Any]:
    """Every rank's value, in order, once all ranks have called it; values are small and picklable."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def set_collective_timeout(timeout_s: float) -> None:
    """From now on a collective that takes longer, in any process group, is an error on the ranks that wait in it."""
    for group in list(distributed_c10d._world.pg_map):  # DeepSpeed has groups of its own
        if not distributed_c10d._rank_not_in_group(group):
            distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)

"""Small collectives of the loop: sums and means over all ranks, in float64."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def sum_over_ranks(values: Sequence[float] | torch.Tensor, device: torch.device) -> list[float]:
    """Each value summed over all ranks; a collective call."""
    total = torch.as_tensor(values, dtype=torch.float64).to(device, copy=True)
    dist.all_reduce(total)
    summed: list[float] = total.tolist()
    return summed


def mean_over_ranks(values: torch.Tensor) -> list[float]:
    """Each value averaged over all ranks; a collective call."""
    return [value / dist.get_world_size() for value in sum_over_ranks(values, values.device)]

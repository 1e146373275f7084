"""Which tokens of a window are neighbours for redundancy dropout: in their frame, and in time.

cells (W, N, 4) of the windows' slots --on the host--> distinct patterns of them --> neighbours of each pattern
                                      '--on the device, where windows are taken to differ all--> of each window
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NOWHERE = 32000  # coordinate of an absent slot: no neighbour of anything


class Neighbours(NamedTuple):
    """STRD neighbourhoods of the tokens of a bucket's windows, one entry per distinct window pattern (K patterns)."""

    space: Tensor  # bool (K, N, N): j is another token of i's frame, at most space // 2 patches away per axis
    time: Tensor  # bool (K, N, N): j is the same patch in another frame, at most time // 2 frames away
    pattern: Tensor  # long (W,): which of the K patterns a window has


def neighbours_in(cells: np.ndarray | Tensor, space: int, time: int, device: torch.device) -> Neighbours:
    """Neighbourhoods in windows of slots at ``cells``, int16 (W, N, 4), each (d, h, w, frame), on ``device``."""
    if isinstance(cells, Tensor):
        return _of_each(cells, space, time)
    return _of_patterns(cells, space, time, device)


def _of_patterns(cells: np.ndarray, space: int, time: int, device: torch.device) -> Neighbours:
    relative = cells - cells.min(1, keepdims=True)
    patterns, pattern = np.unique(relative.reshape(len(cells), -1), axis=0, return_inverse=True)
    patterns = patterns.reshape(len(patterns), -1, 4).astype(np.int64)
    absent = patterns.max(-1) >= NOWHERE // 2
    patterns[absent] = 0
    extent = patterns.max((0, 1)) + 1
    place = np.ravel_multi_index(tuple(np.moveaxis(patterns, -1, 0)), tuple(extent))
    place[absent] = extent.prod()
    near = np.pad(_near(extent, space, time), ((0, 0), (0, 1), (0, 1)))  # an absent slot is near nothing
    # One by one: uneven token sets have a pattern for every window.
    same_frame, same_patch = np.stack([near[:, slots][:, :, slots] for slots in place], 1)
    return Neighbours(
        torch.from_numpy(same_frame).to(device),
        torch.from_numpy(same_patch).to(device),
        torch.from_numpy(pattern.reshape(-1)).to(device),
    )


def _of_each(cells: Tensor, space: int, time: int) -> Neighbours:
    """Each window a pattern of its own, without a look at the coordinates (W, N, 4) from the host."""
    far = torch.zeros((), dtype=cells.dtype, device=cells.device)
    for axis in cells[..., :3].unbind(-1):
        far = torch.maximum(far, (axis.unsqueeze(2) - axis.unsqueeze(1)).abs())
    late = (cells[..., None, 3] - cells[:, None, :, 3]).abs()
    return Neighbours(
        (late == 0) & (far > 0) & (far <= space // 2),
        (far == 0) & (late > 0) & (late <= time // 2),
        torch.arange(len(cells), device=cells.device),
    )


def _near(extent: np.ndarray, space: int, time: int) -> np.ndarray:
    """Bool (2, M, M): which of the M places of a box of this extent are neighbours in their frame, and in time."""
    places = np.indices(tuple(extent)).reshape(4, -1).T
    distance = np.abs(places[:, None] - places)  # (M, M, 4)
    far, late = distance[..., :3].max(-1), distance[..., 3]
    return np.stack([(late == 0) & (far > 0) & (far <= space // 2), (far == 0) & (late > 0) & (late <= time // 2)])

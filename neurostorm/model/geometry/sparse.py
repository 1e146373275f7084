"""The geometry of the tokens that masks leave visible, made where that costs least.

mask (B, P) -> visible tokens of each sample --on a CPU--> tables from coordinates     (geometry.py)
                                             '--on a GPU--> sums over the whole's, in room that the host counts
                                                            and that trial draws of such masks need (drawn.py)
"""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from neurostorm.model.config import SwinConfig
from neurostorm.model.geometry.static import Room, Whole, drawn_geometry
from neurostorm.model.geometry.tokens import Geometry, SubsetGeometry, numbers_of, subset_geometry

Draw = Callable[[int, int, torch.Generator, str], Tensor]  # samples, frames, generator, device -> mask (B, P)

_TRIAL_DRAWS = 16  # batches of masks that say how large the tables of visible tokens become


class VisibleTokens:
    """Makes geometries of visible tokens, and keeps what they have in common.

    Args:
        swin: shape of the encoder.

    Attributes:
        on_device: make the tables on the device of the tokens; None: wherever that is no CPU.
    """

    def __init__(self, swin: SwinConfig) -> None:
        self.on_device: bool | None = None
        self._swin = swin
        self._wholes: dict[tuple[int, torch.device], Whole] = {}
        self._usual: dict[tuple[int, int], tuple[int, Room]] = {}

    def geometry(self, mask: Tensor, whole: Geometry, draw: Draw) -> SubsetGeometry:
        """What ``mask``, bool (B, P) in the order of ``whole``, leaves visible; ``draw`` draws such masks."""
        level, numbers = whole.levels[0], numbers_of(~mask)
        if not (level.device.type != "cpu" if self.on_device is None else self.on_device):
            layout = self._swin.window_layout(level.device.type)
            return subset_geometry(level.grid, self._swin.windows, level.order[numbers], layout)
        frames = level.grid[3]
        tables = self._wholes.get((frames, level.device)) or Whole(whole, self._swin.windows)
        self._wholes[frames, level.device] = tables
        room = tables.count(numbers.cpu().numpy())
        usual_tokens, usual_room = self._usual_room(tables, len(mask), frames, draw)
        if numbers.shape[1] == usual_tokens:
            room = room.at_least(usual_room)
        return drawn_geometry(tables, numbers.to(level.device, non_blocking=True), room)

    def _usual_room(self, tables: Whole, samples: int, frames: int, draw: Draw) -> tuple[int, Room]:
        """Visible tokens of a sample, and room, that masks of ``draw`` need; the same in every process, and kept."""
        if (samples, frames) not in self._usual:
            generator = torch.Generator().manual_seed(0)
            draws = [numbers_of(~draw(samples, frames, generator, "cpu")) for _ in range(_TRIAL_DRAWS)]
            rooms = [tables.count(numbers.numpy()) for numbers in draws]
            self._usual[samples, frames] = draws[0].shape[1], reduce(Room.at_least, rooms).with_reserve()
        return self._usual[samples, frames]

"""Geometry of masked clips on the device that trains: shapes known beforehand, and nothing that waits for the device.

    host     visible tokens of each sample --count--> room for tokens per level, for windows per size
    device   the same tokens + tables of the whole set --cumulative sums, scatters--> levels, merges, window tables

``subset_geometry`` builds the tables of one batch from coordinates, by sorting on the CPU. That takes 20 to 30 ms a
clip and makes tensors whose shapes differ from draw to draw: a GPU would wait for the first, and could neither be
compiled for nor replay the second. But masked clips are drawn from one set of tokens, whose windows and parents are
known. Which of them exist, and which number each gets, are sums over those tables; how much room that takes follows
from counting, which the host does on the mask while the device is busy with something else.

Room is rounded up, and never below what trial draws needed and an eighth more, so that shapes are the same in nearly
every step. What is too much is *dead*: tokens of no sample, in no window and without children, and windows without a
key. Windows of different sizes share a bucket up to the next half of the largest. The result is that of
``subset_geometry``; only the order of tokens is another, that of the whole set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from neurostorm.model.geometry.tokens import Geometry, Level
from neurostorm.model.geometry.windows import Axes, Bucket, WindowTable, effective_window, take_rows

_SMALLEST_WINDOW = 16  # slots of the smallest bucket: below, another launch costs more than empty slots

Rows = tuple[int, ...]  # windows per bucket, largest windows first


@dataclass(frozen=True)
class Room:
    """Sizes of the tensors of a drawn geometry: with the samples' tokens, all that its shapes depend on.

    Attributes:
        tokens: over all samples, for each level above the finest.
        windows: for each level and table (unshifted, shifted), how many windows each bucket holds.
    """

    tokens: tuple[int, ...]
    windows: tuple[tuple[Rows, Rows], ...]

    def at_least(self, other: "Room") -> "Room":
        """Room for both."""

        def both(one: Rows, two: Rows) -> Rows:
            return tuple(map(max, one, two))

        pairs = zip(self.windows, other.windows, strict=True)
        windows = tuple((both(still[0], other[0]), both(still[1], other[1])) for still, other in pairs)
        return Room(both(self.tokens, other.tokens), windows)

    def with_reserve(self) -> "Room":
        """Room for an eighth more, and for one more at least."""

        def more(counts: Rows) -> Rows:
            return tuple(rounded_up(count + count // 8 + 1) for count in counts)

        return Room(more(self.tokens), tuple((more(still), more(shifted)) for still, shifted in self.windows))


class WholeTable:
    """One window table of a token set that samples share, as draws from it need it.

    Args:
        table: from ``windows.py``, every token in one window.

    Attributes:
        token: long (P,), tokens window by window, in the order of the window.
        window: long (P,), the window of each of these.
        first: long (W,), where each window begins among these.
        sizes: slots of a window, per bucket.
    """

    def __init__(self, table: WindowTable) -> None:
        device = table.buckets[0].index.device
        groups = [row[row < table.tokens] for bucket in table.buckets for row in bucket.index.cpu().numpy()]
        count = np.array([len(group) for group in groups])
        token, window = np.concatenate(groups), np.repeat(np.arange(len(groups)), count)
        self._window_of_token = np.empty_like(window)
        self._window_of_token[token] = window
        self.token, self.window, self.first = (
            torch.from_numpy(values).to(device) for values in (token, window, np.cumsum(count) - count)
        )
        sizes = [int(count.max())]
        while sizes[-1] > _SMALLEST_WINDOW:
            sizes.append(-(-sizes[-1] // 2))
        self.sizes = tuple(sizes)
        self.smaller = (*sizes[1:], 0)  # a window of a bucket has more slots than this

    def count(self, sample: np.ndarray, token: np.ndarray) -> Rows:
        """Windows per bucket, rounded up, that hold these tokens of these samples."""
        size = np.bincount(self._window_of_token[token] + sample * len(self.first))
        among = zip(self.sizes, self.smaller, strict=True)
        return tuple(rounded_up(int(((size > below) & (size <= most)).sum())) for most, below in among)


class Whole:
    """A token set that samples share, with what draws from it need: made once, kept by whoever draws.

    Args:
        geometry: from ``geometry_of``, without the released layout's padding and wrapping.
        windows: the window of each level.
    """

    def __init__(self, geometry: Geometry, windows: Sequence[Axes]) -> None:
        self.levels = geometry.levels
        self.tables = [
            [WholeTable(level.windows(window, shifted)) for shifted in (False, True)]
            for level, window in zip(geometry.levels, windows, strict=True)
        ]
        self.cells = [torch.from_numpy(level.coords.astype(np.int16)).to(level.device) for level in geometry.levels]
        self.children = [merge.buckets[0].index for merge in geometry.merges]  # long (parents, 8) of each merge
        self._parents = []
        for child, children in zip(geometry.levels, self.children, strict=False):
            parent = np.empty(len(child) + 1, int)
            parent[children.cpu().numpy()] = np.arange(len(children))[:, None]
            self._parents.append(parent[:-1])
        self.parents = [torch.from_numpy(parent).to(geometry.levels[0].device) for parent in self._parents]

    def count(self, numbers: np.ndarray) -> Room:
        """Room for samples with these tokens of the finest level: int (B, P'), packed numbers."""
        sample, token = np.repeat(np.arange(len(numbers)), numbers.shape[1]), numbers.ravel()
        tokens, windows = [], []
        for number, (still, shifted) in enumerate(self.tables):
            if number:
                there = np.zeros((len(numbers), len(self.levels[number])), bool)
                there[sample, self._parents[number - 1][token]] = True
                sample, token = there.nonzero()
                tokens.append(rounded_up(len(token)))
            windows.append((still.count(sample, token), shifted.count(sample, token)))
        return Room(tuple(tokens), tuple(windows))


def rounded_up(count: int) -> int:
    """``count`` rounded up by an eighth at most, so that few different values occur."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


class DrawnLevel:
    """One level's tokens of all samples, in a batch of size 1; a ``SubsetLevel``.

    Args:
        whole: the set that they are drawn from.
        number: of the level.
        place: long (K,), of each token its number ``sample * P + p`` in the whole set; B * P for a dead one.
        slot: long (B * P,), the token with each of these numbers; K for none.
        rows: windows per bucket of both tables.
        samples: B.
    """

    def __init__(
        self, whole: Whole, number: int, place: Tensor, slot: Tensor, rows: tuple[Rows, Rows], samples: int
    ) -> None:
        self.level, self.samples, self.place, self.slot = whole.levels[number], samples, place, slot
        self.grid, self.device = self.level.grid, self.level.device
        self._tables, self._rows, self._cells = whole.tables[number], rows, whole.cells[number]
        self._windows: dict[bool, WindowTable] = {}
        # A dead token goes by the coordinates of the last one: whatever it computes is for nobody.
        known = place.clamp(max=samples * len(self.level) - 1)
        self.sample, self.token = known // len(self.level), known % len(self.level)

    def __len__(self) -> int:
        return len(self.place)

    def numbers_in(self, whole: Level) -> Tensor:
        """As ``SubsetLevel`` says, of the set that these are drawn from; B * P for a dead token."""
        return self.place

    def places_in(self, whole: Level) -> Tensor:
        """As ``SubsetLevel`` says, of the set that these are drawn from."""
        return self.slot.view(self.samples, -1)

    def positions(self, space: Tensor, time: Tensor) -> Tensor:
        """As ``TokenLevel`` says."""
        of_space, of_time = self.level.space_of_token[self.token], self.level.time_of_token[self.token]
        return (take_rows(space, of_space) + take_rows(time, of_time))[None]

    def windows(self, window: Axes, shifted: bool) -> WindowTable:
        """As ``TokenLevel`` says, of the windows that ``Whole`` was made for."""
        moved = any(effective_window(self.grid, window, shifted)[1])
        if moved not in self._windows:
            self._windows[moved] = self._table(self._tables[moved], self._rows[moved])
        return self._windows[moved]

    def _table(self, whole: WholeTable, rows: Rows) -> WindowTable:
        tokens = len(self)
        slot = self.slot.view(self.samples, -1)[:, whole.token]  # (B, P), in the order of the windows
        there = slot < tokens
        until = there.cumsum(1)
        before = until - there.long()
        begin = before[:, whole.first]  # (B, W), tokens before each window
        size = torch.cat([begin[:, 1:], until[:, -1:]], 1) - begin
        total = sum(count * slots for count, slots in zip(rows, whole.sizes, strict=True))
        row, start = torch.full_like(size, total), 0
        for count, slots, below in zip(rows, whole.sizes, whole.smaller, strict=True):
            mine = (size > below) & (size <= slots)
            number = (mine.flatten().cumsum(0) - 1).view_as(size)
            row = torch.where(mine, start + number * slots, row)
            start += count * slots
        at = torch.where(there, (row - begin)[:, whole.window] + before, total)
        index = slot.new_full((total + 1,), tokens).scatter_(0, at.flatten(), slot.flatten())[:total]
        return WindowTable(
            tuple(self._buckets(index, rows, whole.sizes)), tokens, has_padding=True, has_absent=True, contiguous=False,
            sample=self.sample, samples=self.samples,
        )  # fmt: skip

    def _buckets(self, index: Tensor, rows: Rows, sizes: Sequence[int]) -> list[Bucket]:
        parts = index.split([count * size for count, size in zip(rows, sizes, strict=True)])
        views = [part.view(count, size) for part, count, size in zip(parts, rows, sizes, strict=True) if count]
        cells = torch.cat([self._cells[self.token], self._cells[-1:]])
        return [Bucket(view, cells[view], view < len(self), may_be_empty=True) for view in views]


class DrawnGeometry(NamedTuple):
    """The levels of a batch and the merges between them; a ``SubsetGeometry``."""

    levels: list[DrawnLevel]
    merges: list[WindowTable]


def drawn_geometry(whole: Whole, numbers: Tensor, room: Room) -> DrawnGeometry:
    """Geometry of some tokens of each sample.

    Args:
        whole: the set that they are drawn from.
        numbers: long (B, P') on its device, packed numbers in the finest level.
        room: at least ``whole.count`` of the same numbers: tokens for which there is no room are lost.
    """
    samples, finest = len(numbers), len(whole.levels[0])
    place = (numbers + torch.arange(samples, device=numbers.device)[:, None] * finest).flatten()
    slot = place.new_full((samples * finest,), len(place))
    slot.scatter_(0, place, torch.arange(len(place), device=place.device))
    levels = [DrawnLevel(whole, 0, place, slot, room.windows[0], samples)]
    merges = []
    for number, tokens in enumerate(room.tokens, 1):
        child = levels[-1]
        place, slot = _parents(child, whole.parents[number - 1], len(whole.levels[number]), tokens)
        levels.append(DrawnLevel(whole, number, place, slot, room.windows[number], samples))
        merges.append(_merge(child, levels[-1], whole.children[number - 1]))
    return DrawnGeometry(levels, merges)


def _parents(child: DrawnLevel, parent: Tensor, wide: int, room: int) -> tuple[Tensor, Tensor]:
    """``place`` and ``slot`` of the parents, of which the whole set has ``wide``: each that has a child is one."""
    total = child.samples * wide
    dead = child.place == len(child.slot)
    number = torch.where(dead, total, child.sample * wide + parent[child.token])
    there = torch.zeros(total + 1, dtype=torch.bool, device=number.device).scatter_(0, number, True)[:-1]
    slot = torch.where(there, there.cumsum(0) - 1, room)
    place = slot.new_full((room + 1,), total).scatter_(0, slot, torch.arange(total, device=slot.device))[:-1]
    return place, slot


def _merge(child: DrawnLevel, parent: DrawnLevel, children: Tensor) -> WindowTable:
    """The merge table of two drawn levels, from that of the whole set."""
    wide, nothing = len(child.level), len(child.slot)
    number = children[parent.token]  # (K, 8), of the whole set
    dead = (parent.place == len(parent.slot))[:, None]
    number = torch.where((number == wide) | dead, nothing, number + parent.sample[:, None] * wide)
    index = torch.cat([child.slot, child.slot.new_full((1,), len(child))])[number]
    return WindowTable((Bucket(index),), len(child), has_padding=True, has_absent=True, contiguous=False)

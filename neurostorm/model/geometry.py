"""Which tokens exist, in which order they lie, and which index tables move them.

A clip is a grid of patches x frames; each stage of the network sees a coarser grid. A *level* lists the tokens of one
stage as a packed sequence, so that every block works on ``(B, P, C)`` and never permutes axes:

    coordinates (P, 4) --order--> packed tokens --window table--> (windows, N, C) --mixer--> back by one inverse gather
         |
         +--halve d, h, w--> coordinates of the next level, and the merge table (parents, 8 children)

The packed order keeps the tokens of one unshifted window together, window after window, so even blocks are pure views;
shifted windows and merges are one gather each. Tables come from the coordinates alone (fewer tokens are the same code
with a shorter list), are built once per (grid, windows) and live on their device, outside the state dict.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

Axes = tuple[int, int, int, int]  # patches along d, h, w and frames


def effective_window(grid: Axes, window: Axes, shifted: bool) -> tuple[Axes, Axes]:
    """Window and shift actually used on a grid: an axis no longer than its window is one window and never shifts.

    Returns (window, shift), each four token counts; the shift of a shifted block is half a window, rounded down.
    """
    sizes = tuple(min(g, w) for g, w in zip(grid, window, strict=True))
    shift = tuple(w // 2 if shifted and g > w else 0 for g, w in zip(grid, window, strict=True))
    return sizes, shift  # type: ignore[return-value]


class Neighbours(NamedTuple):
    """STRD neighbourhoods of the tokens of a bucket's windows, one entry per distinct window pattern (K patterns)."""

    space: Tensor  # bool (K, N, N): j is another token of i's frame, at most space // 2 patches away per axis
    time: Tensor  # bool (K, N, N): j is the same patch in another frame, at most time // 2 frames away
    pattern: Tensor  # long (W,): which of the K patterns a window has


@dataclass(frozen=True, eq=False)
class Bucket:
    """Windows of one table that hold the same number of tokens.

    ``index`` is long (W, N) into the packed tokens, where the value P stands for a zero row (padding).
    ``cells`` is int16 (W, N, 4), the tokens' grid coordinates, padding included; only window tables have them.
    """

    index: Tensor
    cells: np.ndarray | None = None
    _neighbours: dict[tuple[int, int], Neighbours] = field(default_factory=dict, repr=False)

    def neighbours(self, space: int, time: int) -> Neighbours:
        """Neighbourhoods for extents of ``space`` patches and ``time`` frames (the window's own edge cuts them)."""
        key = (space, time)
        if key not in self._neighbours:
            if self.cells is None:
                raise ValueError("neighbours: this bucket is no window of grid cells (a merge or an order table)")
            self._neighbours[key] = _neighbours(self.cells, space, time, self.index.device)
        return self._neighbours[key]


@dataclass(frozen=True, eq=False)
class WindowTable:
    """Moves ``tokens`` packed tokens into groups and back; every token lies in exactly one group.

    ``inverse`` is long (P,): where a token lies in the concatenation of all buckets; a value equal to that
    concatenation's length marks a token that no group holds (it reads as zero on the way back).
    """

    buckets: tuple[Bucket, ...]
    inverse: Tensor
    tokens: int
    has_padding: bool  # some index entries are P
    has_absent: bool  # some tokens are in no group
    contiguous: bool  # one bucket in packed order: grouping is a view


def split_windows(x: Tensor, table: WindowTable) -> list[Tensor]:
    """Packed tokens (B, P, C) -> per bucket (B * W, N, C), batch slowest. Padding entries read as zeros."""
    if table.contiguous:
        windows, count = table.buckets[0].index.shape
        return [x.reshape(x.shape[0] * windows, count, x.shape[-1])]
    return list(_Split.apply(x, table))


def join_windows(groups: Sequence[Tensor], table: WindowTable) -> Tensor:
    """Inverse of :func:`split_windows`: per bucket (B * W, N, C) -> (B, P, C); padding entries are dropped."""
    if table.contiguous:
        windows, count = table.buckets[0].index.shape
        return groups[0].reshape(-1, windows * count, groups[0].shape[-1])
    return _Join.apply(table, *groups)


def _gather_groups(x: Tensor, table: WindowTable) -> tuple[Tensor, ...]:
    if table.has_padding:
        x = torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[-1])], 1)
    return tuple(
        x.index_select(1, bucket.index.view(-1)).view(-1, bucket.index.shape[1], x.shape[-1])
        for bucket in table.buckets
    )


def _gather_tokens(groups: Sequence[Tensor], table: WindowTable) -> Tensor:
    width = groups[0].shape[-1]
    batch = groups[0].shape[0] // table.buckets[0].index.shape[0]
    flat = [group.reshape(batch, -1, width) for group in groups]
    if table.has_absent:
        flat.append(flat[0].new_zeros(batch, 1, width))
    joined = torch.cat(flat, 1) if len(flat) > 1 else flat[0]
    return joined.index_select(1, table.inverse)


class _Split(torch.autograd.Function):
    """Grouping as a gather whose gradient is the inverse gather: autograd's own would scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: WindowTable) -> tuple[Tensor, ...]:
        ctx.table = table
        return _gather_groups(x, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather_tokens(grads, ctx.table), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: WindowTable, *groups: Tensor) -> Tensor:
        ctx.table = table
        return _gather_tokens(groups, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_gather_groups(grad, ctx.table)


class Blocks(NamedTuple):
    """A partition of a level's tokens into axis-aligned blocks, for masking."""

    block_of_token: Tensor  # long (P,): raster number of the token's block
    position_in_block: Tensor  # long (P,): raster position inside it, counted in the nominal block
    total: int  # blocks; those at the high edges are smaller when the block does not divide the grid


class Level:
    """The packed tokens of one stage.

    ``coords`` is int (P, 4); ``window`` the window whose unshifted partition fixes the order. Public tensors:
    ``order`` long (P,), the raster number ``s * T + t`` of each token, ``space_of_token`` (its ``s``, the raster number
    of the patch) and ``time_of_token`` (its ``t``).
    """

    def __init__(self, coords: np.ndarray, grid: Axes, window: Axes, device: torch.device) -> None:
        effective, _ = effective_window(grid, window, False)
        cells = coords[np.argsort(_window_major_key(coords, effective, (0, 0, 0, 0), grid))]
        order = np.ravel_multi_index(tuple(cells.T), grid)
        self.grid, self.coords, self.device = grid, cells, device
        self.order = torch.from_numpy(order).to(device)
        self.space_of_token = self.order // grid[3]
        self.time_of_token = self.order % grid[3]
        self._raster = _table([order[:, None]], int(np.prod(grid)), device)
        self._windows: dict[tuple[Axes, bool], WindowTable] = {}
        self._blocks: dict[Axes, Blocks] = {}

    def __len__(self) -> int:
        return len(self.coords)

    def windows(self, window: Axes, shifted: bool) -> WindowTable:
        """Table of the windows of a block; built at the first call, then kept."""
        effective, shift = effective_window(self.grid, window, shifted)
        key = (effective, any(shift))
        if key not in self._windows:
            self._windows[key] = window_table(self.coords, self.grid, effective, shift, self.device)
        return self._windows[key]

    def blocks(self, block: Axes) -> Blocks:
        """Partition into blocks of ``block`` tokens per axis; edge blocks are cut where the grid ends."""
        if block not in self._blocks:
            per_axis = tuple(-(-g // b) for g, b in zip(self.grid, block, strict=True))
            size = np.array(block)
            number = np.ravel_multi_index(tuple((self.coords // size).T), per_axis)
            inside = np.ravel_multi_index(tuple((self.coords % size).T), block)
            self._blocks[block] = Blocks(
                torch.from_numpy(number).to(self.device),
                torch.from_numpy(inside).to(self.device),
                int(np.prod(per_axis)),
            )
        return self._blocks[block]

    def from_raster(self, x: Tensor) -> Tensor:
        """(B, S * T, C) with t fastest -> packed (B, P, C)."""
        return split_windows(x, self._raster)[0].view(x.shape[0], len(self), x.shape[-1])

    def to_raster(self, x: Tensor) -> Tensor:
        """Packed (B, P, C) -> (B, S * T, C) with t fastest; cells without a token are zero."""
        return join_windows([x.reshape(-1, 1, x.shape[-1])], self._raster)

    def to_grid(self, x: Tensor) -> Tensor:
        """Packed (B, P, C) -> (B, C, d, h, w, T)."""
        d, h, w, _ = self.grid
        return rearrange(self.to_raster(x), "b (d h w t) c -> b c d h w t", d=d, h=h, w=w)


class Geometry:
    """Levels of a clip, finest first, and the merge tables between them.

    ``merges[i]`` groups the tokens of level i into the parents of level i + 1: one bucket (parents, 8), children in
    product order over (d, h, w) with w fastest; a child that does not exist is a zero row.
    """

    def __init__(self, coords: np.ndarray, grid: Axes, windows: Sequence[Axes], device: torch.device) -> None:
        self.levels = [Level(coords, grid, windows[0], device)]
        self.merges: list[WindowTable] = []
        for window in windows[1:]:
            child = self.levels[-1]
            grid = (grid[0] // 2, grid[1] // 2, grid[2] // 2, grid[3])
            parents = np.unique(child.coords // np.array([2, 2, 2, 1]), axis=0)
            parent = Level(parents, grid, window, device)
            self.merges.append(_merge_table(child, parent))
            self.levels.append(parent)

    @property
    def order(self) -> Tensor:
        """Long (P,): raster number ``s * T + t`` of each token of the finest level."""
        return self.levels[0].order

    @property
    def space_of_token(self) -> Tensor:
        """Long (P,): raster number of the patch that each token of the finest level shows."""
        return self.levels[0].space_of_token

    @property
    def time_of_token(self) -> Tensor:
        """Long (P,): frame of each token of the finest level."""
        return self.levels[0].time_of_token


@lru_cache(maxsize=32)
def dense_geometry(grid: Axes, windows: tuple[Axes, ...], device: torch.device) -> Geometry:
    """Geometry in which every patch of every frame is a token.

    Args:
        grid: patches along d, h, w and frames at the finest level; d, h, w divisible by 2 ** (levels - 1).
        windows: window per level, finest first.
        device: where the tables live.
    """
    return Geometry(raster_coords(grid), grid, windows, device)


def raster_coords(grid: Sequence[int]) -> np.ndarray:
    """All coordinates of a grid, int64 (cells, 4), t fastest."""
    return np.stack(np.unravel_index(np.arange(int(np.prod(grid))), tuple(grid)), -1)


def window_table(coords: np.ndarray, grid: Axes, window: Axes, shift: Axes, device: torch.device) -> WindowTable:
    """Windows of tokens at ``coords`` (P, 4), in that order; ``window`` and ``shift`` as from effective_window.

    A window holds the coordinates with equal ``(c - shift) // window`` per axis, so an axis is cut at shift,
    shift + window, ... and nothing wraps round. For attention this equals rolling the grid and masking the pairs that
    were not neighbours before the roll, without the mask and without the masked pairs.
    """
    cells, token = coords, np.arange(len(coords))
    padded = tuple(-(-g // w) * w for g, w in zip(grid, window, strict=True))
    if padded != grid:
        # Quirk of the released models: where the window does not divide the grid, zero tokens fill its high end
        # (after the norm) and are attended to like any other token.
        beyond = raster_coords(padded)
        beyond = beyond[(beyond >= np.array(grid)).any(1)]
        cells = np.concatenate([cells, beyond])
        token = np.concatenate([token, np.full(len(beyond), len(coords))])
    key = _window_major_key(cells, window, shift, padded)
    order = np.argsort(key)
    cells, token = cells[order], token[order]
    _, first, size = np.unique(key[order] // int(np.prod(padded)), return_index=True, return_counts=True)
    kept = np.add.reduceat(token < len(coords), first) > 0  # a window of padding alone feeds nobody
    first, size = first[kept], size[kept]
    groups = [first[size == count][:, None] + np.arange(count) for count in sorted(set(size.tolist()), reverse=True)]
    return _table([token[g] for g in groups], len(coords), device, [cells[g] for g in groups])


def patch_table(brain: Tensor, patch: Sequence[int]) -> Tensor:
    """Where the voxels of each patch lie among packed in-mask voxels.

    Args:
        brain: bool (X, Y, Z) mask whose true voxels, in C order, are the packed list of V voxels.
        patch: voxels per patch along X, Y, Z (further entries are ignored).

    Returns:
        Long (S, p^3): row s is the raster number of the patch, columns run over (px, py, pz) with pz fastest; the value
        V stands for a voxel outside the mask.
    """
    number = torch.cumsum(brain.reshape(-1).long(), 0) - 1
    number = torch.where(brain.reshape(-1), number, number[-1] + 1).view(brain.shape)
    return rearrange(number, "(x p) (y q) (z r) -> (x y z) (p q r)", p=patch[0], q=patch[1], r=patch[2]).contiguous()


def _window_major_key(cells: np.ndarray, window: Axes, shift: Axes, grid: tuple[int, ...]) -> np.ndarray:
    """Sort key (cells,): raster number of the window first, raster number in the grid second."""
    number = (cells - np.array(shift)) // np.array(window) + 1  # a shifted axis starts with a cut window, number -1
    windows = tuple(g // w + 2 for g, w in zip(grid, window, strict=True))
    major, minor = np.ravel_multi_index(tuple(number.T), windows), np.ravel_multi_index(tuple(cells.T), grid)
    return major * int(np.prod(grid)) + minor


def _merge_table(child: Level, parent: Level) -> WindowTable:
    slot_of_parent = np.full(int(np.prod(parent.grid)), len(parent))
    slot_of_parent[parent.order.cpu().numpy()] = np.arange(len(parent))
    halved = child.coords // np.array([2, 2, 2, 1])
    octant = (child.coords[:, :3] % 2) @ np.array([4, 2, 1])
    children = np.full((len(parent), 8), len(child))
    children[slot_of_parent[np.ravel_multi_index(tuple(halved.T), parent.grid)], octant] = np.arange(len(child))
    return _table([children], len(child), child.device)


def _table(
    groups: list[np.ndarray], tokens: int, device: torch.device, cells: list[np.ndarray] | None = None
) -> WindowTable:
    flat = np.concatenate([group.ravel() for group in groups])
    inverse = np.full(tokens + 1, len(flat))  # the last is where padding writes
    inverse[flat] = np.arange(len(flat))
    inverse = inverse[:tokens]
    indices = [torch.from_numpy(group).to(device) for group in groups]
    return WindowTable(
        tuple(map(Bucket, indices, [c.astype(np.int16) for c in cells] if cells else [None] * len(indices))),
        torch.from_numpy(inverse).to(device),
        tokens,
        has_padding=bool((flat == tokens).any()),
        has_absent=bool((inverse == len(flat)).any()),
        contiguous=len(groups) == 1 and np.array_equal(flat, np.arange(tokens)),
    )


def _neighbours(cells: np.ndarray, space: int, time: int, device: torch.device) -> Neighbours:
    relative = cells - cells.min(1, keepdims=True)
    patterns, pattern = np.unique(relative.reshape(len(cells), -1), axis=0, return_inverse=True)
    patterns = patterns.reshape(len(patterns), -1, 4)
    distance = np.abs(patterns[:, :, None] - patterns[:, None])  # (K, N, N, 4)
    far = distance[..., :3].max(-1)
    same_frame = (distance[..., 3] == 0) & (far > 0) & (far <= space // 2)
    same_patch = (far == 0) & (distance[..., 3] > 0) & (distance[..., 3] <= time // 2)
    return Neighbours(
        torch.from_numpy(same_frame).to(device),
        torch.from_numpy(same_patch).to(device),
        torch.from_numpy(pattern.reshape(-1)).to(device),
    )

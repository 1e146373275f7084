"""Tables that move packed tokens into windows and back.

    coordinates (P, 5) --window of each token--> sort --> groups of equal size = buckets (W, N) of token numbers
    x (B, P, C) --gather_rows--> rows (R, C), bucket after bucket --split_rows--> per bucket (B * W, N, C), views
                <--scatter_rows--                                 <--join_rows-- what a mixer made of them

A mixer sees ``(windows, N, C)`` and the bucket's key mask, nothing of the grid. What "a token does not exist" means is
settled here once: it lies in no window, so it is no key, and a scan does not pass over it: neither its state nor its
convolution knows that there was a gap. Where windows of several sizes share a bucket, the smaller ones are filled with
*absent* slots at their end (``present`` is false): zero rows that are no keys, that a causal scan reaches after every
token, and whose results are dropped. Merges and rasters are tables of the same kind.

Coordinates are (sample, d, h, w, frame). Token sets that all samples share have sample 0 throughout and any batch size;
sets that differ between samples are one packed list of batch size 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurostorm.model.geometry.neighbors import NOWHERE, Neighbours, neighbours_in

Axes = tuple[int, int, int, int]  # patches along d, h, w and frames

_SHORT_TABLE = 64  # rows


@dataclass(frozen=True)
class Layout:
    """How a grid is cut into windows.

    Attributes:
        pad: quirk of the released models: where the window does not divide the grid, zero tokens fill its high end
            (after the norm) and take part like any other token. Otherwise windows are cut where the grid ends.
        wrap: quirk of the released Mamba blocks: shifted windows reach round the volume and the clip, so tokens of
            opposite faces share a scan. Otherwise nothing wraps; for attention that equals the released roll and mask.
        round_to: window sizes are rounded up to a multiple of this (never above the largest), so that uneven token
            sets make few buckets; 1 keeps every size.
    """

    pad: bool = False
    wrap: bool = False
    round_to: int = 1


@dataclass(frozen=True, eq=False)
class Bucket:
    """Windows of one table that hold the same number of slots.

    Attributes:
        index: long (W, N) into the packed tokens, where the value P stands for a zero row.
        cells: int16 (W, N, 4), the slots' coordinates (d, h, w, frame) as the window sees them; None in tables that
            are no windows. A tensor where windows are made on the device, which are taken to differ all.
        present: bool (W, N), false for absent slots, which come last in their window; None if there are none.
        may_be_empty: some windows may have no token at all.
    """

    index: Tensor
    cells: np.ndarray | Tensor | None = None
    present: Tensor | None = None
    may_be_empty: bool = False
    _derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    def neighbours(self, space: int, time: int) -> Neighbours:
        """Neighbourhoods for extents of ``space`` patches and ``time`` frames (the window's own edge cuts them)."""
        if self.cells is None:
            raise ValueError("neighbours: this bucket is no window of grid cells (a merge, an order, or with prompts)")
        if (space, time) not in self._derived:
            self._derived[space, time] = neighbours_in(self.cells, space, time, self.index.device)
        return self._derived[space, time]

    def places(self) -> Tensor:
        """``cells`` on the device; made once."""
        assert self.cells is not None  # a bucket with neighbours
        if "places" not in self._derived:
            cells = self.cells if isinstance(self.cells, Tensor) else torch.from_numpy(self.cells)
            self._derived["places"] = cells.to(self.index.device)
        return self._derived["places"]

    @property
    def keys(self) -> Tensor | None:
        """Bool (W, N), ``present`` as a softmax can take it: a window without any token has all its slots for keys."""
        if self.present is None or not self.may_be_empty:
            return self.present
        return self.present | ~self.present[:, :1]

    def after_prompts(self, count: int) -> "Bucket":
        """The bucket of the same windows with ``count`` further keys before their tokens."""
        if count not in self._derived:
            present = self.present
            if present is not None:
                present = torch.cat([present.new_ones(len(present), count), present], 1)
            self._derived[count] = Bucket(self.index, None, present)
        return self._derived[count]


@dataclass(frozen=True, eq=False)
class WindowTable:
    """Moves ``tokens`` packed tokens into groups and back; every token lies in one group at most."""

    buckets: tuple[Bucket, ...]
    tokens: int
    has_padding: bool  # some index entries are P
    has_absent: bool  # some tokens are in no group
    contiguous: bool  # the buckets follow each other in packed order
    sample: Tensor | None = None  # long (P,), the sample of each token where their sets differ
    samples: int = 1  # how many of them there are then
    _maps: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def is_view(self, batch: int) -> bool:
        """Whether the rows of ``batch`` samples are their tokens as they lie."""
        return self.contiguous and (batch == 1 or len(self.buckets) == 1)

    def maps(self, batch: int) -> tuple[Tensor, Tensor]:
        """For ``batch`` samples: int32 (R,) token of each row, B * P for a zero row; int32 (B * P,) row of each token.

        The row is R for a token in no group. Made once for each batch size.
        """
        if batch not in self._maps:
            device, nothing = self.buckets[0].index.device, batch * self.tokens
            start = torch.arange(batch, device=device)[:, None] * self.tokens
            flat = [bucket.index.view(1, -1) for bucket in self.buckets]
            index = torch.cat([torch.where(i == self.tokens, nothing, i + start).view(-1) for i in flat])
            inverse = index.new_full((nothing + 1,), len(index))
            inverse[index] = torch.arange(len(index), device=device)
            self._maps[batch] = index.int(), inverse[:-1].int()
        return self._maps[batch]


def gather_rows(x: Tensor, table: WindowTable) -> Tensor:
    """Packed tokens (B, P, C) -> rows (R, C) of all groups: bucket after bucket, inside it sample after sample.

    Padding and absent slots read as zeros.
    """
    return x.reshape(-1, x.shape[-1]) if table.is_view(len(x)) else _Gather.apply(x, table)


def scatter_rows(rows: Tensor, table: WindowTable, batch: int) -> Tensor:
    """Inverse of :func:`gather_rows`: (R, C) -> (B, P, C); padding and absent slots are dropped."""
    if table.is_view(batch):
        return rows.reshape(batch, table.tokens, rows.shape[-1])
    return _Scatter.apply(rows, table, batch)


def split_rows(rows: Tensor, table: WindowTable, batch: int) -> list[Tensor]:
    """Rows (R, C) -> views per bucket (B * W, N, C), batch slowest."""
    parts = rows.split([batch * bucket.index.numel() for bucket in table.buckets])
    return [
        part.view(-1, bucket.index.shape[1], rows.shape[-1]) for part, bucket in zip(parts, table.buckets, strict=True)
    ]


def join_rows(groups: Sequence[Tensor]) -> Tensor:
    """Per bucket (B * W, N, C) -> rows (R, C)."""
    flat = [group.reshape(-1, group.shape[-1]) for group in groups]
    return torch.cat(flat) if len(flat) > 1 else flat[0]


def split_windows(x: Tensor, table: WindowTable) -> list[Tensor]:
    """Packed tokens (B, P, C) -> per bucket (B * W, N, C), batch slowest."""
    return split_rows(gather_rows(x, table), table, len(x))


def join_windows(groups: Sequence[Tensor], table: WindowTable) -> Tensor:
    """Inverse of :func:`split_windows`: per bucket (B * W, N, C) -> (B, P, C)."""
    return scatter_rows(join_rows(groups), table, len(groups[0]) // len(table.buckets[0].index))


def _rows_of(x: Tensor, table: WindowTable) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if table.has_padding:
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return rows.index_select(0, table.maps(len(x))[0])


def _tokens_of(rows: Tensor, table: WindowTable, batch: int) -> Tensor:
    if table.has_absent:
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return rows.index_select(0, table.maps(batch)[1]).view(batch, table.tokens, rows.shape[1])


class _Gather(torch.autograd.Function):
    """Grouping as a gather whose gradient is the inverse gather: autograd's own would scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: WindowTable) -> Tensor:
        ctx.table, ctx.batch = table, len(x)
        return _rows_of(x, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _tokens_of(grad, ctx.table, ctx.batch), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: WindowTable, batch: int) -> Tensor:
        ctx.table = table
        return _tokens_of(rows, table, batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rows_of(grad, ctx.table), None, None


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` for long (R,) into (K, C), where many rows of the result are the same row of the table.

    Autograd's gradient sorts the index, which takes a GPU longer than a block's attention; adding up in place is wrong
    for few rows, as all threads wait for them. So a short table's gradient is a product with zeros and ones.
    """
    return _Take.apply(table, index)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(table)
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        if grad.is_cuda and ctx.rows <= _SHORT_TABLE:
            chosen = index[None, :] == torch.arange(ctx.rows, device=index.device)[:, None]
            return chosen.to(grad.dtype) @ grad, None
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_add_(0, index, grad), None


def effective_window(grid: Axes, window: Axes, shifted: bool) -> tuple[Axes, Axes]:
    """Window and shift actually used on a grid: an axis no longer than its window is one window and never shifts.

    Returns (window, shift), each four token counts; the shift of a shifted block is half a window, rounded down.
    """
    sizes = tuple(min(g, w) for g, w in zip(grid, window, strict=True))
    shift = tuple(w // 2 if shifted and g > w else 0 for g, w in zip(grid, window, strict=True))
    return sizes, shift  # type: ignore[return-value]


def raster_coords(grid: Sequence[int]) -> np.ndarray:
    """All coordinates of a grid, int64 (cells, axes), the last axis fastest."""
    return np.stack(np.unravel_index(np.arange(int(np.prod(grid))), tuple(grid)), -1)


def window_key(cells: np.ndarray, grid: Sequence[int], window: Axes, shift: Axes, wrap: bool) -> np.ndarray:
    """Int64 (2, cells): number of each cell's window, and the cell's place in the scan order inside it.

    Args:
        cells: (cells, 5) coordinates on ``grid`` (samples, d, h, w, frames), which the window divides if ``wrap``.
        window, shift: as from :func:`effective_window`. A window holds the cells with equal ``(c - shift) // window``
            per axis, so an axis is cut at shift, shift + window, ...; with ``wrap`` its two ends are joined first.
    """
    moved = cells[:, 1:] - np.array(shift)
    axes = np.array(grid[1:])
    if wrap:
        moved = moved % axes
    number = moved // np.array(window) + 1  # a shifted axis starts with a cut window, number -1
    windows = tuple(axes // np.array(window) + 3)
    major = cells[:, 0] * int(np.prod(windows)) + np.ravel_multi_index(tuple(number.T), windows)
    return np.stack([major, np.ravel_multi_index(tuple((moved + np.array(shift) * (not wrap)).T), tuple(axes))])


def window_table(
    coords: np.ndarray, grid: Sequence[int], window: Axes, shift: Axes, layout: Layout, device: torch.device
) -> WindowTable:
    """Windows of tokens at ``coords`` (P, 5), packed in that order, on ``grid`` (samples, d, h, w, frames)."""
    cells, token = coords, np.arange(len(coords))
    padded = (grid[0], *(-(-g // w) * w for g, w in zip(grid[1:], window, strict=True)))
    if layout.pad and padded != tuple(grid):
        beyond = raster_coords(padded)
        beyond = beyond[(beyond >= np.array(grid)).any(1)]
        cells = np.concatenate([cells, beyond])
        token = np.concatenate([token, np.full(len(beyond), len(coords))])
    wrap = layout.wrap and any(shift)
    key = window_key(cells, padded, window, shift, wrap)
    order = np.lexsort(key[::-1])
    cells, token = cells[order, 1:], token[order]
    if wrap:
        cells = (cells - np.array(shift)) % np.array(padded[1:])  # places as the joined window sees them
    _, first, size = np.unique(key[0, order], return_index=True, return_counts=True)
    kept = np.add.reduceat(token < len(coords), first) > 0  # a window of padding alone feeds nobody
    table = table_of(_buckets(cells, token, first[kept], size[kept], layout.round_to, len(coords), device), len(coords))
    if grid[0] == 1:
        return table
    return replace(table, sample=torch.from_numpy(coords[:, 0].copy()).to(device), samples=grid[0])


def _buckets(
    cells: np.ndarray,
    token: np.ndarray,
    first: np.ndarray,
    size: np.ndarray,
    round_to: int,
    tokens: int,
    device: torch.device,
) -> list[Bucket]:
    """Windows (each ``size`` consecutive entries from ``first``) gathered by their rounded size, largest first."""
    rounded = np.minimum(-(-size // round_to) * round_to, size.max())
    buckets = []
    for count in sorted(set(rounded.tolist()), reverse=True):
        chosen = rounded == count
        present = np.arange(count) < size[chosen, None]
        entry = np.where(present, first[chosen, None] + np.arange(count), 0)
        index = np.where(present, token[entry], tokens)
        places = np.where(present[..., None], cells[entry], NOWHERE).astype(np.int16)
        mask = None if present.all() else torch.from_numpy(present).to(device)
        buckets.append(Bucket(torch.from_numpy(index).to(device), places, mask))
    return buckets


def table_of(buckets: Sequence[Bucket], tokens: int) -> WindowTable:
    """The table of ``buckets`` over ``tokens`` packed tokens, on their device."""
    flat = np.concatenate([bucket.index.cpu().numpy().ravel() for bucket in buckets])
    grouped = np.zeros(tokens + 1, bool)
    grouped[flat] = True
    return WindowTable(
        tuple(buckets),
        tokens,
        has_padding=bool(grouped[tokens]),
        has_absent=not grouped[:tokens].all(),
        contiguous=np.array_equal(flat, np.arange(tokens)),
    )

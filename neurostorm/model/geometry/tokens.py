"""Which tokens exist, in which order they lie, and which tables of `windows.py` each stage uses.

    token set --> coordinates (P, 5) --order--> packed tokens of a level --> window tables, unshifted and shifted
                       |
                       +--halve d, h, w--> coordinates of the next level, and the merge table (parents, 8 children)

A clip is a grid of patches x frames; each stage of the network sees a coarser grid. A *level* lists the tokens of one
stage as a packed sequence, so that every block works on ``(B, P, C)`` and never permutes axes. Three token sets:

    dense    every patch of every frame (``geometry_of``)
    brain    the patches that hold brain, in every frame (``geometry_of`` with ``patches``)
    subset   any tokens, as many but not the same in each sample, such as the visible ones (``subset_geometry``, or
             on a GPU ``drawn.py``)

Fewer tokens are the same code with a shorter list: a parent exists where a child does, and a child that does not exist
is zero when it is merged. The result is that of the dense model in which the other tokens are keys for nobody and read
as zero. The packed order keeps the tokens of one unshifted window together, windows of one size after another, so even
blocks slice where odd ones gather. Tables follow from the coordinates alone, are built once per token set and live on
their device, outside the state dict.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from neurostorm.model.geometry.windows import (
    Axes,
    Bucket,
    Layout,
    WindowTable,
    effective_window,
    gather_rows,
    join_windows,
    raster_coords,
    split_windows,
    table_of,
    take_rows,
    window_key,
    window_table,
)

_HALVES = np.array([1, 2, 2, 2, 1])  # children per parent along (sample, d, h, w, frame)


class TokenLevel(Protocol):
    """What the network's stages need to know of one level: how many tokens, where they are, who meets whom."""

    def __len__(self) -> int: ...

    def windows(self, window: Axes, shifted: bool) -> WindowTable:
        """Table of the windows of a block."""

    def positions(self, space: Tensor, time: Tensor) -> Tensor:
        """A value for each patch (S, C) plus one for each frame (T or more, C), for every token: (1, P, C)."""


class SubsetLevel(TokenLevel, Protocol):
    """The same of tokens that are drawn for each sample from a set that samples share, ``whole``."""

    def numbers_in(self, whole: "Level") -> Tensor:
        """Long (P,): of each token its number ``sample * len(whole) + place``; ``whole`` has the grid and every token.

        What a level has beyond its tokens, to keep its shape, may have any number from samples * len(whole) on.
        """

    def places_in(self, whole: "Level") -> Tensor:
        """Long (samples, len(whole)): the number in this level of each of the other's tokens, P for one it lacks."""


class TokenGeometry(Protocol):
    """Levels, finest first, and the merges between them."""

    @property
    def levels(self) -> Sequence[TokenLevel]: ...

    @property
    def merges(self) -> Sequence[WindowTable]: ...


class SubsetGeometry(TokenGeometry, Protocol):
    """The same of drawn tokens."""

    @property
    def levels(self) -> Sequence[SubsetLevel]: ...


class Level:
    """The packed tokens of one stage.

    Args:
        cells: int (P, 5), the tokens' coordinates (sample, d, h, w, frame), each once.
        samples: 1 for a set that all samples share (any batch size), else their number (batch size 1).
        grid: patches along d, h, w and frames.
        window: the window whose unshifted partition fixes the order.

    Attributes:
        coords: int (P, 4) coordinates (d, h, w, frame) in packed order.
        order: long (P,) raster number ``s * T + t`` of each token within its sample.
        space_of_token, time_of_token: long (P,), its ``s`` (the raster number of the patch) and its ``t``.
    """

    def __init__(
        self, cells: np.ndarray, samples: int, grid: Axes, window: Axes, layout: Layout, device: torch.device
    ) -> None:
        self.grid, self.samples, self.layout, self.device = grid, samples, layout, device
        effective, still = effective_window(grid, window, False)
        major, minor = window_key(cells, (samples, *grid), effective, still, False)
        _, number, size = np.unique(major, return_inverse=True, return_counts=True)
        self.cells = cells[np.lexsort((minor, major, -size[number]))]
        self.coords = self.cells[:, 1:]
        raster = np.ravel_multi_index(tuple(self.coords.T), grid)
        self.order = torch.from_numpy(raster).to(device)
        self.space_of_token = self.order // grid[3]
        self.time_of_token = self.order % grid[3]
        self._windows: dict[tuple[Axes, bool], WindowTable] = {}

    def __len__(self) -> int:
        return len(self.coords)

    def windows(self, window: Axes, shifted: bool) -> WindowTable:
        """As ``TokenLevel`` says; built at the first call, then kept."""
        effective, shift = effective_window(self.grid, window, shifted)
        key = (effective, any(shift))
        if key not in self._windows:
            grid = (self.samples, *self.grid)
            self._windows[key] = window_table(self.cells, grid, effective, shift, self.layout, self.device)
        return self._windows[key]

    # What a subset never needs is made when somebody asks for it: subsets are made anew in every step.
    @cached_property
    def _cell(self) -> Tensor:
        """Long (P,): the raster number of each token among those of all samples."""
        return self.order + torch.from_numpy(self.cells[:, 0] * int(np.prod(self.grid))).to(self.device)

    @cached_property
    def _raster(self) -> WindowTable:
        return table_of([Bucket(self._cell[:, None])], self.samples * int(np.prod(self.grid)))

    @cached_property
    def _ranks(self) -> WindowTable:
        return table_of([Bucket(self._cell.argsort().argsort()[:, None])], len(self))

    @cached_property
    def _patches(self) -> Tensor | None:
        """Long: the patches that are tokens, if each is one in all frames; of a set that samples share."""
        if self.samples > 1:
            return None
        patches = torch.unique(self.space_of_token)
        return patches if len(patches) * self.grid[3] == len(self) else None

    def positions(self, space: Tensor, time: Tensor) -> Tensor:
        """As ``TokenLevel`` says."""
        if self._patches is None:
            return (take_rows(space, self.space_of_token) + take_rows(time, self.time_of_token))[None]
        return self.pack((take_rows(space, self._patches).unsqueeze(1) + time[: self.grid[3]]).flatten(0, 1)[None])

    def pack(self, x: Tensor) -> Tensor:
        """The tokens in raster order, (B, P, C), samples one after another where they share a list -> packed."""
        return gather_rows(x, self._ranks).view(x.shape[0], len(self), x.shape[-1])

    def from_raster(self, x: Tensor) -> Tensor:
        """(B, S * T, C) with t fastest -> packed (B, P, C); (1, P, C) when the samples' tokens differ."""
        x = x if self.samples == 1 else rearrange(x, "b n c -> 1 (b n) c")
        return split_windows(x, self._raster)[0].view(x.shape[0], len(self), x.shape[-1])

    def numbers_in(self, whole: "Level") -> Tensor:
        """As ``SubsetLevel`` says."""
        place = whole.place_of_cell[np.ravel_multi_index(tuple(self.coords.T), self.grid)]
        return torch.from_numpy(place + self.cells[:, 0] * len(whole)).to(self.device)

    def places_in(self, whole: "Level") -> Tensor:
        """As ``SubsetLevel`` says."""
        place = torch.full((self.samples * len(whole),), len(self), device=self.device)
        place[self.numbers_in(whole)] = torch.arange(len(self), device=self.device)
        return place.view(self.samples, -1)

    @cached_property
    def place_of_cell(self) -> np.ndarray:
        """Int64 (d h w T,): the packed number of the token at each cell, where there is one; of a shared set."""
        place = np.full(int(np.prod(self.grid)), -1)
        place[np.ravel_multi_index(tuple(self.coords.T), self.grid)] = np.arange(len(self))
        return place

    def to_raster(self, x: Tensor) -> Tensor:
        """Packed (B, P, C) -> (B, S * T, C) with t fastest; cells without a token are zero."""
        raster = join_windows([x.reshape(-1, 1, x.shape[-1])], self._raster)
        return raster if self.samples == 1 else rearrange(raster, "1 (b n) c -> b n c", b=self.samples)

    def to_grid(self, x: Tensor) -> Tensor:
        """Packed (B, P, C) -> (B, C, d, h, w, T); cells without a token are zero."""
        d, h, w, _ = self.grid
        return rearrange(self.to_raster(x), "b (d h w t) c -> b c d h w t", d=d, h=h, w=w)


class Geometry:
    """Levels of a clip, finest first, and the merge tables between them.

    ``merges[i]`` groups the tokens of level i into the parents of level i + 1: one bucket (parents, 8), children in
    product order over (d, h, w) with w fastest; a child that does not exist is a zero row.
    """

    def __init__(
        self,
        cells: np.ndarray,
        samples: int,
        grid: Axes,
        windows: Sequence[Axes],
        layout: Layout,
        device: torch.device,
    ) -> None:
        self.levels = [Level(cells, samples, grid, windows[0], layout, device)]
        self.merges: list[WindowTable] = []
        for window in windows[1:]:
            child = self.levels[-1]
            grid = (grid[0] // 2, grid[1] // 2, grid[2] // 2, grid[3])
            places = np.ravel_multi_index(tuple((child.cells // _HALVES).T), (samples, *grid))
            parents = np.stack(np.unravel_index(np.unique(places), (samples, *grid)), -1)
            parent = Level(parents, samples, grid, window, layout, device)
            self.merges.append(_merge_table(child, parent))
            self.levels.append(parent)


def geometry_of(
    grid: Axes,
    windows: tuple[Axes, ...],
    device: torch.device,
    layout: Layout = Layout(),  # noqa: B008 (frozen)
    patches: np.ndarray | None = None,
) -> Geometry:
    """Geometry of a token set that all samples share; built once per process, then kept.

    Args:
        grid: patches along d, h, w and frames at the finest level; d, h, w divisible by 2 ** (levels - 1).
        windows: window per level, finest first.
        device: where the tables live.
        layout: how the grid is cut into windows.
        patches: bool (S,), which patches are tokens in every frame; None for all of them.

    Raises:
        ValueError: no patch is a token.
    """
    if patches is not None and not patches.any():
        raise ValueError("patches: no patch is a token")
    return _shared_geometry(grid, windows, device, layout, None if patches is None else patches.tobytes())


@lru_cache(maxsize=32)
def _shared_geometry(
    grid: Axes, windows: tuple[Axes, ...], device: torch.device, layout: Layout, patches: bytes | None
) -> Geometry:
    cells = raster_coords((1, *grid))
    if patches is not None:
        cells = cells[np.repeat(np.frombuffer(patches, bool), grid[3])]
    return Geometry(cells, 1, grid, windows, layout, device)


def subset_geometry(
    grid: Axes,
    windows: tuple[Axes, ...],
    tokens: Tensor,
    layout: Layout = Layout(),  # noqa: B008 (frozen)
) -> Geometry:
    """Geometry of a token set of its own for each sample; its tensors have batch size 1 and list all samples' tokens.

    Args:
        grid, windows, layout: as :func:`geometry_of` takes them.
        tokens: long (B, P'), the raster numbers ``s * T + t`` of each sample's tokens.
    """
    samples = len(tokens)
    sample = np.repeat(np.arange(samples), tokens.shape[1])
    inside = np.stack(np.unravel_index(tokens.cpu().numpy().ravel(), grid), -1)
    cells = np.concatenate([sample[:, None], inside], 1)
    return Geometry(cells, samples, grid, windows, layout, tokens.device)


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


def _merge_table(child: Level, parent: Level) -> WindowTable:
    grid = (parent.samples, *parent.grid)
    slot_of_parent = np.full(int(np.prod(grid)), len(parent))
    slot_of_parent[np.ravel_multi_index(tuple(parent.cells.T), grid)] = np.arange(len(parent))
    octant = (child.coords[:, :3] % 2) @ np.array([4, 2, 1])
    children = np.full((len(parent), 8), len(child))
    slot = slot_of_parent[np.ravel_multi_index(tuple((child.cells // _HALVES).T), grid)]
    children[slot, octant] = np.arange(len(child))
    return table_of([Bucket(torch.from_numpy(children).to(child.device))], len(child))


def numbers_of(chosen: Tensor) -> Tensor:
    """Bool (B, P) with equally many true in each row -> their numbers, long (B, P').

    Raises:
        ValueError: a row has more than another, as a mask from outside may.
    """
    count = chosen.sum(1)
    if bool((count != count[0]).any()) or not count[0]:
        raise ValueError(
            f"mask: it hides, or leaves, {count.tolist()} tokens of the samples: equally many are needed, and some"
        )
    return chosen.nonzero()[:, 1].view(len(chosen), -1)


def put_tokens(rows: Tensor, numbers: Tensor, tokens: int) -> Tensor:
    """Rows (B * H, C) of the tokens with these numbers (B, H) -> (B, tokens, C), zero elsewhere."""
    x = rows.view(*numbers.shape, -1)
    return x.new_zeros(len(x), tokens, x.shape[2]).scatter_(1, numbers.unsqueeze(-1).expand_as(x), x)

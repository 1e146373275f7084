"""Which tokens a masked autoencoder hides.

    tokens --partition--> blocks --shuffle per sample--> hide from the front until the budget is spent --> bool (B, P)

Five strategies, which differ in the block alone:

    random       one token                         tube          one patch in all frames
    window       a window of patches and frames    window-tube   a window of patches in all frames
    atlas        a region of an atlas in all frames

The budget is the same for every sample and at every shape. Blocks of one size are hidden whole, ``int(blocks * ratio)``
of them. Where sizes differ (windows cut at the grid's edge or by the brain's outline, regions), it is a number of
tokens, and the last block is hidden only as far as the budget goes: whole blocks would hide another share of each
sample, and the visible tokens of a batch could not be one tensor.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from neurostorm.model.geometry.tokens import Level
from neurostorm.model.geometry.windows import Axes

KINDS = ("random", "window", "tube", "window-tube", "atlas")


@dataclass(frozen=True)
class MaskConfig:
    """Masking strategy.

    Attributes:
        kind: "random", "window", "tube", "window-tube" or "atlas".
        ratio: share hidden, above 0 and below 1; of the labelled tokens for "atlas".
        window: patches (d, h, w) and frames of a "window" block, its patches those of a "window-tube" block; None takes
            the network's window.
        tube_frames: frames of a "tube" block, for several tubes per patch as in the released code; None takes all.
    """

    kind: str = "window"
    ratio: float = 0.5
    window: Axes | None = None
    tube_frames: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            object.__setattr__(self, "window", tuple(self.window))

    def validate(self) -> None:
        """Raises ValueError naming the field."""
        if self.kind not in KINDS:
            raise ValueError(f"mask.kind = {self.kind!r}: one of {', '.join(KINDS)}")
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"mask.ratio = {self.ratio}: above 0 and below 1")
        if self.window is not None and (len(self.window) != 4 or min(self.window) < 1):
            raise ValueError(f"mask.window = {self.window}: four positive token counts (d, h, w, frames)")
        if self.tube_frames is not None and self.tube_frames < 1:
            raise ValueError(f"mask.tube_frames = {self.tube_frames}: at least 1, or None for all frames")


@dataclass(frozen=True, eq=False)
class Blocks:
    """A partition of a level's tokens into blocks, and the order in which a block is hidden when it is cut.

    A block has its raster number on the grid of blocks (the released masks are such rasters), so blocks without any
    token have a number too; they are never drawn. Regions of an atlas are numbered by increasing label, 0 is no region.

    Attributes:
        block_of_token: long (P,), number of the token's block.
        position_in_block: long (P,), raster place in a whole block; in a region, the place among its tokens.
        total: blocks numbered.
        rank_in_block: long (P,), how many tokens of the block are hidden before this one (patch by patch, frames in
            order); P for a token that is never hidden.
        sizes: long (total,), on the CPU: tokens of each block that may be hidden.
        unit: tokens hidden together: 1, or the frames of a patch where blocks span them all.
    """

    block_of_token: Tensor
    position_in_block: Tensor
    total: int
    rank_in_block: Tensor
    sizes: Tensor
    unit: int

    def budget(self, ratio: float) -> int:
        """Tokens hidden in each sample: at least one unit, and at least one unit that may be hidden is not.

        Raises:
            ValueError: fewer than two units may be hidden.
        """
        blocks, size, tokens = self._counts
        units = tokens // self.unit
        if units < 2:
            raise ValueError(f"mask: {units} maskable tokens or patches; at least two are needed, one to see by")
        whole = int(blocks * ratio)
        if size and 0 < whole < blocks:
            return whole * size
        return min(max(int(units * ratio), 1), units - 1) * self.unit

    @cached_property
    def _counts(self) -> tuple[int, int, int]:
        """Blocks that may be hidden, their size (0 if they differ), and their tokens."""
        sizes = self.sizes[self.sizes > 0]
        common = len(sizes) > 0 and bool((sizes == sizes[0]).all())
        return len(sizes), int(sizes[0]) if common else 0, int(sizes.sum())


def mask_blocks(level: Level, config: MaskConfig, window: Axes, atlas: np.ndarray | Tensor | None = None) -> Blocks:
    """The blocks a strategy draws from; index arithmetic alone, for the caller to keep.

    Args:
        level: the finest level, with a token set that all samples share.
        config: the strategy.
        window: tokens (d, h, w, frames) of the blocks of "window" and, without the frames, of "window-tube".
        atlas: integer (d, h, w) labels on the level's grid for "atlas"; tokens labelled 0 are never hidden.

    Raises:
        ValueError: "atlas" without labels or with impossible ones; a strategy over all frames where some patch is a
            token in fewer frames than another.
    """
    raster = np.ravel_multi_index(tuple(level.coords.T), level.grid)
    frames, unit = level.grid[3], 1
    if config.kind in ("window-tube", "atlas") or (config.kind == "tube" and (config.tube_frames or frames) >= frames):
        unit = _frames_per_patch(raster // frames)
    if config.kind == "atlas":
        number, total = _regions(level, atlas)
        rank, sizes = _ranks(number, raster, total)
        position, rank = rank, np.where(number == 0, len(level), rank)
        sizes[0] = 0
    else:
        block = _block_shape(config, window, frames)
        per_axis = tuple(-(-g // b) for g, b in zip(level.grid, block, strict=True))
        number = np.ravel_multi_index(tuple((level.coords // np.array(block)).T), per_axis)
        position = np.ravel_multi_index(tuple((level.coords % np.array(block)).T), block)
        total = int(np.prod(per_axis))
        rank, sizes = _ranks(number, raster, total)
    tables = [torch.from_numpy(table).to(level.device) for table in (number, position, rank)]
    return Blocks(tables[0], tables[1], total, tables[2], torch.from_numpy(sizes), unit)


def draw_mask(
    blocks: Blocks, ratio: float, batch: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Bool (B, P), True = hidden: exactly ``blocks.budget(ratio)`` tokens of every sample, in a random order of blocks.

    The draw happens on the generator's device (the global generator of ``device`` without one).

    Raises:
        ValueError: fewer than two tokens or patches may be hidden.
    """
    source = device if generator is None else generator.device
    drawn = torch.rand(batch, blocks.total, generator=generator, device=source).argsort(1)
    sizes = blocks.sizes.to(source)[drawn]
    left = blocks.budget(ratio) - (sizes.cumsum(1) - sizes)  # of the budget when a block's turn comes
    quota = torch.empty_like(left).scatter_(1, drawn, left).to(device, non_blocking=True)
    return blocks.rank_in_block < quota[:, blocks.block_of_token]


def mask_from_released(mask: Tensor, blocks: Blocks, level: Level) -> Tensor:
    """A mask as the released code has it -> bool (B, P) in packed order, True = hidden.

    Args:
        mask: (B, d*h*w*T), a raster of tokens with t fastest, or (B, blocks.total), a raster of blocks; any number
            type, not 0 = hidden.
        blocks: of the same strategy.
        level: that ``blocks`` were made of.

    Raises:
        ValueError: the mask has neither shape.
    """
    cells = int(np.prod(level.grid))
    if mask.ndim == 2 and mask.shape[1] == cells:
        # A grid of as many blocks has one token in each, so the two readings agree. Regions need not; tokens it is.
        place = level.order
    elif mask.ndim == 2 and mask.shape[1] == blocks.total:
        place = blocks.block_of_token
    else:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)}: expected (B, {cells}), a raster of tokens (d, h, w, t) on the grid "
            f"{tuple(level.grid)}, or (B, {blocks.total}), a raster of blocks"
        )
    return (mask != 0).to(level.device)[:, place]


def _block_shape(config: MaskConfig, window: Axes, frames: int) -> Axes:
    if config.kind == "random":
        return (1, 1, 1, 1)
    if config.kind == "tube":
        return (1, 1, 1, config.tube_frames or frames)
    return window if config.kind == "window" else (*window[:3], frames)


def _regions(level: Level, atlas: np.ndarray | Tensor | None) -> tuple[np.ndarray, int]:
    """Region of each token (P,), numbered by increasing label, 0 for label 0, and how many numbers there are."""
    if atlas is None:
        raise ValueError("mask.kind = 'atlas': needs the atlas, labels (d, h, w) on the grid of patches")
    labels = atlas.cpu().numpy() if isinstance(atlas, Tensor) else np.asarray(atlas)
    if labels.shape != tuple(level.grid[:3]) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"atlas: {labels.dtype} labels of shape {labels.shape}, smallest {labels.min()}: expected integers of "
            f"shape {tuple(level.grid[:3])} from 0 up"
        )
    values = np.union1d([0], labels)
    d, h, w = level.coords[:, :3].T
    return np.searchsorted(values, labels[d, h, w]), len(values)


def _ranks(number: np.ndarray, raster: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Place (P,) of each token among those of its block, in raster order, and the tokens (total,) of each block."""
    sizes = np.bincount(number, minlength=total)
    order = np.lexsort((raster, number))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[number[order]]
    return rank, sizes


def _frames_per_patch(patch: np.ndarray) -> int:
    frames = np.unique(np.bincount(patch))
    frames = frames[frames > 0]
    if len(frames) != 1:
        raise ValueError(f"mask: patches are tokens in {frames.min()} to {frames.max()} frames; a tube needs as many")
    return int(frames[0])

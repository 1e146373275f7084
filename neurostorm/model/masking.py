"""Which tokens a masked autoencoder hides.

    tokens --partition into blocks--> choose exactly int(blocks * ratio) of them per sample --> bool (B, P)

The three strategies differ in the block alone: ``random`` single tokens, ``window`` whole windows including their
frames, ``tube`` one patch over all frames. Where the window does not divide the grid the blocks at the high edges are
smaller; "exact" counts blocks, so the share of masked tokens then varies a little from sample to sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from neurostorm.model.geometry import Axes, Blocks, Level

KINDS = ("random", "window", "tube")


@dataclass(frozen=True)
class MaskConfig:
    """Masking strategy.

    Attributes:
        kind: "random", "window" or "tube".
        ratio: share of blocks hidden, above 0 and below 1.
        window: patches (d, h, w) and frames of a "window" block; None takes the network's window.
    """

    kind: str = "window"
    ratio: float = 0.5
    window: Axes | None = None

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


def mask_blocks(level: Level, config: MaskConfig, window: Axes) -> Blocks:
    """The blocks a strategy chooses among; ``window`` (tokens) is what "window" uses."""
    if config.kind == "random":
        return level.blocks((1, 1, 1, 1))
    if config.kind == "tube":
        return level.blocks((1, 1, 1, level.grid[3]))
    return level.blocks(window)


def draw_mask(
    blocks: Blocks, ratio: float, batch: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Bool (B, P), True = hidden: exactly ``int(blocks.total * ratio)`` blocks of every sample, uniformly drawn.

    The draw happens on the generator's device (the global generator of ``device`` without one).
    """
    source = device if generator is None else generator.device
    scores = torch.rand(batch, blocks.total, generator=generator, device=source)
    chosen = scores.argsort(1)[:, : int(blocks.total * ratio)]
    hidden = torch.zeros(batch, blocks.total, dtype=torch.bool, device=source).scatter_(1, chosen, True)
    return hidden.to(device, non_blocking=True)[:, blocks.block_of_token]

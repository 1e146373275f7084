"""The released decoder's parts: expansion of tokens into their children, and blocks at each level on the way up.

    latent (B, P', C') --expand 2 x 2 x 2--> finer level --blocks, expand--> ... --> finest level, blocks

No skip connections, no positions, no prompts, no STRD. Children that do not exist are dropped.
"""

from einops import rearrange
from torch import Tensor, nn

from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import BlockStack
from neurostorm.model.geometry.tokens import Geometry
from neurostorm.model.geometry.windows import WindowTable, join_windows


class PatchExpanding(nn.Module):
    """Each token becomes its 8 children: (B, P, C) -> (B, 8 P, C / c_multiplier), normalised."""

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        width = config.width(stage - 1)
        self.expand = nn.Linear(config.width(stage), 8 * width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, merge: WindowTable) -> Tensor:
        children = rearrange(self.expand(x), "b p (eight c) -> (b p) eight c", eight=8)
        return join_windows([self.norm(children)], merge)


class UpStage(BlockStack):
    """One decoder stage: blocks, then the expansion to the finer level (none at the finest)."""

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__(config, stage)
        self._stage, self._window = stage, config.window
        self.upsample = PatchExpanding(config, stage) if stage > 0 else None

    def forward(self, x: Tensor, geometry: Geometry, recompute: bool) -> Tensor:
        level = geometry.levels[self._stage]
        x = self.run(x, (level.windows(self._window, False), level.windows(self._window, True)), None, recompute)
        return x if self.upsample is None else self.upsample(x, geometry.merges[self._stage - 1])

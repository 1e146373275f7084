"""The blocks of the encoder and of decoders: embedding, window blocks with a mixer and an MLP, merging, stages."""

from collections.abc import Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neurostorm.model.config import SwinConfig
from neurostorm.model.geometry.tokens import TokenGeometry, TokenLevel
from neurostorm.model.geometry.windows import (
    Axes,
    WindowTable,
    gather_rows,
    join_rows,
    scatter_rows,
    split_rows,
    split_windows,
)
from neurostorm.model.mixers import MIXERS
from neurostorm.model.mixers.mamba import Mamba
from neurostorm.model.mixers.mixer import Mixer
from neurostorm.model.ops.dispatch import product_dtype
from neurostorm.model.ops.mlp import Mlp
from neurostorm.model.strd.dropout import StageDropout


class PatchEmbed(nn.Module):
    """One linear map of a patch's voxels, in the order (px, py, pz, channel) with the channel fastest."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.patch_voxels, config.embed_dim)

    def forward(self, patches: Tensor) -> Tensor:
        return self.fc(patches.to(self.fc.weight.dtype))


class PositionalEmbedding(nn.Module):
    """Learned embedding of the patch plus that of the frame; there is no other notion of position."""

    def __init__(self, width: int, grid: Axes) -> None:
        super().__init__()
        d, h, w, frames = grid
        self.pos_embed = nn.Parameter(torch.empty(1, width, d, h, w, 1))
        self.time_embed = nn.Parameter(torch.empty(1, width, 1, 1, 1, frames))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.time_embed, std=0.02)

    def forward(self, x: Tensor, level: TokenLevel) -> Tensor:
        space = rearrange(self.pos_embed, "1 c d h w 1 -> (d h w) c")
        time = rearrange(self.time_embed, "1 c 1 1 1 t -> t c")
        return x + level.positions(space, time)


class DropPath(nn.Module):
    """Stochastic depth: in training the branch of a sample is zero with probability ``rate``, else scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, table: WindowTable) -> Tensor:
        """``x`` (B, P, C) of ``table``, which knows whose each token is where samples share one packed list."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        factor = x.new_empty(x.shape[0] * table.samples, 1, 1).bernoulli_(keep).div_(keep)
        return x * (factor if table.sample is None else factor[table.sample, 0])


class Block(nn.Module):
    """Mix the tokens of each window, then transform each token; both residual, both pre-norm.

    ``prompt`` (1, k, C), if there is one, stands before the normalised tokens of every window while they are mixed.
    """

    prompt: nn.Parameter | None

    def __init__(self, config: SwinConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        width = config.width(stage)
        self.norm1 = nn.LayerNorm(width)
        self._mixer_name, build = MIXERS[config.mixer]
        self.add_module(self._mixer_name, build(width, config.heads[stage], config.qkv_bias))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.register_parameter("prompt", None)

    def forward(self, x: Tensor, table: WindowTable, strd: StageDropout | None = None) -> Tensor:
        x = x + self.drop_path(self.mix(self.norm1(x), table, strd), table)
        return x + self.drop_path(self.mlp(self.norm2(x)), table)

    def mix(self, x: Tensor, table: WindowTable, strd: StageDropout | None) -> Tensor:
        """The mixer over the windows of tokens (B, P, C), with the prompts before them and removed after."""
        mixer = cast(Mixer, self.get_submodule(self._mixer_name))
        x = x.to(product_dtype(x))  # autocast gives norms in float32; the mixer's product would cast every slot instead
        groups = split_rows(mixer.project_in(gather_rows(x, table)), table, len(x))
        if self.prompt is None:
            mixed = [mixer(group, bucket, strd) for group, bucket in zip(groups, table.buckets, strict=True)]
        else:
            prompts, count = mixer.project_in(self.prompt), self.prompt.shape[1]
            mixed = [
                mixer(
                    torch.cat([prompts.expand(len(group), -1, -1).to(group.dtype), group], 1),
                    bucket.after_prompts(count),
                )[:, count:]
                for group, bucket in zip(groups, table.buckets, strict=True)
            ]
        return scatter_rows(mixer.project_out(join_rows(mixed)), table, len(x))

    def set_prompts(self, count: int) -> None:
        """``count`` new prompts, drawn as the released ones; 0 removes them."""
        weight = self.norm1.weight
        prompt = nn.Parameter(weight.new_empty(1, count, len(weight))) if count else None
        if prompt is not None:
            nn.init.trunc_normal_(prompt, std=0.02)
        self.register_parameter("prompt", prompt)


class PatchMerging(nn.Module):
    """Concatenate the 8 children of a parent patch, normalise, reduce: (B, P, C) -> (B, P / 8, c_multiplier * C)."""

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        width = config.width(stage)
        self.norm = nn.LayerNorm(8 * width)
        self.reduction = nn.Linear(8 * width, config.width(stage + 1), bias=False)

    def forward(self, x: Tensor, merge: WindowTable) -> Tensor:
        (children,) = split_windows(x, merge)
        return self.reduction(self.norm(rearrange(children, "(b p) eight c -> b p (eight c)", b=len(x))))


class BlockStack(nn.Module):
    """The blocks of one stage of encoder or decoder, over one level's tokens."""

    def __init__(self, config: SwinConfig, stage: int, drop_path_rates: Sequence[float] | None = None) -> None:
        super().__init__()
        rates = config.drop_path_rates(stage) if drop_path_rates is None else drop_path_rates
        self.blocks = nn.ModuleList(Block(config, stage, rate) for rate in rates)

    def run(self, x: Tensor, tables: Sequence[WindowTable], strd: StageDropout | None, recompute: bool) -> Tensor:
        """Blocks alternate between the unshifted and the shifted table of ``tables``."""
        for number, block in enumerate(self.blocks):
            table = tables[number % 2]
            if recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, table, strd, use_reentrant=False)
            else:
                x = block(x, table, strd)
        return x


class Stage(BlockStack):
    """One encoder stage: blocks, then the merge to the next stage (none after the last)."""

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__(config, stage)
        self._stage, self._window, self._shifts = stage, config.windows[stage], config.shifts(stage)
        self.downsample = PatchMerging(config, stage) if stage + 1 < config.stages else None

    def forward(self, x: Tensor, geometry: TokenGeometry, strd: StageDropout | None, recompute: bool) -> Tensor:
        level = geometry.levels[self._stage]
        tables = level.windows(self._window, False), level.windows(self._window, self._shifts)
        x = self.run(x, tables, strd, recompute)
        return x if self.downsample is None else self.downsample(x, geometry.merges[self._stage])


def initialise(module: nn.Module) -> None:
    """Linear layers start as Xavier-uniform with zero bias, but the scan's as its own; for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Mamba):
        module.reset_scan()

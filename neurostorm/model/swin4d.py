"""The 4D Swin encoder.

    volume (B, C, X, Y, Z, T)
      -> patches (B, P, p^3 C) in packed order -> linear embedding (B, P, embed_dim)
      -> per stage: + position of the patch + position of the frame
                    blocks: x + mix(norm(x)) in windows, x + mlp(norm(x)); odd blocks shift their windows
                    merge 2 x 2 x 2 patches (frames stay), c_multiplier times the width
      -> features (B, C', d, h, w, T)

Architecture: SwiFT (Kim et al. 2023), the backbone of NeuroSTORM; parameter names are the released ones. Everything
between the patches and the features is ``(B, P, C)`` tokens; ``geometry.py`` knows where they lie.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint

from neurostorm.model.attention import WindowAttention
from neurostorm.model.geometry import (
    Axes,
    Geometry,
    Level,
    WindowTable,
    dense_geometry,
    join_windows,
    split_windows,
)
from neurostorm.model.strd import StageDropout, StrdConfig

# mixer -> (name of its parameters in the released models, constructor of (width, heads, qkv_bias))
MIXERS: dict[str, tuple[str, Callable[[int, int, bool], nn.Module]]] = {"attention": ("attn", WindowAttention)}


@dataclass(frozen=True)
class SwinConfig:
    """Shape of the encoder.

    Attributes:
        img_size: voxels (X, Y, Z) and frames T of a clip; a shorter clip works, a longer one does not.
        patch_size: voxels per patch and frames per patch; the last is 1.
        in_chans: channels of the volume.
        embed_dim: width of the first stage; stage i has ``embed_dim * c_multiplier ** i``.
        depths: blocks per stage.
        heads: attention heads per stage.
        window: tokens (d, h, w, frames) that attend to each other.
        first_window: the same for the first stage; None takes ``window``.
        full_last: the last stage's window covers the whole volume (``window[3]`` frames) and never shifts.
        mlp_ratio: hidden width of the MLP over the stage's width.
        qkv_bias: whether query, key and value have a bias.
        drop_path: stochastic depth of the last block; it grows linearly from 0 over the blocks.
        c_multiplier: growth of the width at each merge.
        mixer: what mixes the tokens of a window, a key of MIXERS.
    """

    img_size: Axes
    patch_size: Axes = (6, 6, 6, 1)
    in_chans: int = 1
    embed_dim: int = 36
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: Axes = (4, 4, 4, 4)
    first_window: Axes | None = None
    full_last: bool = False
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path: float = 0.0
    c_multiplier: int = 2
    mixer: str = "attention"

    def __post_init__(self) -> None:
        for entry in fields(self):
            if isinstance(getattr(self, entry.name), list):
                object.__setattr__(self, entry.name, tuple(getattr(self, entry.name)))

    @property
    def stages(self) -> int:
        return len(self.depths)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along each spatial axis of the first stage."""
        return tuple(n // p for n, p in zip(self.img_size[:3], self.patch_size[:3], strict=True))  # type: ignore[return-value]

    @property
    def space(self) -> int:
        """Patches of one frame."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def frames(self) -> int:
        """Frames of the longest clip."""
        return self.img_size[3]

    @property
    def patch_voxels(self) -> int:
        """Values of one patch."""
        return self.patch_size[0] * self.patch_size[1] * self.patch_size[2] * self.in_chans

    def width(self, stage: int) -> int:
        return self.embed_dim * self.c_multiplier**stage

    @property
    def windows(self) -> tuple[Axes, ...]:
        """Nominal window of each stage."""
        windows = [self.first_window or self.window] + [self.window] * (self.stages - 1)
        if self.full_last:
            d, h, w = (n // 2 ** (self.stages - 1) for n in self.grid)
            windows[-1] = (d, h, w, self.window[3])
        return tuple(windows)

    def shifts(self, stage: int) -> bool:
        """Whether the odd blocks of an encoder stage shift; a full last stage does not, over the frames either."""
        return not (self.full_last and stage + 1 == self.stages)

    def drop_path_rates(self, stage: int) -> list[float]:
        """Stochastic depth of the blocks of a stage: 0 to ``drop_path`` in equal steps over all blocks."""
        steps, start = max(1, sum(self.depths) - 1), sum(self.depths[:stage])
        return [self.drop_path * number / steps for number in range(start, start + self.depths[stage])]

    def validate(self) -> None:
        """Raises ValueError naming the field and what is wrong with it."""
        for name in ("img_size", "patch_size", "window", "first_window"):
            axes = getattr(self, name)
            if axes is not None and (len(axes) != 4 or min(axes) < 1):
                raise ValueError(f"{name} = {axes}: four positive numbers (three axes and frames)")
        if self.patch_size[3] != 1:
            raise ValueError(f"patch_size = {self.patch_size}: the last entry is 1, frames are not patched")
        if len(self.depths) < 1 or min(self.depths) < 1:
            raise ValueError(f"depths = {self.depths}: at least one stage, each with at least one block")
        if len(self.heads) != self.stages:
            raise ValueError(f"heads = {self.heads}: one entry per stage, as depths = {self.depths}")
        for stage, heads in enumerate(self.heads):
            if heads < 1 or self.width(stage) % heads:
                raise ValueError(
                    f"heads = {self.heads}: heads[{stage}] must divide the stage's width {self.width(stage)}"
                )
        divisor = 2 ** (self.stages - 1)
        for n, p in zip(self.img_size[:3], self.patch_size[:3], strict=True):
            if n % (p * divisor):
                raise ValueError(f"img_size = {self.img_size}: {n} is no multiple of {p} voxels x {divisor} (merges)")
        for name in ("in_chans", "embed_dim", "c_multiplier"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1")
        if self.mlp_ratio <= 0 or not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"mlp_ratio = {self.mlp_ratio}, drop_path = {self.drop_path}: above 0, and in [0, 1)")
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer = {self.mixer!r}: one of {', '.join(MIXERS)}")


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

    def forward(self, x: Tensor, level: Level) -> Tensor:
        space = rearrange(self.pos_embed, "1 c d h w 1 -> (d h w) 1 c")
        time = rearrange(self.time_embed, "1 c 1 1 1 t -> 1 t c")[:, : level.grid[3]]
        return x + level.from_raster(rearrange(space + time, "s t c -> 1 (s t) c"))


class DropPath(nn.Module):
    """Stochastic depth: in training the branch of a sample is zero with probability ``rate``, else scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(gelu(self.linear1(x)))


class Block(nn.Module):
    """Mix the tokens of each window, then transform each token; both residual, both pre-norm."""

    def __init__(self, config: SwinConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        width = config.width(stage)
        self.norm1 = nn.LayerNorm(width)
        self._mixer_name, build = MIXERS[config.mixer]
        self.add_module(self._mixer_name, build(width, config.heads[stage], config.qkv_bias))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, table: WindowTable, strd: StageDropout | None = None) -> Tensor:
        mixer = self.get_submodule(self._mixer_name)
        windows = split_windows(self.norm1(x), table)
        mixed = [mixer(group, bucket, strd) for group, bucket in zip(windows, table.buckets, strict=True)]
        x = x + self.drop_path(join_windows(mixed, table))
        return x + self.drop_path(self.mlp(self.norm2(x)))


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

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, stage, rate) for rate in config.drop_path_rates(stage))

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

    def forward(self, x: Tensor, geometry: Geometry, strd: StageDropout | None, recompute: bool) -> Tensor:
        level = geometry.levels[self._stage]
        tables = level.windows(self._window, False), level.windows(self._window, self._shifts)
        x = self.run(x, tables, strd, recompute)
        return x if self.downsample is None else self.downsample(x, geometry.merges[self._stage])


class SwinEncoder(nn.Module):
    """4D Swin encoder: (B, C, X, Y, Z, T) -> (B, C', d, h, w, T), the last stage's features without a final norm.

    Args:
        config: its shape; validated here.
        strd: redundancy dropout, active in training mode.

    Attributes:
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        extra: JSON that travels with the saved model.
    """

    def __init__(self, config: SwinConfig, strd: StrdConfig = StrdConfig()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        config.validate()
        strd.validate()
        self.config, self.strd_config = config, strd
        self.activation_checkpointing = False
        self.extra: dict[str, Any] = {}
        self.patch_embed = PatchEmbed(config)
        self.pos_embeds = nn.ModuleList(
            PositionalEmbedding(config.width(i), (*(n // 2**i for n in config.grid), config.frames))
            for i in range(config.stages)
        )
        self.layers = nn.ModuleList(Stage(config, i) for i in range(config.stages))
        self.apply(initialise)

    def geometry(self, frames: int, device: torch.device | str | None = None) -> Geometry:
        """Cached token geometry of clips of ``frames`` frames, on the parameters' device unless another is given.

        Raises:
            ValueError: ``frames`` is not in 1 .. the trained number.
        """
        if not 1 <= frames <= self.config.frames:
            raise ValueError(f"a clip of {frames} frames: this model takes 1 to {self.config.frames} (img_size)")
        where = torch.device(device) if device is not None else self.patch_embed.fc.weight.device
        return dense_geometry((*self.config.grid, frames), self.config.windows, where)

    def to_patches(self, volume: Tensor) -> Tensor:
        """Volume (B, C, X, Y, Z, T) -> patches (B, P, p^3 C) in packed order.

        Raises:
            ValueError: the volume has another size than ``img_size`` (fewer frames are fine).
        """
        size = self.config.img_size
        if volume.ndim != 6 or volume.shape[1] != self.config.in_chans or tuple(volume.shape[2:5]) != size[:3]:
            raise ValueError(f"volume of shape {tuple(volume.shape)}: expected (B, {self.config.in_chans}, *{size})")
        p, q, r, _ = self.config.patch_size
        raster = rearrange(volume, "b c (x p) (y q) (z r) t -> b (x y z t) (p q r c)", p=p, q=q, r=r)
        return self.geometry(volume.shape[-1], volume.device).levels[0].from_raster(raster)

    def encode(self, tokens: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Embedded tokens (B, P, embed_dim) -> (last stage's tokens (B, P', C'), STRD drop rate (stages,))."""
        rates = []
        for i, (positions, stage) in enumerate(zip(self.pos_embeds, self.layers, strict=True)):
            strd = StageDropout(self.strd_config) if self.training and self.strd_config.enabled else None
            tokens = positions(tokens, geometry.levels[i])
            tokens = stage(tokens, geometry, strd, self.activation_checkpointing)
            rates.append(strd.rate() if strd else tokens.new_zeros((), dtype=torch.float32))
        return tokens, torch.stack(rates)

    def forward(self, volume: Tensor) -> Tensor:
        geometry = self.geometry(volume.shape[-1], volume.device)
        tokens, _ = self.encode(self.patch_embed(self.to_patches(volume)), geometry)
        return geometry.levels[-1].to_grid(tokens)


def initialise(module: nn.Module) -> None:
    """Linear layers start as Xavier-uniform with zero bias; for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

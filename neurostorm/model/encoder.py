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
from dataclasses import replace
from typing import Any, cast

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neurostorm.model.config import SwinConfig
from neurostorm.model.geometry.tokens import Geometry, TokenGeometry, TokenLevel, geometry_of
from neurostorm.model.geometry.windows import (
    Axes,
    WindowTable,
    gather_rows,
    join_rows,
    scatter_rows,
    split_rows,
    split_windows,
)
from neurostorm.model.mixers import Mixer
from neurostorm.model.mixers.attention import WindowAttention
from neurostorm.model.mixers.mamba import Mamba
from neurostorm.model.ops.dispatch import product_dtype
from neurostorm.model.ops.mlp import Mlp
from neurostorm.model.strd.dropout import StageDropout, StrdConfig

# mixer -> (name of its parameters in the released models, constructor of (width, heads, qkv_bias))
MIXERS: dict[str, tuple[str, Callable[[int, int, bool], Mixer]]] = {
    "attention": ("attn", WindowAttention),
    "mamba": ("mamba", Mamba),
}


_VARIANTS = 128  # compiled forms of a block's code: stages x tables x modes


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


class SwinEncoder(nn.Module):
    """4D Swin encoder: (B, C, X, Y, Z, T) -> (B, C', d, h, w, T), the last stage's features without a final norm.

    Args:
        config: its shape; validated here.
        strd: redundancy dropout, active in training mode.
        brain: bool (X, Y, Z) on the grid of the clips; needed where only brain patches are tokens.

    Attributes:
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        extra: JSON that travels with the saved model.

    Raises:
        ValueError: a field has an impossible value, or ``brain`` is missing, empty or of another shape.
    """

    brain_patches: Tensor | None  # bool (S, p^3): which voxels of each patch are brain

    def __init__(
        self,
        config: SwinConfig,
        strd: StrdConfig = StrdConfig(),  # noqa: B008 (frozen)
        brain: Tensor | None = None,
    ) -> None:
        super().__init__()
        config.validate()
        strd.validate()
        _check_encoder(config, strd, brain)
        self.config, self.strd_config = config, strd
        self.activation_checkpointing = False
        self.extra: dict[str, Any] = {}
        in_brain = None if brain is None else self._space_patches(brain.bool()[None])[0]
        self.register_buffer("brain_patches", in_brain, persistent=False)
        self._token_patches = None if in_brain is None or config.tokens == "dense" else in_brain.any(1).cpu().numpy()
        self.patch_embed = PatchEmbed(config)
        self.pos_embeds = nn.ModuleList(
            PositionalEmbedding(config.width(i), (*(n // 2**i for n in config.grid), config.frames))
            for i in range(config.stages)
        )
        self.layers = nn.ModuleList(Stage(config, i) for i in range(config.stages))
        self.apply(initialise)
        self.set_prompts(config.prompts)

    def set_prompts(self, count: int) -> None:
        """``count`` new prompts in every encoder block; 0 removes them."""
        self.config = replace(self.config, prompts=count)
        _check_encoder(self.config, self.strd_config, self.brain)
        for module in self.layers.modules():
            if isinstance(module, Block):
                module.set_prompts(count)

    @property
    def brain(self) -> Tensor | None:
        """The brain mask, bool (X, Y, Z), or None."""
        if self.brain_patches is None:
            return None
        (d, h, w), (p, q, r, _) = self.config.grid, self.config.patch_size
        return rearrange(self.brain_patches, "(d h w) (p q r) -> (d p) (h q) (w r)", d=d, h=h, w=w, p=p, q=q, r=r)

    @property
    def tokens_per_frame(self) -> int:
        """Patches that are tokens."""
        return self.config.space if self._token_patches is None else int(self._token_patches.sum())

    def geometry(self, frames: int, device: torch.device | str | None = None) -> Geometry:
        """Cached token geometry of clips of ``frames`` frames, on the parameters' device unless another is given.

        Raises:
            ValueError: ``frames`` is not in 1 .. the trained number.
        """
        config = self.config
        if not 1 <= frames <= config.frames:
            raise ValueError(f"a clip of {frames} frames: this model takes 1 to {config.frames} (img_size)")
        where = torch.device(device) if device is not None else self.patch_embed.fc.weight.device
        layout = config.window_layout(where.type)
        return geometry_of((*config.grid, frames), config.windows, where, layout, self._token_patches)

    def to_patches(self, volume: Tensor) -> Tensor:
        """Volume (B, C, X, Y, Z, T) -> patches (B, P, p^3 C) of the tokens, in packed order.

        Raises:
            ValueError: the volume has another size than ``img_size`` (fewer frames are fine).
        """
        return self.geometry(volume.shape[-1], volume.device).levels[0].pack(self._raster_patches(volume))

    def encode(self, tokens: Tensor, geometry: TokenGeometry) -> tuple[Tensor, Tensor]:
        """Embedded tokens (B, P, embed_dim) -> (last stage's tokens (B, P', C'), STRD drop rate (stages,))."""
        rates = []
        for i, (positions, stage) in enumerate(zip(self.pos_embeds, self.layers, strict=True)):
            strd = StageDropout(self.strd_config) if self.training and self.strd_config.enabled else None
            tokens = positions(tokens, geometry.levels[i])
            tokens = stage(tokens, geometry, strd, self.activation_checkpointing)
            rates.append(strd.rate() if strd else tokens.new_zeros((), dtype=torch.float32))
        return tokens, torch.stack(rates)

    def feature_tokens(self, patches: Tensor) -> Tensor:
        """Patches (B, P, p^3 C) in packed order -> the last stage's tokens (B, P', C'), nothing hidden."""
        return self.encode(self.patch_embed(patches), self.geometry(self._frames(patches), patches.device))[0]

    def features(self, volume: Tensor) -> Tensor:
        """(B, C, X, Y, Z, T) -> (B, C', d, h, w, T), nothing hidden; zero where no token exists."""
        geometry = self.geometry(volume.shape[-1], volume.device)
        embedded = self.patch_embed(self._raster_patches(volume))  # before packing, as it is much narrower after
        tokens, _ = self.encode(geometry.levels[0].pack(embedded), geometry)
        return geometry.levels[-1].to_grid(tokens)

    def forward(self, volume: Tensor) -> Tensor:
        return self.features(volume)

    def _raster_patches(self, volume: Tensor) -> Tensor:
        """(B, C, X, Y, Z, T) -> (B, P, p^3 C), the tokens' patches in raster order; only those are read."""
        size = self.config.img_size
        if volume.ndim != 6 or volume.shape[1] != self.config.in_chans or tuple(volume.shape[2:5]) != size[:3]:
            raise ValueError(f"volume of shape {tuple(volume.shape)}: expected (B, {self.config.in_chans}, *{size})")
        p, q, r, _ = self.config.patch_size
        grid = rearrange(volume, "b c (x p) (y q) (z r) t -> x y z b p q r c t", p=p, q=q, r=r)
        if self._token_patches is None:
            return rearrange(grid, "x y z b p q r c t -> b (x y z t) (p q r c)")
        chosen = torch.from_numpy(self._token_patches).to(volume.device).view(grid.shape[:3])
        return rearrange(grid[chosen], "s b p q r c t -> b (s t) (p q r c)")

    def _frames(self, patches: Tensor) -> int:
        frames, rest = divmod(patches.shape[1], self.tokens_per_frame)
        if rest or patches.shape[2] != self.config.patch_voxels:
            raise ValueError(
                f"patches of shape {tuple(patches.shape)}: expected (B, {self.tokens_per_frame} x frames, "
                f"{self.config.patch_voxels}) for img_size {self.config.img_size}, {self.config.tokens} tokens"
            )
        return frames

    def _space_patches(self, volume: Tensor) -> Tensor:
        """(B, X, Y, Z) -> (B, S, p^3)."""
        p, q, r, _ = self.config.patch_size
        return rearrange(volume, "b (x p) (y q) (z r) -> b (x y z) (p q r)", p=p, q=q, r=r)


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile every block of a network in place (``nn.Module.compile``): names and parameters stay as they are.

    ``options`` are those of ``torch.compile``. Shapes are taken as dynamic, as the windows of a masked clip are never
    the same; every width, table and mode is a variant of its own still, of which torch keeps too few by default.
    """
    for operation in (rearrange, reduce, repeat):  # else the reading of their patterns is traced too, for minutes
        torch._dynamo.allow_in_graph(operation)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(**{"dynamic": True, **options})


def initialise(module: nn.Module) -> None:
    """Linear layers start as Xavier-uniform with zero bias, but the scan's as its own; for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Mamba):
        module.reset_scan()


def _check_encoder(config: SwinConfig, strd: StrdConfig, brain: Tensor | None) -> None:
    if config.tokens == "brain" and brain is None:
        raise ValueError("brain = None: tokens='brain' needs the mask (X, Y, Z) of the clips' grid")
    if brain is not None and (tuple(brain.shape) != tuple(config.img_size[:3]) or not bool(brain.any())):
        raise ValueError(f"brain of shape {tuple(brain.shape)}: a non-empty mask of {config.img_size[:3]} is needed")
    if config.prompts and strd.enabled:
        raise ValueError(f"prompts = {config.prompts}: prompts belong to a frozen backbone, switch strd.enabled off")

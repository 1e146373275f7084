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

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from neurostorm.model.config import SwinConfig
from neurostorm.model.geometry.tokens import Geometry, TokenGeometry, geometry_of
from neurostorm.model.ops.blocks import Block, PatchEmbed, PositionalEmbedding, Stage, initialise
from neurostorm.model.strd.dropout import StageDropout, StrdConfig

_VARIANTS = 128  # compiled forms of a block's code: stages x tables x modes


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


def _check_encoder(config: SwinConfig, strd: StrdConfig, brain: Tensor | None) -> None:
    if config.tokens == "brain" and brain is None:
        raise ValueError("brain = None: tokens='brain' needs the mask (X, Y, Z) of the clips' grid")
    if brain is not None and (tuple(brain.shape) != tuple(config.img_size[:3]) or not bool(brain.any())):
        raise ValueError(f"brain of shape {tuple(brain.shape)}: a non-empty mask of {config.img_size[:3]} is needed")
    if config.prompts and strd.enabled:
        raise ValueError(f"prompts = {config.prompts}: prompts belong to a frozen backbone, switch strd.enabled off")

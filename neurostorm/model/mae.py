"""Masked autoencoder: hide tokens of a clip, encode all of it, predict the hidden voxels.

    patches (B, P, p^3) --embed--> hidden tokens replaced by a mask token --encoder--> latent
        --expand 2x2x2, blocks (per stage, coarse to fine), norm, linear--> prediction (B, P, p^3)
        --squared error on the counted voxels--> loss

Hiding comes before the positional embedding, so a hidden token still knows where and when it is. The decoder mirrors
the encoder without skip connections or positions. Counted are the voxels of hidden tokens: all of them as released
(``loss_on="all"``), or those in the brain and in the run's field of view (``loss_on="brain"``). Source: NeuroSTORM's
released MAE, whose parameter names this one has; any number of stages from two works here.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import embedding

from neurostorm.model.decoder import PatchExpanding, UpStage
from neurostorm.model.geometry import Geometry, patch_table
from neurostorm.model.masking import Blocks, MaskConfig, draw_mask, mask_blocks, mask_from_released
from neurostorm.model.strd import StrdConfig
from neurostorm.model.swin4d import SwinEncoder, initialise
from neurostorm.model.swin_config import SwinConfig

_FLAT = 1e-6  # variance below which a patch has nothing to normalise


class MaeOutput(NamedTuple):
    """What one forward pass gives; losses, rates and shares are float32, those without a gradient are detached.

    A tuple, so that wrappers which look for tensors in a module's output (ZeRO stage 3) find them. Given patches,
    token tensors are packed; given a volume, they are grids and rasters.
    """

    loss: Tensor  # (): mean of clip_loss, the same however clips are parted; released: mean of all counted voxels
    prediction: Tensor  # (B, P, p^3), or (B, 1, X, Y, Z, T); in the units of the input
    mask: Tensor  # bool (B, P), or (B, S * T) with t fastest; True = hidden
    latent: Tensor  # tokens of the last stage (B, P', C'), or (B, C', d, h, w, T)
    baseline: Tensor  # (): mean of clip_baseline
    strd_rates: Tensor  # (stages,): attention elements or tokens dropped over all, per encoder stage
    masked_fraction: Tensor  # (): share of tokens hidden
    clip_loss: Tensor  # (B,): squared error averaged over the clip's counted voxels, 0 if there are none
    clip_baseline: Tensor  # (B,): the same of predicting each voxel's mean


class MaskedAutoencoder(SwinEncoder):
    """Encoder, mask tokens, decoder and loss.

    Args:
        swin: shape of the encoder; two stages at least, one channel.
        mask: which tokens are hidden.
        strd: redundancy dropout of the encoder.
        loss_on: "brain" (voxels of hidden tokens that lie in ``brain``) or "all" (every voxel of hidden tokens).
        brain: bool (X, Y, Z) on the grid of the clips; needed for "brain", and where only brain patches are tokens.
        normalise_targets: the error is that of targets with mean 0 and variance 1 in each patch (over the voxels that
            may count); ``prediction`` is given back in the units of the input.
        atlas: integer (d, h, w), the region of each patch, 0 = none; needed for masks of atlas regions.

    Raises:
        ValueError: a field has an impossible value, ``brain`` or ``atlas`` is missing, empty or of another shape.
    """

    def __init__(
        self,
        swin: SwinConfig,
        mask: MaskConfig = MaskConfig(),  # noqa: B008 (frozen)
        strd: StrdConfig = StrdConfig(),  # noqa: B008 (frozen)
        loss_on: str = "brain",
        brain: Tensor | None = None,
        normalise_targets: bool = False,
        atlas: Tensor | None = None,
    ) -> None:
        super().__init__(swin, strd, brain)
        mask.validate()
        _check_mae(swin, mask, loss_on, brain, atlas)
        self.mask_config, self.loss_on, self.normalise_targets = mask, loss_on, normalise_targets
        self.mask_window = mask.window or swin.window
        self._blocks_of: dict[tuple[int, torch.device], Blocks] = {}
        window, atlas_kind = mask.kind == "window", mask.kind == "atlas"
        cells = self.mask_window[0] * self.mask_window[1] * self.mask_window[2] * self.mask_window[3]
        width = swin.embed_dim
        self.mask_token = nn.Parameter(torch.zeros(width), requires_grad=not window and not atlas_kind)
        self.window_mask_token = nn.Parameter(torch.zeros(cells, width), requires_grad=window)
        self.atlas_mask_token = nn.Parameter(torch.zeros(width), requires_grad=atlas_kind)
        if atlas is not None:
            self.register_buffer("atlas_map", atlas.to(torch.int32))
        self.first_patch_expanding = PatchExpanding(swin, swin.stages - 1)
        self.layers_up = nn.ModuleList(UpStage(swin, stage) for stage in reversed(range(swin.stages - 1)))
        self.norm_up = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, swin.patch_voxels)
        for module in (self.first_patch_expanding, self.layers_up, self.decoder_pred):
            module.apply(initialise)

    def encoder(self) -> SwinEncoder:
        """The encoder alone, sharing this model's parameters."""
        with torch.device("meta"):
            encoder = SwinEncoder(self.config, self.strd_config, self.brain)
        for name in ("patch_embed", "pos_embeds", "layers"):
            setattr(encoder, name, getattr(self, name))
        encoder.extra = self.extra
        return encoder.train(self.training)

    def patch_table(self, brain: Tensor) -> Tensor:
        """Long (S, p^3): where each patch's voxels lie among the packed voxels of ``brain``; V = outside.

        See :func:`neurostorm.model.geometry.patch_table`.
        """
        return patch_table(brain, self.config.patch_size)

    def to_volume(self, patches: Tensor) -> Tensor:
        """Patches (B, P, p^3) in packed order -> (B, 1, X, Y, Z, T), zero where no token exists."""
        raster = self.geometry(self._frames(patches), patches.device).levels[0].to_raster(patches)
        d, h, w = self.config.grid
        p, q, r, _ = self.config.patch_size
        pattern = "b (d h w t) (p q r) -> b 1 (d p) (h q) (w r) t"
        return rearrange(raster, pattern, d=d, h=h, w=w, p=p, q=q, r=r)

    def blocks(self, frames: int, device: torch.device | str | None = None) -> Blocks:
        """The blocks that masks of clips of ``frames`` frames are drawn from; kept."""
        level = self.geometry(frames, device).levels[0]
        key = (frames, level.device)
        if key not in self._blocks_of:
            atlas = self.get_buffer("atlas_map") if self.mask_config.kind == "atlas" else None
            self._blocks_of[key] = mask_blocks(level, self.mask_config, self.mask_window, atlas)
        return self._blocks_of[key]

    def draw_mask(
        self,
        batch: int,
        frames: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Bool (B, P), True = hidden, in packed order, equally many in each sample; see `masking.py`."""
        where = self.geometry(frames, device).levels[0].device
        return draw_mask(self.blocks(frames, device), self.mask_config.ratio, batch, generator, where)

    def forward(  # type: ignore[override]
        self,
        clip: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        inside: Tensor | None = None,
        centre: Tensor | None = None,
    ) -> MaeOutput:
        """Mask and reconstruct a batch.

        Args:
            clip: volume (B, 1, X, Y, Z, T) or patches (B, P, p^3) in packed order, floating point.
            mask: hidden = non-zero; drawn with ``generator`` when None. For patches bool (B, P) in packed order; for a
                volume (B, S * T) or (B, blocks) in raster order with the frame fastest, as the released models take it.
            inside: the run's field of view, True = measured: bool (B, X, Y, Z) for a volume, (B, S, p^3) for patches.
            centre: each voxel's own mean, shaped as ``clip``, for the baseline; None when it is zero (voxel z).
        """
        if clip.ndim == 3:
            return self.forward_patches(clip, mask, generator, inside, centre)
        patches, frames = self.to_patches(clip), clip.shape[-1]
        finest, *_, coarsest = self.geometry(frames, clip.device).levels
        if mask is not None:
            mask = mask_from_released(mask.to(clip.device), self.blocks(frames, clip.device), finest)
        if inside is not None:
            inside = self._space_patches(inside)
        if centre is not None:
            centre = self.to_patches(centre)
        out = self.forward_patches(patches, mask, generator, inside, centre)
        return out._replace(
            prediction=self.to_volume(out.prediction),
            latent=coarsest.to_grid(out.latent),
            mask=finest.to_raster(out.mask.unsqueeze(-1)).squeeze(-1),
        )

    def forward_patches(
        self,
        patches: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        inside: Tensor | None = None,
        centre: Tensor | None = None,
    ) -> MaeOutput:
        """As :meth:`forward` for patches (B, P, p^3); ``inside`` is bool (B, S, p^3)."""
        frames = self._frames(patches)
        geometry = self.geometry(frames, patches.device)
        if mask is None:
            mask = self.draw_mask(len(patches), frames, generator, patches.device)
        tokens = self.hide(self.patch_embed(patches), mask, geometry)
        latent, strd_rates = self.encode(tokens, geometry)
        prediction = self.decode(latent, geometry).float()
        valid = self._valid(geometry, inside)
        counted = mask.unsqueeze(-1) if valid is None else mask.unsqueeze(-1) & valid
        target = patches.float()
        deviation = target if centre is None else target - centre.float()
        if self.normalise_targets:
            mean, std = patch_moments(target, valid)
            error = prediction - (target - mean) / std
            prediction, deviation = prediction * std + mean, deviation / std
        else:
            error = prediction - target
        squares, voxels = square_sums(error, counted)
        clip_loss = squares / voxels.clamp(min=1)
        clip_baseline = square_sums(deviation, counted)[0] / voxels.clamp(min=1)
        # All samples hide equally much, so the two differ only for masks or fields of view given from outside.
        loss = clip_loss.mean() if self.loss_on == "brain" else squares.sum() / voxels.sum().clamp(min=1)
        return MaeOutput(
            loss=loss,
            prediction=prediction,
            mask=mask,
            latent=latent,
            baseline=clip_baseline.mean(),
            strd_rates=strd_rates,
            masked_fraction=mask.float().mean(),
            clip_loss=clip_loss,
            clip_baseline=clip_baseline,
        )

    def hide(self, tokens: Tensor, mask: Tensor, geometry: Geometry) -> Tensor:
        """Replace hidden tokens (B, P, C): by one vector, or for windows by one vector per place in the window."""
        token: Tensor = self.mask_token
        if self.mask_config.kind == "window":
            frames = geometry.levels[0].grid[3]
            token = embedding(self.blocks(frames, tokens.device).position_in_block, self.window_mask_token)
        elif self.mask_config.kind == "atlas":
            token = self.atlas_mask_token
        return torch.where(mask.unsqueeze(-1), token.to(tokens.dtype), tokens)

    def decode(self, latent: Tensor, geometry: Geometry) -> Tensor:
        """Tokens of the last stage (B, P', C') -> predicted patches (B, P, p^3)."""
        x = self.first_patch_expanding(latent, geometry.merges[-1])
        for stage in self.layers_up:
            x = stage(x, geometry, self.activation_checkpointing)
        return self.decoder_pred(self.norm_up(x))

    def _valid(self, geometry: Geometry, inside: Tensor | None) -> Tensor | None:
        """Bool, broadcastable to (B, P, p^3): the voxels that may count; None for all of them."""
        if self.loss_on == "all":  # also what lies outside the field of view, but not a clip without any data
            return None if inside is None else inside.any(2).any(1)[:, None, None]
        space = geometry.levels[0].space_of_token
        valid = None if inside is None else inside[:, space]
        if self.brain_patches is not None:
            brain = self.brain_patches[space]
            valid = brain if valid is None else valid & brain
        return valid


def patch_moments(patches: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, P, 1) of each patch over its valid voxels; 0 and 1 where there are none."""
    weight = torch.ones_like(patches) if valid is None else valid.expand_as(patches).to(patches.dtype)
    voxels = weight.sum(-1, keepdim=True).clamp(min=1)
    mean = (patches * weight).sum(-1, keepdim=True) / voxels
    variance = ((patches - mean).square() * weight).sum(-1, keepdim=True) / voxels
    return mean, torch.where(variance > _FLAT, variance, 1.0).sqrt()


def square_sums(error: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) sums of error^2 over each sample's counted voxels (the others may hold anything), and (B,) their number."""
    counted = counted.expand_as(error)
    return torch.where(counted, error, 0.0).square().sum(dim=(1, 2)), counted.sum(dim=(1, 2))


def _check_mae(swin: SwinConfig, mask: MaskConfig, loss_on: str, brain: Tensor | None, atlas: Tensor | None) -> None:
    if swin.stages < 2:
        raise ValueError(f"depths = {swin.depths}: the autoencoder needs at least two stages")
    if swin.in_chans != 1:
        raise ValueError(f"in_chans = {swin.in_chans}: the autoencoder predicts one channel")
    if loss_on not in ("brain", "all"):
        raise ValueError(f"loss_on = {loss_on!r}: 'brain' or 'all'")
    if loss_on == "brain" and brain is None:
        raise ValueError("brain = None: loss_on='brain' needs the mask (X, Y, Z) of the clips' grid")
    if mask.kind == "atlas" and atlas is None:
        raise ValueError("atlas = None: masks of atlas regions need the region of each patch")
    if atlas is not None and (tuple(atlas.shape) != swin.grid or not bool((atlas > 0).any())):
        raise ValueError(f"atlas of shape {tuple(atlas.shape)}: {swin.grid} labels with a positive one are needed")

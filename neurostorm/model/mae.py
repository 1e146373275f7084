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

from neurostorm.model.geometry import Geometry, WindowTable, join_windows, patch_table
from neurostorm.model.masking import MaskConfig, draw_mask, mask_blocks
from neurostorm.model.strd import StrdConfig
from neurostorm.model.swin4d import BlockStack, SwinConfig, SwinEncoder, initialise


class MaeOutput(NamedTuple):
    """What one forward pass gives; losses, rates and shares are float32, those without a gradient are detached.

    A tuple, so that wrappers which look for tensors in a module's output (ZeRO stage 3) find them.
    """

    loss: Tensor  # (): mean of clip_loss, the same however clips are parted into batches
    prediction: Tensor  # (B, P, p^3) in packed token order
    mask: Tensor  # bool (B, P), True = hidden
    latent: Tensor  # (B, P', C') tokens of the last stage
    baseline: Tensor  # (): mean of clip_baseline
    strd_rates: Tensor  # (stages,): attention elements dropped over all, per encoder stage
    masked_fraction: Tensor  # (): share of tokens hidden
    clip_loss: Tensor  # (B,): squared error averaged over the clip's counted voxels, 0 if there are none
    clip_baseline: Tensor  # (B,): the same of predicting each voxel's mean


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


class MaskedAutoencoder(SwinEncoder):
    """Encoder, mask tokens, decoder and loss.

    Args:
        swin: shape of the encoder; two stages at least, one channel.
        mask: which tokens are hidden.
        strd: redundancy dropout of the encoder.
        loss_on: "brain" (voxels of hidden tokens that lie in ``brain``) or "all" (every voxel of hidden tokens).
        brain: bool (X, Y, Z) on the grid of the clips; needed for "brain".

    Raises:
        ValueError: a field has an impossible value, ``brain`` is missing, empty or of another shape.
    """

    brain_patches: Tensor | None  # bool (S, p^3): which voxels of each patch are brain

    def __init__(
        self,
        swin: SwinConfig,
        mask: MaskConfig = MaskConfig(),  # noqa: B008 (frozen)
        strd: StrdConfig = StrdConfig(),  # noqa: B008 (frozen)
        loss_on: str = "brain",
        brain: Tensor | None = None,
    ) -> None:
        super().__init__(swin, strd)
        mask.validate()
        _check_mae(swin, loss_on, brain)
        self.mask_config, self.loss_on = mask, loss_on
        self.mask_window = mask.window or swin.window
        d, h, w, t = self.mask_window
        self.mask_token = nn.Parameter(torch.zeros(swin.embed_dim), requires_grad=mask.kind != "window")
        self.window_mask_token = nn.Parameter(
            torch.zeros(d * h * w * t, swin.embed_dim), requires_grad=mask.kind == "window"
        )
        self.first_patch_expanding = PatchExpanding(swin, swin.stages - 1)
        self.layers_up = nn.ModuleList(UpStage(swin, stage) for stage in reversed(range(swin.stages - 1)))
        self.norm_up = nn.LayerNorm(swin.embed_dim)
        self.decoder_pred = nn.Linear(swin.embed_dim, swin.patch_voxels)
        in_brain = None if brain is None else self._space_patches(brain.bool()[None])[0]
        self.register_buffer("brain_patches", in_brain, persistent=False)
        for module in (self.first_patch_expanding, self.layers_up, self.decoder_pred):
            module.apply(initialise)

    @property
    def brain(self) -> Tensor | None:
        """The brain mask, bool (X, Y, Z), or None."""
        if self.brain_patches is None:
            return None
        (d, h, w), (p, q, r, _) = self.config.grid, self.config.patch_size
        return rearrange(self.brain_patches, "(d h w) (p q r) -> (d p) (h q) (w r)", d=d, h=h, w=w, p=p, q=q, r=r)

    def patch_table(self, brain: Tensor) -> Tensor:
        """Long (S, p^3): where each patch's voxels lie among the packed voxels of ``brain``; V = outside.

        See :func:`neurostorm.model.geometry.patch_table`.
        """
        return patch_table(brain, self.config.patch_size)

    def to_volume(self, patches: Tensor) -> Tensor:
        """Patches (B, P, p^3) in packed order -> (B, 1, X, Y, Z, T)."""
        raster = self.geometry(self._frames(patches), patches.device).levels[0].to_raster(patches)
        d, h, w = self.config.grid
        p, q, r, _ = self.config.patch_size
        pattern = "b (d h w t) (p q r) -> b 1 (d p) (h q) (w r) t"
        return rearrange(raster, pattern, d=d, h=h, w=w, p=p, q=q, r=r)

    def draw_mask(
        self,
        batch: int,
        frames: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Bool (B, P), True = hidden, in packed order: exactly ``int(blocks * ratio)`` blocks of each sample."""
        level = self.geometry(frames, device).levels[0]
        blocks = mask_blocks(level, self.mask_config, self.mask_window)
        return draw_mask(blocks, self.mask_config.ratio, batch, generator, level.device)

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
            mask: bool (B, P) in packed order; drawn with ``generator`` when None.
            inside: the run's field of view, True = measured: bool (B, X, Y, Z) for a volume, (B, S, p^3) for patches.
            centre: each voxel's own mean, shaped as ``clip``, for the baseline; None when it is zero (voxel z).
        """
        if clip.ndim == 3:
            return self.forward_patches(clip, mask, generator, inside, centre)
        if inside is not None:
            inside = self._space_patches(inside)
        if centre is not None:
            centre = self.to_patches(centre)
        return self.forward_patches(self.to_patches(clip), mask, generator, inside, centre)

    def forward_patches(
        self,
        patches: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        inside: Tensor | None = None,
        centre: Tensor | None = None,
    ) -> MaeOutput:
        """As :meth:`forward` for patches (B, P, p^3); ``inside`` is bool (B, S, p^3)."""
        geometry = self.geometry(self._frames(patches), patches.device)
        if mask is None:
            mask = self.draw_mask(len(patches), self._frames(patches), generator, patches.device)
        tokens = self.hide(self.patch_embed(patches), mask, geometry)
        latent, strd_rates = self.encode(tokens, geometry)
        prediction = self.decode(latent, geometry)
        counted = self._counted(mask, geometry, inside)
        clip_loss = mean_square(prediction.float() - patches.float(), counted)
        with torch.no_grad():
            deviation = patches.float() if centre is None else patches.float() - centre.float()
            clip_baseline = mean_square(deviation, counted)
        return MaeOutput(
            loss=clip_loss.mean(),
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
        if self.mask_config.kind == "window":
            place = geometry.levels[0].blocks(self.mask_window).position_in_block
            token = embedding(place, self.window_mask_token)
        else:
            token = self.mask_token
        return torch.where(mask.unsqueeze(-1), token.to(tokens.dtype), tokens)

    def decode(self, latent: Tensor, geometry: Geometry) -> Tensor:
        """Tokens of the last stage (B, P', C') -> predicted patches (B, P, p^3)."""
        x = self.first_patch_expanding(latent, geometry.merges[-1])
        for stage in self.layers_up:
            x = stage(x, geometry, self.activation_checkpointing)
        return self.decoder_pred(self.norm_up(x))

    def _counted(self, mask: Tensor, geometry: Geometry, inside: Tensor | None) -> Tensor:
        """Bool, broadcastable to (B, P, p^3): the voxels that the loss counts."""
        counted = mask.unsqueeze(-1)
        if self.loss_on == "brain" and self.brain_patches is not None:
            counted = counted & self.brain_patches[geometry.space_of_token]
        if inside is not None:
            counted = counted & inside[:, geometry.space_of_token]
        return counted

    def _frames(self, patches: Tensor) -> int:
        frames, rest = divmod(patches.shape[1], self.config.space)
        if rest or patches.shape[2] != self.config.patch_voxels:
            raise ValueError(
                f"patches of shape {tuple(patches.shape)}: expected (B, {self.config.space} x frames, "
                f"{self.config.patch_voxels}) for img_size {self.config.img_size}"
            )
        return frames

    def _space_patches(self, volume: Tensor) -> Tensor:
        """(B, X, Y, Z) -> (B, S, p^3)."""
        p, q, r, _ = self.config.patch_size
        return rearrange(volume, "b (x p) (y q) (z r) -> b (x y z) (p q r)", p=p, q=q, r=r)


def mean_square(error: Tensor, counted: Tensor) -> Tensor:
    """(B,): mean of error^2 over each sample's counted voxels, 0 if there are none; the others may hold anything."""
    counted = counted.expand_as(error)
    total = torch.where(counted, error, 0.0).square().sum(dim=(1, 2))
    return total / counted.sum(dim=(1, 2)).clamp(min=1)


def _check_mae(swin: SwinConfig, loss_on: str, brain: Tensor | None) -> None:
    if swin.stages < 2:
        raise ValueError(f"depths = {swin.depths}: the autoencoder needs at least two stages")
    if swin.in_chans != 1:
        raise ValueError(f"in_chans = {swin.in_chans}: the autoencoder predicts one channel")
    if loss_on not in ("brain", "all"):
        raise ValueError(f"loss_on = {loss_on!r}: 'brain' or 'all'")
    if loss_on == "brain" and brain is None:
        raise ValueError("brain = None: loss_on='brain' needs the mask (X, Y, Z) of the clips' grid")
    if brain is not None and (tuple(brain.shape) != tuple(swin.img_size[:3]) or not bool(brain.any())):
        raise ValueError(f"brain of shape {tuple(brain.shape)}: a non-empty mask of {swin.img_size[:3]} is needed")

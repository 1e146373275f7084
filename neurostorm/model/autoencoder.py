"""Masked autoencoder: hide tokens of a clip, predict the hidden voxels.

    decoder="paper": all tokens, as released
    patches (B, P, p^3) --embed--> hidden tokens replaced by a mask token --encoder--> latent
        --expand 2x2x2, blocks (per stage, coarse to fine), norm, linear--> prediction (B, P, p^3)

    decoder="light": visible tokens, then hidden ones
    patches (B, P, p^3) --take the visible--> embed --encoder over these alone--> latent of what is visible
        --light.py: mask tokens for the rest of the coarsest level, up to one above the finest--> hidden patches

    --squared error on the counted voxels--> loss

Counted are the voxels of hidden tokens: all of them as released (``loss_on="all"``), or those in the brain and in the
run's field of view (``loss_on="brain"``).

"paper": hiding comes before the positional embedding, so a hidden token still knows where and when it is, and takes
part in every window. The decoder mirrors the encoder without skip connections or positions. Source: NeuroSTORM's
released MAE, whose parameter names this one has; any number of stages from two works here.

"light" differs from the paper so that tokens which carry nothing cost nothing (He et al. 2022, "Masked Autoencoders Are
Scalable Vision Learners"): the encoder computes what it would compute in the dense model if hidden tokens were keys for
nobody and read as zero at merges, which is also what it meets downstream, where nothing is hidden; and the decoder
spends its blocks, which attend, where there are an eighth as many tokens. With the grid's brain patches for tokens, no
token that is computed is background.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from neurostorm.model.config import SwinConfig
from neurostorm.model.decoders import DECODERS
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.geometry.sparse import VisibleTokens
from neurostorm.model.geometry.tokens import Geometry, SubsetGeometry, patch_table
from neurostorm.model.losses.chunked import Scores
from neurostorm.model.masking.masks import Blocks, MaskConfig, draw_mask, mask_blocks, mask_from_released
from neurostorm.model.strd.dropout import StrdConfig


class MaeOutput(NamedTuple):
    """What one forward pass gives; losses, rates and shares are float32, those without a gradient are detached.

    A tuple, so that wrappers which look for tensors in a module's output (ZeRO stage 3) find them. Given patches,
    token tensors are packed; given a volume, they are grids and rasters.
    """

    loss: Tensor  # (): mean of clip_loss, the same however clips are parted; released: mean of all counted voxels
    # (B, P, p^3), or (B, 1, X, Y, Z, T); in the units of the input. Of the light decoder without gradient, 0 where
    # nothing is hidden, and (B, 0, p^3) in training, where nobody looks.
    prediction: Tensor
    mask: Tensor  # bool (B, P), or (B, S * T) with t fastest; True = hidden
    latent: Tensor  # tokens of the last stage (B, P', C'), or (B, C', d, h, w, T)
    baseline: Tensor  # (): mean of clip_baseline
    strd_rates: Tensor  # (stages,): attention elements or tokens dropped over all, per encoder stage
    masked_fraction: Tensor  # (): share of tokens hidden
    clip_loss: Tensor  # (B,): squared error averaged over the clip's counted voxels, 0 if there are none
    # (B,): the same of predicting each voxel's mean; of normalised targets each patch's mean, which costs 1
    clip_baseline: Tensor


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
        decoder: "paper" (every token through encoder and decoder) or "light" (the visible ones through the encoder, a
            decoder of the hidden ones; see the module).
        decoder_depth: blocks of the light decoder.
        predicted: share of the hidden tokens that the light decoder predicts and the loss counts, drawn anew each time.

    Attributes:
        visible: makes the geometry of what a mask leaves visible.

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
        decoder: str = "paper",
        decoder_depth: int = 2,
        predicted: float = 1.0,
    ) -> None:
        super().__init__(swin, strd, brain)
        mask.validate()
        _check_mae(swin, mask, loss_on, brain, atlas, decoder, predicted)
        self.mask_config, self.loss_on, self.normalise_targets = mask, loss_on, normalise_targets
        self.decoder, self.decoder_depth, self.predicted = decoder, decoder_depth, predicted
        self.mask_window = mask.window or swin.window
        self._blocks_of: dict[tuple[int, torch.device], Blocks] = {}
        self.visible = VisibleTokens(swin)
        if atlas is not None:
            self.register_buffer("atlas_map", atlas.to(torch.int32))
        DECODERS[decoder].attach(self, decoder_depth)

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

        See :func:`neurostorm.model.geometry.tokens.patch_table`.
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
                It had better be on the CPU: with the light decoder the host counts what is hidden.
            inside: the run's field of view, True = measured: bool (B, X, Y, Z) for a volume, (B, S, p^3) for patches.
            centre: each voxel's own mean, shaped as ``clip``, for the baseline; None when it is zero (voxel z). The
                baseline of normalised targets is each patch's mean, which needs none.

        Raises:
            ValueError: a size is another than the model's; with the light decoder also a mask that hides nothing,
                everything, or more of one sample than of another.
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
            prediction=self.to_volume(out.prediction) if out.prediction.shape[1] else out.prediction,
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
        decoder = DECODERS[self.decoder]
        if mask is None:
            where = "cpu" if generator is None else generator.device
            mask = self.draw_mask(len(patches), frames, generator, where if decoder.visible_alone else patches.device)
        return decoder.reconstruct(self, patches, mask != 0, generator, inside, centre)

    def _output(
        self, scores: Scores, prediction: Tensor, mask: Tensor, latent: Tensor, strd_rates: Tensor
    ) -> MaeOutput:
        clip_loss = scores.squares / scores.voxels.clamp(min=1)
        clip_baseline = scores.baseline / scores.voxels.clamp(min=1)
        # All samples hide equally much, so the two differ only for masks or fields of view given from outside.
        loss = clip_loss.mean() if self.loss_on == "brain" else scores.squares.sum() / scores.voxels.sum().clamp(min=1)
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

    def visible_geometry(self, mask: Tensor, geometry: Geometry) -> SubsetGeometry:
        """The tokens that ``mask``, bool (B, P) in the order of ``geometry``, leaves visible."""
        return self.visible.geometry(mask, geometry, self.draw_mask)


def _check_mae(
    swin: SwinConfig, mask: MaskConfig, loss_on: str, brain: Tensor | None, atlas: Tensor | None, decoder: str,
    predicted: float,
) -> None:  # fmt: skip
    if decoder not in DECODERS:
        raise ValueError(f"decoder = {decoder!r}: one of {', '.join(DECODERS)}")
    DECODERS[decoder].check(swin, predicted)
    if not 0.0 < predicted <= 1.0:
        raise ValueError(f"predicted = {predicted}: above 0, up to 1")
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

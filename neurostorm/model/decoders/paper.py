"""The released decoder's parts: expansion of tokens into their children, and blocks at each level on the way up.

    latent (B, P', C') --expand 2 x 2 x 2--> finer level --blocks, expand--> ... --> finest level, blocks

No skip connections, no positions, no prompts, no STRD. Children that do not exist are dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import embedding

from neurostorm.model.config import SwinConfig
from neurostorm.model.geometry.tokens import Geometry
from neurostorm.model.geometry.windows import WindowTable, join_windows
from neurostorm.model.losses.chunked import Scores, patch_moments, square_sums
from neurostorm.model.ops.blocks import BlockStack, initialise

if TYPE_CHECKING:
    from neurostorm.model.autoencoder import MaeOutput, MaskedAutoencoder
    from neurostorm.model.cost import Count


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


class _Parts(Protocol):
    """What `attach` adds to a model."""

    mask_token: Tensor
    window_mask_token: Tensor
    atlas_mask_token: Tensor
    first_patch_expanding: PatchExpanding
    layers_up: nn.ModuleList
    norm_up: nn.LayerNorm
    decoder_pred: nn.Linear


def _parts(model: MaskedAutoencoder) -> _Parts:
    return cast(_Parts, model)


class Paper:
    """The decoder `paper` of the registry: every token passes through encoder and decoder, as released."""

    name, visible_alone = "paper", False

    def check(self, swin: SwinConfig, predicted: float) -> None:
        """ValueError for a share of hidden tokens: all are predicted."""
        if predicted < 1.0:
            raise ValueError(f"predicted = {predicted}: the paper's decoder predicts everything")

    def attach(self, model: MaskedAutoencoder, depth: int) -> None:
        """Adds mask tokens, stages and the prediction under the released names; `depth` has no meaning here."""
        window, atlas_kind = model.mask_config.kind == "window", model.mask_config.kind == "atlas"
        cells = model.mask_window[0] * model.mask_window[1] * model.mask_window[2] * model.mask_window[3]
        width = model.config.embed_dim
        model.mask_token = nn.Parameter(torch.zeros(width), requires_grad=not window and not atlas_kind)
        model.window_mask_token = nn.Parameter(torch.zeros(cells, width), requires_grad=window)
        model.atlas_mask_token = nn.Parameter(torch.zeros(width), requires_grad=atlas_kind)
        model.first_patch_expanding = PatchExpanding(model.config, model.config.stages - 1)
        model.layers_up = nn.ModuleList(
            UpStage(model.config, stage) for stage in reversed(range(model.config.stages - 1))
        )
        model.norm_up = nn.LayerNorm(width)
        model.decoder_pred = nn.Linear(width, model.config.patch_voxels)
        for module in (model.first_patch_expanding, model.layers_up, model.decoder_pred):
            module.apply(initialise)

    def reconstruct(
        self,
        model: MaskedAutoencoder,
        patches: Tensor,
        mask: Tensor,
        generator: torch.Generator | None,
        inside: Tensor | None,
        centre: Tensor | None,
    ) -> MaeOutput:
        """See `Decoder`."""
        geometry = model.geometry(model._frames(patches), patches.device)
        mask = mask.to(patches.device, non_blocking=True)
        tokens = self.hide(model, model.patch_embed(patches), mask, geometry)
        latent, strd_rates = model.encode(tokens, geometry)
        prediction = self.decode(model, latent, geometry).float()
        valid = _valid(model, geometry, inside)
        counted = mask.unsqueeze(-1) if valid is None else mask.unsqueeze(-1) & valid
        target = patches.float()
        if model.normalise_targets:
            mean, std = patch_moments(target, valid)
            deviation = (target - mean) / std  # the mean of what is predicted is 0
            error = prediction - deviation
            prediction = prediction * std + mean
        else:
            deviation = target if centre is None else target - centre.float()
            error = prediction - target
        squares, voxels = square_sums(error, counted)
        scores = Scores(squares, square_sums(deviation, counted)[0], voxels)
        return model._output(scores, prediction, mask, latent, strd_rates)

    def hide(self, model: MaskedAutoencoder, tokens: Tensor, mask: Tensor, geometry: Geometry) -> Tensor:
        """Replace hidden tokens (B, P, C): by one vector, or for windows by one per place in the window."""
        token = _parts(model).mask_token
        if model.mask_config.kind == "window":
            frames = geometry.levels[0].grid[3]
            token = embedding(model.blocks(frames, tokens.device).position_in_block, _parts(model).window_mask_token)
        elif model.mask_config.kind == "atlas":
            token = _parts(model).atlas_mask_token
        return torch.where(mask.unsqueeze(-1), token.to(tokens.dtype), tokens)

    def decode(self, model: MaskedAutoencoder, latent: Tensor, geometry: Geometry) -> Tensor:
        """Tokens of the last stage (B, P', C') -> predicted patches (B, P, p^3)."""
        x = _parts(model).first_patch_expanding(latent, geometry.merges[-1])
        for stage in _parts(model).layers_up:
            x = stage(x, geometry, model.activation_checkpointing)
        return _parts(model).decoder_pred(_parts(model).norm_up(x))

    def count(self, count: Count, model: MaskedAutoencoder, geometry: Geometry, hidden: int) -> None:
        """Every token of every level."""
        config, tokens = model.config, [len(level) for level in geometry.levels]
        count.expansion(_parts(model).first_patch_expanding, tokens[-1])
        for i, stage in zip(reversed(range(config.stages - 1)), _parts(model).layers_up, strict=True):
            assert isinstance(stage, UpStage)
            count.blocks(stage, [geometry.levels[i].windows(config.window, shift) for shift in (False, True)])
            if stage.upsample is not None:
                count.expansion(stage.upsample, tokens[i])
        count.linear([_parts(model).decoder_pred], tokens[0])
        count.kept += tokens[0] * (2 * config.embed_dim + config.patch_voxels)  # norm's input and output, error


def _valid(model: MaskedAutoencoder, geometry: Geometry, inside: Tensor | None) -> Tensor | None:
    """Bool, broadcastable to (B, P, p^3): the voxels that may count; None for all of them."""
    if model.loss_on == "all":  # also what lies outside the field of view, but not a clip without any data
        return None if inside is None else inside.any(2).any(1)[:, None, None]
    space = geometry.levels[0].space_of_token
    valid = None if inside is None else inside[:, space]
    if model.brain_patches is not None:
        brain = model.brain_patches[space]
        valid = brain if valid is None else valid & brain
    return valid

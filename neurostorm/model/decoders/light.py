"""The light decoder: it meets the hidden patches where they are few, and predicts no others.

    latent of the visible tokens --fill--> every token of the coarsest level (B, P', C'), hidden ones a mask token
        --+ position, expand 2 x 2 x 2--> ... --> level 1, + position, blocks
        --expand, the children that are asked for, norm--> (B, H, C) --`pred`, in score.py--> their patches (B, H, p^3)

The released decoder has blocks at every level, works on every token of the finest one, most of which are visible or
hold no brain, and costs as much as the encoder. This one has blocks at level 1 alone: there a token stands for 2 x 2 x
2 patches, so that there are an eighth as many, and only the children that the loss counts are made from it. Nothing is
lost where the mask hides whole windows, since the 8 patches of such a token are hidden together; what a single patch
knows of its visible siblings reaches it through their parent. Above level 1 the encoder has looked around already: a
token of the coarsest level of which nothing is visible is a mask token, which few are; of another the encoder has made
one token of what is visible in it, and expansions and positions tell which of its children are meant.

The blocks attend, whatever the encoder's mixer is: a hidden token has no place in an order, and a scan takes four times
as long (tools/BENCHMARKS.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from neurostorm.model.config import SwinConfig
from neurostorm.model.decoders.paper import PatchExpanding
from neurostorm.model.geometry.tokens import Geometry, numbers_of, put_tokens
from neurostorm.model.losses.chunked import Targets, predict_rows, score_rows
from neurostorm.model.ops.blocks import BlockStack, PositionalEmbedding, initialise

if TYPE_CHECKING:
    from neurostorm.model.autoencoder import MaeOutput, MaskedAutoencoder
    from neurostorm.model.cost import Count


class LightDecoder(nn.Module):
    """See the module.

    Args:
        swin: shape of the encoder, two stages at least.
        depth: blocks at level 1.
    """

    def __init__(self, swin: SwinConfig, depth: int) -> None:
        super().__init__()
        if swin.stages < 2 or depth < 1:
            raise ValueError(f"depths = {swin.depths}, depth = {depth}: at least two stages and one block")
        self.mask_token = nn.Parameter(torch.empty(swin.width(swin.stages - 1)))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        stages = range(swin.stages - 1, 0, -1)  # coarse to fine, down to level 1
        self.positions = nn.ModuleList(
            PositionalEmbedding(swin.width(i), (*(n // 2**i for n in swin.grid), swin.frames)) for i in stages
        )
        self.expansions = nn.ModuleList(PatchExpanding(swin, i) for i in stages if i > 1)
        self.blocks = BlockStack(replace(swin, mixer="attention"), 1, [0.0] * depth)
        self.window = swin.window
        width = swin.embed_dim
        self.to_children = nn.Linear(swin.width(1), 8 * width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.pred = nn.Linear(width, swin.patch_voxels)

    def fill(self, latent: Tensor, place: Tensor) -> Tensor:
        """Visible tokens (1, V, C') of all samples -> (B, P', C'); `place` long (B, P'): number of each, V: none."""
        rows = torch.cat([latent[0], self.mask_token.to(latent.dtype)[None]])
        return rows.index_select(0, place.flatten()).view(*place.shape, -1)

    def forward(
        self, latent: Tensor, place: Tensor, geometry: Geometry, asked: Tensor, recompute: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What is visible -> all tokens of the coarsest level (B, P', C'), and `pred`'s input of ``asked`` (B, H, C).

        Args:
            latent, place: as `fill` takes them.
            geometry: of all tokens, which the samples share.
            asked: long (B, H), packed numbers of tokens of the finest level.
            recompute: make each block's activations again in the backward pass.
        """
        full = x = self.fill(latent, place)
        above = zip(self.expansions, self.positions, geometry.levels[:1:-1], geometry.merges[:0:-1], strict=False)
        for expand, position, level, merge in above:
            x = expand(position(x, level), merge)
        level = geometry.levels[1]
        tables = level.windows(self.window, False), level.windows(self.window, True)
        x = self.blocks.run(self.positions[-1](x, level), tables, None, recompute)
        row = geometry.merges[0].maps(len(x))[1].view(len(x), -1).long().gather(1, asked)  # of the child, parent x 8
        children = rearrange(self.to_children(x), "b p (eight c) -> (b p eight) c", eight=8)
        return full, self.norm(children.index_select(0, row.flatten())).view(*asked.shape, -1)


class Light:
    """The decoder `light` of the registry: the encoder sees visible tokens alone, hidden ones alone are predicted."""

    name, visible_alone = "light", True

    def check(self, swin: SwinConfig, predicted: float) -> None:
        """ValueError for the paper's layout."""
        if swin.layout == "paper":
            raise ValueError("decoder = 'light': the paper's layout has the paper's decoder; take layout = 'clean'")

    def attach(self, model: MaskedAutoencoder, depth: int) -> None:
        """Adds `light`, a LightDecoder."""
        model.light = LightDecoder(model.config, depth).apply(initialise)

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
        asked = self.asked(model, mask, generator).to(patches.device, non_blocking=True)
        visible = model.visible_geometry(mask, geometry)
        seen = patches.flatten(0, 1).index_select(0, visible.levels[0].numbers_in(geometry.levels[0]))
        encoded, strd_rates = model.encode(model.patch_embed(seen)[None], visible)
        place = visible.levels[-1].places_in(geometry.levels[-1])
        latent, h = _part(model)(encoded, place, geometry, asked, model.activation_checkpointing)
        targets = _targets(model, patches, asked, geometry, inside, centre)
        pred = _part(model).pred
        scores = score_rows(h.flatten(0, 1), pred.weight, pred.bias, targets)
        prediction = patches.new_zeros(len(patches), 0, patches.shape[2])
        if not model.training:
            with torch.no_grad():
                prediction = put_tokens(predict_rows(pred(h.flatten(0, 1)).float(), targets), asked, patches.shape[1])
        return model._output(scores, prediction, mask.to(patches.device, non_blocking=True), latent, strd_rates)

    def asked(self, model: MaskedAutoencoder, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """Long (B, H): the hidden tokens that are predicted; in training a random share of them, as ``predicted``."""
        hidden = numbers_of(mask)
        count = max(1, int(hidden.shape[1] * model.predicted)) if model.training else hidden.shape[1]
        if count == hidden.shape[1]:
            return hidden
        source = hidden.device if generator is None else generator.device
        drawn = torch.rand(hidden.shape, generator=generator, device=source).argsort(1)[:, :count]
        return hidden.gather(1, drawn.sort(1).values.to(hidden.device))

    def count(self, count: Count, model: MaskedAutoencoder, geometry: Geometry, hidden: int) -> None:
        """All tokens above the finest level, and the predicted ones of that."""
        config, light = model.config, _part(model)
        predicted = max(1, int(hidden * model.predicted))
        for i, expansion in zip(range(config.stages - 1, 1, -1), light.expansions, strict=True):
            assert isinstance(expansion, PatchExpanding)
            count.expansion(expansion, len(geometry.levels[i]))
        count.blocks(light.blocks, [geometry.levels[1].windows(config.window, shift) for shift in (False, True)])
        parents = len(geometry.levels[1])
        count.linear([light.to_children], parents)
        count.linear([light.pred], predicted)
        count.kept += parents * light.to_children.in_features
        count.kept += predicted * 2 * config.embed_dim  # norm's input and output; errors are made again (losses/)


def _part(model: MaskedAutoencoder) -> LightDecoder:
    part = model.light
    assert isinstance(part, LightDecoder)
    return part


def _targets(
    model: MaskedAutoencoder,
    patches: Tensor,
    asked: Tensor,
    geometry: Geometry,
    inside: Tensor | None,
    centre: Tensor | None,
) -> Targets:
    """What the tokens ``asked`` for hold, and what of it counts."""
    samples, sample = len(patches), torch.arange(len(patches), device=patches.device)[:, None]
    in_brain = model.loss_on == "brain"
    if inside is not None and not in_brain:  # as in `_valid`: all voxels of a clip with any data
        inside = inside.any(2, keepdim=True).any(1, keepdim=True).expand(-1, inside.shape[1], -1)
    return Targets(
        patches=patches.flatten(0, 1),
        row=(asked + sample * patches.shape[1]).flatten(),
        sample=sample.expand_as(asked).flatten(),
        samples=samples,
        centre=None if centre is None else centre.flatten(0, 1),
        brain=model.brain_patches if in_brain else None,
        space=geometry.levels[0].space_of_token[asked].flatten(),
        inside=inside,
        normalise=model.normalise_targets,
    )

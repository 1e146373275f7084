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

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from neurostorm.model.config import SwinConfig
from neurostorm.model.decoders.paper import PatchExpanding
from neurostorm.model.encoder import BlockStack, PositionalEmbedding
from neurostorm.model.geometry.tokens import Geometry


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


def numbers_of(chosen: Tensor) -> Tensor:
    """Bool (B, P) with equally many true in each row -> their numbers, long (B, P').

    Raises:
        ValueError: a row has more than another, as a mask from outside may.
    """
    count = chosen.sum(1)
    if bool((count != count[0]).any()) or not count[0]:
        raise ValueError(
            f"mask: it hides, or leaves, {count.tolist()} tokens of the samples: equally many are needed, and some"
        )
    return chosen.nonzero()[:, 1].view(len(chosen), -1)


def put_tokens(rows: Tensor, numbers: Tensor, tokens: int) -> Tensor:
    """Rows (B * H, C) of the tokens with these numbers (B, H) -> (B, tokens, C), zero elsewhere."""
    x = rows.view(*numbers.shape, -1)
    return x.new_zeros(len(x), tokens, x.shape[2]).scatter_(1, numbers.unsqueeze(-1).expand_as(x), x)

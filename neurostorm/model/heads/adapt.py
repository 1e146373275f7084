"""Adapting a pretrained encoder to a task: what is trained, what is frozen, and how many parameters that is.

    volume or patches --encoder--> tokens (B, P', C') --pool--> head --> outputs
                         |            |                 |
                         |            | features, which may be cached when the backbone is frozen
                         |            |                 attention: a learned query per attention head
                         tpt: learned prompts before the tokens of each window of each block

    method     backbone            trained
    linear     frozen, eval mode   head (which averages the tokens)
    attention  frozen, eval mode   pool, head
    tpt        frozen, eval mode   prompts, head
    full       trained             everything

"tpt" is the task-specific prompt tuning of NeuroSTORM, k prompts per block. A linear probe on an average of
NeuroSTORM's tokens does poorly where the label sits in few of them (the state of a task run); "attention" is for these.
"""

import copy
from collections.abc import Iterator
from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.strd.dropout import StrdConfig

METHODS = ("linear", "attention", "tpt", "full")


class AttentionPool(nn.Module):
    """Tokens (B, P', C') -> one token (B, 1, C'): each attention head averages them by its own learned query.

    Args:
        width: C'.
        heads: attention heads; ``width`` is a multiple of it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.empty(heads, 1, width // heads))
        nn.init.trunc_normal_(self.query, std=0.02)  # small: it starts as nearly the mean
        self.key = nn.Linear(width, width, bias=False)  # a bias would add the same to all scores of a head
        self.value = nn.Linear(width, width)  # no projection after it: the head is one

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 3:
            raise ValueError(f"features of shape {tuple(tokens.shape)}: attention pools tokens (B, P', C')")
        tokens = self.norm(tokens)
        k, v = (rearrange(part(tokens), "b p (h c) -> b h p c", h=self.heads) for part in (self.key, self.value))
        pooled = scaled_dot_product_attention(self.query.to(k.dtype).expand(len(k), -1, -1, -1), k, v)
        return rearrange(pooled, "b h 1 c -> b 1 (h c)")


class Adapted(nn.Module):
    """Encoder, pool and head with the training that :func:`adapt` chose; made by it.

    Attributes:
        encoder: the backbone; where it is frozen it is in eval mode, whatever mode the whole is put in.
        pool: AttentionPool, or None where the head gets all tokens.
        head: the head.
        method: one of METHODS.
    """

    def __init__(self, encoder: SwinEncoder, pool: AttentionPool | None, head: nn.Module, method: str) -> None:
        super().__init__()
        self.encoder, self.pool, self.head, self.method = encoder, pool, head, method
        self._raster_order: dict[tuple[int, torch.device], Tensor] = {}
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.method != "full":
            self.encoder.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """A volume (B, C, X, Y, Z, T), or patches (B, P, p^3 C) in packed order -> what the head returns."""
        return self.from_features(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """The same input -> the last stage's tokens (B, P', C') in raster order (d, h, w, frame; the frame fastest).

        Only tokens that exist are listed. Without prompts a frozen backbone keeps no activations and the result has no
        gradient: it may be cached and given to :meth:`from_features` in every epoch.

        Raises:
            ValueError: the input has a shape that the encoder does not take.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._backbone_learns):
            patches = x if x.ndim == 3 else self.encoder.to_patches(x)
            tokens = self.encoder.feature_tokens(patches)
        frames = patches.shape[1] // self.encoder.tokens_per_frame
        return tokens.index_select(1, self._order(frames, tokens.device))

    def from_features(self, features: Tensor) -> Tensor:
        """What :meth:`features` gave (any float type) -> what the head returns.

        A head that averages tokens also takes their average, (B, C').
        """
        features = features.to(next(self.head.parameters()).dtype)
        return self.head(features if self.pool is None else self.pool(features))

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained, as torch's optimisers take them."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    @property
    def trainable_counts(self) -> dict[str, int]:
        """Numbers trained in each part: backbone, prompts, pool, head."""
        counts = dict.fromkeys(("backbone", "prompts", "pool", "head"), 0)
        for name, parameter in self.trainable_parameters():
            part = name.split(".")[0]
            if part == "encoder":
                part = "prompts" if name.endswith(".prompt") else "backbone"
            counts[part] += parameter.numel()
        return counts

    @property
    def trainable_count(self) -> int:
        """Numbers trained in all."""
        return sum(self.trainable_counts.values())

    @property
    def _backbone_learns(self) -> bool:
        return self.method == "full" or self.encoder.config.prompts > 0

    def _order(self, frames: int, device: torch.device) -> Tensor:
        """Long (P',): the packed number of each token of the last stage, in raster order; kept."""
        key = (frames, device)
        if key not in self._raster_order:
            self._raster_order[key] = self.encoder.geometry(frames, device).levels[-1].order.argsort()
        return self._raster_order[key]


def adapt(encoder: SwinEncoder, head: nn.Module, method: str, *, prompts: int = 50) -> Adapted:
    """A copy of ``encoder`` with ``head`` on it, ready to be trained by ``method``, in training mode.

    ``encoder`` itself stays as it is, so that each of several methods and seeds starts from the same weights; of a
    masked autoencoder the encoder is taken. The copy has no redundancy dropout, which belongs to pretraining, and none
    of the prompts that an earlier adaptation gave it. ``head`` is not copied.

    Args:
        encoder: pretrained; a released or an already adapted one too.
        head: takes tokens (B, P', C') of the last stage, as the heads of `heads.py` do. With "attention" it gets one
            token (B, 1, C').
        method: one of METHODS.
        prompts: vectors per block, drawn anew; "tpt" only. 0 leaves the head alone to be trained.

    Raises:
        ValueError: ``method`` is unknown, ``prompts`` negative, or the head is for features of another width.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: one of {', '.join(METHODS)}")
    if prompts < 0:
        raise ValueError(f"prompts = {prompts}: a number of vectors, 0 for none")
    config = encoder.config
    width = config.width(config.stages - 1)
    if getattr(head, "width", width) != width:
        raise ValueError(f"head of width {head.width}: the encoder's features have width {width}")
    own = copy.deepcopy(encoder.encoder() if isinstance(encoder, MaskedAutoencoder) else encoder)
    own.strd_config = StrdConfig()
    own.set_prompts(prompts if method == "tpt" else 0)
    for name, parameter in own.named_parameters():
        parameter.requires_grad_(method == "full" or name.endswith(".prompt"))
    head = head.to(own.patch_embed.fc.weight.device).requires_grad_(True)
    pool = AttentionPool(width, config.heads[-1]).to(next(head.parameters())) if method == "attention" else None
    return Adapted(own, pool, head, method)

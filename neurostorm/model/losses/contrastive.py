"""Contrastive losses: two views of the same are near each other, views of anything else are not.

    patches (B, P, K) --encoder--> tokens --mean--> linear, batch norm --> unit vectors (B, D)

    instance     two clips of one subject are a pair        against the clips of other subjects
    local-local  two views of one clip are a pair           against the other clips of the same subject

The loss of a pair is NT-Xent (Chen et al. 2020, "A Simple Framework for Contrastive Learning", eq. 1): cross-entropy of
finding the partner among all candidates by cosine / temperature. SwiFT (Kim et al. 2023) is pretrained with one of the
two or their sum; local-local is that of TCLR (Dave et al. 2022), which teaches what changes within a recording. Its
candidates are clips of the same subject only, or who it is would be all that must be told.
"""

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.heads.pooled import build_head

PROJECTION = 128  # values of a projected clip, as in SwiFT
_SHORTEST = 1e-6  # length below which a vector is not brought to unit length


class ContrastiveModel(nn.Module):
    """Encoder and projection; the projection is thrown away after pretraining.

    Args:
        encoder: what is pretrained.
        head: features (B, P', C') -> (B, D); None: the released projection, linear without bias to 128 values, batch
            norm, unit length.
    """

    def __init__(self, encoder: SwinEncoder, head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.width(encoder.config.stages - 1)
        self.head = build_head("embedding", width, PROJECTION) if head is None else head

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (B, P, p^3 C) in packed order -> (B, D); in training mode B is at least 2, for the batch norm."""
        return self.head(self.encoder.feature_tokens(patches))


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent of B pairs: the mean over all 2 B vectors of the cross-entropy of their partner among the other 2 B - 1.

    Args:
        z1, z2: (B, D), of any length but zero; row i of the one and of the other are a pair.
        temperature: of the softmax over cosines, above 0.

    Returns:
        (), float32 or wider.

    Raises:
        ValueError: the shapes differ or are no (B, D), or the temperature is not above 0.
    """
    if z1.ndim != 2:
        raise ValueError(f"z1 of shape {tuple(z1.shape)}: (B, D) is needed")
    return _pair_loss(z1, z2, temperature)


def instance_loss(a: Tensor, b: Tensor, subject: Tensor | None = None, temperature: float = 0.1) -> Tensor:
    """NT-Xent over subjects: a clip finds the other clip of its subject among the clips of the batch.

    Args:
        a, b: (B, D), two clips that do not overlap of each of B subjects.
        subject: integers (B,), equal for rows of one subject. The clips of such rows are then no candidates for each
            other. None: all rows are different subjects; the released code takes that for granted and pushes a
            subject's own clips apart where it is not so.
        temperature: as :func:`nt_xent`, as are the result and the errors.
    """
    if a.ndim != 2 or (subject is not None and subject.shape != a.shape[:1]):
        raise ValueError(
            f"a of shape {tuple(a.shape)}, subject of shape {None if subject is None else tuple(subject.shape)}: "
            "(B, D) and (B,) are needed"
        )
    return _pair_loss(a, b, temperature, subject)


def local_local_loss(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent within each subject: a view of a clip finds the other view of it among the views of all its clips.

    Args:
        first, second: (S, n, D), two views of each of n >= 2 clips of each of S subjects.
        temperature: as :func:`nt_xent`, as are the result (the mean over subjects; the released code sums) and errors.
    """
    if first.ndim != 3 or first.shape[1] < 2:
        raise ValueError(f"first of shape {tuple(first.shape)}: (subjects, clips, D) with two clips at least is needed")
    return _pair_loss(first, second, temperature)


def _pair_loss(z1: Tensor, z2: Tensor, temperature: float, subject: Tensor | None = None) -> Tensor:
    """NT-Xent of pairs (..., B, D) within each of the leading axes; rows of one ``subject`` (B,) do not compete."""
    if z1.shape != z2.shape:
        raise ValueError(f"views of shapes {tuple(z1.shape)} and {tuple(z2.shape)}: they must be alike")
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: above 0")
    pairs = z1.shape[-2]
    wide = torch.promote_types(z1.dtype, torch.float32)
    with torch.autocast(z1.device.type, enabled=False):  # a cosine in bf16 is no finer than a step of the softmax
        unit = normalize(torch.cat([z1, z2], -2).to(wide), dim=-1, eps=_SHORTEST)
        logits = unit @ unit.mT / temperature
    row = torch.arange(2 * pairs, device=z1.device)
    partner = row.roll(pairs)
    barred = row[:, None] == row
    if subject is not None:
        whose = repeat(subject, "b -> (two b)", two=2)
        barred = barred | ((whose[:, None] == whose) & (partner[:, None] != row))
    logits = logits.masked_fill(barred, -torch.inf)
    return cross_entropy(logits.flatten(0, -2), partner.repeat(logits.shape[:-2].numel()))

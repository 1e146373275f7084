"""STRD, Spatiotemporal Redundancy Dropout: in training, attend less to what the neighbourhood already says.

    affinity A (N x N, rows sum to 1) --> per token: max f and sum S of A over its spatial and temporal neighbours
                                      --> W = A * (f_t / S_s + f_s / S_t) / 2, clipped to [0, 1]
    attention form:  element (i, j) of A is dropped with probability W_ij, without rescaling (the paper)
    token form:      token i is dropped with probability sum_j W_ij / neighbours (the released code)

The neighbourhoods are those of the window a block really uses, so they shrink where a stage is smaller than its
nominal window. The scores take no gradient: they only parameterise the Bernoulli draw.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurostorm.model.geometry import Bucket, Neighbours

_EPSILON = 1e-8


@dataclass(frozen=True)
class StrdConfig:
    """Redundancy dropout in the encoder: neighbourhoods reach ``space // 2`` patches and ``time // 2`` frames."""

    enabled: bool = False
    space: int = 5
    time: int = 5

    def validate(self) -> None:
        """Raises ValueError naming the field."""
        for name in ("space", "time"):
            if getattr(self, name) < 1:
                raise ValueError(f"strd.{name} = {getattr(self, name)}: a neighbourhood extent is at least 1")


class StageDropout:
    """STRD of one stage during one forward pass: what the mixers draw with, and the count of what they dropped."""

    def __init__(self, config: StrdConfig) -> None:
        self._config = config
        self._dropped: list[Tensor] = []
        self._total = 0

    def neighbours(self, bucket: Bucket) -> Neighbours:
        return bucket.neighbours(self._config.space, self._config.time)

    def count(self, dropped: Tensor, total: int) -> None:
        """Record ``dropped`` (a scalar tensor, left on its device) of ``total`` elements."""
        self._dropped.append(dropped)
        self._total += total

    def rate(self) -> Tensor:
        """Share of elements dropped so far, float32 scalar."""
        return torch.stack(self._dropped).sum().float() / self._total


def neighbourhood_score(affinity: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Largest affinity of each token to its neighbours (0 without any), and their sum.

    Args:
        affinity: (..., N, N), rows sum to 1.
        near: bool, broadcastable to ``affinity``.
    """
    local = affinity.masked_fill(~near, 0.0)
    return local.amax(-1), local.sum(-1)


def drop_gain(affinity: Tensor, space: Tensor, time: Tensor) -> Tensor:
    """g (..., N) such that the drop probability is W_ij = clip(g_i A_ij, 0, 1).

    g = (f_t / S_s + f_s / S_t) / 2, where a term counts only if its neighbourhood (that of the sum) is not empty.
    """
    f_space, sum_space = neighbourhood_score(affinity, space)
    f_time, sum_time = neighbourhood_score(affinity, time)
    return 0.5 * (space.any(-1) * f_time / (sum_space + _EPSILON) + time.any(-1) * f_space / (sum_time + _EPSILON))


def drop_probability(affinity: Tensor, space: Tensor, time: Tensor) -> Tensor:
    """W (..., N, N) in [0, 1]: the probability with which attention element (i, j) is redundant."""
    return (affinity * drop_gain(affinity, space, time).unsqueeze(-1)).clamp_(0.0, 1.0)


def token_drop_probability(affinity: Tensor, space: Tensor, time: Tensor) -> Tensor:
    """Score (..., N) in [0, 1] of the released token form: row sums of W over the size of both neighbourhoods."""
    neighbours = (space.sum(-1) + time.sum(-1)).clamp(min=1)
    return (drop_probability(affinity, space, time).sum(-1) / neighbours).clamp_(0.0, 1.0)


def redundancy_attention(q: Tensor, k: Tensor, v: Tensor, near: Neighbours) -> tuple[Tensor, Tensor]:
    """Softmax attention whose elements are dropped with the paper's probability W.

    Args:
        q, k, v: (windows, heads, N, d); windows are batch x the bucket's windows, batch slowest.
        near: neighbourhoods of the bucket.

    Returns:
        (output (windows, heads, N, d), number of dropped elements as an int64 scalar tensor). Between forward and
        backward only the inputs and one boolean per element stay alive: the scores are computed again.
    """
    return _RedundancyAttention.apply(q, k, v, near)


class _RedundancyAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, near: Neighbours) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(v)
        keep = torch.empty(*q.shape[:-1], k.shape[-2], dtype=torch.bool, device=q.device)
        pattern = near.pattern.repeat(len(q) // len(near.pattern))
        with torch.autocast(q.device.type, enabled=False):
            for part in _parts(keep):
                space, time = near.space, near.time
                if len(space) > 1:  # else every window has the one pattern, which broadcasts
                    space, time = space[pattern[part]], time[pattern[part]]
                affinity = _affinity(q[part], k[part])
                drop = drop_probability(affinity, space.unsqueeze(1), time.unsqueeze(1))
                torch.ge(torch.rand_like(drop), drop, out=keep[part])
                out[part] = affinity.mul_(keep[part]).to(v.dtype) @ v[part]
        ctx.save_for_backward(q, k, v, keep)
        dropped = keep.numel() - keep.sum()
        ctx.mark_non_differentiable(dropped)
        return out, dropped

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, keep = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _parts(keep):
            affinity = _affinity(q[part], k[part])
            kept = affinity * keep[part]
            dv[part] = kept.to(grad.dtype).mT @ grad[part]
            # With G = dL/dA = keep * (grad v^T), the softmax gives A * (G - sum_j A G).
            weighted = (grad[part] @ v[part].mT).mul(kept)
            affinity.mul_(weighted.sum(-1, keepdim=True))
            scores = weighted.sub_(affinity).mul_(q.shape[-1] ** -0.5).to(q.dtype)
            dq[part] = scores @ k[part]
            dk[part] = scores.mT @ q[part]
        return dq, dk, dv, None


def _affinity(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) in float32 (float64 for float64 input)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)


def _parts(keep: Tensor) -> list[slice]:
    """Slices of windows whose N x N temporaries stay within a cache (CPU) or a few hundred MB (GPU)."""
    elements = 2**21 if keep.device.type == "cpu" else 2**27
    step = max(1, elements // keep[0].numel())
    return [slice(start, start + step) for start in range(0, len(keep), step)]

"""STRD, Spatiotemporal Redundancy Dropout: in training, attend less to what the neighbourhood already says.

    affinity A (N x N, rows sum to 1) --> per token: max f and sum S of A over its spatial and temporal neighbours
                                      --> W = A * (f_t / S_s + f_s / S_t) / 2, clipped to [0, 1]
    attention form:  element (i, j) of A is dropped with probability W_ij, without rescaling (the paper)
    token form:      token i is dropped with probability sum_j W_ij / neighbours (the released code)

The neighbourhoods are those of the window a block really uses, so they shrink where a stage is smaller than its
nominal window. The scores take no gradient: they only parameterise the Bernoulli draw. Absent slots of a window are
nobody's keys and nobody's neighbours, and no element of theirs is dropped or counted.

On a GPU the attention form with the scores as they are is one kernel (``strd_triton.py``), where Triton is found;
NEUROSTORM_STRD=torch in the environment switches it off.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neurostorm.model.geometry.neighbors import Neighbours
from neurostorm.model.geometry.windows import Bucket
from neurostorm.model.ops.dispatch import STRD, triton_may

_EPSILON = 1e-8
_CORRECTIONS = 4  # of the calibration
_LARGEST_STEP = 4.0  # of a correction, in log c
_FUSED_TOKENS, _FUSED_BYTES = 256, 128  # most tokens of a window, and bytes of a head's token, that the kernel takes


@dataclass(frozen=True)
class StrdConfig:
    """Redundancy dropout in the encoder: neighbourhoods reach ``space // 2`` patches and ``time // 2`` frames.

    Attributes:
        enabled: drop in training.
        space, time: extents of the neighbourhoods, in patches and frames.
        rate: mean drop probability, above 0 and below 1. The scores as released drop 0.1 to 3.5 % of the elements,
            depending on stage and window, too few to regularise by; with a rate each window's (and head's) scores are
            multiplied by one number so that their mean, clipped at 1, is this. Where fewer elements than that have a
            score above 0 (a window of one patch or one frame has none) all of these drop and the rate is not reached:
            go by the realised rate in the log. None takes the scores as they are.
    """

    enabled: bool = False
    space: int = 5
    time: int = 5
    rate: float | None = None

    def validate(self) -> None:
        """Raises ValueError naming the field."""
        for name in ("space", "time"):
            if getattr(self, name) < 1:
                raise ValueError(f"strd.{name} = {getattr(self, name)}: a neighbourhood extent is at least 1")
        if self.rate is not None and not 0.0 < self.rate < 1.0:
            raise ValueError(f"strd.rate = {self.rate}: above 0 and below 1, or None for the scores as they are")


class StageDropout:
    """STRD of one stage during one forward pass: what the mixers draw with, and the count of what they dropped.

    Tensors of windows are batch x the bucket's windows, batch slowest. Drops are drawn from the global generator.
    """

    def __init__(self, config: StrdConfig) -> None:
        self._config = config
        self._dropped: list[Tensor] = []
        self._total: Tensor | int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bucket: Bucket) -> Tensor:
        """Attention form: q, k, v (windows, heads, N, d) -> (windows, heads, N, d). What absent slots get is finite."""
        config = self._config
        if config.rate is None and triton_applies_to(q, k, v):
            reach = config.space // 2, config.time // 2
            mixed, dropped = fused_attention(q, k, v, bucket.places(), reach, bucket.present)
        else:
            mixed, dropped = redundancy_attention(q, k, v, self.neighbours(bucket), bucket.present, config.rate)
        windows, heads, tokens, _ = q.shape
        if bucket.present is None:
            self.count(dropped, windows * heads * tokens**2)
        else:
            self.count(dropped, bucket.present.sum(1).square().sum() * (heads * windows // len(bucket.present)))
        return mixed

    def drop_tokens(self, h: Tensor, bucket: Bucket) -> Tensor:
        """Token form: mixed tokens (windows, N, C) with the redundant ones set to 0, the others as they are.

        One ``torch.bernoulli`` over the float32 scores (windows, N), as the released code draws. Between forward and
        backward one boolean per token stays alive.
        """
        near = self.neighbours(bucket)
        drop = torch.bernoulli(token_scores(h, near, bucket.present, self._config.rate)).bool()
        if bucket.present is None:
            self.count(drop.sum(), drop.numel())
        else:
            self.count(drop.sum(), bucket.present.sum() * (len(h) // len(bucket.present)))
        return h.masked_fill(drop.unsqueeze(-1), 0.0)

    def neighbours(self, bucket: Bucket) -> Neighbours:
        return bucket.neighbours(self._config.space, self._config.time)

    def count(self, dropped: Tensor, total: Tensor | int) -> None:
        """Record ``dropped`` (a scalar tensor, left on its device) of ``total`` elements."""
        self._dropped.append(dropped)
        self._total = self._total + total

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


def calibrate(score: Tensor, rate: float, count: Tensor | int, axes: tuple[int, ...]) -> Tensor:
    """Probabilities min(1, c * score), with the c of each window for which their mean is ``rate``.

    The first c would be exact if nothing clipped. Newton's steps then go in log c, as scores spread over decades: the
    slope of sum min(1, c s) there is its part that is not clipped. Each window has its own c: it must not matter with
    which others a window is computed.

    Args:
        score: in [0, 1]; 0 for what is not counted.
        rate: mean wanted over the counted elements.
        count: counted elements of each window; broadcastable to ``score`` reduced over ``axes`` with these kept.
        axes: the axes of one window's elements.
    """
    wanted = rate * count
    gain = wanted / score.sum(axes, keepdim=True).clamp(min=1e-20)
    for _ in range(_CORRECTIONS):
        chance = (score * gain).clamp_(max=1.0)
        total = chance.sum(axes, keepdim=True)
        slope = (total - chance.floor_().sum(axes, keepdim=True)).clamp(min=1e-20)  # floor is 1 where it clips
        gain = gain * ((wanted - total) / slope).clamp(-_LARGEST_STEP, _LARGEST_STEP).exp()
    return (score * gain).clamp_(max=1.0)


@torch.no_grad()
def token_scores(h: Tensor, near: Neighbours, present: Tensor | None = None, rate: float | None = None) -> Tensor:
    """Drop probability of each token, float32 (windows, N); A = softmax(h h^T / sqrt(C)) within each window.

    Args:
        h: (windows, N, C), the mixer's output.
        near: neighbourhoods of the bucket.
        present: bool (W, N) of the bucket or None; absent slots get 0.
        rate: mean probability over the present tokens of each window, or None for the released score.
    """
    score = torch.empty(h.shape[:2], device=h.device)
    pattern, present = _over_batch(near.pattern, len(h)), None if present is None else _over_batch(present, len(h))
    with torch.autocast(h.device.type, enabled=False):
        for part in _parts(len(h), h.shape[1] ** 2, h.device):
            tokens = h[part].to(torch.promote_types(h.dtype, torch.float32))
            keys = None if present is None else present[part]
            chance = token_drop_probability(_affinity(tokens, tokens, keys), *_patterns(near, pattern[part], keys))
            if rate is not None:
                count = h.shape[1] if keys is None else keys.sum(1, keepdim=True)
                chance = calibrate(chance, rate, count, (-1,))
            score[part] = chance.float()
    return score.nan_to_num_(0.0)  # a diverged h is for the loss to show: a draw from NaN aborts the process


def redundancy_attention(
    q: Tensor, k: Tensor, v: Tensor, near: Neighbours, present: Tensor | None = None, rate: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention whose elements are dropped with the paper's probability W.

    Args:
        q, k, v: (windows, heads, N, d); windows are batch x the bucket's windows, batch slowest.
        near: neighbourhoods of the bucket.
        present: bool (W, N) of the bucket or None; absent slots are no keys.
        rate: mean drop probability of each window and head, or None for W as it is.

    Returns:
        (output (windows, heads, N, d), number of dropped elements as an int64 scalar tensor). Between forward and
        backward only the inputs and one boolean per element stay alive: the scores are computed again.
    """
    return _RedundancyAttention.apply(q, k, v, near, present, rate)


class _RedundancyAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, near: Neighbours, present: Tensor | None, rate: float | None
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(v)
        keep = torch.empty(*q.shape[:-1], k.shape[-2], dtype=torch.bool, device=q.device)
        pattern, present = _over_batch(near.pattern, len(q)), None if present is None else _over_batch(present, len(q))
        with torch.autocast(q.device.type, enabled=False):
            for part in _parts(len(q), keep[0].numel(), q.device):
                keys = None if present is None else present[part].unsqueeze(1)
                affinity = _affinity(q[part], k[part], keys)
                space, time = _patterns(near, pattern[part], None if present is None else present[part])
                drop = drop_probability(affinity, space.unsqueeze(1), time.unsqueeze(1))
                if rate is not None:
                    count = q.shape[2] ** 2 if keys is None else keys.sum(-1).square()[..., None, None]
                    drop = calibrate(drop, rate, count, (-2, -1))
                torch.ge(torch.rand_like(drop), drop, out=keep[part])
                out[part] = affinity.mul_(keep[part]).to(v.dtype) @ v[part]
        ctx.save_for_backward(q, k, v, keep, present)
        dropped = keep.numel() - keep.sum()
        ctx.mark_non_differentiable(dropped)
        return out, dropped

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, keep, present = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _parts(len(q), keep[0].numel(), q.device):
            affinity = _affinity(q[part], k[part], None if present is None else present[part].unsqueeze(1))
            kept = affinity * keep[part]
            dv[part] = kept.to(grad.dtype).mT @ grad[part]
            # With G = dL/dA = keep * (grad v^T), the softmax gives A * (G - sum_j A G).
            weighted = (grad[part] @ v[part].mT).mul(kept)
            affinity.mul_(weighted.sum(-1, keepdim=True))
            scores = weighted.sub_(affinity).mul_(q.shape[-1] ** -0.5).to(q.dtype)
            dq[part] = scores @ k[part]
            dk[part] = scores.mT @ q[part]
        return dq, dk, dv, None, None, None


def triton_applies_to(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes these: float32 or bfloat16 on a GPU, a window and a head small enough."""
    return (
        q.is_cuda
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[2] <= _FUSED_TOKENS
        and q.shape[3] * q.element_size() <= _FUSED_BYTES
        and triton_may(STRD)
    )


@torch._disable_dynamo  # torch.compiler.disable, which would import the compiler here and now, for everybody
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, cells: Tensor, reach: tuple[int, int], present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``redundancy_attention`` without a rate in one kernel, which finds neighbours by their coordinates.

    Args:
        q, k, v, present: as there.
        cells: int16 (W, N, 4) of the bucket, on the device.
        reach: of the neighbourhoods, in patches and in frames.

    Returns:
        As there, from other random numbers, and 0 where a window has no key. Two numbers for each query stay alive.
    """
    return _FusedAttention.apply(q, k, v, cells, reach, present)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cells: Tensor, reach: tuple[int, int], present: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        from neurostorm.model.strd import triton_kernel

        seed = torch.randint(2**63 - 1, (1,), device=q.device)  # drawn where it is read: nobody waits for it
        out, dropped, kept = triton_kernel.forward(q, k, v, cells, reach, present, seed)
        ctx.save_for_backward(q, k, v, present, seed, *kept)
        ctx.mark_non_differentiable(dropped)
        return out, dropped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        from neurostorm.model.strd import triton_kernel

        q, k, v, present, seed, *kept = ctx.saved_tensors
        return *triton_kernel.backward(q, k, v, present, seed, triton_kernel.Kept(*kept), grad), None, None, None


def _affinity(q: Tensor, k: Tensor, keys: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) in float32 (float64 for float64 input), 0 where ``keys`` (..., N) is false."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if keys is not None:  # the lowest number rather than -inf: a window without any key stays finite
        scores = scores.masked_fill_(~keys.unsqueeze(-2), torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def _parts(windows: int, elements: int, device: torch.device) -> list[slice]:
    """Slices of windows whose N x N temporaries (``elements`` per window) stay within a cache (CPU) or a few hundred
    MB (GPU)."""
    step = max(1, (2**21 if device.type == "cpu" else 2**27) // elements)
    return [slice(start, start + step) for start in range(0, windows, step)]


def _patterns(near: Neighbours, pattern: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Spatial and temporal neighbourhoods, (windows or 1, N, N), of windows of these patterns with these slots
    (windows, N). Absent slots have none, so they have no score either."""
    space, time = near.space, near.time
    if len(space) > 1:  # else every window has the one pattern, which broadcasts
        space, time = space[pattern], time[pattern]
    if present is None:
        return space, time
    pairs = present.unsqueeze(-1) & present.unsqueeze(-2)
    return space & pairs, time & pairs


def _over_batch(table: Tensor, windows: int) -> Tensor:
    """What the bucket says of its windows (W, ...), for ``windows`` = batch x W of them."""
    return table.repeat(windows // len(table), *[1] * (table.ndim - 1))

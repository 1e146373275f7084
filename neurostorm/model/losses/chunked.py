"""How far predictions are from what was hidden, with nothing kept that is as large as the patches.

    h (B, H, C) --linear--> prediction of p^3 voxels   -.
    patches (B, P, p^3) --take those asked for--> target -+--> squared error of the voxels that count, summed per sample
    centre, moments of the target, what may count        -'

A prediction has six times as many numbers as the token it is made from, and target, error and its square as many again:
written out, they are the largest tensors of a sparse training step. So rows are scored block by block, each in a cache,
and the backward pass makes a block's error again, as `mlp.py` does with its hidden layer.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_FLAT = 1e-6  # variance below which a patch has nothing to normalise
_CACHED_VALUES = {"cpu": 2**19, "cuda": 2**27}  # of a block's predictions


class Targets(NamedTuple):
    """What is predicted, and which of its voxels count; nothing here takes a gradient.

    Rows are the predicted tokens of all samples one after another: sample b has rows b * H to (b + 1) * H.
    """

    patches: Tensor  # (B * P, p^3), those of every token
    row: Tensor  # long (R,), which of them each row predicts
    sample: Tensor  # long (R,), whose it is
    samples: int  # B
    space: Tensor  # long (R,), the patch of space of each row
    centre: Tensor | None = None  # (B * P, p^3), each voxel's mean; None: zero. Not used where targets are normalised
    brain: Tensor | None = None  # bool (S, p^3), voxels that count in each patch of space; None: all
    inside: Tensor | None = None  # bool (B, S, p^3), the field of view; None: everything
    normalise: bool = False  # the error is that of targets with mean 0 and variance 1 in each patch


class Scores(NamedTuple):
    """Float32 (B,): squares of the error summed, the same of predicting the mean, voxels that count.

    The mean is each voxel's own over its run. Of normalised targets it is each patch's own, which costs exactly 1 per
    voxel, except in flat patches, where it costs what little they vary.
    """

    squares: Tensor
    baseline: Tensor
    voxels: Tensor


def score_rows(h: Tensor, weight: Tensor, bias: Tensor, targets: Targets) -> Scores:
    """Scores of the predictions ``h @ weight.T + bias``, (R, p^3) of h (R, C), with gradients of the squares."""
    with torch.autocast(h.device.type, enabled=False):
        wide = torch.promote_types(h.dtype, torch.float32)
        return Scores(*_Score.apply(h.to(wide), weight.to(wide), bias.to(wide), targets))


def predict_rows(rows: Tensor, targets: Targets) -> Tensor:
    """Predictions (R, p^3) in the units of the input: of normalised targets with their moments put back."""
    if not targets.normalise:
        return rows
    target = targets.patches.index_select(0, targets.row).to(rows.dtype)
    mean, std = patch_moments(target, _counted(targets, slice(None), rows.device))
    return rows * std + mean


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, targets: Targets) -> tuple[Tensor, ...]:
        sums = h.new_zeros(3, targets.samples)
        for part in _parts(h, weight):
            error, away, counted = _block(h[part], weight, bias, targets, part)
            rows = torch.stack([error.square().sum(1), away.square().sum(1), counted.expand_as(error).sum(1)])
            sums.index_add_(1, targets.sample[part], rows.to(sums.dtype))
        ctx.save_for_backward(h, weight, bias)
        ctx.targets = targets
        squares, baseline, voxels = sums[0], sums[1], sums[2]
        ctx.mark_non_differentiable(baseline, voxels)
        return squares, baseline, voxels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias = ctx.saved_tensors
        dh, dweight, dbias = torch.empty_like(h), torch.zeros_like(weight), torch.zeros_like(bias)
        for part in _parts(h, weight):
            error = _block(h[part], weight, bias, ctx.targets, part)[0]
            error.mul_(2 * grad[ctx.targets.sample[part], None])
            torch.mm(error, weight, out=dh[part])
            dweight.addmm_(error.T, h[part])
            dbias += error.sum(0)
        return dh, dweight, dbias, None


def _block(h: Tensor, weight: Tensor, bias: Tensor, targets: Targets, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Error and distance from the mean, both (rows, p^3) and 0 where a voxel does not count, and which voxels count.

    The mean is that of each voxel over its run or, of normalised targets, that of each patch.
    """
    row = targets.row[part]
    target = targets.patches.index_select(0, row).to(h.dtype)
    counted = _counted(targets, part, h.device)
    if targets.normalise:
        mean, std = patch_moments(target, counted)
        target = away = (target - mean) / std  # the mean of what is predicted is 0
    else:
        away = target if targets.centre is None else target - targets.centre.index_select(0, row).to(h.dtype)
    error = torch.addmm(bias, h, weight.T).sub_(target)
    return error.masked_fill_(~counted, 0.0), torch.where(counted, away, 0.0), counted


def _counted(targets: Targets, part: slice, device: torch.device) -> Tensor:
    """Bool, broadcastable to (rows, p^3): which voxels count."""
    counted = torch.ones((), dtype=torch.bool, device=device)
    if targets.brain is not None:
        counted = targets.brain[targets.space[part]]
    if targets.inside is not None:
        counted = counted & targets.inside[targets.sample[part], targets.space[part]]
    return counted


def square_sums(error: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) sums of error^2 over each sample's counted voxels (the others may hold anything), and (B,) their number."""
    counted = counted.expand_as(error)
    return torch.where(counted, error, 0.0).square().sum(dim=(1, 2)), counted.sum(dim=(1, 2))


def patch_moments(patches: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (..., 1) of patches (..., p^3) over valid voxels; 0 and 1 where there are none."""
    weight = torch.ones_like(patches) if valid is None else valid.expand_as(patches).to(patches.dtype)
    voxels = weight.sum(-1, keepdim=True).clamp(min=1)
    mean = (patches * weight).sum(-1, keepdim=True) / voxels
    variance = ((patches - mean).square() * weight).sum(-1, keepdim=True) / voxels
    return mean, torch.where(variance > _FLAT, variance, 1.0).sqrt()


def _parts(h: Tensor, weight: Tensor) -> Iterator[slice]:
    rows = max(1, _CACHED_VALUES.get(h.device.type, _CACHED_VALUES["cuda"]) // len(weight))
    return (slice(start, start + rows) for start in range(0, len(h), rows))

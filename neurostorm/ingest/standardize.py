"""From a run on its own grid and clock to the store's: packed brain voxels, one TR, one byte per voxel and frame.

    frames (x y z) ── spatial plan ──> (T, V) ── temporal plan ──> (T', V) ── z of each voxel ──> int8, mean, std
                      sparse V x xyz              sparse T' x T

Both plans are sparse matrices made once per run from geometry alone, so resampling is two products and touches only
the voxels of the store's mask. One rule makes every weight, in space and in time: the source is interpolated linearly,
and where the target's samples are r > 1 source samples apart, the interpolant is averaged over a box of sqrt(r^2 - 1)
(widths add in quadrature: 1 from the interpolation, the rest from the box).

    target finer than or equal to the source   no box: (tri)linear interpolation
    target coarser                             an average, so that nothing is aliased; linear fields stay exact
    centres coincide at equal spacing          one weight of 1: an exact copy

Slice timing is ignored: a frame's voxels all count as acquired at k * TR. Memory: the source voxels that are needed
(float32, about a quarter of the volume) or the packed ones, whichever are fewer; the int8 result; one block of work.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from neurostorm.ingest.nifti import RunError
from neurostorm.store.codec import clipped_fraction, quantise, signal_to_quantisation_noise_db

Bool = NDArray[np.bool_]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

MASK_SHARE = 0.5  # of a packed voxel's weight must lie in the run's own brain mask
COINCIDE = 1e-3  # share of a voxel within which two centres are the same place
SAME_TR = 1e-6  # relative difference within which two TRs are the same
CONSTANT = 1e-6  # std below this share of the mean is the rounding of float32, not signal
_POINT = 1e-6  # a box below this width is a point
_NO_WEIGHT = 1e-6  # smaller weights are rounding
_PLAN_WEIGHTS = 1 << 20  # weights made at a time: bounds what planning needs
_BLOCK_VALUES = 1 << 18  # source or stored values worked on at a time, 1 MB of float32


@dataclass(frozen=True)
class SpatialPlan:
    """How the packed voxels of the store are made of a source's voxels.

    Attributes:
        kind: "copy" (exact), "linear" (trilinear) or "average" (the source is finer).
        matrix: (V, X * Y * Z) float32 CSR over the source's voxels in Fortran order; rows sum to 1, or are empty.
        inside: (V,) the row is not empty: the voxel's box lies between the source's first and last centres.
    """

    kind: str
    matrix: sparse.csr_array
    inside: Bool

    def within(self, brain: Bool) -> "SpatialPlan":
        """The plan with only the source voxels inside `brain` (X * Y * Z, Fortran order).

        A packed voxel stays when more than half of its weight does. Its weights are scaled to a sum of 1 again, so that
        the zeros (or the scalp) around a brain do not bleed into its rim.
        """
        share = self.matrix @ brain.astype(np.float32)
        keep = self.inside & (share > MASK_SHARE)
        rows = np.repeat(np.arange(len(keep), dtype=np.int32), np.diff(self.matrix.indptr))
        chosen = keep[rows] & brain[self.matrix.indices]
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows[chosen], minlength=len(keep)))])
        data = self.matrix.data[chosen] / share[rows[chosen]]
        parts = (data, self.matrix.indices[chosen], starts)
        return SpatialPlan(self.kind, sparse.csr_array(parts, shape=self.matrix.shape), keep)


@dataclass(frozen=True)
class TemporalPlan:
    """How stored frames are made of acquired ones.

    Attributes:
        kind: "copy", "linear" (the store's TR is shorter) or "average" (it is longer).
        matrix: (T', T) float32 CSR, rows sum to 1.
    """

    kind: str
    matrix: sparse.csr_array

    @property
    def frames(self) -> int:
        """Stored frames, T'."""
        return int(self.matrix.shape[0])


@dataclass(frozen=True)
class Standardised:
    """One run as the store takes it.

    Attributes:
        frames: (T', V) int8, 16 x the z-score of each voxel.
        mean, std: (V,) float32, source units, over the stored frames; both 0 where the run has no signal.
        global_mean, global_std: over the voxels with signal and all frames, source units.
        tsnr_median: median of mean / std over the voxels with signal.
        clipped_fraction: share of stored values at the limit of int8.
        coverage: share of the V voxels that have signal.
        quantisation_db: median temporal signal to quantisation noise of these voxels.
    """

    frames: NDArray[np.int8]
    mean: Float32
    std: Float32
    global_mean: float
    global_std: float
    tsnr_median: float
    clipped_fraction: float
    coverage: float
    quantisation_db: float


def plan_spatial(
    source_shape: tuple[int, ...],
    source_affine: Float64,
    target_affine: Float64,
    wanted: Bool,
) -> SpatialPlan:
    """Plan how a volume comes onto voxels of another grid; only affines decide, never array indices.

    Args:
        source_shape: X, Y, Z of the source's array.
        source_affine, target_affine: (4, 4) index -> mm.
        wanted: bool (X', Y', Z') on the target grid; its V true voxels, in C order, are the rows of the plan.
    """
    to_source = np.linalg.inv(source_affine) @ target_affine
    centres = np.argwhere(wanted) @ to_source[:3, :3].T + to_source[:3, 3]  # (V, 3) in source voxels
    ratio = np.linalg.norm(to_source[:3, :3], axis=1)  # extent of a target voxel along each source axis, source voxels
    aligned = bool(np.abs(centres - np.rint(centres)).max(initial=0.0) < COINCIDE)
    if aligned:
        centres = np.rint(centres)
    box = _box(ratio)
    average = bool(box.any())
    last = np.asarray(source_shape) - 1.0
    reaches = (centres - box / 2 >= -COINCIDE) & (centres + box / 2 <= last + COINCIDE)
    inside: Bool = np.all(reaches, axis=1)
    centres = np.clip(centres, box / 2, np.maximum(last - box / 2, box / 2))  # moves only what is within COINCIDE
    kind = "average" if average else "copy" if aligned else "linear"
    return SpatialPlan(kind, _weight_matrix(centres, box, inside, source_shape), inside)


def plan_temporal(source_frames: int, source_tr_s: float, target_tr_s: float) -> TemporalPlan:
    """Plan the stored frames at 0, target_tr_s, 2 target_tr_s ... up to the last acquired time, (T - 1) source_tr_s.

    Acquired frame k is a sample at k * source_tr_s. Near the ends an average's box is narrowed on both sides alike, so
    that its centre stays at the target time and no phase is lost.

    Raises RunError when fewer than two frames result.
    """
    ratio = target_tr_s / source_tr_s
    if abs(ratio - 1) <= SAME_TR:
        identity = sparse.csr_array(sparse.eye_array(source_frames, dtype=np.float32))
        return TemporalPlan("copy", identity)
    count = int(np.floor((source_frames - 1) / ratio + 1e-6)) + 1
    if count < 2:
        raise RunError(f"lasts {source_frames * source_tr_s:g} s: too short for two frames {target_tr_s:g} s apart")
    centres = np.minimum(np.arange(count) * ratio, source_frames - 1)
    room = 2 * np.minimum(centres, source_frames - 1 - centres)
    index, weight = _weights(centres, np.minimum(_box(np.asarray(ratio)), room), source_frames)
    rows = np.repeat(np.arange(count), index.shape[1])
    matrix = sparse.coo_array((weight.ravel(), (rows, index.ravel())), shape=(count, source_frames)).tocsr()
    matrix.eliminate_zeros()
    return TemporalPlan("average" if _box(np.asarray(ratio)) > 0 else "linear", matrix.astype(np.float32))


def standardise(
    frames: Iterator[Float32], source_frames: int, spatial: SpatialPlan, temporal: TemporalPlan
) -> Standardised:
    """Resample a run in space and time, z-score each voxel and round it to bytes.

    Args:
        frames: `source_frames` volumes (X * Y * Z) float32 in Fortran order, taken one at a time.
        source_frames: T.
        spatial: its rows are the V packed voxels.
        temporal: its rows are the T' stored frames.

    A voxel is without signal (mean, std and frames 0) when the plan leaves it out, when a source voxel it needs is not
    finite in any frame, or when it does not vary. RunError when no voxel has signal.
    """
    held, second = _collect(frames, source_frames, spatial)
    voxels = len(spatial.inside)
    result = np.zeros((temporal.frames, voxels), np.int8)
    mean, std = np.zeros(voxels), np.zeros(voxels)
    decibels = np.full(voxels, np.nan, np.float32)
    finite = np.zeros(voxels, bool)
    clipped = 0
    step = max(256, _BLOCK_VALUES // max(source_frames, temporal.frames))
    for first in range(0, voxels, step):
        part = slice(first, first + step)
        block = held[:, part] if second is None else _second_stage(held, second[part])
        finite[part] = np.isfinite(block).all(axis=0) & spatial.inside[part]
        block = np.where(finite[part], block, np.float32(0))
        if temporal.kind != "copy":
            block = temporal.matrix @ block
        mean[part], std[part] = _moments(block)
        z = _z_scores(block, mean[part], std[part])
        stored = quantise(z)
        decibels[part] = signal_to_quantisation_noise_db(z, stored)
        clipped += round(clipped_fraction(stored) * stored.size)
        result[:, part] = stored
    if not finite.any():
        raise RunError("has no finite value in the brain: every voxel there is NaN or infinite in some frame")
    if not std.any():
        raise RunError("is constant: no voxel of the brain changes over time")
    return _summary(result, mean, std, decibels, clipped)


def _box(ratio: Float64) -> Float64:
    """Width of the average, in source samples, for targets `ratio` source samples apart; 0 for interpolation."""
    return np.where(ratio > 1 + COINCIDE, np.sqrt(np.maximum(ratio**2 - 1, 0.0)), 0.0)


def _weights(centres: Float64, box: Float64, size: int) -> tuple[NDArray[np.intp], Float32]:
    """Weights of the linear interpolant's averages over boxes, along one axis with samples at 0 .. size - 1.

    Args:
        centres: (N,) middles of the boxes, in source samples.
        box: widths, one or (N,); each box must lie within 0 .. size - 1.

    Returns:
        index (N, K) of the samples that can matter, and weight (N, K) float32 with rows that sum to 1.
    """
    low, high = centres - box / 2, centres + box / 2
    index = np.floor(low).astype(np.intp)[:, None] + np.arange(int(np.ceil(np.max(box))) + 2)
    width = np.broadcast_to(box, centres.shape)[:, None]
    averaged = (_hat_integral(high[:, None] - index) - _hat_integral(low[:, None] - index)) / np.maximum(width, _POINT)
    weight = np.where(width > _POINT, averaged, np.clip(1 - np.abs(centres[:, None] - index), 0, None))
    weight[(weight < _NO_WEIGHT) | (index < 0) | (index >= size)] = 0
    weight /= weight.sum(axis=1, keepdims=True)
    return np.clip(index, 0, size - 1), weight.astype(np.float32)


def _hat_integral(x: Float64) -> Float64:
    """Integral from minus infinity to `x` of the hat function 1 - |u| on -1 .. 1."""
    x = np.clip(x, -1, 1)
    return 0.5 + x - np.sign(x) * x**2 / 2


def _weight_matrix(centres: Float64, box: Float64, inside: Bool, shape: tuple[int, ...]) -> sparse.csr_array:
    """(V, X * Y * Z) CSR: products of the three axes' weights, rows outside empty; made in pieces."""
    rows = np.flatnonzero(inside)
    per_row = int(np.prod(np.ceil(box) + 2))
    step = max(1, _PLAN_WEIGHTS // per_row)
    weights: list[Float32] = []
    columns: list[NDArray[np.int32]] = []
    counts = np.zeros(len(centres) + 1, np.int64)
    stride = (1, shape[0], shape[0] * shape[1])  # Fortran order: x is fastest
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        column = np.zeros((len(part), 1), np.int64)
        weight = np.ones((len(part), 1), np.float32)
        for axis in (2, 1, 0):  # x last, so that a row's columns rise
            index, share = _weights(centres[part, axis], box[axis], shape[axis])
            column = (column[:, :, None] + index[:, None, :] * stride[axis]).reshape(len(part), -1)
            weight = (weight[:, :, None] * share[:, None, :]).reshape(len(part), -1)
        used = weight > 0
        counts[part + 1] = used.sum(axis=1)
        weights.append(weight[used])
        columns.append(column[used].astype(np.int32))
    data = np.concatenate(weights) if weights else np.zeros(0, np.float32)
    indices = np.concatenate(columns) if columns else np.zeros(0, np.int32)
    return sparse.csr_array((data, indices, np.cumsum(counts)), shape=(len(centres), int(np.prod(shape))))


def _collect(
    frames: Iterator[Float32], source_frames: int, spatial: SpatialPlan
) -> tuple[Float32, sparse.csr_array | None]:
    """All frames, reduced to what is needed, and what is still to be done to them.

    Either the packed voxels (T, V) and nothing more, or, where those are more than the source voxels they are made of,
    the latter (T, N) and the plan's columns for them (V, N): the smaller of the two is kept.
    """
    needed = np.unique(spatial.matrix.indices)
    voxels = spatial.matrix.shape[0]
    early = voxels <= len(needed)
    held = np.empty((source_frames, voxels if early else len(needed)), np.float32)
    for row, frame in zip(held, frames, strict=True):
        if early:
            row[:] = spatial.matrix @ frame
        else:
            np.take(frame, needed, out=row)
    if early:
        return held, None
    position = np.searchsorted(needed, spatial.matrix.indices).astype(np.int32)
    second = sparse.csr_array((spatial.matrix.data, position, spatial.matrix.indptr), shape=(voxels, len(needed)))
    return held, second


def _second_stage(held: Float32, rows: sparse.csr_array) -> Float32:
    """(T, block) of the packed voxels `rows`; frame by frame, as the product with all at once would copy `held`."""
    block = np.empty((len(held), rows.shape[0]), np.float32)
    for packed, frame in zip(block, held, strict=True):
        packed[:] = rows @ frame
    return block


def _moments(block: Float32) -> tuple[Float64, Float64]:
    """Mean and std over frames, accumulated in float64; std 0 where a voxel only varies by rounding."""
    mean = block.mean(axis=0, dtype=np.float64)
    std = block.std(axis=0, dtype=np.float64)
    signal = std > np.maximum(CONSTANT * np.abs(mean), np.finfo(np.float32).tiny)
    return np.where(signal, mean, 0.0), np.where(signal, std, 0.0)


def _z_scores(block: Float32, mean: Float64, std: Float64) -> Float32:
    """(T', block) float32; 0 where std is 0."""
    scale = np.divide(1.0, std, out=np.zeros_like(std), where=std > 0).astype(np.float32)
    z = block - mean.astype(np.float32)
    z *= scale
    return z


def _summary(frames: NDArray[np.int8], mean: Float64, std: Float64, decibels: Float32, clipped: int) -> Standardised:
    """The run with its figures, over the voxels that have signal."""
    signal = std > 0
    total = float(mean[signal].mean())
    variance = float((std[signal] ** 2 + (mean[signal] - total) ** 2).mean())
    return Standardised(
        frames=frames,
        mean=mean.astype(np.float32),
        std=std.astype(np.float32),
        global_mean=total,
        global_std=variance**0.5,
        tsnr_median=float(np.median(mean[signal] / std[signal])),
        clipped_fraction=clipped / (len(frames) * int(signal.sum())),
        coverage=float(signal.mean()),
        quantisation_db=float(np.median(decibels[signal])),
    )

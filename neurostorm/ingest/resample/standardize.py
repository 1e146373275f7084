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

Slice timing is ignored: a frame's voxels all count as acquired at k * TR. Memory: what `hold.py` keeps of the source
(at most 4 bytes per packed voxel and acquired frame; in a file of 16-bit integers 2 bytes per voxel that is copied, or
per source voxel that is needed), the int8 result, two plans, and one block of work per thread.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from neurostorm.ingest.nifti import RunError
from neurostorm.ingest.resample.blocks import pack
from neurostorm.ingest.resample.frame_buffer import Scaling, buffer_frames
from neurostorm.ingest.resample.weights import COINCIDE, axis_weights, box_width, copy_weights, volume_weights
from neurostorm.store import INT8_16, FrameCodec

Bool = NDArray[np.bool_]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Result = TypeVar("Result")

MASK_SHARE = 0.5  # of a packed voxel's weight must lie in the run's own brain mask
SAME_TR = 1e-6  # relative difference within which two TRs are the same
_BLOCK_VALUES = 1 << 18  # source or stored values worked on at a time, 1 MB of float32
_LEAST_BLOCK = 256  # voxels, so that a row of a block is worth a call
_FIGURE_VOXELS = 8192  # voxels whose quantisation noise is looked at: its median is all that is kept


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

    @property
    def filled(self) -> sparse.csr_array:
        """The rows that are not empty; shares the weights."""
        starts = np.concatenate([self.matrix.indptr[:1], self.matrix.indptr[1:][self.inside]])
        parts = (self.matrix.data, self.matrix.indices, starts)
        return sparse.csr_array(parts, shape=(len(starts) - 1, self.matrix.shape[1]))

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
        frames: (T', V) int8, the z-score of each voxel as the codec stores it.
        mean, std: (V,) float32, source units, over the stored frames; both 0 where the run has no signal.
        global_mean, global_std: over the voxels with signal and all frames, source units.
        tsnr_median: median of mean / std over the voxels with signal.
        clipped_fraction: share of stored values at the limit of int8.
        coverage: share of the V voxels that have signal.
        quantisation_db: median temporal signal to quantisation noise of some 8,000 of these voxels, evenly spread.
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

    The last two plans are remembered, as the runs of a dataset mostly share one grid: do not change their arrays.
    """
    places = wanted.astype(bool)
    affines = np.asarray(source_affine, np.float64).tobytes(), np.asarray(target_affine, np.float64).tobytes()
    return _plan_spatial(tuple(source_shape), *affines, places.shape, np.packbits(places).tobytes())


@lru_cache(maxsize=2)
def _plan_spatial(
    source_shape: tuple[int, ...], source: bytes, target: bytes, target_shape: tuple[int, ...], wanted_bits: bytes
) -> SpatialPlan:
    source_affine, target_affine = (np.frombuffer(affine).reshape(4, 4) for affine in (source, target))
    bits = np.unpackbits(np.frombuffer(wanted_bits, np.uint8), count=int(np.prod(target_shape)))
    wanted = bits.astype(bool).reshape(target_shape)
    to_source = np.linalg.inv(source_affine) @ target_affine
    centres = np.argwhere(wanted) @ to_source[:3, :3].T + to_source[:3, 3]  # (V, 3) in source voxels
    ratio = np.linalg.norm(to_source[:3, :3], axis=1)  # extent of a target voxel along each source axis, source voxels
    aligned = bool(np.abs(centres - np.rint(centres)).max(initial=0.0) < COINCIDE)
    if aligned:
        centres = np.rint(centres)
    box = box_width(ratio)
    average = bool(box.any())
    last = np.asarray(source_shape) - 1.0
    reaches = (centres - box / 2 >= -COINCIDE) & (centres + box / 2 <= last + COINCIDE)
    inside: Bool = np.all(reaches, axis=1)
    centres = np.clip(centres, box / 2, np.maximum(last - box / 2, box / 2))  # moves only what is within COINCIDE
    kind = "average" if average else "copy" if aligned else "linear"
    if kind == "copy":
        return SpatialPlan(kind, copy_weights(centres, inside, source_shape), inside)
    return SpatialPlan(kind, volume_weights(centres, box, inside, source_shape), inside)


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
    index, weight = axis_weights(centres, np.minimum(box_width(np.asarray(ratio)), room), source_frames)
    rows = np.repeat(np.arange(count), index.shape[1])
    matrix = sparse.coo_array((weight.ravel(), (rows, index.ravel())), shape=(count, source_frames)).tocsr()
    matrix.eliminate_zeros()
    return TemporalPlan("average" if box_width(np.asarray(ratio)) > 0 else "linear", matrix.astype(np.float32))


def standardise(
    frames: Iterator[NDArray[Any]],
    source_frames: int,
    spatial: SpatialPlan,
    temporal: TemporalPlan,
    *,
    scaling: Scaling = (1.0, 0.0),
    codec: FrameCodec = INT8_16,
    threads: int = 1,
) -> Standardised:
    """Resample a run in space and time, z-score each voxel and round it to bytes.

    Args:
        frames: `source_frames` volumes (X * Y * Z) of any one real type in Fortran order, taken one at a time.
        source_frames: T.
        spatial: its rows are the V packed voxels.
        temporal: its rows are the T' stored frames.
        scaling: slope and intercept from the frames' numbers to values.
        codec: of the store.
        threads: that work on blocks of voxels at the same time; the result is the same for any number.

    A voxel is without signal (mean, std and frames 0) when the plan leaves it out, when a source voxel it needs is not
    finite in any frame, or when it does not vary. RunError when no voxel has signal.
    """
    places, voxels = np.flatnonzero(spatial.inside), len(spatial.inside)
    hold = buffer_frames(frames, source_frames, spatial.filled, scaling)
    clock = None if temporal.kind == "copy" else temporal.matrix
    result = np.zeros((temporal.frames, voxels), np.int8)
    mean, std = np.zeros(voxels), np.zeros(voxels)
    figure_every = max(1, len(places) // _FIGURE_VOXELS)
    step = max(_LEAST_BLOCK, _BLOCK_VALUES // max(source_frames, temporal.frames))

    def work(first: int) -> tuple[bool, int, Float32]:
        part = slice(first, min(first + step, len(places)))
        packed = pack(hold.block(part), clock, figure_every, codec)
        where = part if len(places) == voxels else places[part]
        result[:, where], mean[where], std[where] = packed.frames, packed.mean, packed.std
        return bool(packed.finite.any()), packed.clipped, packed.decibels

    done = _each(work, range(0, len(places), step), threads)
    if not any(finite for finite, _, _ in done):
        raise RunError("has no finite value in the brain: every voxel there is NaN or infinite in some frame")
    if not std.any():
        raise RunError("is constant: no voxel of the brain changes over time")
    decibels = np.concatenate([some for _, _, some in done])
    return _summary(result, mean, std, decibels, sum(clipped for _, clipped, _ in done))


def _each(work: Callable[[int], Result], items: Sequence[int], threads: int) -> list[Result]:
    """`work` on all items; numpy and scipy leave Python's lock to the other threads while they compute."""
    if threads == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def _summary(frames: NDArray[np.int8], mean: Float64, std: Float64, decibels: Float32, clipped: int) -> Standardised:
    """The run with its figures, over the voxels that have signal; `decibels` are those of some of them."""
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
        quantisation_db=float(np.median(decibels)),
    )

"""One block of a run's packed voxels from values to stored bytes: small enough to stay in the processor's cache.

    (T, block) ──dead──> zeros ──temporal product──> (T', block) ──z of each voxel──> mean, std, int8, figures

A block is worked on by as many passes as are convenient, since none of them goes to memory. Every block is independent
of the others, so that threads may share them out without a difference to the result.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from neurostorm.store.codec import INT8_16, FrameCodec

Bool = NDArray[np.bool_]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

CONSTANT = 1e-6  # std below this share of the mean is the rounding of float32, not signal
_SMALL_SQUARES = 1e-30  # mean squares below it lose digits in float32


@dataclass(frozen=True)
class Packed:
    """One block as it is stored.

    Attributes:
        frames: (T', block) int8.
        mean, std: (block,) float64, source units; both 0 where a voxel has no signal.
        finite: (block,) no source value was NaN or infinite.
        clipped: number of stored values at the limit of int8.
        decibels: temporal signal to quantisation noise of some of the voxels that have signal.
    """

    frames: NDArray[np.int8]
    mean: Float64
    std: Float64
    finite: Bool
    clipped: int
    decibels: Float32


def pack(block: Float32, temporal: sparse.csr_array | None, figure_every: int, codec: FrameCodec = INT8_16) -> Packed:
    """Bring a block to the store's clock and bytes.

    Args:
        block: (T, block) values; changed.
        temporal: (T', T), None for a copy.
        codec: of the store.
        figure_every: the decibels are those of every so-manieth voxel that has signal.
    """
    finite = finite_series(block)
    if not finite.all():
        block[:, ~finite] = 0
    if temporal is not None:
        block = temporal @ block
    mean, std, z = standard_scores(block)
    frames = codec.encode(z)
    some = np.flatnonzero(std > 0)[::figure_every]
    decibels = codec.signal_to_noise_db(z[:, some], frames[:, some])
    return Packed(frames, mean, std, finite, codec.count_clipped(frames), decibels)


def finite_series(block: Float32) -> Bool:
    """(block,) whether all of a voxel's values are finite.

    NaN and infinity survive a sum, so that only the voxels whose sum is not finite need a look at each value: finite
    values near float32's limit may add up to infinity.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        finite: Bool = np.isfinite(block.sum(axis=0))
    if not finite.all():
        finite[~finite] = np.isfinite(block[:, ~finite]).all(axis=0)
    return finite


def standard_scores(block: Float32) -> tuple[Float64, Float64, Float32]:
    """Mean and std over frames in float64, and z-scores.

    The deviations from the mean are float32 (close values are subtracted without error), their squares are added up in
    float64. A voxel whose squares leave the range of float32 is done in float64 altogether.

    Returns:
        mean (block,), std (block,): 0 where a voxel only varies by rounding; z (T', block) float32, 0 there.
    """
    mean = block.mean(axis=0, dtype=np.float64)
    near = mean.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        z = block - near
        variance = np.multiply(z, z).mean(axis=0, dtype=np.float64) - (mean - near) ** 2
    odd = np.flatnonzero(~((variance > _SMALL_SQUARES) & np.isfinite(variance)))
    if len(odd):
        variance[odd] = block[:, odd].var(axis=0, dtype=np.float64)
        z[:, odd] = 0
    std = np.sqrt(variance)
    signal = std > np.maximum(CONSTANT * np.abs(mean), np.finfo(np.float32).tiny)
    scale = np.divide(1.0, std, out=np.zeros_like(std), where=signal)
    z *= scale.astype(np.float32)
    if len(odd):
        z[:, odd] = (block[:, odd] - mean[odd]) * scale[odd]
    return np.where(signal, mean, 0.0), np.where(signal, std, 0.0), z

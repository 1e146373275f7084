"""The byte a voxel's signal is stored in: sixteen steps to one standard deviation.

    z (per-voxel z-score) --x16, round--> int8 in -127..127 --/16--> z again, within 1/32 while |z| < 7.97

The rounding error of a step of 1/16 is uniform with variance (1/16)^2 / 12, so a voxel of variance one keeps
10 log10(12 * 256) = 34.9 dB of temporal signal to noise, whatever its mean or amplitude was in the scanner's units.
The value -128 is never produced; the store uses it to mark what is missing.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

SCALE = 16
LIMIT = 127
_BLOCK_FLOATS = 1 << 22  # work in pieces of 16 MB, so that a whole run never needs a second copy in float32


def quantise(z: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
    """int8 of the shape of `z`: 16 z rounded half to even, clipped to +-127.

    Raises:
        ValueError: `z` holds a value that is not finite; such voxels get std 0 and z 0 before they come here.
    """
    flat = np.asarray(z).reshape(-1)
    out = np.empty(flat.shape, np.int8)
    for first in range(0, flat.size, _BLOCK_FLOATS):
        values = flat[first : first + _BLOCK_FLOATS]
        if not np.isfinite(values).all():
            raise ValueError("z-scores must be finite: set voxels without signal to 0 (and their std to 0) first")
        block = np.clip(values, -LIMIT / SCALE, LIMIT / SCALE)  # before scaling, which may leave the range of floats
        block *= SCALE
        np.rint(block, out=block)
        out[first : first + _BLOCK_FLOATS] = block  # whole numbers within the range: the cast is exact
    return out.reshape(np.shape(z))


def dequantise(frames: NDArray[np.int8]) -> NDArray[np.float32]:
    """float32 of the shape of `frames`: the z-scores that the bytes stand for, exact multiples of 1/16."""
    return np.asarray(frames, np.float32) / np.float32(SCALE)


def clipped_fraction(frames: NDArray[np.int8]) -> float:
    """Share of the stored values at the limit, |z| >= 7.9; 0 for no values."""
    if frames.size == 0:
        return 0.0
    return float(np.count_nonzero(np.abs(frames) >= LIMIT) / frames.size)


def signal_to_quantisation_noise_db(z: NDArray[np.floating[Any]], q: NDArray[np.int8]) -> NDArray[np.float32]:
    """Temporal signal to noise of the stored bytes, 10 log10(var(z) / var(z - q/16)), per voxel.

    Args:
        z: (T, V) the z-scores before rounding.
        q: (T, V) int8, what `quantise` made of them.

    Returns:
        (V,) float32 in dB; inf where the bytes are exact, nan where the voxel has no variance to keep.
    """
    if z.ndim != 2 or z.shape != q.shape:
        raise ValueError(f"z {z.shape} and q {q.shape} must both be (frames, voxels)")
    decibels = np.empty(z.shape[1], np.float32)
    width = max(1, _BLOCK_FLOATS // max(1, z.shape[0]))
    for first in range(0, z.shape[1], width):
        part = slice(first, first + width)
        signal = z[:, part].var(axis=0, dtype=np.float64)
        noise = (z[:, part] - dequantise(q[:, part])).var(axis=0, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            decibels[part] = np.where(signal > 0, 10 * np.log10(signal / noise), np.nan)
    return decibels

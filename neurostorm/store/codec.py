"""How a voxel's signal is stored in a frame: a codec, which the store's header names.

    z (per-voxel z-score) --encode--> one byte, in a Zarr array whose fill value marks what is missing --decode--> z

`int8-16` has sixteen steps to one standard deviation: z comes back within 1/32 while |z| < 7.97. The rounding error of
a step of 1/16 is uniform with variance (1/16)^2 / 12, so a voxel of variance one keeps 10 log10(12 * 256) = 34.9 dB of
temporal signal to noise, whatever its mean or amplitude was in the scanner's units.

A new codec is an entry of FRAME_CODECS. It is linear and has one byte a voxel: tokens are cut from stored bytes on the
device, and a frame is a row of V bytes (`shard.py`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

_BLOCK_FLOATS = 1 << 22  # work in pieces of 16 MB, so that a whole run never needs a second copy in float32


@dataclass(frozen=True)
class FrameCodec:
    """A linear code of z-scores. A voxel outside a run's field of view is 0 in all frames.

    Attributes:
        name: in the header of stores.
        scale: steps to one standard deviation.
        limit: the largest magnitude that is stored; z beyond `limit / scale` is clipped.
        dtype: of stored values.
        missing: the value that no frame has: what Zarr returns for a chunk that is not there.
    """

    name: str
    scale: int
    limit: int
    dtype: ClassVar[np.dtype[np.int8]] = np.dtype(np.int8)
    missing: ClassVar[int] = -128

    def encode(self, z: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
        """int8 of the shape of `z`: `scale` z rounded half to even, clipped to +-`limit`.

        Raises:
            ValueError: `z` holds a value that is not finite; such voxels get std 0 and z 0 before they come here.
        """
        flat = np.asarray(z).reshape(-1)
        out = np.empty(flat.shape, self.dtype)
        for first in range(0, flat.size, _BLOCK_FLOATS):
            values = flat[first : first + _BLOCK_FLOATS]
            if not np.isfinite(values).all():
                raise ValueError("z-scores must be finite: set voxels without signal to 0 (and their std to 0) first")
            most = self.limit / self.scale
            block = np.clip(values, -most, most)  # before scaling, which may leave the range of floats
            block *= self.scale
            np.rint(block, out=block)
            out[first : first + _BLOCK_FLOATS] = block  # whole numbers within the range: the cast is exact
        return out.reshape(np.shape(z))

    def decode(self, frames: NDArray[np.int8]) -> NDArray[np.float32]:
        """float32 of the shape of `frames`: the z-scores that the bytes stand for, exact multiples of 1/`scale`."""
        return np.asarray(frames, np.float32) / np.float32(self.scale)

    def count_clipped(self, frames: NDArray[np.int8]) -> int:
        """How many of the stored values are at the limit."""
        return int(np.count_nonzero((frames >= self.limit) | (frames <= -self.limit)))

    def signal_to_noise_db(self, z: NDArray[np.floating[Any]], frames: NDArray[np.int8]) -> NDArray[np.float32]:
        """Temporal signal to noise of the stored bytes, 10 log10(var(z) / var(z - decoded)), per voxel.

        Args:
            z: (T, V) the z-scores before rounding.
            frames: (T, V) int8, what `encode` made of them.

        Returns:
            (V,) float32 in dB; inf where the bytes are exact, nan where the voxel has no variance to keep.
        """
        if z.ndim != 2 or z.shape != frames.shape:
            raise ValueError(f"z {z.shape} and the stored frames {frames.shape} must both be (frames, voxels)")
        decibels = np.empty(z.shape[1], np.float32)
        width = max(1, _BLOCK_FLOATS // max(1, z.shape[0]))
        for first in range(0, z.shape[1], width):
            part = slice(first, first + width)
            signal = z[:, part].var(axis=0, dtype=np.float64)
            noise = (z[:, part] - self.decode(frames[:, part])).var(axis=0, dtype=np.float64)
            with np.errstate(divide="ignore", invalid="ignore"):
                decibels[part] = np.where(signal > 0, 10 * np.log10(signal / noise), np.nan)
        return decibels


INT8_16 = FrameCodec("int8-16", scale=16, limit=127)
FRAME_CODECS: dict[str, FrameCodec] = {codec.name: codec for codec in (INT8_16,)}

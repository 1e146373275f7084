"""The clips of one preprocessed NIfTI file, equal to those that a store of the same grid, mask and TR would hold.

    path --its mask, its sidecars--> Source --bring_to_target (target.py)--> int8 (T, V) --/16, scale--> (X, Y, Z, L)

The signal is rounded to the store's bytes on purpose: a model sees of a file what it would see of it in a store, to the
last bit, and a result does not depend on the way that was taken.
"""

from collections.abc import Iterator

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from neurostorm.ingest.layouts.discover import Source, source_of
from neurostorm.ingest.nifti import RunError, open_nifti
from neurostorm.ingest.resample.standardize import Standardised
from neurostorm.ingest.resample.target import Target, bring_to_target
from neurostorm.io.paths import AnyPath
from neurostorm.store import INT8_16


def read_clips(
    run: AnyPath | Source,
    *,
    grid_affine: NDArray[np.float64],
    brain: NDArray[np.bool_],
    tr_s: float,
    frames: int,
    normalise: str,
    stride: int | None = None,
) -> Iterator[Tensor]:
    """The clips of one file, in order; read at once and held as bytes, made into floats one clip at a time.

    Args:
        run: the file, or what `discover` found of it.
        grid_affine: (4, 4), voxel index -> mm, of the clips' grid.
        brain: (X, Y, Z) bool on that grid.
        tr_s: seconds between two frames of a clip.
        frames: of a clip; a shorter run gives one shorter clip.
        normalise: "voxel" (z of each voxel over the run) or "global" (z over all brain voxels and frames).
        stride: frames between clip starts; default: `frames`. A rest that is shorter than a clip is left out.

    Returns:
        Iterator of (X, Y, Z, L) float32; outside the brain 0, or for "global" where an intensity of 0 lies.

    Raises:
        RunError: the file, its mask or its sidecar cannot be used; the message is the reason.
        ValueError: `normalise` is neither of the two.
    """
    if normalise not in ("voxel", "global"):
        raise ValueError(f"normalise = {normalise!r}: voxel or global")
    source = run if isinstance(run, Source) else source_of(run)
    if source.refused:
        raise RunError(source.refused)
    target = Target(grid_affine, brain, tr_s)
    result = bring_to_target(source, open_nifti(source.path), target).result
    return _clips(result, brain, frames, normalise, stride or frames)


def _clips(
    result: Standardised, brain: NDArray[np.bool_], frames: int, normalise: str, stride: int
) -> Iterator[Tensor]:
    stored = torch.from_numpy(result.frames)
    total, length = len(stored), min(frames, len(stored))
    voxels = torch.from_numpy(np.flatnonzero(brain))
    centre, spread = result.global_mean, result.global_std
    shift = torch.from_numpy((result.mean - centre) / spread)
    scale = torch.from_numpy(result.std / spread)
    outside = -centre / spread if normalise == "global" else 0.0  # the intensity is zero there
    for start in range(0, total - length + 1, stride):
        values = stored[start : start + length].float() / INT8_16.scale
        if normalise == "global":
            values = torch.addcmul(shift, values, scale)
        box = torch.full((length, brain.size), outside)
        box[:, voxels] = values
        x, y, z = brain.shape
        yield rearrange(box, "t (x y z) -> x y z t", x=x, y=y, z=z)

"""Regions on a store's grid, and the mean signal of each.

    label NIfTI --affine, nearest--.
                                    > labels (V,), 1..R, 0 = none --region_means--> frames (T, V) -> series (T, R)
    mask --halved again and again--'

An atlas is taken where there is one. Without one the mask is cut into blocks of equal size that keep to their side of
the brain: they know no anatomy, but nothing has to be downloaded and they are the same everywhere.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from neurostorm.model.masking.atlas import patch_labels
from neurostorm.store import INT8_16, FrameCodec, Grid

_ONE_VOXEL = (1, 1, 1)


@dataclass(frozen=True, eq=False)
class Parcels:
    """Regions of one mask; `sha256` tells whether two are the same.

    Attributes:
        labels: int32 (V,), the region of each voxel of the mask in C order: 1 to R, each at least once; 0 for none.
        names: of the R regions, the first of label 1.
        lost: names of the atlas's regions that have no voxel of the mask; they are left out of the R.
    """

    labels: NDArray[np.int32]
    names: tuple[str, ...]
    lost: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the labels alone: other names of the same regions change no signal."""
        return hashlib.sha256(np.asarray(self.labels, "<i4").tobytes()).hexdigest()


def parcels_from_atlas(file: Path, grid: Grid, mask: NDArray[np.bool_]) -> Parcels:
    """The regions of a label image, each named by its number in the file.

    Args:
        file: 3D label NIfTI in MNI space, of any voxel size, orientation and field of view; 0 is no region.
        grid: the store's.
        mask: bool (X, Y, Z).

    Raises:
        ValueError: the file is no label image (see `neurostorm.model.masking.atlas`), or none of its regions meets the
            mask.
    """
    placed = patch_labels(file, grid.affine, grid.shape, _ONE_VOXEL)[mask]
    there = np.unique(placed[placed > 0])
    if not len(there):
        raise ValueError(f"atlas {file}: no region has a voxel of the store's mask; is it in MNI space?")
    known = np.unique(np.asanyarray(nibabel.load(file).dataobj)).astype(np.int64)
    lost = np.setdiff1d(known[known > 0], there)
    labels = np.where(placed > 0, np.searchsorted(there, placed) + 1, 0).astype(np.int32)
    return Parcels(labels, tuple(map(str, there)), tuple(map(str, lost)))


def parcels_from_mask(grid: Grid, mask: NDArray[np.bool_], count: int = 100) -> Parcels:
    """Blocks of nearly equal size, each on one side of the midsagittal plane; the same for the same mask, always.

    A side (left: x < 0 mm) gets blocks by its share of the voxels. It is halved across its widest axis, the halves
    again, as in a k-d tree (Bentley 1975): sizes on one side differ by a few voxels, and nothing is drawn at random as
    in a clustering.

    Args:
        grid: the store's.
        mask: bool (X, Y, Z) with V voxels.
        count: R, all blocks together.

    Raises:
        ValueError: there are fewer voxels than blocks, or fewer blocks than sides that have voxels.
    """
    index = np.argwhere(mask)
    place_mm = index * grid.voxel_mm + np.asarray(grid.origin_mm)  # (V, 3)
    sides = {"left": np.flatnonzero(place_mm[:, 0] < 0), "right": np.flatnonzero(place_mm[:, 0] >= 0)}
    sides = {name: voxels for name, voxels in sides.items() if len(voxels)}
    if not len(sides) <= count <= len(index):
        raise ValueError(
            f"{count} regions of a mask of {len(index)} voxels on {len(sides)} side(s): a side needs one region at "
            "least, and a region one voxel"
        )
    labels, names = np.zeros(len(index), np.int32), []
    for side, parts in zip(sides, _shares([len(voxels) for voxels in sides.values()], count), strict=True):
        for number, block in enumerate(_halved(place_mm, sides[side], parts), 1):
            names.append(f"{side} {number}")
            labels[block] = len(names)
    return Parcels(labels, tuple(names))


def region_means(
    frames: NDArray[np.int8],
    labels: NDArray[np.integer[Any]],
    live: NDArray[np.bool_] | None = None,
    codec: FrameCodec = INT8_16,
) -> NDArray[np.float32]:
    """The mean z-score of each region's live voxels, frame by frame.

    Sums are of whole numbers, so the result does not depend on how a run is cut into blocks. One core takes about
    0.6 s for 1,200 frames of 228,000 voxels.

    Args:
        frames: int8 (T, V), a store's bytes.
        labels: (V,), 0 for none, 1 to R as in `Parcels`.
        live: bool (V,), the voxels inside the run's field of view; None: those that any of `frames` is not 0 in.
        codec: of the store.

    Returns:
        Float32 (T, R), R the largest label; 0 for a region without a live voxel.

    Raises:
        ValueError: the voxels of the arguments do not agree.
    """
    if frames.ndim != 2 or labels.shape != frames.shape[1:]:
        raise ValueError(f"frames {frames.shape} and labels {labels.shape}: (T, V) and (V,) are needed, V the same")
    counted = np.asarray(frames.any(0) if live is None else live)
    if counted.shape != labels.shape:
        raise ValueError(f"live {counted.shape}: needs a value for each of {len(labels)} voxels")
    regions = int(labels.max(initial=0))
    means = np.zeros((len(frames), regions), np.float32)
    used = np.flatnonzero(counted & (labels > 0))
    order = used[np.argsort(labels[used], kind="stable")]  # voxels region by region
    if not len(order):
        return means
    there, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    for frame, row in zip(frames, means, strict=True):  # one at a time: what was gathered stays in the cache
        row[there - 1] = np.add.reduceat(frame.take(order), first, dtype=np.int32) / (codec.scale * sizes)
    return means


def _shares(sizes: list[int], count: int) -> list[int]:
    """`count` parted in proportion to one or two sizes, at least one each, no more than there are voxels."""
    if len(sizes) == 1:
        return [count]
    low, high = max(1, count - sizes[1]), min(count - 1, sizes[0])
    first = min(max(round(count * sizes[0] / sum(sizes)), low), high)
    return [first, count - first]


def _halved(place_mm: NDArray[np.float64], voxels: NDArray[np.intp], parts: int) -> list[NDArray[np.intp]]:
    """`voxels` in `parts` blocks, by cuts across the widest axis."""
    if parts == 1:
        return [voxels]
    where = place_mm[voxels]
    widest = int(np.argmax(np.ptp(where, axis=0)))
    # The other axes settle ties, so that a plane that is shared out is shared out in one piece.
    order = np.lexsort((where[:, (widest + 2) % 3], where[:, (widest + 1) % 3], where[:, widest]))
    few = parts // 2
    cut = round(len(voxels) * few / parts)
    low, high = voxels[order[:cut]], voxels[order[cut:]]
    return [*_halved(place_mm, low, few), *_halved(place_mm, high, parts - few)]

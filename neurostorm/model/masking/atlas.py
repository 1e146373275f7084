"""A label volume on the grid of patches, for masking whole regions.

    label NIfTI --affine--> nearest label at each voxel centre of the grid --most frequent in a patch--> int32 (d, h, w)

Any atlas in the clips' space serves, whatever its voxel size, orientation or field of view. A patch with any labelled
voxel gets a label, the most frequent one other than 0: cortex is thinner than a patch, so counting the unlabelled
voxels too would leave most of it without a region, and what has no region is never masked.
"""

import math
import zlib
from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import ArrayLike, NDArray

MAX_VOXELS = 1 << 26  # of an atlas; 0.5 mm over the whole head

AtlasSource = str | PathLike[str] | tuple[ArrayLike, ArrayLike]


def patch_labels(
    atlas: AtlasSource, grid_affine: ArrayLike, shape: Sequence[int], patch: Sequence[int]
) -> NDArray[np.int32]:
    """The label of every patch.

    Args:
        atlas: path of a label image (3D, or 4D with one volume), or its array and (4, 4) affine (voxel -> mm, RAS+).
        grid_affine: (4, 4) affine of the clips' grid, voxel -> mm.
        shape: voxels (X, Y, Z) of that grid; further entries are ignored.
        patch: voxels (px, py, pz) per patch; further entries are ignored.

    Returns:
        Int32 (X / px, Y / py, Z / pz): the most frequent label of the patch's voxels other than 0, the smallest of
        several; 0 where no voxel has one or the atlas does not reach.

    Raises:
        ValueError: the atlas cannot be read, is not 3D, holds other numbers than labels (whole, not negative), has no
            usable affine, or has no label inside the grid; the patch does not divide the grid.
    """
    size, step = tuple(shape[:3]), tuple(patch[:3])
    if any(n % p for n, p in zip(size, step, strict=True)):
        raise ValueError(f"patch = {step}: does not divide the grid of {size} voxels")
    name, array, affine = _read(atlas)
    labels, affine = _ras(_as_labels(name, array), affine)
    on_grid = _nearest(labels, np.linalg.solve(affine, np.asarray(grid_affine, np.float64)), size)
    if not on_grid.any():
        raise ValueError(
            f"{name}: no label lies inside the grid of {size} voxels; is it in the clips' space, and its affine right?"
        )
    return _majority(on_grid, step)


def _read(atlas: AtlasSource) -> tuple[str, NDArray[Any], NDArray[np.float64]]:
    """Name for messages, array (i, j, k) and affine."""
    if isinstance(atlas, tuple):
        name, array, affine = "the atlas array", np.asarray(atlas[0]), np.asarray(atlas[1], np.float64)
    else:
        name, array, affine = _load(fspath(atlas))
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3 or not array.size:
        raise ValueError(f"{name}: has shape {array.shape}; a label volume is 3D (pick one volume of a 4D image)")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        raise ValueError(f"{name}: its affine cannot be inverted; write the one of the space it was drawn in")
    return name, array, affine


def _load(path: str) -> tuple[str, NDArray[Any], NDArray[np.float64]]:
    import nibabel  # only those who mask by atlas need it
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        image = nibabel.load(path)
        if math.prod(image.shape) > MAX_VOXELS:  # before the numbers are read: a header can announce any shape
            raise ValueError(f"its shape {image.shape} has more than {MAX_VOXELS:,} voxels")
        return f"atlas {path}", np.asanyarray(image.dataobj), np.asarray(image.affine, np.float64)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
        raise ValueError(f"atlas {path}: cannot be read ({error}); give a complete label NIfTI") from error


def _as_labels(name: str, array: NDArray[Any]) -> NDArray[np.int32]:
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name}: holds {array.dtype} values; labels are whole numbers")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.rint(array)).all()):
        raise ValueError(f"{name}: holds numbers that are not whole; give the label image, not probabilities")
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise ValueError(
            f"{name}: labels run from {array.min():g} to {array.max():g}; renumber them from 1 up, with 0 for none"
        )
    return array.astype(np.int32)


def _ras(labels: NDArray[np.int32], affine: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Axes turned to right, anterior, superior, so that half-way between two voxels is settled alike in any file."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    turn = io_orientation(affine)
    return apply_orientation(labels, turn), affine @ inv_ornt_aff(turn, labels.shape)


def _nearest(labels: NDArray[np.int32], to_atlas: NDArray[np.floating[Any]], size: Sequence[int]) -> NDArray[np.int32]:
    """Labels at the voxel centres of a grid of ``size``; ``to_atlas`` maps its voxels to the atlas's. Outside is 0."""
    grid = np.indices(size, np.float64).reshape(3, -1)
    # Rounded before it is halved: half-way points must not hang on the last bit of an affine.
    place = np.floor(np.round(to_atlas[:3, :3] @ grid + to_atlas[:3, 3:], 4) + 0.5).astype(np.int64)
    inside = ((place >= 0) & (place < np.array(labels.shape)[:, None])).all(0)
    found = np.zeros(grid.shape[1], np.int32)
    found[inside] = labels[tuple(place[:, inside])]
    return found.reshape(size)


def _majority(labels: NDArray[np.int32], patch: Sequence[int]) -> NDArray[np.int32]:
    p, q, r = patch
    voxels = rearrange(labels, "(x p) (y q) (z r) -> (x y z) (p q r)", p=p, q=q, r=r)
    number, voxel = np.nonzero(voxels)
    values = int(voxels.max()) + 1
    pairs, count = np.unique(number * values + voxels[number, voxel], return_counts=True)
    patches, label = np.divmod(pairs, values)
    best = np.lexsort((label, -count, patches))  # by patch, the most frequent first, then the smallest label
    patches, first = np.unique(patches[best], return_index=True)
    winner = np.zeros(len(voxels), np.int32)
    winner[patches] = label[best][first]
    d, h, w = (n // p for n, p in zip(labels.shape, patch, strict=True))
    return winner.reshape(d, h, w)

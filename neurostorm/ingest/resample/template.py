"""The whole-brain mask that a store keeps: which voxels of its grid are brain.

    ICBM152 T1 template (nilearn, 1 mm)  --outline, holes filled-->  share of each voxel  -->  bool (X, Y, Z)
    or a mask file of the user            --------------------->     by affine

Affines alone decide: nilearn's template lies on a grid of its own, and a user's mask may too.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from neurostorm.ingest.nifti import RunError, read_volume
from neurostorm.ingest.resample.standardize import plan_spatial
from neurostorm.io.errors import UserError
from neurostorm.io.paths import AnyPath
from neurostorm.store import Grid

Bool = NDArray[np.bool_]

TEMPLATE_LEVEL = 0.2  # of the skull-stripped T1's maximum; between 0.15 and 0.25 the outline moves by 0.3 %
# A voxel counts as brain when three quarters of it lie inside the outline: 230,799 voxels at 2 mm and 28,210 at 4 mm
# (FSL's 2 mm mask has 228,483). Half a voxel would give 235,382 and 29,390, most of the rest being cerebrospinal fluid.
TEMPLATE_SHARE = 0.75
MASK_SHARE = 0.5  # a user's mask is taken as it is: the nearer of in and out


class MaskError(UserError, ValueError):
    """A mask file that cannot be the store's mask; the message names it and the fix."""


def brain_mask(grid: Grid, mask_path: AnyPath | None = None) -> Bool:
    """Brain voxels of a grid, bool (X, Y, Z), from the ICBM152 template or from a mask file in MNI space.

    Raises MaskError when the file cannot be read, is empty, or does not lie inside the grid.
    """
    if mask_path is None:
        outline, affine = _template_outline()
        return _share(outline, affine, grid) > TEMPLATE_SHARE
    try:
        volume, affine = read_volume(mask_path)
    except RunError as error:
        raise MaskError(f"ingest.mask={mask_path}: {error}") from error
    outline = np.nan_to_num(volume) > 0
    if not outline.any():
        raise MaskError(f"ingest.mask={mask_path}: the mask is empty, no voxel is above 0")
    mask: Bool = _share(outline, affine, grid) > MASK_SHARE
    _check_inside(mask_path, outline, affine, mask, grid)
    return mask


def _template_outline() -> tuple[Bool, NDArray[np.float64]]:
    """The template's brain with its ventricles, bool (X, Y, Z) at 1 mm, and its affine."""
    from nilearn.datasets import load_mni152_template  # a second of imports that no other part of the ingest needs

    template = load_mni152_template(resolution=1)
    values = np.asarray(template.dataobj, np.float32)
    filled = ndimage.binary_fill_holes(values > TEMPLATE_LEVEL * values.max())
    assert filled is not None
    return filled, np.asarray(template.affine, np.float64)


def _share(outline: Bool, affine: NDArray[np.float64], grid: Grid) -> NDArray[np.float32]:
    """Share of each voxel of the grid inside the outline, (X, Y, Z) float32. Beyond its array is outside."""
    padded, shifted = _padded(outline, affine, grid)
    plan = plan_spatial(padded.shape, shifted, grid.affine, np.ones(grid.shape, bool))
    return (plan.matrix @ padded.ravel(order="F").astype(np.float32)).reshape(grid.shape)


def _padded(outline: Bool, affine: NDArray[np.float64], grid: Grid) -> tuple[Bool, NDArray[np.float64]]:
    """The outline with a margin of zeros: a tightly cropped mask must not lose the voxels at its faces."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    margin = [math.ceil(grid.voxel_mm / step) + 1 for step in spacing]
    shifted = affine.copy()
    shifted[:3, 3] -= affine[:3, :3] @ margin
    return np.pad(outline, [(width, width) for width in margin]), shifted


def _check_inside(path: AnyPath, outline: Bool, affine: NDArray[np.float64], mask: Bool, grid: Grid) -> None:
    """MaskError unless nine tenths of the mask lie inside the grid."""
    if not mask.any():
        raise MaskError(f"ingest.mask={path}: lies outside the {grid.name} grid; is it in MNI space?")
    inside_mm = np.argwhere(outline) @ affine[:3, :3].T + affine[:3, 3]
    index = (inside_mm - grid.origin_mm) / grid.voxel_mm
    within = ((index >= -0.5) & (index <= np.asarray(grid.shape) - 0.5)).all(axis=1).mean()
    if within < 0.9:
        raise MaskError(
            f"ingest.mask={path}: only {within:.0%} of the mask lie inside the {grid.name} grid; is it in MNI space?"
        )

"""Regions from an atlas and from the mask, and the mean signal of each."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from neurostorm.downstream.methods.parcels import Parcels, parcels_from_atlas, parcels_from_mask, region_means
from neurostorm.store import GRIDS, INT8_16, Grid

GRID = Grid("test", (12, 14, 10), 4.0, (-22.0, -26.0, -18.0))


def ball(grid: Grid) -> np.ndarray:
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in grid.shape], indexing="ij")
    return sum(axis**2 for axis in axes) < 1


def octants(mm: np.ndarray) -> np.ndarray:
    """Labels (11, 13 ... 25) by the signs of x and y and by three layers of z; mm (3, ...)."""
    return (11 + 2 * (mm[0] > 0) + 4 * (mm[1] > 0) + 8 * np.digitize(mm[2], [-5, 7])).astype(np.int16)


def write_octants(path: Path, size_mm: float, *, flip: bool) -> Path:
    """The octants as a file of its own voxel size, its x axis running to the right, or to the left."""
    shape = tuple(int(np.ceil(90 / size_mm)) for _ in range(3))
    affine = np.diag([size_mm] * 3 + [1.0])
    affine[:3, 3] = -45 + size_mm / 2
    if flip:
        affine[0] *= -1
        affine[0, 3] = 45 - size_mm / 2
    mm = np.tensordot(affine[:3, :3], np.indices(shape), 1) + affine[:3, 3].reshape(3, 1, 1, 1)
    nibabel.save(nibabel.Nifti1Image(octants(mm), affine), path)
    return path


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size_mm", [1.0, 2.0])
def test_an_atlas_of_any_grid_names_each_voxel_by_its_place(tmp_path: Path, size_mm: float, flip: bool) -> None:
    mask = ball(GRID)
    parcels = parcels_from_atlas(write_octants(tmp_path / "atlas.nii.gz", size_mm, flip=flip), GRID, mask)
    mm = (np.argwhere(mask) * GRID.voxel_mm + np.array(GRID.origin_mm)).T
    assert parcels.labels.dtype == np.int32
    assert [int(parcels.names[label - 1]) for label in parcels.labels] == octants(mm).tolist()
    assert len(parcels) == 12 and parcels.lost == ()


def test_regions_without_a_voxel_of_the_mask_are_dropped_and_named(tmp_path: Path) -> None:
    labels = np.zeros(GRID.shape, np.uint8)
    labels[4, 4, 4], labels[5, 5, 5], labels[0, 0, 0], labels[6, 6, 6] = 3, 40, 7, 200
    nibabel.save(nibabel.Nifti1Image(labels, GRID.affine), tmp_path / "atlas.nii")
    mask = ball(GRID)
    parcels = parcels_from_atlas(tmp_path / "atlas.nii", GRID, mask)
    assert parcels.names == ("3", "40", "200") and parcels.lost == ("7",)
    assert np.array_equal(np.flatnonzero(parcels.labels), np.flatnonzero(np.isin(labels[mask], (3, 40, 200))))
    assert sorted(parcels.labels[parcels.labels > 0]) == [1, 2, 3]
    outside = np.zeros_like(mask)
    outside[11, 13, 9] = True
    with pytest.raises(ValueError, match=r"atlas\.nii: no region has a voxel"):
        parcels_from_atlas(tmp_path / "atlas.nii", GRID, outside)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 40), holes=st.floats(0, 0.9))
def test_blocks_are_full_equal_and_one_sided_in_any_mask(seed: int, count: int, holes: float) -> None:
    mask = ball(GRID) & (np.random.default_rng(seed).random(GRID.shape) >= holes)
    parcels = parcels_from_mask(GRID, mask, count)
    sizes = np.bincount(parcels.labels, minlength=count + 1)
    assert sizes[0] == 0 and len(parcels) == count == len(sizes) - 1
    x_mm = np.argwhere(mask)[:, 0] * GRID.voxel_mm + GRID.origin_mm[0]
    for number, name in enumerate(parcels.names, 1):
        assert (np.sign(x_mm[parcels.labels == number]) == (-1 if name.startswith("left") else 1)).all()
    if mask.sum() >= 8 * count:
        assert sizes[1:].max() <= 2 * sizes[1:].min()
    assert np.array_equal(parcels_from_mask(GRID, mask, count).labels, parcels.labels)


def test_blocks_of_the_2_mm_grid_are_equal_compact_and_in_one_piece() -> None:
    """A solid of a brain's size: each block's spread is near a cube's, and all of it hangs together."""
    grid = GRIDS["2mm"]
    mm = np.tensordot(np.eye(3) * grid.voxel_mm, np.indices(grid.shape), 1) + np.reshape(grid.origin_mm, (3, 1, 1, 1))
    mask = (mm[0] / 68) ** 2 + ((mm[1] + 18) / 86) ** 2 + ((mm[2] - 4) / 68) ** 2 < 1
    parcels = parcels_from_mask(grid, mask, 100)
    sizes = np.bincount(parcels.labels)[1:]
    assert len(sizes) == 100 and sizes.max() < 1.1 * sizes.min()
    place = mm[:, mask]
    spread = np.array([place[:, parcels.labels == number].var(1).sum() for number in range(1, 101)])
    cube = 3 * (sizes * grid.voxel_mm**3) ** (2 / 3) / 12
    assert np.median(spread / cube) < 1.4 and (spread / cube).max() < 3.5
    box = np.zeros(mask.shape, int)
    box[mask] = parcels.labels
    for number in (1, 37, 64, 100):
        block = box == number
        one = np.zeros_like(block)
        one[tuple(np.argwhere(block)[0])] = True
        assert np.array_equal(binary_dilation(one, iterations=-1, mask=block), block)


def test_a_mask_of_one_side_and_counts_that_cannot_be() -> None:
    right = ball(GRID)
    right[:6] = False
    parcels = parcels_from_mask(GRID, right, 3)
    assert parcels.names == ("right 1", "right 2", "right 3")
    assert len(parcels_from_mask(GRID, right, int(right.sum()))) == right.sum()
    for mask, count in ((right, int(right.sum()) + 1), (ball(GRID), 1), (right, 0), (np.zeros_like(right), 2)):
        with pytest.raises(ValueError, match=f"{count} regions of a mask of {mask.sum()} voxels"):
            parcels_from_mask(GRID, mask, count)


def test_the_hash_is_that_of_the_labels_alone() -> None:
    labels = np.array([1, 2, 0, 2], np.int32)
    same, other = Parcels(labels.copy(), ("x", "y")), Parcels(labels[::-1].copy(), ("a", "b"))
    assert Parcels(labels, ("a", "b")).sha256 == same.sha256 != other.sha256


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), voxels=st.integers(1, 40), regions=st.integers(1, 9), given_live=st.booleans())
def test_means_are_those_of_the_live_voxels(seed: int, voxels: int, regions: int, given_live: bool) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, regions + 1, voxels).astype(np.int32)
    frames = rng.integers(-127, 128, (5, voxels)).astype(np.int8)
    live = rng.random(voxels) < 0.6
    frames[:, ~live] = 0
    means = region_means(frames, labels, live if given_live else None)
    assert means.dtype == np.float32 and means.shape == (5, labels.max())
    for number in range(1, labels.max() + 1):
        chosen = INT8_16.decode(frames[:, (labels == number) & live])
        expected = chosen.mean(1, dtype=np.float64) if chosen.shape[1] else np.zeros(5)
        np.testing.assert_allclose(means[:, number - 1], expected, rtol=1e-6, atol=1e-7)


def test_means_of_blocks_are_the_bits_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 30, 5000).astype(np.int32)
    frames = rng.integers(-127, 128, (50, 5000)).astype(np.int8)
    live = rng.random(5000) < 0.9
    whole = region_means(frames, labels, live)
    parts = [region_means(frames[first : first + 7], labels, live) for first in range(0, 50, 7)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_sums_do_not_leave_their_type() -> None:
    frames = np.full((1, 300_000), 127, np.int8)
    assert region_means(frames, np.ones(300_000, np.int32))[0, 0] == 127 / 16


@pytest.mark.parametrize(
    ("frames", "labels", "live"),
    [((3, 4), 5, None), ((4,), 4, None), ((3, 4), 4, 5)],
)
def test_voxels_that_do_not_agree_are_refused(frames: tuple[int, ...], labels: int, live: int | None) -> None:
    with pytest.raises(ValueError, match=str(labels if live is None else live)):
        region_means(np.ones(frames, np.int8), np.ones(labels, np.int32), None if live is None else np.ones(live, bool))

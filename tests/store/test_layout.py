"""The grids hold the whole brain where the comments say, and names cannot leave the store."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neurostorm.store.layout import (
    GRIDS,
    ClipReadError,
    FrameRangeError,
    Grid,
    StoreError,
    mask_hash,
    run_path,
    safe_name,
    split_run,
)


@pytest.fixture(scope="module")
def brain() -> dict[float, NDArray[np.float64]]:
    """Centres in mm of the voxels of nilearn's ICBM152 brain mask, (N, 3), by voxel size."""
    from nilearn.datasets import load_mni152_brain_mask

    centres = {}
    for voxel_mm in (2, 4):
        image = load_mni152_brain_mask(resolution=voxel_mm)
        index = np.argwhere(np.asarray(image.dataobj) > 0)
        centres[float(voxel_mm)] = index @ image.affine[:3, :3].T + image.affine[:3, 3]
    return centres


def filled_cells(index: NDArray[np.int64], size: int) -> int:
    """How many cubes of `size` voxels, counted from index 0, hold any of the voxels (N, 3)."""
    return len(np.unique(np.ravel_multi_index(tuple((index // size).T), (96, 96, 96))))


@pytest.mark.parametrize(
    ("name", "windows", "patches"),
    [("2mm", (41, 64), (1470, 4096)), ("4mm", (8, 8), (228, 512)), ("reference", (53, 64), (1476, 4096))],
)
def test_the_brain_lies_where_the_layout_says(
    brain: dict[float, NDArray[np.float64]], name: str, windows: tuple[int, int], patches: tuple[int, int]
) -> None:
    grid = GRIDS[name]
    exact = (brain[grid.voxel_mm] - grid.origin_mm) / grid.voxel_mm
    index = exact.round().astype(int)
    assert np.abs(exact - index).max() < 1e-6, "the grid must share its voxel centres with the template"
    assert (index >= 0).all() and (index < grid.shape).all(), "the whole brain is inside"
    for size, (filled, total) in ((24, windows), (6, patches)):
        assert np.prod([n // size for n in grid.shape]) == total
        assert filled_cells(index, size) == filled


def test_no_neighbouring_offset_of_the_2mm_grid_does_better(brain: dict[float, NDArray[np.float64]]) -> None:
    grid = GRIDS["2mm"]
    index = ((brain[2.0] - grid.origin_mm) / 2).round().astype(int)
    costs = {}
    for shift in np.ndindex(4, 4, 4):
        moved = index + np.array(shift) - (0, 2, 1)
        if (moved >= 0).all() and (moved < 96).all():
            costs[shift] = tuple(filled_cells(moved, size) for size in (24, 6))
    assert len(costs) > 20
    assert min(costs.values()) == costs[(0, 2, 1)]


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_every_grid_shares_voxel_centres_with_the_fsl_grid(name: str) -> None:
    grid = GRIDS[name]
    steps = (np.array(grid.origin_mm) - (-90, -126, -72)) / grid.voxel_mm
    assert (steps == steps.round()).all()
    assert all(n % 24 == 0 for n in grid.shape)
    assert grid.name == name


def test_the_affine_takes_indices_to_millimetres() -> None:
    grid = Grid("g", (4, 5, 6), 3.0, (-1.0, 2.0, 5.0))
    assert (grid.affine @ [1, 2, 3, 1]).tolist() == [2.0, 8.0, 14.0, 1.0]
    assert Grid.from_attributes(grid.describe()) == grid


def test_a_tilted_affine_is_not_a_grid() -> None:
    attributes = GRIDS["4mm"].describe()
    attributes["affine"][0][1] = 0.5
    with pytest.raises(ValueError, match="upright"):
        Grid.from_attributes(attributes)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b", "sub 01", "naïve", "a\n", "/etc"])
def test_names_that_could_leave_the_store_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name") as caught:
        run_path("made", name, "task-rest")
    assert repr(name) in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(st.text("aZ9._+-/\\~ \né", max_size=6))
def test_a_safe_name_is_one_step_of_a_path(text: str) -> None:
    try:
        name = safe_name(text)
    except ValueError:
        return
    assert name == text and "/" not in name and not name.startswith(".") and name.isascii() and name


def test_a_run_path_splits_into_what_made_it() -> None:
    assert split_run(run_path("hcp", "sub-01", "ses-1_task-rest_run-1")) == ("hcp", "sub-01", "ses-1_task-rest_run-1")
    for bad in ("runs/hcp/sub-01", "hcp/sub-01/x/y", "runs/hcp/../x", "runs/a/b/c/d"):
        with pytest.raises(ValueError):
            split_run(bad)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 3 * 4 * 5 - 1))
def test_the_mask_hash_sees_every_voxel_and_the_shape(flipped: int) -> None:
    mask = np.random.default_rng(1).random((3, 4, 5)) < 0.5
    other = mask.copy()
    other.flat[flipped] ^= True
    assert mask_hash(mask) == mask_hash(mask.astype(np.uint8) * 255)
    assert mask_hash(mask) != mask_hash(other)
    assert mask_hash(mask) != mask_hash(mask.reshape(4, 3, 5))


def test_a_clip_error_keeps_its_facts_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ClipReadError("runs/a/b/c", 40, "checksum")))
    assert (error.run, error.start, error.reason) == ("runs/a/b/c", 40, "checksum")
    assert "runs/a/b/c" in str(error) and "40" in str(error)
    assert issubclass(FrameRangeError, IndexError) and issubclass(FrameRangeError, StoreError)

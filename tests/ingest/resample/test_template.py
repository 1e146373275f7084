"""The store's brain mask: the template's on every grid, or the user's by its own affine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neurostorm.ingest.resample.template import MaskError, brain_mask
from neurostorm.store import GRIDS


def points_of(name: str, mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask) * GRIDS[name].voxel_mm + GRIDS[name].origin_mm


@pytest.fixture(scope="module")
def masks() -> dict[str, np.ndarray]:
    return {name: brain_mask(GRIDS[name]) for name in ("2mm", "4mm", "reference")}


def test_sizes_and_places_agree_between_grids(masks: dict[str, np.ndarray]) -> None:
    """V as published for the 2 mm template to 2 %, the same volume and the same centre on each grid, none cut off."""
    assert masks["2mm"].sum() == pytest.approx(228_483, rel=0.02)
    assert masks["4mm"].sum() == pytest.approx(228_483 / 8, rel=0.02)
    assert masks["reference"].sum() == masks["2mm"].sum()
    centres = [points_of(name, mask).mean(axis=0) for name, mask in masks.items()]
    np.testing.assert_allclose(centres[0], centres[2], atol=1e-9)
    np.testing.assert_allclose(centres[0], centres[1], atol=0.2)


def test_the_brain_is_where_mni_space_has_it(masks: dict[str, np.ndarray]) -> None:
    """Ventricles, occipital pole and cerebellum are in; the eyes, the air and the neck are not."""
    for name, mask in masks.items():
        grid = GRIDS[name]
        for point, inside in {
            (4, -10, 18): True, (10, -94, 4): True, (-30, -66, -36): True, (-54, -22, 8): True,
            (34, 62, -38): False, (0, 74, 0): False, (0, -46, -78): False, (-78, 0, 0): False,
        }.items():  # fmt: skip
            index = tuple(np.rint((np.asarray(point) - grid.origin_mm) / grid.voxel_mm).astype(int))
            assert mask[index] == inside, (name, point)


def test_a_users_mask_comes_by_its_affine(tmp_path: Path, kit: Any) -> None:
    """A ball right of the midline, stored from right to left at 3 mm, lands right of the midline."""
    shape = (60, 60, 60)
    affine = kit.affine_of("LAS", 3.0, shape, (0.0, 0.0, 0.0))
    centre = np.array([30.0, -20, 10])
    ball = ((kit.voxel_centres(shape, affine) - centre) ** 2).sum(axis=1) < 20**2
    path = kit.save(tmp_path / "mask.nii.gz", ball.reshape(shape, order="F").astype(np.uint8), affine)
    for name in ("2mm", "4mm"):
        mask = brain_mask(GRIDS[name], path)
        points = points_of(name, mask)
        np.testing.assert_allclose(points.mean(axis=0), centre, atol=0.3)
        assert mask.sum() * GRIDS[name].voxel_mm ** 3 == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.05)


def test_a_tightly_cropped_mask_keeps_its_faces(tmp_path: Path, kit: Any) -> None:
    grid = GRIDS["4mm"]
    affine = grid.affine.copy()
    affine[:3, 3] += 4.0 * 10
    path = kit.save(tmp_path / "mask.nii.gz", np.ones((6, 7, 8), np.uint8), affine)
    expected = np.zeros(grid.shape, bool)
    expected[10:16, 10:17, 10:18] = True
    np.testing.assert_array_equal(brain_mask(grid, path), expected)


def test_masks_that_cannot_be_used(tmp_path: Path, kit: Any) -> None:
    ones = np.ones((20, 20, 20), np.uint8)
    far = kit.affine_of("RAS", 2.0, ones.shape, (500.0, 0.0, 0.0))
    half = kit.affine_of("RAS", 2.0, ones.shape, (120.0, 0.0, 0.0))
    here = kit.affine_of("RAS", 2.0, ones.shape, (0.0, 0.0, 0.0))
    cases = {
        "empty": (ones * 0, here, "empty"),
        "far": (ones, far, "outside the 2mm grid"),
        "half": (ones, half, "only [0-9]+% of the mask"),
    }
    for name, (data, affine, reason) in cases.items():
        path = kit.save(tmp_path / f"{name}.nii.gz", data, affine)
        with pytest.raises(MaskError, match=f"{name}.nii.gz.*{reason}"):
            brain_mask(GRIDS["2mm"], path)
    with pytest.raises(MaskError, match="cannot be read"):
        brain_mask(GRIDS["2mm"], tmp_path / "absent.nii.gz")

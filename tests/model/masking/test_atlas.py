import gzip

import nibabel
import numpy as np
import pytest

from neurostorm.model.masking.atlas import patch_labels

SHAPE, PATCH = (24, 30, 24), (6, 6, 6)  # voxels of 2 mm
GRID = np.diag([2.0, 2, 2, 1])
GRID[:3, 3] = (-23, -29, -20)


def world(affine, shape):
    """Coordinates (3, *shape) in mm of the voxel centres."""
    return np.tensordot(affine[:3, :3], np.indices(shape), 1) + affine[:3, 3].reshape(3, 1, 1, 1)


def regions(mm):
    """A parcellation of space: cubes of 24 mm, no label in front of y = -10 mm."""
    x, y, z = np.floor((mm + 100) / 24).astype(int)
    return np.where(mm[1] < -10, 0, 1 + x + 10 * y + 100 * z).astype(np.int16)


def write(path, size_mm, orientation, margin_mm=12):
    """The parcellation sampled at ``size_mm``, its box larger than the grid by a margin."""
    low = GRID[:3, 3] - 1 - margin_mm
    shape = tuple(np.ceil((np.array(SHAPE) * 2 + 2 * margin_mm) / size_mm).astype(int))
    affine = np.diag([size_mm, size_mm, size_mm, 1.0])
    affine[:3, 3] = low + size_mm / 2
    if orientation == "LAS":
        affine[0, 3] += (shape[0] - 1) * size_mm
        affine[0, 0] = -size_mm
    assert "".join(nibabel.aff2axcodes(affine)) == orientation
    nibabel.save(nibabel.Nifti1Image(regions(world(affine, shape)), affine), path)
    return path


def sampled(size_mm, margin_mm):
    """The parcellation at the file's voxel centre nearest to each of the grid's."""
    centres = []
    for axis, n in enumerate(SHAPE):
        first = GRID[axis, 3] - 1 - margin_mm + size_mm / 2
        mm = GRID[axis, 3] + 2.0 * np.arange(n)
        centres.append(first + size_mm * np.rint((mm - first) / size_mm))
    return regions(np.stack(np.meshgrid(*centres, indexing="ij")))


def most_frequent(labels):
    """The rule, patch by patch."""
    d, h, w = (n // p for n, p in zip(labels.shape, PATCH, strict=True))
    out = np.zeros((d, h, w), np.int32)
    for i, j, k in np.ndindex(d, h, w):
        part = labels[6 * i : 6 * i + 6, 6 * j : 6 * j + 6, 6 * k : 6 * k + 6]
        values, counts = np.unique(part[part > 0], return_counts=True)
        out[i, j, k] = values[counts.argmax()] if len(values) else 0
    return out


@pytest.mark.parametrize("orientation", ["RAS", "LAS"])
@pytest.mark.parametrize("size_mm", [1.0, 2.0, 3.0])
def test_any_label_file_lands_on_the_patches_it_covers(tmp_path, size_mm, orientation):
    path = write(tmp_path / "atlas.nii.gz", size_mm, orientation, margin_mm=12.3)
    labels = patch_labels(path, GRID, SHAPE, PATCH)
    assert labels.dtype == np.int32
    assert np.array_equal(labels, most_frequent(sampled(size_mm, 12.3)))
    truth = most_frequent(regions(world(GRID, SHAPE)))
    assert len(np.unique(truth)) > 10 and (labels == truth).mean() > 0.5  # else where two labels share a patch


def test_orientation_of_the_file_changes_nothing(tmp_path):
    labels = np.random.default_rng(0).integers(0, 9, (48, 60, 48), dtype=np.int16)
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, 3] = GRID[:3, 3] - 0.5  # the grid's centres lie half-way between its voxels
    found = [patch_labels((labels, affine), GRID, SHAPE, PATCH)]
    for axes in ("LAS", "RPI", "SAL"):
        turn = nibabel.orientations.axcodes2ornt(axes)
        nibabel.save(nibabel.Nifti1Image(labels, affine).as_reoriented(turn), tmp_path / f"{axes}.nii")
        found.append(patch_labels(tmp_path / f"{axes}.nii", GRID, SHAPE, PATCH))
    assert all(np.array_equal(labels, found[0]) for labels in found)


def test_on_its_own_grid_an_atlas_is_counted_voxel_by_voxel():
    labels = np.random.default_rng(0).choice([0, 2, 7, 40000], size=SHAPE, p=[0.9, 0.04, 0.03, 0.03])
    assert np.array_equal(patch_labels((labels, GRID), GRID, SHAPE, PATCH), most_frequent(labels))


def test_one_labelled_voxel_is_enough_and_ties_take_the_smaller_label():
    labels = np.zeros(SHAPE, np.uint8)
    labels[0, 0, 0] = 9
    labels[6, 0, 0], labels[11, 5, 5] = 5, 4
    found = patch_labels((labels, GRID), GRID, SHAPE, PATCH)
    assert found[0, 0, 0] == 9 and found[1, 0, 0] == 4 and (found > 0).sum() == 2


def test_outside_of_the_atlas_there_is_no_label():
    half = np.full((12, 30, 24), 3)
    found = patch_labels((half, GRID), GRID, SHAPE, PATCH)
    assert (found[:2] == 3).all() and not found[2:].any()
    moved = GRID.copy()
    moved[0, 3] += 24  # the same array 24 mm further right
    found = patch_labels((half, moved), GRID, SHAPE, PATCH)
    assert not found[:2].any() and (found[2:] == 3).all()


def test_a_fourth_axis_of_one_volume_and_floats_that_are_whole_are_labels():
    labels = np.random.default_rng(0).integers(0, 5, SHAPE)
    expected = patch_labels((labels, GRID), GRID, SHAPE, PATCH)
    assert np.array_equal(patch_labels((labels[..., None].astype(np.float64), GRID), GRID, SHAPE, PATCH), expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((4, 4)), "is 3D"),
        (np.ones((4, 4, 4, 2)), r"\(4, 4, 4, 2\); a label volume is 3D"),
        (np.full((4, 4, 4), 0.5), "not whole; give the label image"),
        (np.full((4, 4, 4), np.nan), "not whole"),
        (np.full((4, 4, 4), -2), "from -2 to -2; renumber"),
        (np.full((4, 4, 4), 2**40), "renumber"),
        (np.full((4, 4, 4), 1j), "complex128"),
        (np.zeros((4, 4, 4), int), "no label lies inside the grid"),
    ],
)
def test_what_is_no_label_volume_is_refused_with_the_reason(array, message):
    with pytest.raises(ValueError, match=message):
        patch_labels((array, GRID), GRID, SHAPE, PATCH)


def test_an_atlas_of_another_place_is_refused_by_name(tmp_path):
    affine = GRID.copy()
    affine[:3, 3] = 500
    path = tmp_path / "far.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones(SHAPE, np.int16), affine), path)
    with pytest.raises(ValueError, match=r"atlas .*far\.nii\.gz: no label lies inside the grid"):
        patch_labels(str(path), GRID, SHAPE, PATCH)


def test_an_affine_without_inverse_is_refused():
    with pytest.raises(ValueError, match="cannot be inverted"):
        patch_labels((np.ones(SHAPE, int), np.zeros((4, 4))), GRID, SHAPE, PATCH)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    whole = write(tmp_path / "atlas.nii.gz", 2.0, "RAS")
    (tmp_path / "cut.nii.gz").write_bytes(whole.read_bytes()[:-200])
    (tmp_path / "cut.nii").write_bytes(gzip.decompress(whole.read_bytes())[:-200])
    (tmp_path / "text.nii").write_text("not an image")
    for name in ("cut.nii.gz", "cut.nii", "text.nii", "absent.nii"):
        with pytest.raises(ValueError, match=rf"atlas .*{name}: cannot be read"):
            patch_labels(tmp_path / name, GRID, SHAPE, PATCH)


def test_a_patch_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"patch = \(5, 6, 6\)"):
        patch_labels((np.ones(SHAPE, int), GRID), GRID, SHAPE, (5, 6, 6))

"""Runs for other programs: what nibabel and Zarr read back is the run in source units."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import zarr

from neurostorm.io.paths import to_path
from neurostorm.store import INT8_16, ClipReadError, FrameStore
from neurostorm.store.maintenance import export as export_module
from neurostorm.store.maintenance.export import nifti_zarr_name, write_nifti, write_nifti_zarr


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven frames of the small box at a time: blocks, and a last one that is not full."""
    monkeypatch.setattr(export_module, "_BLOCK_BYTES", 7 * 4 * 6 * 7 * 8)


def expected_of(example: Any, frames: int) -> np.ndarray:
    arrays = example.arrays(frames)
    box = np.zeros((frames, *example.grid.shape), np.float32)
    box[:, example.mask] = INT8_16.decode(arrays["frames"]) * arrays["std"] + arrays["mean"]
    return box


@pytest.mark.parametrize("name", ["run.nii", "run.nii.gz"])
def test_the_nifti_is_the_run_in_source_units(example: Any, tmp_path: Path, name: str) -> None:
    run = example.add(frames=30)
    write_nifti(FrameStore.open(example.path), run, tmp_path / name)
    image = nib.load(tmp_path / name)
    assert image.shape == (*example.grid.shape, 30) and image.get_data_dtype() == np.float32
    assert np.array_equal(image.affine, example.grid.affine)
    assert image.header["sform_code"] == image.header["qform_code"] == 4  # MNI152
    assert np.array_equal(image.header.get_best_affine(), image.header.get_qform())
    assert image.header.get_zooms() == pytest.approx((4, 4, 4, 0.8))
    assert image.header.get_xyzt_units() == ("mm", "sec")
    values = np.moveaxis(np.asarray(image.dataobj), 3, 0)
    assert np.allclose(values, expected_of(example, 30), rtol=1e-6)
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([name, example.path.name]), (
        "no temporary file stays"
    )


def test_a_damaged_run_leaves_no_file(example: Any, tmp_path: Path) -> None:
    run = example.add()
    shard = example.path / run / "0.0"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    store = FrameStore.open(example.path)
    with pytest.raises(ClipReadError, match=run):
        write_nifti(store, run, tmp_path / "out.nii")
    with pytest.raises(ClipReadError, match=run):
        write_nifti_zarr(store, run, tmp_path / "out.nii.zarr")
    assert not (tmp_path / "out.nii").exists() and not (tmp_path / "out.nii.zarr" / "zarr.json").exists()


def check_nifti_zarr(group: zarr.Group, example: Any, frames: int) -> None:
    """What the specification (NIfTI-Zarr 1.0.rc1 on OME-NGFF 0.5) asks for, and the values."""
    ome = group.attrs["ome"]
    (image,) = ome["multiscales"]
    assert ome["version"] == "0.5"
    assert [(axis["name"], axis["type"], axis["unit"]) for axis in image["axes"]] == [
        ("t", "time", "second"),
        *((name, "space", "millimeter") for name in "zyx"),
    ]
    (level,) = image["datasets"]
    assert level["coordinateTransformations"] == [{"type": "scale", "scale": [0.8, 4.0, 4.0, 4.0]}]
    data = group[level["path"]]
    assert data.metadata.dimension_names == ("t", "z", "y", "x") and data.dtype == np.float32
    x, y, z = example.grid.shape
    assert data.shape == (frames, z, y, x) and data.chunks == (1, z, y, x)
    assert np.allclose(data[:].transpose(0, 3, 2, 1), expected_of(example, frames), rtol=1e-6)
    nifti = group["nifti"]
    assert nifti.dtype == np.uint8 and nifti.shape == (348,) and nifti.nchunks == 1
    header = nib.Nifti1Header.from_fileobj(io.BytesIO(nifti[:].tobytes()), check=False)
    assert header.get_data_shape() == (x, y, z, frames) and header.get_data_dtype() == np.float32
    assert np.array_equal(header.get_best_affine(), example.grid.affine)
    words = dict(nifti.attrs)
    assert words["Dim"] == [x, y, z, frames] and words["VoxelSize"] == pytest.approx([4, 4, 4, 0.8])
    assert words["Affine"] == example.grid.affine[:3].tolist() and words["Unit"] == {"L": "mm", "T": "s"}
    assert words["Description"] == "neurostorm store, recipe voxel_z"


def test_the_nifti_zarr_is_the_run_in_source_units(example: Any, tmp_path: Path) -> None:
    run = example.add(frames=30)
    store, folder = FrameStore.open(example.path), tmp_path / nifti_zarr_name(run)
    assert folder == tmp_path / "made" / "sub-01" / "ses-1_task-rest.nii.zarr"
    told: list[int] = []

    class Bar:
        def __init__(self, total: int) -> None:
            told.append(-total)

        def __enter__(self) -> Callable[[int], None]:
            return told.append

        def __exit__(self, *error: object) -> None: ...

    assert write_nifti_zarr(store, run, folder, progress=Bar)
    assert told == [-30, 7, 7, 7, 7, 2]
    check_nifti_zarr(zarr.open_group(folder, mode="r"), example, 30)
    assert len([file for file in (folder / "0").rglob("*") if file.is_file()]) == 1 + 5, "a file per block"
    made = (folder / "zarr.json").stat().st_mtime_ns
    assert not write_nifti_zarr(store, run, folder), "a whole one is left as it is"
    assert (folder / "zarr.json").stat().st_mtime_ns == made
    (folder / "zarr.json").unlink()  # as if it had been cut off
    (folder / "0" / "c" / "0" / "0" / "0" / "0").write_bytes(b"half")
    assert write_nifti_zarr(store, run, folder)
    check_nifti_zarr(zarr.open_group(folder, mode="r"), example, 30)


def test_a_nifti_zarr_in_a_bucket(make_bucket: Callable[[], str], example: Any) -> None:
    run = example.add(frames=9)
    folder = to_path(f"{make_bucket()}/viewer/run.nii.zarr")
    assert write_nifti_zarr(FrameStore.open(example.path), run, folder)
    store = zarr.storage.ObjectStore(folder.client, read_only=True)
    check_nifti_zarr(zarr.open_group(store, path=folder.key, mode="r"), example, 9)
    assert not (folder.parent / "zarr.json").exists(), "nothing beside it"
    assert json.loads((folder / "zarr.json").read_text())["node_type"] == "group"

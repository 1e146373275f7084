"""Files that claim, or inflate to, more than they can be: each costs its run, before memory or time is spent on it."""

import gzip
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from neurostorm.ingest import nifti, stream
from neurostorm.ingest.annotations import annotations
from neurostorm.ingest.layouts.discover import DiscoverError, Source, read_participants
from neurostorm.ingest.layouts.tree import _dataset_name
from neurostorm.ingest.nifti import MAX_MASK_VOXELS, RunError, open_nifti, read_frames, read_volume
from neurostorm.ingest.resample import target
from neurostorm.ingest.resample.target import check_mask_size, sidecar_tr_s
from neurostorm.ingest.resample.template import MaskError, brain_mask
from neurostorm.model.masking.atlas import patch_labels
from neurostorm.store import GRIDS

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
HUGE = (512, 512, 1024)  # 2^28 voxels


def claim(path: Path, shape: tuple[int, ...], *, offset: int = 352, size: int | None = None) -> Path:
    """A NIfTI header of uint8 that announces `shape`, and zeros that take no room on disk."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(shape)
    header.set_sform(AFFINE, 4)
    header.set_data_offset(offset)
    header["magic"] = b"n+1\0"
    with path.open("wb") as file:
        file.write(header.binaryblock + bytes(4))
        file.truncate(offset + int(np.prod(shape)) if size is None else size)
    return path


def test_a_mask_of_a_quarter_billion_voxels_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = claim(tmp_path / "mask.nii", HUGE)
    assert np.prod(HUGE) <= nifti.MAX_VOXELS and np.prod(HUGE) > MAX_MASK_VOXELS
    monkeypatch.setattr(nifti, "read_frames", None)  # not called
    monkeypatch.setattr(target, "plan_spatial", None)
    run = open_nifti(claim(tmp_path / "run.nii", (10, 10, 10, 5)))
    with pytest.raises(RunError, match=r"brain mask, mask.nii, that .*\(512, 512, 1024\).*cannot be a mask"):
        target._own_brain(path, run)
    with pytest.raises(RunError, match="cannot be a mask"):
        read_volume(path)
    with pytest.raises(MaskError, match=r"ingest.mask=.*mask.nii: has the shape.*cannot be a mask"):
        brain_mask(GRIDS["4mm"], path)


def test_the_memory_of_another_grid_is_bounded_by_both_grids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: Any
) -> None:
    check_mask_size(300 * 300 * 300, 97 * 115 * 97)  # 0.7 mm onto 2 mm
    for mask_voxels, run_voxels in ((1 << 28, 1 << 20), (1 << 20, 1 << 28)):
        with pytest.raises(RunError, match=r"needs about \d+ GB of memory .*resample it to the run's grid"):
            check_mask_size(mask_voxels, run_voxels)
    monkeypatch.setattr(target, "_MOST_MASK_BYTES", 1000)
    run = open_nifti(claim(tmp_path / "run.nii", (10, 10, 10, 5)))
    same = kit.save(tmp_path / "same.nii.gz", np.ones((10, 10, 10), np.uint8), AFFINE)
    assert target._own_brain(same, run).all(), "on the run's grid it costs nothing"
    other = kit.save(tmp_path / "other.nii.gz", np.ones((10, 10, 10), np.uint8), AFFINE * 1.5)
    with pytest.raises(RunError, match=r"brain mask, other.nii.gz, that needs about"):
        target._own_brain(other, run)


def test_an_atlas_of_a_quarter_billion_voxels_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = claim(tmp_path / "atlas.nii", HUGE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"atlas .*atlas.nii: .*\(512, 512, 1024\) has more than"):
        patch_labels(path, AFFINE, (24, 24, 24), (6, 6, 6))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; its numbers take 262,144


def test_a_gzip_file_that_inflates_far_beyond_its_header_costs_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = claim(tmp_path / "run.nii", (10, 10, 10, 5)).read_bytes()
    bomb = tmp_path / "bomb.nii.gz"
    bomb.write_bytes(gzip.compress(plain + bytes(64 << 20)))
    read = 0

    class Counting(stream._OwningGzip):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal read
            data = super().read(size)
            read += len(data)
            return data

    monkeypatch.setattr(stream, "_OwningGzip", Counting)
    assert len(list(read_frames(open_nifti(bomb)))) == 5, "some padding is no harm"
    monkeypatch.setattr(nifti, "MAX_OTHER_BYTES", 8 << 20)
    read = 0
    with pytest.raises(RunError, match="holds more than 8,388,608 bytes behind the last frame"):
        list(read_frames(open_nifti(bomb)))
    assert read < 10 << 20, "the rest is not inflated"


@pytest.mark.parametrize(
    ("shape", "offset", "reason"),
    [
        ((600, 600, 600, 2000), 352, "is no functional run"),
        ((10, 10, 10, 5), 1 << 30, "vox_offset"),
    ],
)
def test_a_header_that_claims_more_than_any_run_has_is_refused(
    tmp_path: Path, shape: tuple[int, ...], offset: int, reason: str
) -> None:
    path = claim(tmp_path / "run.nii", shape, offset=offset)
    with pytest.raises(RunError, match=reason):
        open_nifti(path)


def test_tables_and_sidecars_that_are_too_large_cost_the_run_or_the_table(
    tmp_path: Path, source_of: Callable[..., Source], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    large = tmp_path / "dataset_description.json"
    with large.open("wb") as file:
        file.truncate(stream.MAX_PARTICIPANTS_BYTES + 1)  # zeros that take no room on disk
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    with pytest.raises(RunError, match=r"sidecar that cannot be read.*has 2,147,483,649 bytes, more than"):
        sidecar_tr_s((large,))
    with pytest.raises(DiscoverError, match="more than"):
        read_participants(large, "d")
    run = tmp_path / "sub-1_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
    assert annotations(source_of(run, events=large, motion=large), 5) == {}
    assert caplog.text.count("more than 268,435,456") == 2
    _dataset_name((tmp_path,), tmp_path)
    assert "its Name is not used" in caplog.text


def test_a_pipe_beside_a_run_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(RunError, match="not a regular file"):
        sidecar_tr_s((tmp_path / "run.json",))

"""A file read for a model gives what a store of the same grid, mask and TR would hold of it, to the last bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neurostorm.data.clips import ClipReader
from neurostorm.data.plan.clip_plan import ROW
from neurostorm.data.unpack import ClipUnpacker
from neurostorm.ingest.convert import ingest_run
from neurostorm.ingest.layouts.discover import Source, discover, source_of
from neurostorm.ingest.nifti import RunError
from neurostorm.ingest.resample.clip import read_clips
from neurostorm.model.geometry.tokens import patch_table
from neurostorm.store import FrameStore

SHAPE, MIDDLE = (34, 40, 34), (0.0, -18.0, 6.0)
BOLD = "sub-1/func/sub-1_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"


@pytest.fixture
def run(tmp_path: Path, kit: Any) -> Path:
    """A preprocessed BIDS run of 30 frames at 6 mm, LAS, TR 1.1 s."""
    affine = kit.affine_of("LAS", 6.0, SHAPE, MIDDLE)
    return kit.save(tmp_path / "bids" / BOLD, kit.phantom(SHAPE, affine, 30, 1.1), affine, tr_s=1.1)


def target_of(store: Path) -> dict[str, Any]:
    opened = FrameStore.open(store)
    return {"grid_affine": opened.grid.affine, "brain": opened.mask, "tr_s": opened.tr_s}


def from_store(store: Path, run: str, starts: list[int], frames: int, normalise: str) -> torch.Tensor:
    """The clips as training unpacks them, with patches of one voxel: (B, X, Y, Z, L)."""
    opened = FrameStore.open(store)
    rows = np.zeros(len(starts), ROW)
    rows["start"] = starts
    voxels = opened.mask.size
    space, time = (
        index.reshape(-1) for index in torch.meshgrid(torch.arange(voxels), torch.arange(frames), indexing="ij")
    )
    unpack = ClipUnpacker(patch_table(torch.from_numpy(opened.mask), (1, 1, 1)), space, time, opened.voxel_count)
    values = unpack(ClipReader(opened, (run,), frames, normalise).batch(rows)).values
    return values.view(len(starts), *opened.mask.shape, frames)


@pytest.mark.parametrize("normalise", ["voxel", "global"])
def test_a_file_gives_what_the_store_gives(run: Path, store: Path, normalise: str) -> None:
    (source,) = discover(run.parents[2])
    ingest_run(source, store)
    clips = torch.stack(list(read_clips(run, **target_of(store), frames=9, normalise=normalise, stride=5)))
    assert clips.shape == (7, 20, 24, 20, 9) and clips.dtype == torch.float32  # 40 frames at .8 s
    assert torch.equal(clips, from_store(store, source.run, [0, 5, 10, 15, 20, 25, 30], 9, normalise))
    brain = FrameStore.open(store).mask
    outside = clips.movedim(-1, 1)[:, :, ~torch.from_numpy(brain)]
    assert (outside == outside[0, 0, 0]).all() and bool((outside == 0).all()) == (normalise == "voxel")


def test_the_sidecar_above_and_the_mask_beside_a_file_count(run: Path, store: Path, kit: Any) -> None:
    """Both change what is read, exactly as they do when the dataset is ingested."""
    root = run.parents[2]
    plain = torch.stack(list(read_clips(run, **target_of(store), frames=10, normalise="voxel")))
    (root / "dataset_description.json").write_text(json.dumps({"Name": "bids"}))
    (root / "task-rest_bold.json").write_text(json.dumps({"RepetitionTime": 1.6}))
    (root / "task-other_bold.json").write_text(json.dumps({"RepetitionTime": 2.5}))
    affine = kit.affine_of("LAS", 6.0, SHAPE, MIDDLE)
    half = kit.brain(kit.voxel_centres(SHAPE, affine)).reshape(SHAPE, order="F").astype(np.uint8)
    half[: SHAPE[0] // 2] = 0
    kit.save(run.with_name(run.name.replace("desc-preproc_bold", "desc-brain_mask")), half, affine)
    (source,) = discover(root)
    found = source_of(run)
    assert (found.sidecars, found.mask_path) == (source.sidecars, source.mask_path)
    assert source.mask_path is not None and [file.name for file in source.sidecars] == ["task-rest_bold.json"]
    ingest_run(source, store)
    clips = torch.stack(list(read_clips(run, **target_of(store), frames=10, normalise="voxel")))
    assert len(clips) == 5 and len(plain) == 4  # 59 and 40 frames
    assert torch.equal(clips, from_store(store, source.run, [0, 10, 20, 30, 40], 10, "voxel"))
    assert 0 < (clips[0] != 0).sum() < 0.6 * (plain[0] != 0).sum()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.integers(1, 50), stride=st.none() | st.integers(1, 50))
def test_clips_begin_every_stride_and_end_within_the_run(
    short: tuple[Path, dict[str, Any], torch.Tensor], frames: int, stride: int | None
) -> None:
    path, target, whole = short
    clips = list(read_clips(path, **target, frames=frames, normalise="voxel", stride=stride))
    length, step = min(frames, whole.shape[-1]), stride or frames
    starts = [start for start in range(whole.shape[-1]) if start % step == 0 and start + length <= whole.shape[-1]]
    assert len(clips) == len(starts)
    for start, clip in zip(starts, clips, strict=True):
        assert torch.equal(clip, whole[..., start : start + length])


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, kit: Any) -> tuple[Path, dict[str, Any], torch.Tensor]:
    """A run of 13 frames on a coarse grid, that grid with a brain of a few voxels, and all its frames as one clip."""
    affine = kit.affine_of("RAS", 12.0, (12, 14, 12), MIDDLE)
    path = kit.save(tmp_path_factory.mktemp("short") / "a.nii", kit.phantom((12, 14, 12), affine, 13, 0.8), affine)
    target = {"grid_affine": affine, "brain": np.zeros((12, 14, 12), bool), "tr_s": 0.8}
    target["brain"][4:8, 5:9, 4:8] = True
    (whole,) = read_clips(path, **target, frames=13, normalise="voxel")
    return path, target, whole


def test_a_file_beside_any_others_is_found_alone(tmp_path: Path, run: Path) -> None:
    """Neither other runs nor folders below are looked at; names of another scheme work too."""
    for name in ("deep/er/x.nii.gz", "y.nii.gz", "x_mask.nii.gz"):
        file = tmp_path / "home" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(run.read_bytes() if name != "deep/er/x.nii.gz" else b"")
    found = source_of(tmp_path / "home" / "y.nii.gz")
    assert (found.format, found.mask_path, found.sidecars) == ("plain", None, ())
    hcp = tmp_path / "100307/MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR.nii.gz"
    hcp.parent.mkdir(parents=True)
    hcp.write_bytes(run.read_bytes())
    (hcp.parent / "brainmask_fs.2.nii.gz").write_bytes(run.read_bytes())
    found = source_of(hcp)
    assert (found.format, found.subject) == ("hcp", "sub-100307") and found.mask_path is not None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sub-1_task-rest_space-T1w_desc-preproc_bold.nii.gz", "not in MNI space"),
        ("sub-1_task-rest_bold.nii.gz", "not named as a preprocessed run"),
        ("brain_mask.nii.gz", "not named as a preprocessed run"),
        ("run.txt", "not named as a preprocessed run"),
        ("missing.nii.gz", "cannot be read: No such file"),
        ("folder-is-missing/too.nii.gz", "cannot be read: No such file"),
    ],
)
def test_a_name_that_no_run_has_is_refused(run: Path, store: Path, name: str, words: str) -> None:
    path = run.parent / name
    if "missing" not in name:
        path.write_bytes(run.read_bytes())
    with pytest.raises(RunError, match=words):
        read_clips(path, **target_of(store), frames=4, normalise="voxel")


def test_a_run_beside_the_grid_and_an_unknown_normalisation_are_refused(
    tmp_path: Path, run: Path, store: Path, kit: Any, source_of: Callable[..., Source]
) -> None:
    away = kit.affine_of("LAS", 6.0, SHAPE, (400.0, 0.0, 0.0))
    path = kit.save(tmp_path / "away.nii", kit.phantom(SHAPE, away, 4, 0.8), away)
    with pytest.raises(RunError, match="lies outside the grid"):
        read_clips(source_of(path), **target_of(store), frames=4, normalise="voxel")
    with pytest.raises(ValueError, match="normalise = 'min-max'"):
        read_clips(run, **target_of(store), frames=4, normalise="min-max")

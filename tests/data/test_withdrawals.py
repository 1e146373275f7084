"""A participant withdraws while clips are read: theirs are left out, which is no damage; others are untouched."""

import shutil

import numpy as np
import pytest

from neurostorm.data import withdrawals as withdrawals_module
from neurostorm.data.clips import ClipReader
from neurostorm.data.withdrawals import Withdrawals, subject_of
from neurostorm.io.paths import copy_files, list_files, to_path
from neurostorm.store import FrameStore, StoreError, read_manifest
from neurostorm.store.maintenance.care import remove_subject
from neurostorm.store.run_index import RunIndex
from neurostorm.store.shard import SHARD_FILE

GONE = "made/sub-1"
PLACES = [(2, 0), (2, 6), (0, 3), (3, 1), (8, 4)]  # runs 2 and 3 are theirs


@pytest.fixture(params=["local", "s3"])
def path(request, uneven, tmp_path, make_bucket):
    """A copy of the uneven store, to be changed."""
    if request.param == "local":
        return to_path(shutil.copytree(uneven.path, tmp_path / "store.zarr"))
    far = to_path(make_bucket()) / "store.zarr"
    copy_files(uneven.path, far, [name for name, _ in list_files(uneven.path) if not name.endswith(".lock")])
    return far


def reader_of(path, normalise="voxel"):
    runs = RunIndex(read_manifest(path), moments=normalise == "global")
    return ClipReader(FrameStore.open(path), runs, 6, normalise, withdrawals=Withdrawals.read(path))


@pytest.mark.parametrize("normalise", ["voxel", "global"])
def test_clips_of_a_subject_who_withdraws_meanwhile_are_left_out(path, normalise, rows_of, uneven):
    assert {subject_of(uneven.runs[run]) for run in (2, 3)} == {GONE}
    reader, rows = reader_of(path, normalise), rows_of(PLACES)
    before = reader.read(rows)
    assert not before["withdrawn"].any() and not before["bad"].any()
    remove_subject(path, *GONE.split("/"))
    for _ in range(2):
        found = reader.read(rows)
        assert found["withdrawn"].tolist() == [True, True, False, True, False] and not found["bad"].any()
        for name in before.keys() - {"withdrawn"}:
            kept = [0, 1, 2, 3, 4] if name in ("row", "run", "start", "bad") else [2, 4]
            assert np.array_equal(found[name][kept], before[name][kept]), name
        assert not found["frames"][[0, 1, 3]].any()
    assert list(reader.withdrawals.when) == [GONE]


def test_a_start_after_the_withdrawal_asks_for_none_of_their_files(uneven, rows_of, tmp_path, monkeypatch):
    path = to_path(shutil.copytree(uneven.path, tmp_path / "store.zarr"))
    manifest = read_manifest(path)
    remove_subject(path, *GONE.split("/"))
    store = FrameStore.open(path)
    reader = ClipReader(store, RunIndex(manifest), 6, "voxel", withdrawals=Withdrawals.read(path))
    frames, asked = store.frames, []
    monkeypatch.setattr(store, "frames", lambda run, *rest, **named: asked.append(run) or frames(run, *rest, **named))
    assert reader.read(rows_of(PLACES))["withdrawn"].tolist() == [True, True, False, True, False]
    assert {subject_of(run) for run in asked} == {subject_of(uneven.runs[run]) for run in (0, 8)}


def test_reading_ahead_overwrites_the_memory_of_a_clip_that_is_left_out(uneven, rows_of, tmp_path):
    path = to_path(shutil.copytree(uneven.path, tmp_path / "store.zarr"))
    reader, rows = reader_of(path), rows_of([(2, 0), (0, 0)])
    orders = ((rows, [uneven.runs[run] for run in rows["run"]]) for _ in range(8))
    for nth, columns in enumerate(reader.read_ahead(orders, threads=2, ahead=1)):
        if nth == 1:
            remove_subject(path, *GONE.split("/"))
        if nth >= 4:
            assert columns["withdrawn"].tolist() == [True, False]
            assert not columns["frames"][0].any() and columns["frames"][1].any()


def test_a_run_that_is_gone_for_another_reason_is_damage(path, rows_of, uneven):
    reader = reader_of(path)
    for name in (SHARD_FILE, "zarr.json"):
        (path / uneven.runs[2] / name).unlink()
    (path / uneven.runs[8] / SHARD_FILE).unlink()
    remove_subject(path, "made", "sub-0")
    found = reader.read(rows_of(PLACES))
    assert found["bad"].tolist() == [True, True, False, False, True]
    assert found["withdrawn"].tolist() == [False, False, True, False, False]


def test_the_table_is_read_once_for_each_subject_who_withdrew(path, rows_of, uneven, monkeypatch):
    reader, looks, read = reader_of(path), [], withdrawals_module.read_withdrawn
    monkeypatch.setattr(withdrawals_module, "read_withdrawn", lambda where: looks.append(where) or read(where))
    remove_subject(path, *GONE.split("/"))
    for _ in range(3):
        reader.read(rows_of(PLACES))
    assert len(looks) == 1


def test_without_withdrawals_a_run_that_is_gone_is_bad(path, rows_of, uneven):
    reader = ClipReader(FrameStore.open(path), uneven.runs, 6, "voxel")
    remove_subject(path, *GONE.split("/"))
    found = reader.read(rows_of(PLACES))
    assert found["bad"].tolist() == [True, True, False, True, False] and not found["withdrawn"].any()


def test_a_table_that_cannot_be_read_is_said(path):
    (path / "withdrawn.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(StoreError, match=r"withdrawn\.parquet cannot be read"):
        Withdrawals.read(path)

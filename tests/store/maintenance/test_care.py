"""Repairing a store, and taking a participant out: whatever cuts it off, doing it again ends the same."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from neurostorm.io.paths import to_path
from neurostorm.io.processes import machine_tag
from neurostorm.store import (
    StoreError,
    add_quarantine,
    build_manifest,
    create_store,
    read_manifest,
    read_participants,
    read_quarantine,
    read_withdrawn,
    withdrawn_subjects,
    write_manifest,
    write_participants,
    write_run,
)
from neurostorm.store.files import find_runs
from neurostorm.store.maintenance import care as care_module
from neurostorm.store.maintenance.care import (
    allow_removed,
    find_subject,
    holding,
    names_subject,
    remove_subject,
    repair,
)
from neurostorm.store.maintenance.verify import verify

UNFINISHED = f"{machine_tag()}-abc"  # a name that this machine's writers give

RUN = "runs/{}/{}/ses-1_task-rest"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def people(*rows: tuple[str, str]) -> pa.Table:
    return pa.table(
        {"dataset": [row[0] for row in rows], "participant_id": [row[1] for row in rows], "age": [30] * len(rows)}
    )


@pytest.fixture
def store(example: Any) -> Any:
    """Two datasets that both have a sub-01, and a sub-02 in one of them."""
    for number, who in enumerate([("sub-01", "made"), ("sub-02", "made"), ("sub-01", "other")]):
        example.add_true(*who, seed=number)
    write_participants(example.path, people(("made", "sub-01"), ("made", "sub-02"), ("other", "01")))
    reasons = [{"source": f"/raw/{name}", "reason": "broken", "when": "2026-01-01"} for name in QUARANTINED]
    add_quarantine(example.path, reasons)
    write_manifest(example.path)
    return example


QUARANTINED = ("made/sub-02/func/sub-02_task-nback_bold.nii.gz", "made/sub-021/func/sub-021_task-rest_bold.nii.gz")


def test_repair_leaves_a_sound_store_as_it_is(store: Any) -> None:
    before = files(store.path)
    done = repair(store.path, drop_damaged=True)
    assert (done.leftovers, done.dropped, done.unread, done.groups, done.runs) == ((), (), (), (), 3)
    assert {name: data for name, data in files(store.path).items() if name != ".lock"} == {
        name: data for name, data in before.items() if name != ".lock"
    }


def test_repair_clears_away_what_is_half_written_and_rebuilds_the_manifest(store: Any) -> None:
    subject = store.path / "runs" / "made" / "sub-01"
    shutil.copytree(subject / "ses-1_task-rest", subject / "ses-2")
    (subject / "ses-2" / "zarr.json").unlink()
    (store.path / ".partial" / UNFINISHED).mkdir(parents=True)
    (store.path / ".partial" / UNFINISHED / "0.0").write_bytes(b"cut off")
    (subject / "zarr.json").unlink()
    (store.path / "manifest.parquet").write_bytes(b"PAR1")
    before = files(store.path)
    planned = repair(store.path, dry_run=True)
    assert files(store.path) == before
    assert planned.leftovers == (f".partial/{UNFINISHED}", "runs/made/sub-01/ses-2")
    assert planned.groups == ("runs/made/sub-01",)
    assert repair(store.path) == planned
    assert not (subject / "ses-2").exists() and not (store.path / ".partial" / UNFINISHED).exists()
    assert verify(store.path).problems == ()
    assert repair(store.path).leftovers == ()


def test_damaged_runs_go_only_if_asked_and_can_be_written_again(store: Any) -> None:
    run = store.path / RUN.format("other", "sub-01")
    shard = run / "0.0"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    before = files(store.path / "runs")
    assert repair(store.path).dropped == ()
    assert repair(store.path, drop_damaged=True, dry_run=True).dropped[0].where == RUN.format("other", "sub-01")
    assert files(store.path / "runs") == before
    (problem,) = repair(store.path, drop_damaged=True).dropped
    assert "checksum" in problem.what
    assert not (store.path / "runs" / "other").exists(), "a dataset without subjects goes too"
    assert read_manifest(store.path).num_rows == 2
    assert write_run(store.path, RUN.format("other", "sub-01"), **store.true_arrays(seed=2))
    write_manifest(store.path)
    assert verify(store.path).problems == ()


def test_attributes_that_cannot_be_read_stop_a_repair_before_it_changes_anything(store: Any) -> None:
    (store.path / ".partial" / UNFINISHED).mkdir(parents=True)
    (store.path / ".partial" / UNFINISHED / "0.0").write_bytes(b"cut off")
    (store.path / RUN.format("made", "sub-02") / "zarr.json").write_bytes(b"{")
    with pytest.raises(StoreError, match=r"sub-02.*--drop-damaged"):
        repair(store.path)
    assert (store.path / ".partial" / UNFINISHED).exists()
    assert len(repair(store.path, drop_damaged=True).dropped) == 1
    assert verify(store.path).problems == ()


def test_runs_that_cannot_be_read_just_now_are_never_dropped(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    done = repair(store.path, drop_damaged=True)
    assert done.dropped == () and len(done.unread) == 3
    assert len(find_runs(store.path)) == 3


def test_a_subject_who_withdraws_leaves_no_trace_but_their_name(store: Any) -> None:
    others = {name: data for name, data in files(store.path / "runs").items() if "made/sub-02" not in name}
    assert remove_subject(store.path, "made", "sub-02") == holding_of_sub_02()
    assert files(store.path / "runs") == others
    assert "sub-02" not in str(read_manifest(store.path).to_pydict())
    assert read_participants(store.path).column("participant_id").to_pylist() == ["sub-01", "01"]
    assert read_quarantine(store.path).column("source").to_pylist() == [f"/raw/{QUARANTINED[1]}"]
    assert withdrawn_subjects(store.path) == {("made", "sub-02")}
    assert verify(store.path).problems == ()
    when = read_withdrawn(store.path)
    assert remove_subject(store.path, "made", "sub-02").runs == 0
    assert read_withdrawn(store.path).equals(when), "the first time counts"


def holding_of_sub_02() -> Any:
    class Same:
        def __eq__(self, other: object) -> bool:
            assert isinstance(other, care_module.Holding)
            return (other.runs, other.labels, other.quarantined, other.withdrawn) == (1, 1, 1, False)

    return Same()


def test_the_last_subject_of_a_dataset_takes_its_group_along_and_no_label_stays(store: Any) -> None:
    remove_subject(store.path, "other", "sub-01")
    assert not (store.path / "runs" / "other").exists()
    assert (store.path / RUN.format("made", "sub-01") / "zarr.json").is_file(), "another person of the same id"
    assert read_participants(store.path).column("participant_id").to_pylist() == ["sub-01", "sub-02"]


STEPS = ["add_withdrawn", "drop_rows", "remove_tree", "remove_partials", "_remove_empty_groups"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [True, False])
def test_a_removal_that_is_cut_off_is_finished_by_the_next(
    store: Any, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    class Killed(Exception):
        pass

    real: Callable[..., Any] = getattr(care_module, step)

    def killed(*arguments: Any, **options: Any) -> Any:
        if after:
            real(*arguments, **options)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(care_module, step, killed)
        with pytest.raises(Killed):
            remove_subject(store.path, "made", "sub-02")
    if step != "add_withdrawn":
        assert withdrawn_subjects(store.path) == {("made", "sub-02")}, "recorded before anything is deleted"
    if step == "remove_tree":
        assert len(find_runs(store.path)) == 2, "no run is left that looks whole"
    remove_subject(store.path, *find_subject(store.path, "sub-02"))
    assert len(find_runs(store.path)) == read_manifest(store.path).num_rows == 2
    assert not (store.path / "runs" / "made" / "sub-02").exists()
    assert read_participants(store.path).num_rows == 2 and read_quarantine(store.path).num_rows == 1
    assert verify(store.path).problems == ()


def test_nobody_who_withdrew_comes_back_through_a_table(store: Any) -> None:
    remove_subject(store.path, "made", "sub-02")
    write_participants(store.path, people(("made", "sub-02"), ("made", "02"), ("made", "sub-03"), ("other", "sub-02")))
    keys = read_participants(store.path).select(["dataset", "participant_id"]).to_pylist()
    assert [tuple(key.values()) for key in keys] == [
        ("made", "sub-01"), ("made", "sub-03"), ("other", "01"), ("other", "sub-02"),
    ]  # fmt: skip
    store.add_true("sub-02", "made", seed=1)  # an ingest that had begun before
    assert len(find_runs(store.path)) == 3 and build_manifest(store.path).num_rows == 2
    assert allow_removed(store.path, "made", "sub-02") and not allow_removed(store.path, "made", "sub-02")
    assert withdrawn_subjects(store.path) == set() and build_manifest(store.path).num_rows == 3


def test_frames_that_a_killed_ingest_left_go_with_their_subject(store: Any) -> None:
    (store.path / ".partial" / UNFINISHED).mkdir(parents=True)
    (store.path / ".partial" / UNFINISHED / "0.0").write_bytes(b"frames of sub-02")
    remove_subject(store.path, "made", "sub-02")
    assert not (store.path / ".partial" / UNFINISHED).exists()


def test_an_id_is_found_wherever_it_stands_and_never_guessed(store: Any) -> None:
    assert find_subject(store.path, "sub-02") == ("made", "sub-02")
    assert find_subject(store.path, "other/sub-01/") == ("other", "sub-01")
    assert find_subject(store.path, "made/sub-021") == ("made", "sub-021"), "only in quarantine"
    with pytest.raises(StoreError, match="name one of made/sub-01, other/sub-01"):
        find_subject(store.path, "sub-01")
    with pytest.raises(StoreError, match="no subject 'made/sub-07'; the nearest: made/sub-0"):
        find_subject(store.path, "made/sub-07")
    with pytest.raises(ValueError, match="cannot name"):
        remove_subject(store.path, "made", "../other")
    assert withdrawn_subjects(store.path) == set()


@pytest.mark.parametrize(
    ("source", "subject", "expected"),
    [
        ("/d/sub-01/ses-1/func/sub-01_ses-1_task-rest_bold.nii.gz", "sub-01", True),
        ("/d/sub-01/ses-1/func/sub-01_ses-1_task-rest_bold.nii.gz", "sub-0", False),
        ("/d/sub-011/func/sub-011_bold.nii.gz", "sub-01", False),
        ("s3://bucket/flat/sub-01_task-rest_bold.nii.gz", "sub-01", True),
        ("/d/01/sub-02/sub-02_bold.nii.gz", "sub-01", False),
        ("/hcp/100307/MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR.nii.gz", "sub-100307", True),
        ("/hcp/HCD01_V1_MR/MNINonLinear/Results/rfMRI_REST/rfMRI_REST.nii.gz", "sub-HCD01", True),
        ("/plain/smith.nii", "sub-smith", True),
        ("/plain/smith.nii", "sub-smit", False),
    ],
)
def test_whose_file_a_path_is(source: str, subject: str, expected: bool) -> None:
    assert names_subject(source, subject) is expected


@pytest.mark.parametrize(
    "action",
    [
        repair,
        verify,
        lambda path: find_subject(path, "sub-01"),
        lambda path: remove_subject(path, "made", "sub-01"),
        lambda path: allow_removed(path, "made", "sub-01"),
    ],
)
def test_an_unknown_format_is_refused_and_left_alone(store: Any, action: Callable[[Path], object]) -> None:
    header = json.loads((store.path / "zarr.json").read_text())
    header["attributes"]["neurostorm_format"] = 99
    (store.path / "zarr.json").write_text(json.dumps(header))
    before = files(store.path)
    with pytest.raises(StoreError, match="has format 99, this version reads format"):
        action(store.path)
    assert files(store.path) == before


def test_an_object_store_is_cared_for_in_the_same_way(
    make_bucket: Callable[[], str], example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = to_path(f"{make_bucket()}/stores/care")
    create_store(path, **example.properties)
    for number in (1, 2, 3):
        write_run(path, RUN.format("made", f"sub-{number}"), **example.true_arrays(seed=number))
    write_participants(path, people(("made", "sub-1"), ("made", "sub-2")))
    write_manifest(path)
    assert verify(path).problems == ()
    shard = path / RUN.format("made", "sub-3") / "0.0"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    (path / RUN.format("made", "sub-4") / "0.0").write_bytes(b"without metadata")
    (problem,) = verify(path).problems
    assert problem.where == RUN.format("made", "sub-3") and "checksum" in problem.what
    assert repair(path).leftovers == (), "it may be one that is being written"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 4000)
    done = repair(path, drop_damaged=True)
    assert done.leftovers == (RUN.format("made", "sub-4"),) and [p.where for p in done.dropped] == [problem.where]
    assert remove_subject(path, *find_subject(path, "sub-2")).runs == 1
    assert sorted(find_runs(path)) == [RUN.format("made", "sub-1")]
    assert not (path / "runs" / "made" / "sub-2").exists()
    assert read_participants(path).column("participant_id").to_pylist() == ["sub-1"]
    assert verify(path).problems == ()
    remove_subject(path, "made", "sub-1")
    assert not (path / "runs" / "made").exists() and holding(path, "made", "sub-1").withdrawn

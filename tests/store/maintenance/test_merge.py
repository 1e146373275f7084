"""Merging stores: what fits comes once, whole and checked; nothing that is there changes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from neurostorm.io.paths import to_path
from neurostorm.store import (
    StoreError,
    add_quarantine,
    create_store,
    read_manifest,
    read_participants,
    read_quarantine,
    withdrawn_subjects,
    write_manifest,
    write_participants,
    write_run,
)
from neurostorm.store.files import find_runs
from neurostorm.store.maintenance import merge as merge_module
from neurostorm.store.maintenance.care import remove_subject
from neurostorm.store.maintenance.merge import merge
from neurostorm.store.maintenance.verify import verify

RUN = "runs/{}/{}/ses-1_task-rest"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stores(make_example: Callable[..., Any]) -> tuple[Any, Any]:
    """made/sub-1 and sub-2; made/sub-2 (the same) and sub-3, compressed, with labels and quarantine."""
    one, two = make_example("one"), make_example("two")
    for store, subjects in ((one, (1, 2)), (two, (2, 3))):
        create_store(store.path, **store.properties)
        for number in subjects:
            store.add_true(f"sub-{number}", seed=number, compression="zstd" if number == 3 else "none")
        names = [f"sub-{number}" for number in subjects]
        age = [30 + number for number in subjects]
        write_participants(store.path, pa.table({"dataset": ["made"] * 2, "participant_id": names, "age": age}))
        write_manifest(store.path)
    add_quarantine(one.path, [{"source": "raw/3.nii.gz", "reason": "could not be read then"}])
    add_quarantine(
        two.path, [{"source": f"/raw/sub-{n}/sub-{n}_task-nback_bold.nii.gz", "reason": "broken"} for n in (1, 4)]
    )
    return one, two


def test_a_merge_brings_runs_labels_and_quarantine_and_changes_nothing_that_was_there(stores: Any) -> None:
    one, two = stores
    before, theirs = files(one.path / "runs"), files(two.path)
    done = merge(one.path, [two.path])
    assert (done.copied, done.there, done.refused, done.problems) == (1, 1, 0, [])
    after = files(one.path / "runs")
    new = {name: data for name, data in after.items() if name not in before}
    assert {name: after[name] for name in before} == before
    assert new == {f"made/{name}": data for name, data in files(two.path / "runs" / "made").items() if "sub-3" in name}
    assert files(two.path) == theirs
    assert verify(one.path).problems == ()
    assert read_participants(one.path).column("age").to_pylist() == [31, 32, 33]
    sources = read_quarantine(one.path).column("source").to_pylist()
    assert sources == [f"/raw/sub-{n}/sub-{n}_task-nback_bold.nii.gz" for n in (1, 4)], (
        "what is a run now is no failure"
    )
    again = merge(one.path, [two.path])
    assert (again.copied, again.size_bytes, again.there, again.problems) == (0, 0, 2, [])
    assert files(one.path / "runs") == after


def test_two_stores_make_a_third(stores: Any, tmp_path: Path) -> None:
    done = merge(tmp_path / "third", [store.path for store in stores])
    assert (done.copied, done.there) == (3, 1)
    assert verify(tmp_path / "third").problems == () and read_manifest(tmp_path / "third").num_rows == 3


def test_a_merge_that_is_cut_off_is_finished_by_the_next(stores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = stores
    two.add_true("sub-4", seed=4)
    real, left = merge_module.publish, [1]

    def full(*arguments: Any) -> bool:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(merge_module, "publish", full)
        with pytest.raises(OSError, match="No space"):
            merge(one.path, [two.path])
    done = merge(one.path, [two.path])
    assert done.copied <= 2 and done.copied + done.there == 3
    assert verify(one.path).problems == () and len(find_runs(one.path)) == 4


def test_what_differs_is_listed_and_stays(stores: Any) -> None:
    one, two = stores
    shutil.rmtree(two.path / RUN.format("made", "sub-2"))
    two.add_true("sub-2", seed=7)
    table = pa.table({"dataset": ["made"], "participant_id": ["sub-2"], "age": [99]})
    write_participants(two.path, table)
    before = files(one.path / "runs" / "made" / "sub-2")
    done = merge(one.path, [two.path])
    assert done.copied == 1 and done.there == 0
    assert {problem.where for problem in done.problems} == {RUN.format("made", "sub-2"), "participants.parquet"}
    assert "made/sub-2 has other labels" in str(done.problems)
    assert files(one.path / "runs" / "made" / "sub-2") == before
    assert read_participants(one.path).column("age").to_pylist() == [31, 32, 33]


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("place_in_file", [0.3, 0.999])
def test_a_damaged_run_is_not_taken(stores: Any, compression: str, place_in_file: float) -> None:
    one, two = stores
    run = RUN.format("made", "sub-5")
    two.add_true("sub-5", seed=5, compression=compression)
    shard = two.path / run / "0.0"
    data = bytearray(shard.read_bytes())
    data[int(place_in_file * len(data))] ^= 1
    shard.write_bytes(data)
    done = merge(one.path, [two.path])
    assert [problem.where for problem in done.problems] == [run] and done.copied == 1
    assert not (one.path / run).exists() and verify(one.path).problems == ()
    shard.unlink()
    assert "missing" in merge(one.path, [two.path]).problems[0].what


def test_who_withdrew_from_either_store_does_not_come(stores: Any) -> None:
    one, two = stores
    two.add_true("sub-4", seed=4)
    remove_subject(one.path, "made", "sub-3")
    remove_subject(two.path, "made", "sub-2")
    done = merge(one.path, [two.path])
    assert (done.copied, done.refused) == (1, 1)
    assert [(p.where, p.fix) for p in done.problems] == [("made/sub-2", "start `remove --subject made/sub-2`")]
    assert withdrawn_subjects(one.path) == {("made", "sub-2"), ("made", "sub-3")}
    assert read_manifest(one.path).column("subject").to_pylist() == ["sub-1", "sub-4"]
    assert "sub-3" not in read_participants(one.path).column("participant_id").to_pylist()
    remove_subject(one.path, "made", "sub-2")
    assert verify(one.path).problems == () and merge(one.path, [two.path]).problems == []


def test_stores_that_differ_are_refused_with_what_differs(stores: Any, make_example: Callable[..., Any]) -> None:
    one, _ = stores
    other = make_example("other")
    mask = ~other.mask
    for changed, words in (
        ({"tr_s": 2.0}, "tr_s is 2.0, not 0.8"),
        ({"recipe": "global_z"}, "recipe is"),
        ({"mask": mask}, "mask_sha256 is"),
        ({"grid": replace(other.grid, voxel_mm=3.0)}, "grid is"),
    ):
        create_store(other.path, **(other.properties | changed))
        with pytest.raises(StoreError, match=f"cannot be merged.*{words}"):
            merge(one.path, [other.path])
        shutil.rmtree(other.path)
    with pytest.raises(StoreError, match="no store at"):
        merge(one.path, [other.path])


@pytest.mark.parametrize("which", [0, 1])
def test_an_unknown_format_is_refused(stores: Any, which: int) -> None:
    file = stores[which].path / "zarr.json"
    header = json.loads(file.read_text())
    header["attributes"]["neurostorm_format"] = 99
    file.write_text(json.dumps(header))
    with pytest.raises(StoreError, match="has format 99"):
        merge(stores[0].path, [stores[1].path])


def test_a_store_moves_into_a_bucket_and_back(make_bucket: Callable[[], str], stores: Any, tmp_path: Path) -> None:
    one, two = stores
    bucket = to_path(f"{make_bucket()}/corpus")
    assert merge(bucket, [one.path, two.path]).copied == 3
    assert verify(bucket).problems == ()
    write_run(two.path, RUN.format("made", "sub-9"), **two.true_arrays(seed=9))
    assert merge(bucket, [two.path]).copied == 1
    back = merge(tmp_path / "back", [bucket])
    assert back.copied == 4 and verify(tmp_path / "back").problems == ()
    assert (tmp_path / "back" / RUN.format("made", "sub-9") / "0.0").read_bytes() == (
        two.path / RUN.format("made", "sub-9") / "0.0"
    ).read_bytes()

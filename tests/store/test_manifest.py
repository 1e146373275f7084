"""The tables at a store's root: rebuilt, replaced, added to, never half written."""

import multiprocessing
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neurostorm.store import (
    MANIFEST_SCHEMA,
    StoreError,
    add_quarantine,
    build_manifest,
    clear_quarantine,
    read_manifest,
    read_participants,
    read_quarantine,
    write_manifest,
    write_participants,
)


def people(dataset: str, **columns: list[Any]) -> pa.Table:
    count = len(next(iter(columns.values())))
    return pa.table({"dataset": [dataset] * count, **columns})


def test_the_manifest_has_a_row_per_run_with_its_figures(example: Any) -> None:
    run = example.add("sub-02", frames=31, seed=4)
    example.add("sub-01", frames=12)
    table = write_manifest(example.path)
    assert table.schema == MANIFEST_SCHEMA
    assert table.column("subject").to_pylist() == ["sub-01", "sub-02"]
    row = table.to_pylist()[1]
    assert row == pytest.approx(
        {
            "run": run, "dataset": "made", "subject": "sub-02", "session": "1", "task": "rest", "run_label": "1",
            "frames": 31, "tr_s": 0.8, "source": "raw/4.nii.gz", "source_sha256": f"{4:064x}", "source_tr_s": 2.0,
            "source_frames": 31, "tsnr_median": 60.0, "clipped_fraction": 0.0, "coverage": 1.0, "global_mean": 1000.0,
            "global_std": 250.0, "chunk_frames": row["chunk_frames"], "compression": "none",
        }
    )  # fmt: skip


def test_the_manifest_rebuilt_is_the_manifest_written(example: Any) -> None:
    for seed in range(3):
        example.add(f"sub-{seed}", seed=seed)
    written = write_manifest(example.path)
    (example.path / "manifest.parquet").unlink()
    assert build_manifest(example.path).equals(written)
    write_manifest(example.path)
    assert read_manifest(example.path).equals(written)


def test_a_store_without_runs_has_an_empty_manifest(example: Any) -> None:
    assert write_manifest(example.path).num_rows == 0
    assert read_manifest(example.path).schema == MANIFEST_SCHEMA


def test_figures_a_run_does_not_state_are_null(example: Any) -> None:
    example.add(attributes={"source": "a.nii", "coverage": float("nan")})
    row = build_manifest(example.path).to_pylist()[0]
    assert row["source"] == "a.nii" and row["task"] == "" and row["run_label"] == "ses-1_task-rest"
    assert row["coverage"] is None and row["global_std"] is None


def test_figures_of_the_wrong_kind_name_the_run_and_the_field(example: Any) -> None:
    run = example.add(attributes={"coverage": "much"})
    with pytest.raises(StoreError, match="coverage") as caught:
        build_manifest(example.path)
    assert run in str(caught.value)


def test_a_missing_or_foreign_manifest_says_what_to_do(example: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"tools/store\.py repair"):
        read_manifest(example.path)
    pq.write_table(pa.table({"run": ["a"]}), example.path / "manifest.parquet")
    with pytest.raises(StoreError, match="no column clipped_fraction"):
        read_manifest(example.path)
    (example.path / "manifest.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(StoreError, match="cannot be read as Parquet"):
        read_manifest(example.path)
    with pytest.raises(StoreError, match="no store at"):
        read_manifest(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_table(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    example.add("sub-1")
    old = write_manifest(example.path)
    example.add("sub-2", seed=2)

    def refuse(source: Any, target: Any) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="no space"):
            write_manifest(example.path)
    assert read_manifest(example.path).equals(old)
    assert [item.name for item in example.path.glob("*manifest*")] == ["manifest.parquet"]


def test_participants_of_two_datasets_share_one_table(example: Any) -> None:
    assert read_participants(example.path) is None
    write_participants(example.path, people("b", participant_id=["sub-2", "sub-1"], age=[31, 32], site=["x", "y"]))
    write_participants(example.path, people("a", participant_id=["sub-1"], age=[70.5], diagnosis=["mdd"]))
    table = read_participants(example.path)
    assert table is not None
    rows = table.to_pylist()
    assert [(row["dataset"], row["participant_id"], row["age"]) for row in rows] == [
        ("a", "sub-1", 70.5), ("b", "sub-1", 32.0), ("b", "sub-2", 31.0),
    ]  # fmt: skip
    assert rows[0]["site"] is None and rows[0]["diagnosis"] == "mdd" and rows[1]["diagnosis"] is None


def test_a_subject_that_comes_again_is_replaced(example: Any) -> None:
    write_participants(example.path, people("a", participant_id=["s1", "s2"], age=[1, 2]))
    table = write_participants(example.path, people("a", participant_id=["s2", "s3"], age=[20, 30]))
    assert [(row["participant_id"], row["age"]) for row in table.to_pylist()] == [("s1", 1), ("s2", 20), ("s3", 30)]


def test_a_column_of_two_kinds_becomes_text(example: Any) -> None:
    write_participants(example.path, people("a", participant_id=["s1"], sex=["F"], iq=[None]))
    table = write_participants(example.path, people("b", participant_id=["s1"], sex=[1], iq=[101.5]))
    assert table.column("sex").to_pylist() == ["F", "1"]
    assert table.column("iq").to_pylist() == [None, 101.5]


def test_participants_without_a_key_or_twice_are_refused(example: Any) -> None:
    with pytest.raises(ValueError, match="participant_id"):
        write_participants(example.path, pa.table({"dataset": ["a"], "age": [3]}))
    with pytest.raises(ValueError, match="twice"):
        write_participants(example.path, people("a", participant_id=["s1", "s1"], age=[1, 2]))
    assert read_participants(example.path) is None


def test_quarantine_keeps_the_last_reason_of_each_source(example: Any) -> None:
    assert read_quarantine(example.path).num_rows == 0
    add_quarantine(
        example.path,
        [
            {"source": "b.nii", "reason": "truncated", "when": "2026-01-01T00:00:00+00:00"},
            {"source": "a.nii", "reason": "one frame", "when": datetime(2026, 1, 2, tzinfo=UTC)},
        ],
    )
    add_quarantine(example.path, [{"source": "b.nii", "reason": "no TR"}])
    rows = read_quarantine(example.path).to_pylist()
    assert [(row["source"], row["reason"]) for row in rows] == [("a.nii", "one frame"), ("b.nii", "no TR")]
    assert rows[0]["when"] == "2026-01-02T00:00:00+00:00"
    assert datetime.fromisoformat(rows[1]["when"]).tzinfo is not None


def test_sources_that_succeed_leave_quarantine(example: Any) -> None:
    add_quarantine(example.path, [{"source": name, "reason": "broken"} for name in ("a", "b", "c")])
    clear_quarantine(example.path, iter(["a", "c", "never there"]))
    assert read_quarantine(example.path).column("source").to_pylist() == ["b"]


def test_two_processes_add_to_quarantine_without_losing_rows(example: Any) -> None:
    names = [f"{i:02d}.nii" for i in range(20)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        jobs = [pool.apply_async(add_quarantine, (example.path, [{"source": n, "reason": "broken"}])) for n in names]
        for job in jobs:
            job.get(60)
    assert read_quarantine(example.path).column("source").to_pylist() == names

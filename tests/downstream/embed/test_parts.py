"""The tables that are made of the runs' parts."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neurostorm.downstream.embed import parts
from neurostorm.downstream.embed.parts import ClipResult, RunToEmbed, assemble, write_part


def table(out: Path, name: str) -> pa.Table:
    return pq.read_table(out / f"{name}.parquet")


def test_subjects_are_the_means_of_their_runs(tmp_path: Path) -> None:
    """Each run counts alike, whatever its clips; a namesake in another dataset is another subject."""
    runs = [
        RunToEmbed(f"runs/{dataset}/sub-1/run-{number}", dataset, "sub-1", "", "rest", "here", "x")
        for dataset, number in (("a", 1), ("a", 2), ("b", 1))
    ]
    for run, values in zip(runs, ([1.0, 3.0], [8.0], [5.0]), strict=True):
        clips = [ClipResult(10 * n, np.array([value, -value], np.float32)) for n, value in enumerate(values)]
        write_part(tmp_path, run, clips)
    done = assemble(tmp_path, runs, 0.5, "no part")
    assert (done.clips, done.runs, done.subjects) == (4, 3, 2)
    rows = table(tmp_path, "subjects").to_pylist()
    assert [(row["dataset"], row["runs"], row["embedding"]) for row in rows] == [("a", 2, [5, -5]), ("b", 1, [5, -5])]
    assert table(tmp_path, "clips")["start_s"].to_pylist() == [0, 5, 0, 0]


def test_row_groups_hold_a_bounded_number_of_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "GROUP_CLIPS", 4)
    runs = [RunToEmbed(f"runs/a/sub-{n}/run", "a", f"sub-{n}", "", "", "here", "x") for n in range(5)]
    for run in runs:
        write_part(tmp_path, run, [ClipResult(n, np.zeros(2, np.float32)) for n in range(3)])
    assert assemble(tmp_path, runs, 1.0, "").clips == 15
    file = pq.ParquetFile(tmp_path / "clips.parquet")
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [6, 6, 3]
    assert file.read()["start_frame"].to_pylist() == [0, 1, 2] * 5

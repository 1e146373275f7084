"""The feed's benchmark measures what it says: its sides bring the same clips, its shares are ratios of rates."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from neurostorm.store import FrameStore

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.fixture
def sides(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("feed_sides")


@pytest.fixture
def bench(sides):
    return importlib.import_module("feed")


def test_every_side_brings_the_same_clips(sides, ball_store):
    work = sides.open_work(FrameStore.open(ball_store), batch=3, steps=2)
    for rows in work.batches():
        expected = work.reader.read(rows)["frames"]
        assert np.array_equal(sides.by_zarr(work, rows), expected)
        mapped, read = sides.mmap(work, rows), sides.pread(work, rows)
        for clip, row, raw, copied in zip(expected, rows, read, mapped, strict=True):
            (_, _, size), *_ = sides.ranges(work, np.array([row]))
            assert bytes(raw[:size]) == bytes(copied[:size])
            layout = sides.layout_of_run(ball_store / work.runs[row["run"]])
            before = int(row["start"]) % layout.chunk_frames * layout.voxels  # of its first chunk, but not of the clip
            assert bytes(raw[before : before + layout.voxels]) == clip[0].tobytes()


def test_shares_are_ratios_of_rates(bench, sides, ball_store):
    work = sides.open_work(FrameStore.open(ball_store), batch=3, steps=2)
    seconds = {
        "pread": 1.0, "reader": 1.25, "reader, every checksum": 2.0, "patches": 1.0, "patches, released path": 6.0,
        "pipeline, read in the worker": 1.6, "pipeline, read in tasks": 4.0,
    }  # fmt: skip
    waits = {"pipeline, read in the worker": 0.02, "pipeline, read in tasks": 0.5}
    figures = bench.summary(work, seconds, waits)
    assert figures["reader_share"] == pytest.approx(0.8)
    assert figures["pipeline_share"] == pytest.approx(0.625)
    assert figures["ratio_to_baseline"] == pytest.approx(6.0)
    assert figures["wait_fraction"] == 0.02, "of the better mode"
    assert figures["pipeline_clips_per_s"] == pytest.approx(6 / 1.6)

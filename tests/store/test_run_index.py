"""Where a run's rows lie, by the manifest alone: little memory, no request before the first frames, the run decides."""

import pickle
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neurostorm.store import (
    MANIFEST_SCHEMA,
    ClipReadError,
    FrameStore,
    build_manifest,
    read_manifest,
    write_manifest,
)
from neurostorm.store.layout import MissingRunError
from neurostorm.store.maintenance.care import drop_run, remove_subject
from neurostorm.store.maintenance.merge import merge
from neurostorm.store.maintenance.verify import verify
from neurostorm.store.run_index import RunIndex


def indexed(path: Any, manifest: pa.Table | None = None) -> FrameStore:
    """The store with the index of its manifest, or of another."""
    store = FrameStore.open(path)
    store.use_index(RunIndex(read_manifest(path) if manifest is None else manifest, moments=True))
    return store


def invented(runs: int) -> pa.Table:
    """A manifest of runs that are nowhere."""
    paths = [f"runs/hcp-aging/sub-{1_000_000 + number}/ses-1_task-rest" for number in range(runs)]
    known = {"run": paths, "frames": [434] * runs, "chunk_frames": [1] * runs, "compression": ["none"] * runs}
    columns = [pa.array(known.get(field.name, [None] * runs), field.type) for field in MANIFEST_SCHEMA]
    return pa.Table.from_arrays(columns, schema=MANIFEST_SCHEMA)


def test_the_index_finds_every_run_and_its_layout(example: Any) -> None:
    runs = [example.add(f"sub-{i}", frames=20 + i, seed=i, chunk_frames=1 + i % 3) for i in (4, 1, 9, 2)]
    runs.append(example.add("sub-3", frames=30, compression="zstd"))
    table = build_manifest(example.path)
    for manifest in (table, table.take([3, 0, 4, 2, 1])):
        index = pickle.loads(pickle.dumps(RunIndex(manifest, moments=True)))
        assert list(index) == manifest["run"].to_pylist() and len(index) == 5
        assert index.take(np.array([2, 2, 0])).to_pylist() == [index[2], index[2], index[0]]
        for run in runs:
            number = index.find(run)
            assert number is not None and index[number] == run and run in index
            layout = index.layout(number, example.voxels)
            assert layout == FrameStore.open(example.path)._layout(run, 0).layout
            assert index.moments(number) == (1000.0, 250.0)
        for other in ("runs/made/sub-0/x", "runs/made/sub-4/ses-1_task-rest2", "runs/z", ""):
            assert index.find(other) is None and other not in index
    assert RunIndex(table.slice(0, 0)).find(runs[0]) is None
    assert RunIndex(table).moments(0) is None, "not kept unless they are needed"


def test_a_first_clip_of_a_run_reads_the_shard_and_nothing_else(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [example.add(f"sub-{i}", frames=30, seed=i) for i in range(3)]
    write_manifest(example.path)
    store = indexed(example.path)
    for run in runs:
        (example.path / run / "zarr.json").unlink()
    for seed, run in enumerate(runs):
        assert np.array_equal(store.frames(run, 3, 9), example.arrays(30, seed)["frames"][3:12])
        assert np.array_equal(store.moments(run)[1], example.arrays(30, seed)["std"])
        assert store.frame_count(run) == 30


def test_a_worker_holds_less_than_a_hundred_bytes_of_a_run(example: Any) -> None:
    def held(runs: int) -> int:
        manifest = invented(runs)
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        store = FrameStore.open(example.path)
        index = RunIndex(manifest, moments=True)
        store.use_index(index)
        for run in index:
            assert store.frame_count(run) == 434
        size = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
        tracemalloc.stop()
        return size

    # The least of three: Python's own tables, as that of interned strings, grow now and then.
    few, many = (min(held(runs) for _ in range(3)) for runs in (3000, 9000))
    assert (many - few) / 6000 < 100


def test_the_run_itself_decides_how_it_is_packed(example: Any) -> None:
    run = example.add(frames=30, chunk_frames=4)
    old = write_manifest(example.path)
    drop_run(example.path, run)
    for packing in ({"chunk_frames": 3}, {"chunk_frames": 4, "compression": "zstd"}):
        example.add(frames=30, **packing)
        store = indexed(example.path, old)
        for _ in range(2):
            assert np.array_equal(store.frames(run, 5, 20), example.arrays(30)["frames"][5:25])
            assert np.array_equal(store.moments(run)[0], example.arrays(30)["mean"])
        drop_run(example.path, run)


@pytest.mark.parametrize("frames", [20, 31, 60])
def test_moments_of_a_run_that_was_ingested_anew_are_not_taken_from_its_frames(example: Any, frames: int) -> None:
    run = example.add(frames=30, chunk_frames=1)
    old = write_manifest(example.path)
    drop_run(example.path, run)
    example.add(frames=frames, seed=3, chunk_frames=1)
    store = indexed(example.path, old)
    with pytest.raises(ClipReadError, match=rf"manifest says 30 frames, the run has {frames}: it was ingested anew"):
        store.moments(run)
    store._recent.clear()  # as when many other runs were read
    with pytest.raises(ClipReadError, match="it was ingested anew"):
        store.moments(run)


def test_damage_is_named_as_without_a_manifest(example: Any) -> None:
    run = example.add(frames=30, chunk_frames=5)
    write_manifest(example.path)
    shard = example.path / run / "0.0"
    whole = bytearray(shard.read_bytes())
    whole[7] ^= 1
    shard.write_bytes(whole)
    store = indexed(example.path)
    for _ in range(2):
        with pytest.raises(ClipReadError, match="checksum of the rows from 0 on"):
            store.frames(run, 0, 6)
    assert np.array_equal(store.frames(run, 5, 6), example.arrays(30)["frames"][5:11])
    whole[-1] ^= 1  # an index that nobody needs
    shard.write_bytes(whole)
    assert np.array_equal(indexed(example.path).moments(run)[0], example.arrays(30)["mean"])
    shard.unlink()
    with pytest.raises(ClipReadError, match=r"0\.0 cannot be read"):
        store.frames(run, 0, 6)
    drop_run(example.path, run)
    for opened in (store, indexed(example.path)):
        with pytest.raises(MissingRunError, match="has no run"):
            opened.frames(run, 0, 6)


def test_a_manifest_of_an_earlier_version_is_read_and_the_runs_are_asked(example: Any) -> None:
    run = example.add_true(chunk_frames=5)
    table = write_manifest(example.path).drop_columns(["chunk_frames", "compression"])
    pq.write_table(table, example.path / "manifest.parquet")
    assert read_manifest(example.path)["chunk_frames"].to_pylist() == [None]
    assert verify(example.path).problems == ()
    store = indexed(example.path)
    assert np.array_equal(store.frames(run, 3, 9), example.true_arrays()["frames"][3:12])
    (example.path / run / "zarr.json").unlink()
    assert len(store.frames(run, 10, 9)) == 9, "its metadata is read once"


def test_maintenance_keeps_the_layouts(example: Any, make_example: Any) -> None:
    for number in (1, 2):
        example.add_true(f"sub-0{number}", seed=number, chunk_frames=1 + number)
    write_manifest(example.path)
    other = make_example("other.zarr").path
    merge(other, [example.path])
    remove_subject(example.path, "made", "sub-01")
    for path, packing in ((example.path, [3]), (other, [2, 3])):
        assert read_manifest(path)["chunk_frames"].to_pylist() == packing
        assert verify(path).problems == ()


def test_a_wrong_layout_in_the_manifest_is_found_by_verify(example: Any) -> None:
    run = example.add_true(chunk_frames=5)
    table = write_manifest(example.path)
    wrong = table.set_column(table.column_names.index("chunk_frames"), "chunk_frames", pa.array([4], pa.int32()))
    pq.write_table(wrong, example.path / "manifest.parquet")
    (problem,) = verify(example.path).problems
    assert problem.where == run and "the manifest says chunk_frames 4, the run 5" in problem.what


def test_a_run_whose_metadata_is_damaged_has_no_layout_and_is_named_by_its_reader(example: Any) -> None:
    run = example.add()
    file = example.path / run / "zarr.json"
    file.write_text(file.read_text().replace('"int8"', '"int16"'))
    assert write_manifest(example.path)["chunk_frames"].to_pylist() == [None]
    with pytest.raises(ClipReadError, match="does not describe a run"):
        indexed(example.path).frames(run)

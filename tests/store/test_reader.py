"""What a store gives back, and what it says when something is wrong with it."""

import errno
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import neurostorm.store.reader as reader
from neurostorm.store import (
    ClipReadError,
    FrameRangeError,
    FrameStore,
    StoreError,
    StoreUnavailableError,
    create_store,
    write_manifest,
)
from neurostorm.store.shard import layout_of, read_index


def flip(file: Path, position: int) -> None:
    """Change one bit of one byte."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def change_header(path: Path, **changes: Any) -> None:
    header = json.loads((path / "zarr.json").read_text())
    header["attributes"] |= changes
    (path / "zarr.json").write_text(json.dumps(header))


def test_a_store_knows_itself(example: Any) -> None:
    store = FrameStore.open(str(example.path))
    assert (store.grid, store.tr_s, store.voxel_count) == (example.grid, example.tr_s, example.voxels)
    assert np.array_equal(store.mask, example.mask) and store.mask.dtype == bool
    assert store.recipe == {"name": "voxel_z", "version": 1}
    assert len(store.mask_sha256) == 64
    assert store.path == example.path


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_clip_is_the_slice_of_the_run(example: Any, data: st.DataObject) -> None:
    if not (example.path / "runs" / "made").exists():
        example.add(frames=47, chunk_frames=10)
    store = FrameStore.open(example.path)
    start = data.draw(st.integers(0, 46))
    count = data.draw(st.integers(1, 47 - start))
    assert np.array_equal(
        store.frames(store.runs()[0], start, count), example.arrays(47)["frames"][start : start + count]
    )


@pytest.mark.parametrize(("start", "count"), [(-1, 5), (20, 6), (25, 1), (25, None), (0, 0), (0, -3), (99, 2)])
def test_frames_outside_the_run_are_an_error(example: Any, start: int, count: int | None) -> None:
    run = example.add(frames=25)
    with pytest.raises(FrameRangeError, match="frames 0 to 24"):
        FrameStore.open(example.path).frames(run, start, count)


def test_only_the_chunks_of_the_clip_are_read(example: Any) -> None:
    run = example.add(frames=60, chunk_frames=10)
    flip(example.path / run / "0.0", 5 * (10 * example.voxels + 4) + 7)  # the last chunk of frames, not its neighbours
    store = FrameStore.open(example.path)
    assert np.array_equal(store.frames(run, 30, 20), example.arrays(60)["frames"][30:50])
    with pytest.raises(ClipReadError):
        store.frames(run, 45, 6)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_flipped_bit_names_the_run_and_the_clip(example: Any, compression: str) -> None:
    run = example.add(frames=60, compression=compression)
    flip(example.path / run / "0.0", 11)
    with pytest.raises(ClipReadError, match="checksum") as caught:
        FrameStore.open(example.path).frames(run, 5, 20)
    assert (caught.value.run, caught.value.start) == (run, 5)
    assert run in str(caught.value) and "5" in str(caught.value)


def test_a_short_file_and_a_missing_file_are_clip_errors(example: Any) -> None:
    run = example.add(frames=25, chunk_frames=4)
    shard = example.path / run / "0.0"
    whole = shard.read_bytes()
    store = FrameStore.open(example.path)
    for length in (0, 10, 10 * example.voxels):
        shard.write_bytes(whole[:length])
        with pytest.raises(ClipReadError, match="too short"):
            store.frames(run, 0, 12)
    shard.unlink()
    with pytest.raises(ClipReadError, match=r"clip from frame 3: .*0\.0 cannot be read"):
        store.frames(run, 3, 10)
    shard.write_bytes(whole)
    assert np.array_equal(store.frames(run), example.arrays(25)["frames"])


def test_a_damaged_index_is_a_clip_error_where_it_is_needed(example: Any) -> None:
    run = example.add(frames=25, chunk_frames=4, compression="zstd")
    shard = example.path / run / "0.0"
    whole = shard.read_bytes()
    flip(shard, len(whole) - 9)
    with pytest.raises(ClipReadError, match="damaged index"):
        FrameStore.open(example.path).frames(run, 0, 10)
    shard.write_bytes(whole[:20])
    with pytest.raises(ClipReadError, match="too short"):
        FrameStore.open(example.path).frames(run, 0, 10)
    shard.write_bytes(whole + b"more")
    with pytest.raises(ClipReadError):
        FrameStore.open(example.path).frames(run, 0, 10)


def test_damaged_moments_and_metadata_are_clip_errors(example: Any) -> None:
    run = example.add(chunk_frames=5)
    flip(example.path / run / "0.0", 5 * (5 * example.voxels + 4) + 4)  # row 25
    store = FrameStore.open(example.path)
    assert np.array_equal(store.frames(run), example.arrays()["frames"])
    with pytest.raises(ClipReadError, match="checksum"):
        store.moments(run)
    (example.path / run / "zarr.json").write_text("{")
    with pytest.raises(ClipReadError, match="cannot be read as the metadata"):
        FrameStore.open(example.path).frames(run)
    (example.path / run / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(ClipReadError, match="does not describe a run"):
        FrameStore.open(example.path).frames(run)


def test_a_run_of_another_mask_is_a_clip_error(example: Any, make_example: Any) -> None:
    other = make_example("other.zarr")
    other.mask[0, 0, 0] ^= True
    create_store(other.path, **other.properties)
    run = other.add()
    shutil.copytree(other.path / "runs", example.path / "runs", dirs_exist_ok=True)
    with pytest.raises(ClipReadError, match=f"{other.voxels} voxels"):
        FrameStore.open(example.path).frames(run)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
def test_a_file_system_that_does_not_answer_is_unavailable_and_not_damage(
    number: int, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = example.add()
    store = FrameStore.open(example.path)

    def away(*arguments: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", away)
        with pytest.raises(StoreUnavailableError, match=os.strerror(number)):
            store.frames(run, 0, 1)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", away)
        for ask in (lambda: store.run_attributes(run), lambda: FrameStore.open(example.path)):
            with pytest.raises(StoreUnavailableError, match=os.strerror(number)):
                ask()
    store.frames(run, 0, 1)


def test_a_store_whose_file_system_is_not_mounted_is_unavailable(example: Any, tmp_path: Path) -> None:
    first, second = example.add("sub-01"), example.add("sub-02")
    path = tmp_path / "mount" / "store.zarr"
    shutil.copytree(example.path, path)
    store = FrameStore.open(path)
    store.frames(first)
    shutil.rmtree(tmp_path / "mount")
    for run in (first, second):  # one whose layout is known, one that was never read
        with pytest.raises(StoreUnavailableError, match="is gone itself"):
            store.frames(run, 0, 1)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_checksums_are_compared_the_first_time_or_always(example: Any, compression: str) -> None:
    run = example.add(frames=40, chunk_frames=8, compression=compression)
    first, always = (FrameStore.open(example.path, verify) for verify in ("first", "always"))
    for store in (first, always):
        store.frames(run, 0, 20)
    shard = example.path / run / "0.0"
    flip(shard, end_of_chunk(example.path / run, 1) - 1)  # the checksum itself: what the rows hold is right
    assert np.array_equal(first.frames(run, 8, 8), example.arrays(40)["frames"][8:16])
    with pytest.raises(ClipReadError, match="checksum of the rows from 8 on"):
        always.frames(run, 8, 8)
    with pytest.raises(ClipReadError, match="checksum"):  # reaches into chunks that were not read before
        first.frames(run, 8, 30)
    with pytest.raises(ClipReadError, match="checksum"):
        pickle.loads(pickle.dumps(first)).frames(run, 8, 8)
    assert pickle.loads(pickle.dumps(always)).verify == "always"


def end_of_chunk(run: Path, number: int) -> int:
    """Where a chunk and its checksum end in the shard, by the index."""
    layout = layout_of(json.loads((run / "zarr.json").read_text()))
    data = (run / "0.0").read_bytes()
    return int(read_index(layout, data[-layout.index_bytes :], len(data))[number].sum())


def test_a_clip_is_read_into_the_callers_array(example: Any) -> None:
    run = example.add(frames=40, chunk_frames=8)
    store = FrameStore.open(example.path)
    block = np.full((3, 12, example.voxels), 99, np.int8)
    assert store.frames(run, 5, 12, block[1]) is not None
    assert np.array_equal(block[1], example.arrays(40)["frames"][5:17])
    assert (block[[0, 2]] == 99).all()
    frozen = np.zeros((12, example.voxels), np.int8)
    frozen.flags.writeable = False
    for bad in (
        np.zeros((11, example.voxels), np.int8),
        np.zeros((12, example.voxels), np.float32),
        np.zeros((12, 2 * example.voxels), np.int8)[:, ::2],
        frozen,
    ):
        with pytest.raises(ValueError, match="out is"):
            store.frames(run, 5, 12, bad)


def test_many_threads_read_one_store(example: Any) -> None:
    runs = [example.add(f"sub-{seed}", frames=60, seed=seed, chunk_frames=7) for seed in range(3)]
    store = FrameStore.open(example.path)
    wanted = [example.arrays(60, seed)["frames"] for seed in range(3)]
    jobs = [(seed, start) for start in range(0, 50, 3) for seed in range(3)]
    with ThreadPoolExecutor(8) as pool:
        clips = list(pool.map(lambda job: store.frames(runs[job[0]], job[1], 10), jobs))
    for (seed, start), clip in zip(jobs, clips, strict=True):
        assert np.array_equal(clip, wanted[seed][start : start + 10])


def test_reading_leaves_no_file_open(example: Any) -> None:
    run = example.add(frames=40, chunk_frames=8)
    store = FrameStore.open(example.path)
    before = len(os.listdir("/proc/self/fd"))
    for start in range(30):
        store.frames(run, start, 5)
    (example.path / run / "0.0").write_bytes(b"short")
    for start in range(30):
        with pytest.raises(ClipReadError):
            store.frames(run, start, 5)
    assert len(os.listdir("/proc/self/fd")) == before


def test_unknown_runs_are_named(example: Any) -> None:
    store = FrameStore.open(example.path)
    for run in ("runs/made/sub-01/none", "nonsense", "runs/made/../x"):
        for ask in (store.frames, store.moments, store.run_attributes):
            with pytest.raises(StoreError, match=r"run"):
                ask(run)


def test_runs_are_listed_sorted_and_only_whole_ones(example: Any) -> None:
    runs = [example.add(f"sub-{i:02d}", dataset, seed=i) for dataset in ("b", "a") for i in (3, 1)]
    (example.path / "runs" / "a" / "sub-09" / "task-empty").mkdir(parents=True)
    assert FrameStore.open(example.path).runs() == sorted(runs)


def test_unpacking_puts_voxels_where_the_mask_has_them(example: Any) -> None:
    store = FrameStore.open(example.path)
    values = np.random.default_rng(0).standard_normal((2, 3, example.voxels)).astype(np.float32)
    box = store.unpack(values, fill=-5.0)
    assert box.shape == (2, 3, *example.grid.shape) and box.dtype == np.float32
    assert np.array_equal(box[..., example.mask], values)
    assert (box[..., ~example.mask] == -5.0).all()
    assert store.unpack(np.ones(example.voxels, np.int8)).dtype == np.int8
    with pytest.raises(ValueError, match="voxels of the mask"):
        store.unpack(values[..., 1:])


def test_a_pickled_store_is_small_and_works_elsewhere(example: Any) -> None:
    run = example.add()
    store = FrameStore.open(example.path)
    store.frames(run)
    data = pickle.dumps(store)
    assert len(data) < 500
    again = pickle.loads(data)
    assert np.array_equal(again.frames(run, 2, 3), store.frames(run, 2, 3))
    assert again.grid == store.grid and np.array_equal(again.mask, store.mask)


def test_the_memory_of_layouts_is_bounded(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_KNOWN_RUNS", 3)
    monkeypatch.setattr(reader, "_RECENT_RUNS", 2)
    runs = [example.add(f"sub-{i}", seed=i) for i in range(4)]
    store = FrameStore.open(example.path)
    for _ in range(2):
        for seed, run in enumerate(runs):
            assert np.array_equal(store.frames(run), example.arrays(seed=seed)["frames"])
    assert len(store._layouts) == 3 and len(store._recent) == 2


def test_a_layout_is_not_read_again(example: Any) -> None:
    run = example.add()
    store = FrameStore.open(example.path)
    store.frames(run)
    (example.path / run / "zarr.json").unlink()
    assert np.array_equal(store.frames(run, 0, 5), example.arrays()["frames"][:5])


def test_stores_that_cannot_be_read_say_why(example: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store at"):
        FrameStore.open(tmp_path / "nowhere")
    (tmp_path / "plain").mkdir()
    with pytest.raises(StoreError, match="not a frame store"):
        FrameStore.open(tmp_path / "plain")
    change_header(example.path, neurostorm_format=3)
    with pytest.raises(StoreError, match="has format 3, this version reads format 2"):
        FrameStore.open(example.path)
    (example.path / "zarr.json").write_text("not json")
    with pytest.raises(StoreError, match="cannot be read"):
        FrameStore.open(example.path)


def test_a_store_whose_mask_or_grid_was_changed_is_refused(example: Any) -> None:
    kept = (example.path / "zarr.json").read_text()
    change_header(example.path, mask_sha256="0" * 64)
    with pytest.raises(StoreError, match="hash"):
        FrameStore.open(example.path)
    change_header(example.path, grid={"name": "box"})
    with pytest.raises(StoreError, match="does not describe a grid"):
        FrameStore.open(example.path)
    (example.path / "zarr.json").write_text(kept)
    shutil.rmtree(example.path / "mask")
    with pytest.raises(StoreError, match="mask"):
        FrameStore.open(example.path)


def test_the_content_hash_follows_what_a_model_sees(example: Any, make_example: Any) -> None:
    with pytest.raises(StoreError, match=r"manifest\.parquet is missing"):
        FrameStore.open(example.path).content_hash()
    twin = make_example("twin.zarr")
    create_store(twin.path, **twin.properties)
    for store, order in ((example, (1, 2)), (twin, (2, 1))):
        for seed in order:
            store.add(f"sub-{seed}", seed=seed)
        write_manifest(store.path)
    hashes = [FrameStore.open(store.path).content_hash() for store in (example, twin)]
    assert hashes[0] == hashes[1], "the same runs, in whatever order and place"
    twin.add("sub-3", seed=3)
    assert FrameStore.open(twin.path).content_hash() == hashes[0], "the manifest is what was planned on"
    write_manifest(twin.path)
    assert FrameStore.open(twin.path).content_hash() != hashes[0]

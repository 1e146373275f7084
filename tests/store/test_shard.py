"""A run's bytes are a Zarr v3 array: zarr-python, which knows nothing of this code, reads and writes the same."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neurostorm.io.paths import AnyPath
from neurostorm.store import run_bytes, shard
from neurostorm.store.run_file import RunFile
from neurostorm.store.shard import (
    MOMENT_ROWS,
    RunLayout,
    ShardError,
    array_metadata,
    default_chunk_frames,
    encode,
    layout_of,
    moment_rows,
    moments_of,
    read_index,
)

layouts = st.builds(
    RunLayout, st.integers(1, 40), st.integers(1, 30), st.integers(1, 60), st.sampled_from(["none", "zstd"])
)
a_few = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(layout: RunLayout, seed: int = 0) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Frames (T, V) and moment rows (8, V), any bytes but the one that is not stored."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(-127, 128, (layout.frames, layout.voxels), np.int8)
    return frames, moment_rows(rng.normal(1000, 9, layout.voxels), rng.random(layout.voxels))


def encoded(layout: RunLayout) -> bytes:
    return b"".join(encode(layout, *rows_of(layout)))


def write(folder: Path, layout: RunLayout, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "zarr.json").write_text(json.dumps(array_metadata(layout, {"frames": layout.frames})))
    (folder / "0.0").write_bytes(data)
    return folder


def read_rows(file: AnyPath, layout: RunLayout, first: int, count: int, *, verify_all: bool = True) -> NDArray[np.int8]:
    out = np.full((count, layout.voxels), 77, np.int8)
    RunFile(layout, file).read(first, out, verify_all=verify_all)
    return out


@a_few
@given(layouts)
@example(RunLayout(20, 3, 7, "none"))  # the last chunk of frames shares rows with the moments
@example(RunLayout(1, 1, 60, "zstd"))
def test_zarr_python_reads_what_is_encoded(tmp_path: Path, layout: RunLayout) -> None:
    array = zarr.open_array(write(tmp_path / "run", layout, encoded(layout)), mode="r")
    assert np.array_equal(array[:], np.concatenate(rows_of(layout)))
    assert array.attrs["frames"] == layout.frames and array.metadata.dimension_names == ("frame", "voxel")


@a_few
@given(layouts, st.data())
def test_what_zarr_python_writes_is_read(tmp_path: Path, layout: RunLayout, data: st.DataObject) -> None:
    rows = np.concatenate(rows_of(layout))
    array = zarr.create_array(
        tmp_path / "run",
        shape=rows.shape,
        dtype="int8",
        chunks=(layout.chunk_frames, layout.voxels),
        shards=(layout.chunks * layout.chunk_frames, layout.voxels),
        compressors=(
            *([zarr.codecs.ZstdCodec(level=1)] if layout.compression == "zstd" else []),
            zarr.codecs.Crc32cCodec(),
        ),
        chunk_key_encoding={"name": "v2", "separator": "."},
        dimension_names=("frame", "voxel"),
        attributes={"frames": layout.frames},
        fill_value=-128,
        overwrite=True,
    )
    array[:] = rows
    assert layout_of(json.loads((tmp_path / "run" / "zarr.json").read_text())) == layout
    first = data.draw(st.integers(0, layout.rows - 1))
    count = data.draw(st.integers(1, layout.rows - first))
    # zarr-python may put chunks in another order, so that only the index tells where they are.
    order = RunFile(layout, tmp_path / "run" / "0.0")
    raw = (tmp_path / "run" / "0.0").read_bytes()
    order._index = read_index(layout, raw[-layout.index_bytes :], len(raw))
    out = np.empty((count, layout.voxels), np.int8)
    order._read_and_decode(first, out, layout.chunk_range(first, count), layout.chunk_range(first, count))
    assert np.array_equal(out, rows[first : first + count])


def test_attributes_that_zarr_python_changes_leave_the_run_readable(tmp_path: Path) -> None:
    layout = RunLayout(9, 5, 4, "zstd")
    run = write(tmp_path / "run", layout, encoded(layout))
    zarr.open_array(run, mode="r+").attrs["note"] = "checked by eye"
    metadata = json.loads((run / "zarr.json").read_text())
    assert metadata["attributes"]["note"] == "checked by eye" and layout_of(metadata) == layout


@a_few
@given(layouts, st.data(), st.integers(1, 255))
@example(RunLayout(3, 2, 4, "none"), None, 1)
def test_damage_anywhere_is_noticed_or_harmless(
    tmp_path: Path, layout: RunLayout, data: st.DataObject | None, change: int
) -> None:
    good = encoded(layout)
    position = len(good) - 1 if data is None else data.draw(st.integers(0, len(good) - 1))
    damaged = bytearray(good)
    damaged[position] ^= change
    file = write(tmp_path / "run", layout, bytes(damaged)) / "0.0"
    wanted = np.concatenate(rows_of(layout))
    wrong = []
    for first in range(layout.rows):
        try:
            assert np.array_equal(read_rows(file, layout, first, 1), wanted[first : first + 1])
        except ShardError:
            wrong.append(first)
    in_index = position >= len(good) - layout.index_bytes
    assert len(wrong) == 0 if in_index and layout.compression == "none" else len(wrong) > 0


@a_few
@given(layouts, st.data())
def test_a_shard_that_ends_early_is_noticed_or_harmless(tmp_path: Path, layout: RunLayout, data: st.DataObject) -> None:
    good = encoded(layout)
    file = write(tmp_path / "run", layout, good[: data.draw(st.integers(0, len(good) - 1))]) / "0.0"
    wanted = np.concatenate(rows_of(layout))
    for first in range(layout.rows):
        try:
            assert np.array_equal(read_rows(file, layout, first, 1), wanted[first : first + 1])
        except ShardError:
            continue


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ((2**64 - 1, 2**64 - 1), "lacks the chunk of row 4"),
        ((0, 10**6), "behind its end"),
        ((10**6, 4), "behind its end"),
        ((2**64 - 8, 12), "behind its end"),  # the sum of the two wraps around to 4
    ],
)
def test_an_index_that_cannot_be_is_refused(entry: tuple[int, int], reason: str) -> None:
    layout = RunLayout(9, 5, 4, "zstd")
    good = encoded(layout)
    table = np.frombuffer(good[-layout.index_bytes : -4], "<u8").reshape(-1, 2).copy()
    table[1] = entry
    tail = table.tobytes() + shard._crc(table.tobytes())
    with pytest.raises(ShardError, match=reason):
        read_index(layout, tail, len(good))


def altered() -> list[Any]:
    layout = RunLayout(9, 5, 4, "zstd")
    good = array_metadata(layout, {"frames": 9})
    changes: list[tuple[tuple[Any, ...], Any]] = [
        (("shape",), [17, 6]), (("shape",), [18, 5]), (("shape",), [8, 5]), (("shape",), [17]), (("shape",), None),
        (("data_type",), "uint8"), (("fill_value",), 0), (("zarr_format",), 2), (("node_type",), "group"),
        (("chunk_grid", "configuration", "chunk_shape"), [16, 5]), (("chunk_key_encoding", "name"), "default"),
        (("codecs",), []), (("codecs", 0, "name"), "gzip"),
        (("codecs", 0, "configuration", "index_location"), "start"),
        (("codecs", 0, "configuration", "chunk_shape"), [0, 5]),
        (("codecs", 0, "configuration", "chunk_shape"), [3, 5]),
        (("codecs", 0, "configuration", "chunk_shape"), [-4, 5]),
        (("codecs", 0, "configuration", "codecs"), [{"name": "bytes"}]),
        (("codecs", 0, "configuration", "codecs", 1, "name"), "blosc"),
        (("codecs", 0, "configuration", "index_codecs"), [{"name": "bytes"}]),
        (("storage_transformers",), [{"name": "other"}]), (("attributes", "frames"), 10), (("attributes",), {}),
    ]  # fmt: skip
    trees = []
    for path, value in changes:
        tree = copy.deepcopy(good)
        node: Any = tree
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value
        trees.append(tree)
    assert layout_of(good) == layout
    return trees


@pytest.mark.parametrize("metadata", [*altered(), {}, {"shape": [17, 5]}])
def test_metadata_of_anything_else_is_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(ShardError, match="does not describe a run"):
        layout_of(metadata)


@pytest.mark.parametrize(
    "layout", [RunLayout(0, 5, 4, "none"), RunLayout(9, 0, 4, "none"), RunLayout(9, 5, -4, "none")]
)
def test_a_run_of_nothing_is_refused_though_it_is_consistent(layout: RunLayout) -> None:
    with pytest.raises(ShardError, match="no frames"):
        layout_of(array_metadata(layout, {"frames": layout.frames}))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.floats(0, width=32)), min_size=1, max_size=20))
def test_moments_come_back_to_the_bit(pairs: list[tuple[float, float]]) -> None:
    mean, std = np.array(pairs, np.float32).T
    again = moments_of(moment_rows(mean, std))
    assert np.array_equal(again[0], mean) and np.array_equal(again[1], std)


def test_many_small_chunks_take_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RunLayout(700, 3, 1, "none")
    file = write(tmp_path / "run", layout, encoded(layout)) / "0.0"
    assert np.array_equal(read_rows(file, layout, 1, 690), rows_of(layout)[0][1:691])
    preadv = os.preadv

    def less(handle: int, buffers: list[Any], offset: int) -> int:
        """A kernel that hands out less than was asked for, as it does at 2 GB and at signals."""
        return preadv(handle, [*buffers[:-1][:50], memoryview(buffers[:51][-1]).cast("B")[:2]], offset)

    monkeypatch.setattr(os, "preadv", less)
    assert np.array_equal(read_rows(file, layout, 1, 690), rows_of(layout)[0][1:691])


@pytest.mark.parametrize(("voxels", "expected"), [(229_137, 1), (28_549, 5), (1, 131_072), (10**7, 1)])
def test_chunks_come_near_128_kb(voxels: int, expected: int) -> None:
    assert default_chunk_frames(voxels) == expected


@a_few
@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 100))
def test_the_bytes_announced_are_those_encoded(frames: int, voxels: int, chunk_frames: int) -> None:
    layout = RunLayout(frames, voxels, min(chunk_frames, frames + MOMENT_ROWS), "none")
    assert len(encoded(layout)) == run_bytes(frames, voxels, chunk_frames) == layout.shard_bytes

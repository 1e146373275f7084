"""A run is there whole or not at all, whoever writes at the same time and whatever is killed."""

import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from neurostorm.io.processes import machine_tag
from neurostorm.store import (
    FrameStore,
    Grid,
    StoreError,
    create_store,
    remove_partials,
    run_bytes,
    run_files,
    run_path,
    write_run,
)
from neurostorm.store.writer import publish

RUN = run_path("made", "sub-01", "ses-1_task-rest")
UNFINISHED = f"{machine_tag()}-abc"  # a name that this machine's writers give


def partials(path: Path) -> list[Path]:
    return sorted((path / ".partial").glob("*"))


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(("frames", "chunk_frames"), [(1, 10), (9, 10), (25, 10), (25, 7), (610, 10), (3, 1)])
def test_what_is_written_is_what_is_read(example: Any, compression: str, frames: int, chunk_frames: int) -> None:
    arrays = example.arrays(frames)
    run = example.add(frames=frames, compression=compression, chunk_frames=chunk_frames)
    store = FrameStore.open(example.path)
    assert np.array_equal(store.frames(run), arrays["frames"])
    mean, std = store.moments(run)
    assert np.array_equal(mean, arrays["mean"]) and np.array_equal(std, arrays["std"])


def test_a_run_of_zeros_is_no_missing_run(example: Any) -> None:
    zeros = np.zeros(example.voxels, np.float32)
    frames = np.zeros((20, example.voxels), np.int8)
    assert write_run(example.path, RUN, frames=frames, mean=zeros, std=zeros, attributes={})
    store = FrameStore.open(example.path)
    assert not store.frames(RUN).any()
    assert not store.moments(RUN)[1].any()


def test_any_zarr_reader_walks_the_store(example: Any) -> None:
    run = example.add()
    root = zarr.open(example.path, mode="r")
    arrays = example.arrays()
    array = root["runs"]["made"]["sub-01"]["ses-1_task-rest"]
    assert array.shape == (25 + 8, example.voxels) and array.attrs["frames"] == 25
    assert np.array_equal(root[run][3:14], arrays["frames"][3:14])
    moments = np.ascontiguousarray(root[run][25:]).reshape(2, -1).view("<f4")
    assert np.array_equal(moments, [arrays["mean"], arrays["std"]])
    assert np.array_equal(root["mask"][:] != 0, example.mask)
    assert list(dict(root["runs"]["made"]["sub-01"].arrays())) == ["ses-1_task-rest"]
    assert list(dict(root["runs"].groups())) == ["made"]
    assert root.attrs["neurostorm_format"] == 2
    assert root.attrs["grid"]["affine"] == example.grid.affine.tolist()


def test_a_run_is_two_files_of_the_size_that_is_announced(example: Any) -> None:
    for number, chunk_frames in enumerate((None, 1, 7, 5000)):
        run = example.add(f"sub-{number}", frames=600, chunk_frames=chunk_frames)
        files = {item.name: item.stat().st_size for item in (example.path / run).rglob("*") if item.is_file()}
        assert sorted(files) == ["0.0", "zarr.json"] and len(files) == run_files()
        assert files["0.0"] == run_bytes(600, example.voxels, chunk_frames)
    assert partials(example.path) == []


def test_chunks_longer_than_the_run_cost_nothing(example: Any) -> None:
    run = example.add(frames=20, chunk_frames=10**9)
    assert (example.path / run / "0.0").stat().st_size < 30 * example.voxels
    assert np.array_equal(FrameStore.open(example.path).frames(run), example.arrays(20)["frames"])


def test_a_second_write_leaves_the_first(example: Any) -> None:
    example.add(seed=0)
    assert write_run(example.path, RUN, **example.arrays(seed=1)) is False
    store = FrameStore.open(example.path)
    assert np.array_equal(store.frames(RUN), example.arrays(seed=0)["frames"])


def test_attributes_are_strict_json_with_the_facts_filled_in(example: Any) -> None:
    odd = {
        "tsnr_median": np.float32(2.5),
        "coverage": float("nan"),
        "entities": {"run": np.int64(1)},
        "dataset": "wrong",
    }
    run = example.add(attributes=odd)
    found = FrameStore.open(example.path).run_attributes(run)
    assert found["tsnr_median"] == 2.5 and found["coverage"] is None and found["entities"] == {"run": 1}
    assert (found["dataset"], found["subject"], found["frames"], found["tr_s"]) == ("made", "sub-01", 25, 0.8)


def test_a_failed_rename_leaves_nothing_visible(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="no space"):
            write_run(example.path, RUN, **example.arrays())
    assert FrameStore.open(example.path).runs() == []
    assert partials(example.path) == []
    assert write_run(example.path, RUN, **example.arrays())


KILLED = """
import os, sys
import numpy as np
from neurostorm.store import write_run

os.replace = lambda source, target: os._exit(9)
frames = np.ones((12, int(sys.argv[3])), np.int8)
write_run(sys.argv[1], sys.argv[2], frames=frames, mean=frames[0] * 1.0, std=frames[0] * 1.0, attributes={})
"""


def test_a_killed_writer_leaves_only_a_partial(example: Any) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", KILLED, os.fspath(example.path), RUN, str(example.voxels)]
    assert subprocess.run(command, cwd=root, check=False, timeout=60).returncode == 9
    assert len(partials(example.path)) == 1
    assert FrameStore.open(example.path).runs() == []
    assert write_run(example.path, RUN, **example.arrays())
    assert remove_partials(example.path) == 1
    assert partials(example.path) == []
    assert FrameStore.open(example.path).runs() == [RUN]


def test_a_living_writer_is_not_swept_and_a_full_disk_leaves_nothing(example: Any) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x"
        assert len(partials(example.path)) == 1 and remove_partials(example.path) == 0
        raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(OSError, match="no space"):
        publish(example.path, RUN, b"{}", pieces())
    assert partials(example.path) == [] and FrameStore.open(example.path).runs() == []


def test_an_empty_folder_of_a_writer_is_swept_when_it_is_old(example: Any) -> None:
    begun = example.path / ".partial" / UNFINISHED
    begun.mkdir(parents=True)
    assert remove_partials(example.path) == 0, "its writer may be opening the file"
    os.utime(begun, (time.time() - 3600,) * 2)
    assert remove_partials(example.path) == 1 and not begun.exists()


def test_temporary_files_of_tables_and_groups_are_swept(example: Any) -> None:
    example.add()
    folders = (".", "runs/made", "runs/made/sub-01")
    left = [example.path / folder / f".zarr.json.{UNFINISHED}.partial" for folder in folders]
    for file in left:
        file.write_bytes(b"half")
    with left[0].open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert remove_partials(example.path) == 2
    assert [file.exists() for file in left] == [True, False, False]


def test_what_is_left_of_another_run_is_named(example: Any) -> None:
    (example.path / RUN).mkdir(parents=True)
    (example.path / RUN / "0.0").write_bytes(b"left when somebody deleted the run")
    with pytest.raises(StoreError, match="holds something else") as caught:
        write_run(example.path, RUN, **example.arrays())
    assert RUN in str(caught.value)
    assert partials(example.path) == []


def test_who_loses_the_race_reports_it(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, rivals = os.replace, [example.arrays(seed=5)]

    def overtaken(source: Any, target: Any) -> None:
        if os.fspath(target).endswith(RUN) and rivals:
            assert write_run(example.path, RUN, **rivals.pop())
        rename(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    assert write_run(example.path, RUN, **example.arrays(seed=6)) is False
    assert np.array_equal(FrameStore.open(example.path).frames(RUN), example.arrays(seed=5)["frames"])
    assert partials(example.path) == []


def test_two_processes_create_and_fill_one_store(make_example: Callable[..., Any]) -> None:
    example = make_example("shared.zarr")
    runs = [run_path("made", f"sub-{i}", "task-rest") for i in range(6)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        made = [pool.apply_async(create_store, (example.path,), example.properties) for _ in range(4)]
        assert [result.get(60) for result in made] == [None] * 4
        writes = [
            pool.apply_async(write_run, (example.path, run), example.arrays(60)) for run in runs for _ in range(2)
        ]
        wins = [result.get(60) for result in writes]
    assert [wins[i] + wins[i + 1] for i in range(0, len(wins), 2)] == [1] * len(runs)
    store = FrameStore.open(example.path)
    assert store.runs() == runs
    assert all(np.array_equal(store.frames(run), example.arrays(60)["frames"]) for run in runs)
    assert [item.name for item in example.path.parent.iterdir()] == ["shared.zarr"], "no temporary folder stays"


def test_who_loses_the_race_for_the_store_checks_the_winner(
    make_example: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = make_example("raced.zarr")
    rename, rivals = os.replace, [example.properties | {"tr_s": 2.0}]

    def overtaken(source: Any, target: Any) -> None:
        if os.fspath(target) == os.fspath(example.path) and rivals:
            create_store(example.path, **rivals.pop())
        rename(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    with pytest.raises(StoreError, match=r"TR \(s\) 2\.0 instead of 0\.8"):
        create_store(example.path, **example.properties)


def test_a_store_that_appears_while_one_looks_is_welcome(
    make_example: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = make_example("sudden.zarr")
    look, rivals = Path.exists, [example.properties]

    def late(path: Path, **options: Any) -> bool:
        if path == example.path and rivals:
            create_store(path, **rivals.pop())
        return look(path, **options)

    monkeypatch.setattr(Path, "exists", late)
    create_store(example.path, **example.properties)
    assert not rivals and FrameStore.open(example.path).runs() == []


def test_the_same_store_again_is_no_work_and_another_is_refused(example: Any) -> None:
    run = example.add()
    create_store(example.path, **example.properties)
    other_mask = example.mask.copy()
    other_mask.flat[0] ^= True
    for changed, named in (
        ({"tr_s": 2.0}, "TR (s) 0.8 instead of 2.0"),
        ({"mask": other_mask}, "another brain mask ("),
        ({"grid": Grid("box", (6, 7, 8), 4.0, (-10.0, -12.0, -18.0))}, "4 mm from -10, -12, -18)"),
        ({"recipe": "reference"}, "instead of reference (version"),
    ):
        with pytest.raises(StoreError, match="choose another store") as caught:
            create_store(example.path, **(example.properties | changed))
        assert named in str(caught.value) and "{" not in str(caught.value) and "\n" not in str(caught.value)
    assert FrameStore.open(example.path).runs() == [run]


def test_a_folder_of_something_else_is_left_alone(make_example: Callable[..., Any]) -> None:
    example = make_example("thesis")
    example.path.mkdir()
    create_store(example.path, **example.properties)  # an empty folder is fine
    other = make_example("papers")
    other.path.mkdir()
    (other.path / "draft.txt").write_text("chapter one")
    with pytest.raises(StoreError, match="not a frame store"):
        create_store(other.path, **other.properties)
    assert [item.name for item in other.path.iterdir()] == ["draft.txt"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"mask": np.ones((6, 7, 9), bool)}, "shape"),
        ({"mask": np.zeros((6, 7, 8), bool)}, "no voxel"),
        ({"tr_s": 0.0}, "tr_s"),
        ({"tr_s": float("nan")}, "tr_s"),
    ],
)
def test_a_store_that_makes_no_sense_is_not_made(make_example: Callable[..., Any], changed: Any, named: str) -> None:
    example = make_example("nonsense.zarr")
    with pytest.raises(ValueError, match=named):
        create_store(example.path, **(example.properties | changed))
    assert not example.path.exists()


@pytest.mark.parametrize(
    "run", ["runs/made/../../etc", "runs/made/sub-01", "/runs/made/sub-01/x", "runs/made/sub-01/.x"]
)
def test_a_run_cannot_leave_the_store(example: Any, run: str) -> None:
    before = sorted(example.path.parent.rglob("*"))
    with pytest.raises(ValueError):
        write_run(example.path, run, **example.arrays())
    assert sorted(example.path.parent.rglob("*")) == before


def test_arrays_that_do_not_fit_are_refused(example: Any) -> None:
    good = example.arrays()
    missing = good["frames"].copy()
    missing[3, 4] = -128
    bad = [
        {"frames": good["frames"].astype(np.float32)},
        {"frames": good["frames"][:, 1:]},
        {"frames": good["frames"][:0]},
        {"frames": missing},
        {"mean": good["mean"][1:]},
        {"mean": np.full(example.voxels, np.nan)},
        {"std": -good["std"]},
        {"compression": "gzip"},
        {"chunk_frames": 0},
    ]
    for change in bad:
        with pytest.raises(ValueError, match=r"frames|mean|std|compression"):
            write_run(example.path, RUN, **(good | change))
    assert FrameStore.open(example.path).runs() == []


def test_addresses_that_are_not_understood_are_refused(example: Any) -> None:
    for address in ("ftp://server/store.zarr", "s3://", "s3:/bucket/store.zarr"):
        with pytest.raises(StoreError, match="s3://BUCKET/KEY"):
            create_store(address, **example.properties)

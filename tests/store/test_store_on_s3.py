"""A store in an object store is the same store, file by file; runs are there whole or not at all there too."""

import itertools
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from neurostorm.io.object_store import ObjectPath, ObjectStoreError
from neurostorm.io.paths import AnyPath, list_files, to_path
from neurostorm.store import (
    ClipReadError,
    FrameStore,
    StoreError,
    StoreUnavailableError,
    add_quarantine,
    create_store,
    partials,
    read_manifest,
    read_quarantine,
    remove_partials,
    run_path,
    write_manifest,
    write_run,
    writer,
)
from neurostorm.store.run_index import RunIndex
from tests.faulty_s3 import Network, bad_network

RUN = run_path("made", "sub-01", "ses-1_task-rest")


@pytest.fixture
def remote(example: Any, make_bucket: Callable[[], str]) -> Any:
    """An empty store as `example`, in a bucket."""
    made = replace(example, path=to_path(make_bucket()) / "stores" / "box.zarr")
    create_store(made.path, **made.properties)
    return made


@pytest.fixture
def network(remote: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    with bad_network(s3_server, monkeypatch) as made:
        yield made


def contents(root: AnyPath) -> dict[str, bytes]:
    names = [name for name, _ in list_files(root) if not name.endswith((".lock", ".parquet"))]
    return {name: (root / name).read_bytes() for name in names}


def test_the_files_are_those_of_a_local_store(example: Any, remote: Any) -> None:
    for store in (example, remote):
        for seed, compression in enumerate(("none", "zstd")):
            store.add(f"sub-{seed}", seed=seed, compression=compression, chunk_frames=7)
        write_manifest(store.path)
        add_quarantine(store.path, [{"source": "b.nii", "reason": "cut off", "when": "2026-01-01"}])
    assert contents(remote.path) == contents(example.path)
    assert read_manifest(remote.path).equals(read_manifest(example.path))
    assert read_quarantine(remote.path).equals(read_quarantine(example.path))
    here, there = (FrameStore.open(store.path) for store in (example, remote))
    assert there.runs() == here.runs() and there.content_hash() == here.content_hash()
    assert np.array_equal(there.mask, here.mask) and there.grid == here.grid


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_clips_and_moments_come_back(remote: Any, compression: str) -> None:
    run = remote.add(frames=30, compression=compression, chunk_frames=7)
    arrays = remote.arrays(30)
    store = pickle.loads(pickle.dumps(FrameStore.open(str(remote.path), "always")))
    for start, count in ((0, 30), (0, 1), (6, 2), (13, 15), (29, 1)):
        out = np.zeros((count, remote.voxels), np.int8)
        store.frames(run, start, count, out)
        assert np.array_equal(out, arrays["frames"][start : start + count])
    assert np.array_equal(store.moments(run), [arrays["mean"], arrays["std"]])
    assert store.run_attributes(run)["source"] == "raw/0.nii.gz" and store.frame_count(run) == 30
    assert remote.add("sub-02") and write_run(remote.path, run, **remote.arrays()) is False


def test_a_first_clip_is_one_request_and_the_store_itself_a_few(remote: Any, network: Network) -> None:
    runs = [remote.add(f"sub-{seed}", frames=30, seed=seed) for seed in range(3)]
    write_manifest(remote.path)
    manifest = read_manifest(remote.path)
    network.requests.clear()
    store = FrameStore.open(remote.path)
    store.use_index(RunIndex(manifest))
    assert len(network.requests) <= 4, network.requests
    for seed, run in enumerate(runs):
        network.requests.clear()
        assert np.array_equal(store.frames(run, 4, 9), remote.arrays(30, seed)["frames"][4:13])
        assert [name.rpartition("/")[2] for name in network.requests] == ["0.0"]
        assert np.array_equal(store.moments(run)[0], remote.arrays(30, seed)["mean"])
        assert len(network.requests) == 2


def test_zarr_python_walks_the_store(remote: Any) -> None:
    run = remote.add()
    root = zarr.open_group(zarr.storage.ObjectStore(remote.path.client, read_only=True), path=remote.path.key, mode="r")
    assert np.array_equal(root[run][:25], remote.arrays()["frames"])
    assert np.array_equal(root["mask"][:] != 0, remote.mask)
    assert list(dict(root["runs"]["made"].groups())) == ["sub-01"] and root.attrs["neurostorm_format"] == 2


def test_what_is_missing_or_damaged_is_named(remote: Any, make_bucket: Callable[[], str]) -> None:
    run = remote.add(frames=30, chunk_frames=7)
    shard = remote.path / run / "0.0"
    whole = shard.read_bytes()
    store = FrameStore.open(remote.path)
    shard.write_bytes(whole[:100] + b"x" + whole[101:])
    with pytest.raises(ClipReadError, match="checksum"):
        store.frames(run)
    for length in (0, 10, 8 * remote.voxels):
        shard.write_bytes(whole[:length])
        with pytest.raises(ClipReadError, match=r"0\.0 is too short"):
            store.frames(run, 5, 20)
    shard.unlink()
    with pytest.raises(ClipReadError, match=r"clip from frame 5: .*No such object"):
        store.frames(run, 5, 20)
    for ask in (store.frames, store.run_attributes):
        with pytest.raises(StoreError, match="has no run"):
            ask(run.replace("01", "09"))
    (remote.path / "mask" / "0.0.0").unlink()
    with pytest.raises(StoreError, match="mask"):
        FrameStore.open(remote.path)
    empty = to_path(make_bucket())
    with pytest.raises(StoreError, match="no store at"):
        FrameStore.open(empty / "x")
    with pytest.raises(StoreError, match="there is no bucket"):
        FrameStore.open("s3://no-such-bucket/x")


def test_the_same_store_again_is_no_work_and_another_is_refused(remote: Any) -> None:
    create_store(remote.path, **remote.properties)
    with pytest.raises(StoreError, match=r"TR \(s\) 0\.8 instead of 2\.0"):
        create_store(remote.path, **remote.properties | {"tr_s": 2.0})
    (remote.path.parent / "thesis" / "draft.txt").write_bytes(b"chapter one")
    with pytest.raises(StoreError, match="not a frame store"):
        create_store(remote.path.parent / "thesis", **remote.properties)


def test_a_creation_that_was_cut_off_is_finished_by_the_same_only(remote: Any) -> None:
    (remote.path / "zarr.json").unlink()
    other = remote.mask.copy()
    other[0, 0, :2] = ~other[0, 0, :2]
    with pytest.raises(StoreError, match="another mask"):
        create_store(remote.path, **remote.properties | {"mask": other})
    create_store(remote.path, **remote.properties)
    assert np.array_equal(FrameStore.open(remote.path).mask, remote.mask)


def large(remote: Any, seed: int = 0) -> dict[str, Any]:
    """Arrays of a run whose upload takes three parts."""
    return remote.arrays(12_000_000 // remote.voxels, seed)


def test_an_upload_that_is_cut_off_leaves_no_run_and_the_next_attempt_succeeds(remote: Any, network: Network) -> None:
    arrays = large(remote)
    before = contents(remote.path)
    network.fail("cut upload", "PUT", "partNumber=2", times=99)
    with pytest.raises(ObjectStoreError, match=f"^{remote.path}/"):
        write_run(remote.path, RUN, **arrays)
    assert FrameStore.open(remote.path).runs() == []
    assert contents(remote.path).keys() - before.keys() == {"runs/made/zarr.json", "runs/made/sub-01/zarr.json"}
    network.faults.clear()
    network.fail("cut upload", "PUT", "partNumber=1", times=2)
    assert write_run(remote.path, RUN, **arrays)
    assert np.array_equal(FrameStore.open(remote.path).frames(RUN), arrays["frames"])


def test_reading_sits_out_a_short_fault_and_names_the_run_in_a_long_one(remote: Any, network: Network) -> None:
    run = remote.add(frames=30, chunk_frames=7)
    for kind in ("refuse", "cut answer"):
        network.fail(kind, "GET", "0.0", times=2)
        assert np.array_equal(FrameStore.open(remote.path).frames(run, 3, 9), remote.arrays(30)["frames"][3:12])
    network.fail("refuse", "GET", f"{run}/0.0", times=99)
    with pytest.raises(StoreUnavailableError, match=f"{run}/0.0 cannot be read"):
        FrameStore.open(remote.path).frames(run, 3, 9)
    network.fail("forbid", "GET", f"{run}/zarr.json", times=1)
    with pytest.raises(StoreUnavailableError, match="AccessDenied"):
        FrameStore.open(remote.path).frames(run, 3, 9)
    network.fail("forbid", "GET", "box.zarr/zarr.json", times=1)
    with pytest.raises(StoreUnavailableError, match="AccessDenied"):
        FrameStore.open(remote.path)


@pytest.mark.parametrize("part", ["/0.0?uploadId", "/0.0", "/zarr.json"])
def test_a_run_whose_answer_is_lost_is_whole_all_the_same(remote: Any, network: Network, part: str) -> None:
    method = "POST" if "uploadId" in part else "PUT"
    network.fail("lose answer", method, RUN + part)
    try:
        write_run(remote.path, RUN, **remote.arrays())
    except ObjectStoreError:
        write_run(remote.path, RUN, **remote.arrays())
    assert np.array_equal(FrameStore.open(remote.path).frames(RUN), remote.arrays()["frames"])
    assert network.faults[0].left == 0


KILLED = """
import os, pickle, sys
from neurostorm.store import write_run, writer
address, run, step, arrays = pickle.loads(sys.stdin.buffer.read())
do = getattr(writer, step)
def die(*given):
    if str(given[-1 if step == "copy_if_absent" else 0]).startswith(f"{address}/{run}/"):
        os._exit(9)
    return do(*given)
setattr(writer, step, die)
write_run(address, run, **arrays)
"""


def kill_before(step: str, remote: Any, seed: int) -> None:
    root = Path(__file__).resolve().parents[2]
    data = pickle.dumps((str(remote.path), RUN, step, remote.arrays(seed=seed)))
    command = [sys.executable, "-c", KILLED]
    assert subprocess.run(command, cwd=root, input=data, check=False, timeout=60).returncode == 9


def test_a_writer_that_is_killed_leaves_no_run_and_never_another_ones_frames(
    remote: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_before("copy_if_absent", remote, seed=1)
    (left,) = [name for name, _ in list_files(remote.path / ".partial")]
    assert FrameStore.open(remote.path).runs() == []
    kill_before("put_if_absent", remote, seed=1)
    assert (remote.path / RUN / "0.0").exists() and FrameStore.open(remote.path).runs() == []
    with pytest.raises(StoreError, match=r"tools/store\.py repair"):
        write_run(remote.path, RUN, **remote.arrays(seed=2))
    assert FrameStore.open(remote.path).runs() == []
    assert write_run(remote.path, RUN, **remote.arrays(seed=1)), "the same bytes: nothing stands in the way"
    assert np.array_equal(FrameStore.open(remote.path).frames(RUN), remote.arrays(seed=1)["frames"])
    assert remove_partials(remote.path) == 0, "the uploads are young"
    monkeypatch.setattr(partials, "STALE_S", -1.0)
    assert remove_partials(remote.path) == 2
    assert not (remote.path / ".partial" / left).exists() and FrameStore.open(remote.path).runs() == [RUN]


class Turns:
    """Makes two threads take their steps in a given order; who is done gives up the rest of its turns."""

    def __init__(self, order: str) -> None:
        self.order = list(order)
        self.changed = threading.Condition()

    def take(self, name: str, step: Callable[[], Any]) -> Any:
        with self.changed:
            assert self.changed.wait_for(lambda: self.order[:1] == [name] or name not in self.order, timeout=20)
            try:
                return step()
            finally:
                self.order[:1] = []
                self.changed.notify_all()

    def leave(self, name: str) -> None:
        with self.changed:
            self.order = [other for other in self.order if other != name]
            self.changed.notify_all()


@pytest.mark.parametrize("order", sorted({"".join(order) for order in itertools.permutations("AABB")}))
@pytest.mark.parametrize("seeds", [(5, 6), (5, 5)], ids=["different", "same"])
def test_two_writers_of_one_run_end_in_one_of_them(
    remote: Any, monkeypatch: pytest.MonkeyPatch, order: str, seeds: tuple[int, int]
) -> None:
    turns = Turns(order)
    for step in ("copy_if_absent", "put_if_absent"):
        do = getattr(writer, step)

        def in_turn(*given: Any, do: Any = do) -> Any:
            name = threading.current_thread().name
            if name in ("A", "B") and any(RUN in str(item) for item in given):
                return turns.take(name, lambda: do(*given))
            return do(*given)

        monkeypatch.setattr(writer, step, in_turn)
    results: dict[str, Any] = {}

    def write(name: str, seed: int) -> None:
        try:
            results[name] = write_run(remote.path, RUN, **remote.arrays(seed=seed))
        except StoreError as error:
            results[name] = str(error)
        turns.leave(name)

    threads = [threading.Thread(target=write, args=pair, name=pair[0]) for pair in zip("AB", seeds, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    winners = [seed for name, seed in zip("AB", seeds, strict=True) if results[name] is True]
    assert len(winners) == 1 and len(results) == 2, results
    store = FrameStore.open(remote.path)
    assert np.array_equal(store.frames(RUN), remote.arrays(seed=winners[0])["frames"])
    assert store.run_attributes(RUN)["source"] == f"raw/{winners[0]}.nii.gz"
    assert list(list_files(remote.path / ".partial")) == []
    assert isinstance(remote.path, ObjectPath) and os.fspath(RUN) in store.runs()

"""What a store consists of is found by plain files: nodes, headers, attributes of many runs at once."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from neurostorm.store import StoreError, files


def test_the_metadata_of_many_runs_comes_in_their_order(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [example.add(f"sub-{seed:02d}", frames=1 + seed) for seed in range(12)]
    read, threads = files.read_metadata, set()

    def slower_first(node: Path) -> dict[str, Any]:
        threads.add(threading.get_ident())
        time.sleep(0.02 * (node.parent.name == "sub-11"))
        return read(node)

    monkeypatch.setattr(files, "read_metadata", slower_first)
    found = list(files.read_many(example.path, reversed(runs)))
    assert [metadata["attributes"]["frames"] for metadata in found] == list(range(12, 0, -1))
    assert len(threads) > 1


def test_one_unreadable_run_among_many_is_named(example: Any) -> None:
    runs = [example.add(f"sub-{seed}") for seed in range(5)]
    (example.path / runs[2] / "zarr.json").write_text('{"attributes": []}')
    (example.path / runs[4] / "zarr.json").unlink()
    reading = files.read_many(example.path, runs)
    assert [next(reading)["attributes"]["subject"] for _ in range(2)] == ["sub-0", "sub-1"]
    with pytest.raises(StoreError, match="`attributes` is not an object") as caught:
        next(reading)
    assert runs[2] in str(caught.value)
    with pytest.raises(files.MissingNodeError, match="sub-4"):
        list(files.read_many(example.path, runs[4:]))


def test_only_complete_runs_in_their_place_are_found(example: Any) -> None:
    run = example.add()
    for other in ("runs/made/sub-02/task-begun/0.0", "runs/made/.hidden/x/zarr.json", "runs/made/sub-01/a/b/zarr.json"):
        (example.path / other).parent.mkdir(parents=True)
        (example.path / other).write_bytes(b"")
    assert files.find_runs(example.path) == [run]
    assert files.is_node(example.path / run) and not files.is_node(example.path / "runs/made/sub-02")


def test_a_file_in_place_of_a_store_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("x")
    with pytest.raises(StoreError, match="no store at"):
        files.read_header(tmp_path / "notes")

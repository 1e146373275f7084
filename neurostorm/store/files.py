"""What the store does to the disk: read a group's attributes, and put files and folders in place in one step.

    write under another name --fsync--> rename --> everybody sees the old state, or the whole new one

No Zarr here: a group's attributes are one small JSON file, and planning reads 66,000 of them.
"""

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from neurostorm.store.layout import FORMAT, LOCK, RUNS, StoreError

StorePath = str | os.PathLike[str]


def local_path(path: StorePath) -> Path:
    """`path` as a local Path. StoreError for an object-store address, which this format cannot rename in."""
    text = os.fspath(path)
    if "://" in text:
        raise StoreError(f"{text} is not a local path: give a folder, for object stores a mounted one")
    return Path(text)


def is_group(path: Path) -> bool:
    """Whether a Zarr v3 node stands at `path`; for a run this means that it is complete."""
    return (path / "zarr.json").is_file()


def read_header(path: StorePath) -> dict[str, Any]:
    """The attributes of a store's root. StoreError: no such folder, not a store, or a format this code cannot read."""
    root = local_path(path)
    if not root.is_dir():
        raise StoreError(f"there is no store at {root}: check the path, or make one with jobs/ingest.py --store {root}")
    attributes = read_attributes(root) if is_group(root) else {}
    if "neurostorm_format" not in attributes:
        raise StoreError(f"{root} is not a frame store: its zarr.json is missing or has no `neurostorm_format`")
    if attributes["neurostorm_format"] != FORMAT:
        raise StoreError(
            f"{root} has format {attributes['neurostorm_format']}, this version reads format {FORMAT}: "
            "use the version that wrote it, or ingest again"
        )
    return attributes


def read_attributes(group: Path) -> dict[str, Any]:
    """The attributes of one Zarr v3 group, straight from its zarr.json: planning opens 66,000 of them."""
    file = group / "zarr.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")).get("attributes", {}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise StoreError(f"{file} cannot be read as the metadata of a Zarr v3 group: {error}") from error


def find_runs(path: StorePath) -> list[str]:
    """Paths of the complete runs of a store, in no order: three levels of folders below `runs`, renamed there whole."""
    root = local_path(path)
    level = [root / RUNS]
    for _ in range(3):
        level = [
            Path(entry.path)
            for folder in level
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".")
        ]
    return [folder.relative_to(root).as_posix() for folder in level if is_group(folder)]


def publish(partial: Path, target: Path) -> bool:
    """Rename a finished folder to its place; False when somebody else's is there already."""
    try:
        os.replace(partial, target)
    except OSError:
        if is_group(target):
            return False
        raise
    sync(target.parent)
    return True


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `target`, flush it and rename it: readers see the old or the new one."""
    partial = target.with_name(f".{uuid.uuid4().hex}.{target.name}")  # the suffix stays: some writers go by it
    try:
        write(partial)
        sync(partial)
        os.replace(partial, target)
        sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: StorePath) -> Iterator[None]:
    """Hold the store's lock: for tables that are read, added to and written back, by one process at a time."""
    with (local_path(path) / LOCK).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def flush(folder: Path) -> None:
    """Force a folder with all it holds to disk, so that the rename cannot outlive the data in a power cut."""
    for item in (*folder.rglob("*"), folder):
        sync(item)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

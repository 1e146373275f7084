"""Which files a store consists of, read as plain files: headers, attributes, the runs that are there.

    zarr.json of the root -> is it a store, of a format that is known?      zarr.json of a run -> its attributes

No Zarr here: metadata is one small JSON file, and planning reads 66,000 of them. A store lies on a local path or in an
object store (`places.py`); nothing here asks where.
"""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from neurostorm.io.object_store import ObjectPath, errors
from neurostorm.io.paths import AnyPath, is_unavailable, list_files, to_path
from neurostorm.store.layout import FORMAT, METADATA, RUNS, StoreError, StoreUnavailableError

StorePath = str | os.PathLike[str] | ObjectPath
READ_THREADS = 16  # small files at once; on an object store each is a round trip


class MissingNodeError(StoreError):
    """There is no Zarr node where one was asked for."""


def store_place(path: StorePath) -> AnyPath:
    """`path` as a AnyPath. StoreError for an address that is not understood."""
    try:
        return to_path(path)
    except ValueError as error:
        raise StoreError(str(error)) from error


def is_node(folder: AnyPath) -> bool:
    """Whether a Zarr v3 node stands at `folder`; for a run this means that it is complete."""
    return (folder / METADATA).is_file()


def read_header(path: StorePath) -> dict[str, Any]:
    """The attributes of a store's root. StoreError: no such folder, not a store, or a format this code cannot read."""
    root = store_place(path)
    try:
        attributes = read_attributes(root)
    except MissingNodeError:
        if root.is_dir():
            raise StoreError(f"{root} is not a frame store: its {METADATA} is missing") from None
        raise StoreError(
            f"there is no store at {root}: check the path, or make one with jobs/ingest.py --store {root}"
        ) from None
    if "neurostorm_format" not in attributes:
        raise StoreError(f"{root} is not a frame store: its {METADATA} has no `neurostorm_format`")
    if attributes["neurostorm_format"] != FORMAT:
        raise StoreError(
            f"{root} has format {attributes['neurostorm_format']}, this version reads format {FORMAT}: "
            "use the version that wrote it, or ingest again"
        )
    return attributes


def read_metadata(node: AnyPath) -> dict[str, Any]:
    """The zarr.json of a group or an array.

    MissingNodeError, StoreUnavailableError when storage is away, else StoreError when it cannot be read as one.
    """
    file = node / METADATA
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(metadata.get("attributes", {}), dict):
            raise ValueError("`attributes` is not an object")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingNodeError(f"{file} is missing") from error
    except OSError as error:
        raise unreadable(f"{file} cannot be read: {error}", error) from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise StoreError(f"{file} cannot be read as the metadata of a Zarr v3 node: {error}") from error
    return dict(metadata)


def unreadable(message: str, error: OSError) -> StoreError:
    """The error to raise for something that could not be read: StoreUnavailableError when its storage is away."""
    return (StoreUnavailableError if is_unavailable(error) else StoreError)(message)


def read_attributes(node: AnyPath) -> dict[str, Any]:
    """The attributes of a group or an array. StoreError as `read_metadata`."""
    return dict(read_metadata(node).get("attributes", {}))


def read_many(root: AnyPath, runs: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The zarr.json of `runs`, in their order, several read at a time. StoreError as `read_metadata`."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        yield from pool.map(lambda run: read_metadata(root / run), runs)


def find_runs(path: StorePath) -> list[str]:
    """Paths of the complete runs of a store, in no order."""
    root = store_place(path)
    if isinstance(root, Path):
        return [folder.relative_to(root).as_posix() for folder in run_folders(root) if is_node(folder)]
    depth = len(f"{RUNS}/dataset/subject/entities/{METADATA}".split("/"))
    names = (f"{RUNS}/{name}" for name, _ in list_files(root / RUNS) if name.endswith(f"/{METADATA}"))
    return [name.removesuffix(f"/{METADATA}") for name in names if name.count("/") + 1 == depth]


def run_folders(root: Path) -> list[Path]:
    """Folders of a local store where runs stand, or stood: three levels below `runs`, in no order."""
    level = [root / RUNS]
    for _ in range(3):
        level = [
            Path(entry.path)
            for folder in level
            if folder.is_dir()
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".")
        ]
    return level


def read_array(node: AnyPath) -> NDArray[Any]:
    """A whole Zarr array."""
    if not isinstance(node, ObjectPath):
        return np.asarray(zarr.open_array(node, mode="r", zarr_format=3)[...])
    with errors(node):
        store = zarr.storage.ObjectStore(node.client, read_only=True)
        return np.asarray(zarr.open_array(store, path=node.key, mode="r", zarr_format=3)[...])

"""What lies in a store, from one listing of its files: complete runs, what writers left half-written, bytes.

    every file's name and size ─┬─ runs/<dataset>/<subject>/<entities>/ with zarr.json      -> a complete run
                                ├─ the same without it; what killed writers left beside it  -> leftovers
                                └─ dataset or subject of a run without a zarr.json          -> a group that is missing

A listing costs an object store a request per thousand files, a look at each run one per run: care begins here.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from neurostorm.io.errors import nearest_names
from neurostorm.io.paths import AnyPath, list_files
from neurostorm.store.files import find_runs, is_node
from neurostorm.store.layout import METADATA, RUNS, StoreError
from neurostorm.store.partials import find_partials

LISTED = 20  # names in an error
OLDER_THAN_S = 3600.0  # an object store's shard without metadata may be one that is being written; after this it is not

Advance = Callable[[int], None]
Progress = Callable[[int], AbstractContextManager[Advance]]  # total -> what is told of every step, from any thread


@dataclass(frozen=True)
class Inventory:
    """What lies in a store.

    Attributes:
        runs: complete run -> bytes of its files, sorted.
        leftovers: files and folders, relative to the root, that no writer will finish.
        missing_groups: groups above complete runs that lack their metadata, without which Zarr cannot walk down.
        files, size_bytes: of all the store.
    """

    runs: dict[str, int]
    leftovers: tuple[str, ...]
    missing_groups: tuple[str, ...]
    files: int
    size_bytes: int


def take_inventory(root: AnyPath, older_than_s: float = OLDER_THAN_S) -> Inventory:
    """List a store. OSError when it cannot be listed.

    Args:
        root: the store.
        older_than_s: age in seconds from which a shard without metadata counts as left over, in an object store; on a
            local path a run is renamed into its place whole, so that there it always is.
    """
    sizes: Counter[str] = Counter()
    inside: dict[str, str] = {}  # a file of every folder where a run could stand
    nodes: set[str] = set()
    files = size_bytes = 0
    for name, size in list_files(root):
        files, size_bytes = files + 1, size_bytes + size
        steps = name.split("/")
        if steps[0] != RUNS or any(step.startswith(".") for step in steps):
            continue
        if steps[-1] == METADATA and len(steps) <= 5:
            nodes.add("/".join(steps[:-1]))
        if len(steps) >= 5:
            run = "/".join(steps[:4])
            sizes[run] += size
            inside[run] = name
    runs = {run: sizes[run] for run in sorted(sizes) if run in nodes}
    groups = {run.rsplit("/", up)[0] for run in runs for up in (1, 2)}
    unfinished = [run for run in sorted(sizes) if run not in nodes and _is_old(root, inside[run], older_than_s)]
    partials = [str(entry).removeprefix(f"{root}/") for entry in find_partials(root)]
    return Inventory(runs, (*partials, *unfinished), tuple(sorted(groups - nodes)), files, size_bytes)


def find_run(root: AnyPath, name: str) -> str:
    """The path of the complete run that `name` means.

    Args:
        root: the store.
        name: `<dataset>/<subject>/<entities>` with or without `runs/` before it, or any of its parts that say which run
            is meant: `sub-001`, `made/sub-001`, `sub-001_ses-1_task-rest`.

    Raises:
        StoreError: it means no run (with the nearest names) or several (with their names).
    """
    wanted = name.strip("/")
    wanted = wanted if wanted.startswith(f"{RUNS}/") else f"{RUNS}/{wanted}"
    if wanted.count("/") == 3 and is_node(root / wanted):
        return wanted
    runs, parts = sorted(find_runs(root)), _parts_of(wanted.removeprefix(f"{RUNS}/"))
    found = [run for run in runs if parts and parts <= _parts_of(run)]
    exact = [run for run in found if parts == _parts_of(run.split("/", 2)[2])]  # all but its dataset
    if len(exact or found) == 1:
        return (exact or found)[0]
    if found:
        names = "".join(f"\n  {run.removeprefix(f'{RUNS}/')}" for run in found[:LISTED])
        more = f"\n  ... and {len(found) - LISTED:,} more" if len(found) > LISTED else ""
        raise StoreError(f"{name!r} means {len(found):,} runs of {root}, name one of them:{names}{more}")
    near = nearest_names(wanted, runs, count=3, cutoff=0.3)
    hint = f"; the nearest: {', '.join(near)}" if near else f"; it holds {len(runs):,} runs"
    raise StoreError(f"{root} has no run {name!r}{hint}. `python tools/store.py list {root}` lists them")


def _parts_of(name: str) -> set[str]:
    """`made/sub-1/ses-1_task-rest` -> made, sub-1, ses-1, task-rest."""
    return set(name.replace("/", "_").split("_")) - {""}


@contextlib.contextmanager
def silent(total: int) -> Iterator[Advance]:
    """A `Progress` that shows nothing."""
    yield lambda _: None


def _is_old(root: AnyPath, name: str, older_than_s: float) -> bool:
    if isinstance(root, Path):
        return True
    try:
        return time.time() - (root / name).stat().st_mtime_ns / 1e9 > older_than_s
    except FileNotFoundError:
        return False

"""Is a store what it says it is? Every run's bytes, in parallel, and the tables that speak of them.

    inventory ─┬─ runs, several at a time ─ check_run ─────────────────┐
               ├─ mask against its hash, tables against the runs ──────┼─> problems: where, what, fix
               └─ leftovers of killed writers, groups without metadata ┘

Nothing is changed here; `care.py` does that. Reading and checksums leave Python's lock to the other threads.
"""

import os
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from neurostorm.io.paths import AnyPath
from neurostorm.store.files import StorePath, read_header
from neurostorm.store.layout import MANIFEST, MASK, METADATA, PARTICIPANTS, StoreError, mask_hash, split_run
from neurostorm.store.maintenance.check_run import Problem, check_run
from neurostorm.store.maintenance.inventory import Inventory, Progress, find_run, silent, take_inventory
from neurostorm.store.manifest import read_manifest, read_participants
from neurostorm.store.reader import FrameStore
from neurostorm.store.tables import is_withdrawn, read_quarantine, withdrawn_subjects

MAX_WORKERS = 8
_REPAIR = "start `repair`"
_REMOVE = "start `remove --subject` for them again"

RowOf = Callable[[str], dict[str, Any] | None]


@dataclass(frozen=True)
class Verified:
    """What a look at a store found.

    Attributes:
        problems: all that is wrong, damaged runs first.
        runs, size_bytes: that were read.
        seconds: it took.
    """

    problems: tuple[Problem, ...]
    runs: int
    size_bytes: int
    seconds: float


def verify(
    path: StorePath,
    *,
    run: str | None = None,
    sample: float = 1.0,
    workers: int | None = None,
    progress: Progress = silent,
) -> Verified:
    """Read a store and list what is wrong with it.

    Args:
        path: the store.
        run: only this one, its row of the manifest, and the mask.
        sample: share of the runs to read, drawn anew each time; at least one. Tables are always compared in full.
        workers: runs read at a time, each with 32 MB or, in an object store, 64 MB; default: the cores, 8 at most.
        progress: gets the number of bytes to read, and is told of them as they are.

    Raises:
        StoreError: no store, a format that is not known, a root without grid, TR or mask hash, or no such run.
        OSError: the store cannot be listed.
    """
    started = time.monotonic()
    store = FrameStore(path)
    problems = _mask_wrong(store)
    if run is None:
        inventory = take_inventory(store.path)
        chosen = _sample(inventory.runs, sample)
        wrong, row_of = _tables_wrong(store.path, inventory.runs)
        problems += wrong + _not_runs(inventory)
    else:
        name = find_run(store.path, run)
        chosen = {name: sum(item.stat().st_size for item in (store.path / name).iterdir())}
        wrong, table = _manifest(store.path)
        problems += wrong
        row_of = _rows(table)
    for _, found in check_runs(store, chosen, row_of=row_of, workers=workers, progress=progress):
        problems += found
    problems.sort(key=lambda problem: (not problem.damaged, problem.where))
    return Verified(tuple(problems), len(chosen), sum(chosen.values()), time.monotonic() - started)


def check_runs(
    store: FrameStore,
    runs: Mapping[str, int],
    *,
    row_of: RowOf = lambda run: None,
    workers: int | None = None,
    progress: Progress = silent,
) -> Iterator[tuple[str, list[Problem]]]:
    """Each of `runs` (run -> bytes) with what is wrong with it, in the order in which they are done.

    `row_of` gives a run's row of the manifest, None for no comparison; the rest as in `verify`.
    """
    voxels, tr_s = int(read_header(store.path)["mask_voxels"]), store.tr_s
    workers = workers or min(MAX_WORKERS, os.cpu_count() or 1)
    with progress(sum(runs.values())) as advance, ThreadPoolExecutor(workers) as pool:

        def check(run: str) -> list[Problem]:
            return check_run(
                store.path, run, voxels=voxels, tr_s=tr_s, codec=store.codec, row=row_of(run), advance=advance
            )

        waiting = {pool.submit(check, run): run for run in runs}
        try:
            for done in as_completed(waiting):
                yield waiting.pop(done), done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _sample(runs: dict[str, int], share: float) -> dict[str, int]:
    if share >= 1 or not runs:
        return runs
    names = random.sample(sorted(runs), max(1, round(share * len(runs))))
    return {name: runs[name] for name in sorted(names)}


def _mask_wrong(store: FrameStore) -> list[Problem]:
    """StoreError from the header itself: without grid, TR and hash there is nothing to compare with."""
    expected, shape, _ = store.mask_sha256, store.grid.shape, store.tr_s
    fix = f"copy {MASK}/ from a store of the same grid and mask"
    try:
        if store.mask.shape == shape and mask_hash(store.mask) == expected:
            return []
    except StoreError as error:
        return [Problem(MASK, str(error), fix)]
    return [Problem(MASK, f"does not match the grid and the hash in {METADATA}", fix)]


def _tables_wrong(root: AnyPath, runs: Collection[str]) -> tuple[list[Problem], RowOf]:
    """What the tables say of runs and people that are not there, or should not be; and the manifest's rows."""
    wrong, table = _manifest(root)
    gone: set[tuple[str, str]] = set()
    labels: list[tuple[str, str]] = []
    for read in (withdrawn_subjects, read_quarantine, read_participants):
        try:
            found = read(root)
        except StoreError as error:
            wrong.append(Problem("tables", str(error), "see the message"))
            continue
        if isinstance(found, set):
            gone = found
        elif read is read_participants and found is not None:
            keys = (found.column(name).cast(pa.string()).to_pylist() for name in ("dataset", "participant_id"))
            labels = list(zip(*keys, strict=True))
    listed = set() if table is None else set(table.column("run").to_pylist())
    for run in runs:
        if split_run(run)[:2] in gone:
            wrong.append(Problem(run, "its subject withdrew, but it is here", _REMOVE))
        elif table is not None and run not in listed:
            wrong.append(Problem(run, f"has no row in {MANIFEST}", _REPAIR))
    wrong += [Problem(run, f"has a row in {MANIFEST}, but is not there", _REPAIR) for run in listed - set(runs)]
    wrong += [
        Problem(PARTICIPANTS, f"{dataset}/{participant} withdrew, but their labels are here", _REMOVE)
        for dataset, participant in labels
        if is_withdrawn(dataset, participant, gone)
    ]
    return wrong, _rows(table)


def _manifest(root: AnyPath) -> tuple[list[Problem], pa.Table | None]:
    try:
        return [], read_manifest(root)
    except (StoreError, pa.ArrowException) as error:
        return [Problem(MANIFEST, str(error), _REPAIR)], None


def _rows(table: pa.Table | None) -> RowOf:
    """Finds a run's row, made when it is asked for: 66,000 rows of Python objects are 100 MB."""
    if table is None:
        return lambda run: None
    place_of = {run: number for number, run in enumerate(table.column("run").to_pylist())}

    def row_of(run: str) -> dict[str, Any] | None:
        number = place_of.get(run)
        return None if number is None else table.slice(number, 1).to_pylist()[0]

    return row_of


def _not_runs(inventory: Inventory) -> list[Problem]:
    left = [Problem(name, "was left unfinished by a writer", _REPAIR) for name in inventory.leftovers]
    return left + [
        Problem(f"{group}/{METADATA}", "is missing: Zarr readers do not find what is below", _REPAIR)
        for group in inventory.missing_groups
    ]

"""Bringing the runs and tables of other stores into one store.

    same grid, mask, TR, recipe? ─ each run: there already? its subject withdrew? ─ checksums ─ written whole ─┐
    withdrawn, labels, quarantine of the others, where STORE has none ─ manifest rebuilt ──────────────────────┘

Nothing in the store is overwritten. What was copied when a merge was cut off is found and skipped by the next one.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from neurostorm.io.paths import AnyPath
from neurostorm.store.files import StorePath, is_node, read_header, read_metadata, store_place
from neurostorm.store.layout import METADATA, PARTICIPANTS, RUNS, StoreError, split_run
from neurostorm.store.maintenance.care import names_subject
from neurostorm.store.maintenance.check_run import Problem
from neurostorm.store.maintenance.inventory import Advance, Progress, silent, take_inventory
from neurostorm.store.manifest import read_participants, write_manifest, write_participants
from neurostorm.store.reader import FrameStore
from neurostorm.store.run_file import RunFile, read_range
from neurostorm.store.shard import SHARD_FILE, ShardError, check, layout_of, read_index
from neurostorm.store.tables import (
    add_quarantine,
    add_withdrawn,
    clear_quarantine,
    read_quarantine,
    withdrawn_subjects,
)
from neurostorm.store.writer import create_store, publish

WORKERS = 4  # runs copied at a time
_PIECE_BYTES = 8 << 20
CRC_BYTES = 4  # behind every chunk


@dataclass
class Merged:
    """What a merge did.

    Attributes:
        copied, size_bytes: runs that came, and their bytes.
        there: runs that were there already, the same.
        refused: runs of subjects who withdrew from the store, or from the one they were in.
        problems: what was not taken, and why.
    """

    copied: int = 0
    size_bytes: int = 0
    there: int = 0
    refused: int = 0
    problems: list[Problem] = field(default_factory=list)


def merge(path: StorePath, others: Sequence[StorePath], *, progress: Progress = silent) -> Merged:
    """Copy the runs, labels and quarantine of `others` into the store at `path`, which is made if it is missing.

    Args:
        path: the store; what it holds stays as it is.
        others: stores of the same grid, mask, TR and recipe, in the order in which they count.
        progress: gets the bytes to copy, and is told of them as they are.

    Raises:
        StoreError: a store is missing, has an unknown format, differs from the first in what makes runs comparable, or
            has tables with names that cannot be of a participant.
        OSError: the store cannot be written; start again.
    """
    root, sources = store_place(path), [store_place(other) for other in others]
    headers = [read_header(source) for source in sources]
    if not is_node(root):
        _create_like(root, sources[0])
    wanted = read_header(root)
    for source, header in zip(sources, headers, strict=True):
        _check_alike(root, wanted, source, header)
    result = Merged()
    for source in sources:
        add_withdrawn(root, withdrawn_subjects(source))
        gone = withdrawn_subjects(root)
        runs = take_inventory(source).runs
        allowed = {run: size for run, size in runs.items() if split_run(run)[:2] not in gone}
        result.refused += len(runs) - len(allowed)
        _copy_runs(root, source, allowed, result, progress)
        result.problems += _merge_labels(root, source) + _still_here(root, source)
    manifest = write_manifest(root)
    _merge_quarantine(root, sources, set(manifest.column("source").to_pylist()))
    return result


def _create_like(root: AnyPath, source: AnyPath) -> None:
    like = FrameStore.open(source)
    name, version = like.recipe["name"], like.recipe["version"]
    create_store(root, grid=like.grid, mask=like.mask, tr_s=like.tr_s, recipe=name, recipe_version=version)


def _check_alike(root: AnyPath, wanted: Mapping[str, Any], source: AnyPath, found: Mapping[str, Any]) -> None:
    """StoreError with every property in which the frames of two stores are not comparable."""
    keys = ("space", "grid", "mask_sha256", "tr_s", "recipe")
    unlike = [key for key in keys if found.get(key) != wanted.get(key)]
    differing = [f"{key} is {found.get(key)}, not {wanted.get(key)}" for key in unlike]
    if differing:
        raise StoreError(f"{source} cannot be merged into {root}: {'; '.join(differing)}. Ingest its files into {root}")


def _copy_runs(root: AnyPath, source: AnyPath, runs: Mapping[str, int], result: Merged, progress: Progress) -> None:
    """Copy what is not there, several at a time; OSError ends it."""
    with progress(sum(runs.values())) as advance, ThreadPoolExecutor(WORKERS) as pool:
        waiting = {pool.submit(_copy_run, root, source, run, advance): run for run in runs}
        try:
            for done in as_completed(waiting):
                run = waiting.pop(done)
                problem = done.result()
                if isinstance(problem, Problem):
                    result.problems.append(problem)
                elif problem:
                    result.copied, result.size_bytes = result.copied + 1, result.size_bytes + runs[run]
                else:
                    result.there += 1
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _copy_run(root: AnyPath, source: AnyPath, run: str, advance: Advance) -> bool | Problem:
    """True: copied; False: there already, the same; else why not."""
    try:
        metadata = (source / run / METADATA).read_bytes()
        if not is_node(root / run):
            file = RunFile(layout_of(read_metadata(source / run)), source / run / SHARD_FILE)
            size = _shard_size(file)
            if publish(root, run, metadata, _checked(file, size, advance)):
                return True
        if (root / run / METADATA).read_bytes() == metadata:
            return False
    except (ShardError, StoreError) as error:
        fix = "ingest it again there, see `verify`"
        return Problem(run, f"was not taken from {source}: {error}", fix, damaged=isinstance(error, ShardError))
    return Problem(run, f"is another run in {source}; that of {root} stays", "keep one, and remove the other")


def _shard_size(file: RunFile) -> int:
    """Bytes of a shard. ShardError when it is missing or shorter than its index."""
    try:
        size = file.shard.stat().st_size
    except FileNotFoundError as error:
        raise ShardError(f"its shard {SHARD_FILE} is missing") from error
    if size < file.layout.index_bytes:
        raise ShardError(f"its shard has {size} bytes, fewer than its index")
    return size


def _checked(file: RunFile, size: int, advance: Advance) -> Iterator[memoryview]:
    """A shard of `size` bytes in pieces of some 8 MB, every chunk's checksum compared. ShardError when one is wrong."""
    layout = file.layout
    end = size - layout.index_bytes
    tail = read_range(file.shard, end, layout.index_bytes)
    index = read_index(layout, tail, size).astype(np.int64)
    edges = np.append(0, np.cumsum(index[:, 1]))
    if not np.array_equal(index[:, 0], edges[:-1]) or edges[-1] != end:
        raise ShardError("has an index that does not say where the chunks are")
    first = 0
    while first < layout.chunks:
        stop = max(first + 1, int(np.searchsorted(edges, edges[first] + _PIECE_BYTES, side="right")) - 1)
        piece = read_range(file.shard, int(edges[first]), int(edges[stop] - edges[first]))
        for number in range(first, stop):
            record = piece[edges[number] - edges[first] : edges[number + 1] - edges[first]]
            check(record[:-CRC_BYTES], record[-CRC_BYTES:], number * layout.chunk_frames)
        advance(len(piece))
        yield piece
        first = stop
    yield tail


def _merge_labels(root: AnyPath, source: AnyPath) -> list[Problem]:
    """Add the participants that the store has no row of; those of whom it has another row are named."""
    theirs, ours = read_participants(source), read_participants(root)
    if theirs is None:
        return []
    rows = {_person(row): row for row in (ours.to_pylist() if ours is not None else [])}
    found = theirs.to_pylist()
    try:
        write_participants(root, theirs.filter(pa.array([_person(row) not in rows for row in found], pa.bool_())))
    except ValueError as error:
        raise StoreError(f"{source / PARTICIPANTS} cannot be merged: {error}") from error
    return [
        Problem(PARTICIPANTS, f"{'/'.join(_person(row))} has other labels in {source}; those of {root} stay", "compare")
        for row in found
        if any(value is not None and rows.get(_person(row), row).get(name) != value for name, value in row.items())
    ]


def _person(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row["dataset"]), str(row["participant_id"])


def _still_here(root: AnyPath, source: AnyPath) -> list[Problem]:
    """Who withdrew from the other store, and is in this one."""
    return [
        Problem("/".join(who), f"withdrew from {source}, but is here", f"start `remove --subject {'/'.join(who)}`")
        for who in sorted(withdrawn_subjects(source))
        if (root / RUNS / "/".join(who)).is_dir()
    ]


def _merge_quarantine(root: AnyPath, sources: Sequence[AnyPath], ingested: set[str]) -> None:
    """Add rows of inputs that are neither in quarantine here, nor a run, nor of somebody who withdrew."""
    clear_quarantine(root, ingested)
    known = ingested | set(read_quarantine(root).column("source").to_pylist())
    gone = {subject for _, subject in withdrawn_subjects(root)}
    for source in sources:
        rows = [row for row in read_quarantine(source).to_pylist() if row["source"] not in known]
        add_quarantine(root, [row for row in rows if not any(names_subject(row["source"], who) for who in gone)])
        known |= {row["source"] for row in rows}

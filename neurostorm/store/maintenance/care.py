"""Taking care of a store: repairing it, and taking a participant out who withdraws.

    repair     leftovers ─ damaged runs (if asked) ─ missing groups ─ manifest rebuilt from the runs
    withdraw   withdrawn.parquet first ─ manifest rows ─ labels ─ quarantine rows ─ all runs ─ empty groups
    readmit    off withdrawn.parquet: what is ingested from now on is taken again

Each step may be done twice: whatever cuts them off, starting again finishes them. `merge.py` brings stores together.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from neurostorm.io.atomic import put_if_absent
from neurostorm.io.errors import nearest_names
from neurostorm.io.paths import AnyPath, list_files, remove_tree
from neurostorm.store.files import StorePath, is_node, read_header, read_many, store_place
from neurostorm.store.layout import (
    MANIFEST,
    METADATA,
    PARTICIPANTS,
    QUARANTINE,
    RUNS,
    WITHDRAWN,
    StoreError,
    safe_name,
)
from neurostorm.store.maintenance.check_run import Problem
from neurostorm.store.maintenance.inventory import OLDER_THAN_S, Inventory, Progress, silent, take_inventory
from neurostorm.store.maintenance.verify import check_runs
from neurostorm.store.manifest import drop_rows, read_participants, write_manifest
from neurostorm.store.partials import remove_partials
from neurostorm.store.reader import FrameStore
from neurostorm.store.tables import add_withdrawn, is_withdrawn, read_quarantine, withdrawn_subjects
from neurostorm.store.writer import make_groups

__all__ = [
    "Holding",
    "Repaired",
    "allow_removed",
    "find_subject",
    "holding",
    "remove_subject",
    "repair",
    "withdrawn_subjects",
]


@dataclass(frozen=True)
class Repaired:
    """What a repair did, or would do.

    Attributes:
        leftovers: files and folders that were deleted.
        dropped: runs that were deleted because they were damaged, with what was wrong.
        unread: what could not be read just now, and was left as it is.
        groups: groups that got their metadata.
        runs: complete runs that stay, a row each in the manifest.
    """

    leftovers: tuple[str, ...]
    dropped: tuple[Problem, ...]
    unread: tuple[Problem, ...]
    groups: tuple[str, ...]
    runs: int


@dataclass(frozen=True)
class Holding:
    """What a store holds of one subject.

    Attributes:
        dataset, subject: who.
        runs, size_bytes: complete runs and the bytes of all files.
        labels: rows of participants.parquet.
        quarantined: rows of quarantine.parquet, as far as their paths tell.
        withdrawn: they are recorded as withdrawn already.
    """

    dataset: str
    subject: str
    runs: int
    size_bytes: int
    labels: int
    quarantined: int
    withdrawn: bool


def repair(
    path: StorePath,
    *,
    dry_run: bool = False,
    drop_damaged: bool = False,
    older_than_s: float = OLDER_THAN_S,
    workers: int | None = None,
    progress: Progress = silent,
) -> Repaired:
    """Delete what writers left half-written, give groups their metadata, rebuild the manifest.

    Args:
        path: the store.
        dry_run: change nothing, only say what would be done.
        drop_damaged: read every run (`verify`) and delete those that are damaged, for the next ingest to bring back.
        older_than_s: in an object store, the age in seconds from which a shard without metadata is a leftover.
        workers, progress: as `verify`, for `drop_damaged`.

    Raises:
        StoreError: no store, a format that is not known; or a run's attributes cannot be read, without `drop_damaged`.
        OSError: the store cannot be read or written.
    """
    root = store_place(path)
    read_header(root)
    inventory = take_inventory(root, older_than_s)
    wrong = _damage(root, inventory, workers, progress) if drop_damaged else []
    dropped = tuple(problem for problem in wrong if problem.damaged)
    stays = set(inventory.runs) - {problem.where for problem in dropped}
    if not drop_damaged:
        _attributes_can_be_read(root, stays)
    if not dry_run:
        remove_partials(root)
        for name in inventory.leftovers:
            if name.startswith(f"{RUNS}/") and not is_node(root / name):
                remove_tree(root / name)
        for problem in dropped:
            drop_run(root, problem.where)
        for run in stays:
            if any(run.startswith(f"{group}/") for group in inventory.missing_groups):
                make_groups(root, run)
        write_manifest(root)
    unread = tuple(problem for problem in wrong if not problem.damaged)
    return Repaired(inventory.leftovers, dropped, unread, inventory.missing_groups, len(stays))


def drop_run(root: AnyPath, run: str) -> None:
    """Delete a run, its metadata first: from then on it is not there; and the groups that it leaves empty."""
    (root / run / METADATA).unlink(missing_ok=True)
    remove_tree(root / run)
    _remove_empty_groups(root, run)


def find_subject(path: StorePath, name: str) -> tuple[str, str]:
    """(dataset, subject) that `sub-ID`, or `DATASET/sub-ID`, means.

    StoreError: nobody in runs, labels, quarantine or withdrawn.parquet has the id (with the nearest), or several
    datasets have it.
    """
    root = store_place(path)
    read_header(root)
    dataset, _, subject = name.strip("/").rpartition("/")
    known = _known_subjects(root)
    found = sorted(key for key in known if key[1] == subject and dataset in ("", key[0]))
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(f"{other}/{subject}" for other, _ in found)
        raise StoreError(f"{root} has {subject} in several datasets, maybe different people: name one of {choices}")
    if dataset and _quarantined(root, subject):
        return dataset, subject
    near = nearest_names(name, {text for key in known for text in (key[1], "/".join(key))}, count=3, cutoff=0.6)
    hint = f"; the nearest: {', '.join(near)}" if near else ""
    raise StoreError(f"{root} has no subject {name!r}{hint}")


def holding(path: StorePath, dataset: str, subject: str) -> Holding:
    """What `withdraw` would delete. Errors as `read_participants` and `read_quarantine`."""
    root = store_place(path)
    files = dict(list_files(root / RUNS / dataset / subject))
    runs = sum(name.count("/") == 1 and name.endswith(f"/{METADATA}") for name in files)
    labels = sum(is_withdrawn(*key, {(dataset, subject)}) for key in _labelled(root))
    gone = (dataset, subject) in withdrawn_subjects(root)
    return Holding(dataset, subject, runs, sum(files.values()), labels, _quarantined(root, subject), gone)


def remove_subject(path: StorePath, dataset: str, subject: str) -> Holding:
    """Take everything of a participant out of a store, for good; returns what there was.

    Frames, labels, rows of the manifest and of quarantine go. `withdrawn.parquet` is written first: from then on an
    ingest refuses the id, and a `withdraw` that was cut off is finished by doing it again. What other systems keep
    (backups, versions of objects in a bucket, checkpoints, embeddings) is theirs to delete.

    Args:
        path: the store.
        dataset, subject: who, as in the paths of the runs; unknown ones are recorded all the same.

    Raises:
        ValueError: names that cannot be of a run.
        StoreError: no store, a format that is not known, a table that cannot be read.
        OSError: the store cannot be written; start again.
    """
    root = store_place(path)
    read_header(root)
    who = (safe_name(dataset), safe_name(subject))
    before = holding(root, *who)
    add_withdrawn(root, [who])
    drop_rows(root, MANIFEST, lambda row: (row["dataset"], row["subject"]) == who)
    drop_rows(root, PARTICIPANTS, lambda row: is_withdrawn(str(row["dataset"]), str(row["participant_id"]), {who}))
    drop_rows(root, QUARANTINE, lambda row: names_subject(row["source"], subject))
    folder = root / RUNS / dataset / subject
    for name in [name for name, _ in list_files(folder) if name.endswith(f"/{METADATA}")]:
        (folder / name).unlink(missing_ok=True)
    remove_tree(folder)
    remove_partials(root)  # a killed ingest may have left frames of theirs
    _remove_empty_groups(root, f"{RUNS}/{dataset}/{subject}")
    return before


def allow_removed(path: StorePath, dataset: str, subject: str) -> bool:
    """Take a participant off `withdrawn.parquet`, so that an ingest takes them again; False if they were not there.

    What `withdraw` deleted does not come back by itself. StoreError: no store, or a format that is not known.
    """
    read_header(path)
    who = (dataset, subject)
    return drop_rows(path, WITHDRAWN, lambda row: (row["dataset"], row["subject"]) == who) > 0


def names_subject(source: str, subject: str) -> bool:
    """Whether the path of a source file speaks of `subject` (sub-ID).

    A `sub-` in a folder or in front of the file's name decides. Without one (HCP, plain names) the bare ID does: a
    folder or the file's name, or what stands before its first `_`.
    """
    parts = PurePosixPath(source).parts
    steps = [*parts[:-1], *(part.removesuffix(".gz").removesuffix(".nii") for part in parts[-1:])]
    heads = {step.partition("_")[0] for step in steps}
    named = {head for head in heads if head.startswith("sub-")}
    return subject in named if named else subject.removeprefix("sub-") in heads | set(steps)


def _damage(root: AnyPath, inventory: Inventory, workers: int | None, progress: Progress) -> list[Problem]:
    found = check_runs(FrameStore(root), inventory.runs, workers=workers, progress=progress)
    return sorted((problem for _, problems in found for problem in problems), key=lambda problem: problem.where)


def _attributes_can_be_read(root: AnyPath, runs: Iterable[str]) -> None:
    """StoreError with the fix, before anything is changed: the manifest is built from the attributes."""
    try:
        for _ in read_many(root, runs):
            pass
    except StoreError as error:
        raise StoreError(
            f"{error}: start repair with --drop-damaged to delete this run, then ingest it again"
        ) from error


def _known_subjects(root: AnyPath) -> set[tuple[str, str]]:
    """Everybody who has a run, a label, or withdrew."""
    known = withdrawn_subjects(root)
    for dataset, participant in _labelled(root):
        known.add((dataset, participant if participant.startswith("sub-") else f"sub-{participant}"))
    for folder in _folders(root / RUNS):
        known |= {(folder.name, subject.name) for subject in _folders(folder)}
    return known


def _folders(folder: AnyPath) -> list[AnyPath]:
    if not folder.is_dir():
        return []
    return [item for item in folder.iterdir() if item.name != METADATA and not item.name.startswith(".")]


def _labelled(root: AnyPath) -> list[tuple[str, str]]:
    """(dataset, participant_id) of every row of participants.parquet."""
    table = read_participants(root)
    return [] if table is None else [(str(row["dataset"]), str(row["participant_id"])) for row in table.to_pylist()]


def _quarantined(root: AnyPath, subject: str) -> int:
    return sum(names_subject(source, subject) for source in read_quarantine(root).column("source").to_pylist())


def _remove_empty_groups(root: AnyPath, below: str) -> None:
    """Delete the groups above `runs/<dataset>/...` that hold nothing any more, the innermost first."""
    steps = below.split("/")
    for depth in range(len(steps) - 1, 1, -1):
        _remove_if_empty(root / "/".join(steps[:depth]))


def _remove_if_empty(group: AnyPath) -> None:
    """An ingest may put a run there at any time: then the group's metadata is put back."""
    if _folders(group):
        return
    metadata = group / METADATA
    with contextlib.suppress(FileNotFoundError):
        before = metadata.read_bytes()
        metadata.unlink(missing_ok=True)
        if isinstance(group, Path):
            with contextlib.suppress(OSError):  # somebody's run came
                group.rmdir()
        if _folders(group):
            put_if_absent(metadata, before)

"""Checkpoints that are whole or do not count: a folder per step, with a commit marker written last.

    checkpoints/step-00000050/state/...      every rank's DeepSpeed shards
                              trainer.json   step, configuration, code revision, workers
                              COMMITTED      size and CRC-32 of every other file, and which rank wrote it; written last
                copy-00000050/...            the same again, of the newest alone

    save:     each rank writes to a folder of its own, takes its files' sizes and CRCs, and puts them in their place,
              flushed to disk with the folders above them
              -> gathered -> rank 0: all there? -> trainer.json -> COMMITTED -> each rank copies its files -> COMMITTED
              -> old ones removed
    restore:  rank 0 chooses the newest -> each rank fetches its own files and rank 0's, checks them -> loads
              (the files of all ranks, if there are more or fewer of them now, or another ZeRO stage)

`newest` is the highest step whose marker is there and whose files are what the marker says; a broken one is passed
over with a warning for its copy, or else for the one before. An object store makes the copy itself. There `newest`
compares sizes only; CRCs are checked of what a rank has fetched, and a checkpoint found damaged then is marked as such,
so that all who look after that agree on what is next. Clip order, masks and dropout follow from (seed, step), so no
generator state needs saving.
"""

import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neurostorm.io.atomic import atomic_write, fsync
from neurostorm.io.errors import UserError
from neurostorm.io.local_copies import local_copy, upload_folder
from neurostorm.io.object_store import ObjectStoreError
from neurostorm.io.paths import AnyPath, copy_files, list_files, relative_path, remove_tree

logger = logging.getLogger(__name__)

MARKER = "COMMITTED"
TRAINER = "trainer.json"
_PREFIX, _COPY = "step-", "copy-"
_FULL_BYTES = 16 << 20  # free on a disk on which a shard found no room

Fingerprint = list[int]  # size in bytes, CRC-32
Gather = Callable[[Any], list[Any]]


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be used; the message names the folder and the fix."""

    retry = True  # from its copy, from the one before, or when there is room


@dataclass(frozen=True)
class Marker:
    """What a commit marker says: each file's fingerprint, the files of each rank, and what was found to be broken."""

    files: dict[str, Fingerprint]
    ranks: list[list[str]]
    broken: str | None = None

    @classmethod
    def read(cls, path: AnyPath) -> "Marker":
        """The marker of a checkpoint. FileNotFoundError when it has none, ValueError when it is not one."""
        content = json.loads((path / MARKER).read_text())
        try:
            marker = cls(dict(content["files"]), list(content["ranks"]), content.get("broken"))
            for name in (*marker.files, *(name for names in marker.ranks for name in names)):
                relative_path(name)  # ranks copy and open what the marker names
            return marker
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def write(self, path: AnyPath) -> None:
        """Commits the checkpoint at `path`, in one step."""
        atomic_write(path / MARKER, json.dumps(vars(self), indent=1).encode())


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its place, the number of finished steps, and what `trainer.json` holds."""

    path: AnyPath
    step: int
    trainer: dict[str, Any]

    @property
    def workers(self) -> int:
        """How many workers wrote it."""
        return int(self.trainer["workers"])


def save(
    folder: AnyPath,
    step: int,
    *,
    write_shards: Callable[[Path], None],
    gather: Gather,
    rank: int,
    trainer: dict[str, Any],
    keep: int,
) -> None:
    """Writes and commits the checkpoint of `step` finished steps; every rank calls it.

    write_shards  saves this rank's part into the local folder it is given (a collective of the engine)
    gather        gives every rank's value, in order, once all ranks have called it

    CheckpointError when there is no room for the shards: torch itself says only that a write failed.
    """
    path = folder / f"{_PREFIX}{step:08d}"
    if rank == 0:
        _remove(path)  # an uncommitted rest of a killed run
    gather(None)
    with upload_folder(path) as own:
        try:
            write_shards(own)
        except (OSError, RuntimeError) as error:
            raise _unwritten(path, own, error) from error
        written = {name: _fingerprint(own / name) for name, _ in list_files(own)}
    of_ranks = gather(written)
    marker = _commit(path, {"step": step, **trainer}, of_ranks) if rank == 0 else None
    _copy(path, list(written), marker, gather)
    if rank == 0:
        _prune(folder, path.name, keep)
    gather(None)


def newest_committed(folder: AnyPath) -> AnyPath | None:
    """Returns the newest checkpoint that has a commit marker, or None; its files are not checked, as `newest` does."""
    return next((path for path in reversed(_steps(folder, (_PREFIX,))) if (path / MARKER).is_file()), None)


def step_of(path: AnyPath) -> int:
    """Returns the number of finished steps of a checkpoint, by its name."""
    return int(path.name.rpartition("-")[2])


def newest(folder: AnyPath) -> Checkpoint | None:
    """The checkpoint to resume from, or None; broken ones are passed over with a warning."""
    for path in reversed(_steps(folder)):
        problem = _problem(path)
        if problem is None:
            trainer = json.loads((path / TRAINER).read_text())
            return Checkpoint(path, int(trainer["step"]), trainer)
        logger.warning("passing over checkpoint %s: %s", path, problem)
    return None


def choose(folder: AnyPath, *, gather: Gather, rank: int) -> Checkpoint | None:
    """The newest checkpoint, or None, as rank 0 sees it; every rank calls it."""
    chosen: Checkpoint | None = gather(newest(folder) if rank == 0 else None)[0]
    return chosen


def restore(
    chosen: Checkpoint, load: Callable[[Path], None], *, gather: Gather, rank: int, convert: bool = False
) -> None:
    """Loads the checkpoint that `choose` gave; every rank calls it.

    Args:
        chosen: the same one on all ranks.
        load: restores this rank's part from the local folder it is given (a collective of the engine).
        gather: see `save`.
        rank: of this process.
        convert: `load` needs the files of all ranks, as it does when there are more or fewer of them now.

    Raises:
        CheckpointError: on all ranks, when one of them found its files damaged. From then on the checkpoint is passed
            over, so that the next start (Ray Train makes one by itself) resumes from its copy or the one before.
    """
    workers, marker = len(gather(None)), Marker.read(chosen.path)
    whole = convert or len(marker.ranks) != workers
    parts = marker.ranks if whole else [marker.ranks[0], marker.ranks[rank]]
    own = sorted({name for part in parts for name in part})
    with local_copy(chosen.path, own) as local:
        problems = [problem for problem in gather(_damage(local, {n: marker.files[n] for n in own})) if problem]
        if not problems:
            load(local)
            return
    if rank == 0:
        Marker(marker.files, marker.ranks, broken=problems[0]).write(chosen.path)
    raise CheckpointError(f"{chosen.path}: {problems[0]}; start again to resume from its copy or the one before it")


def is_begun(folder: AnyPath) -> bool:
    """Whether any checkpoint was committed, be it broken or not."""
    return any((path / MARKER).is_file() for path in _steps(folder))


def _commit(path: AnyPath, trainer: dict[str, Any], of_ranks: list[dict[str, Fingerprint]]) -> Marker:
    content = json.dumps(trainer, indent=1).encode()
    atomic_write(path / TRAINER, content)
    files = {name: mark for written in of_ranks for name, mark in written.items()}
    files[TRAINER] = [len(content), zlib.crc32(content)]
    problem = _missing(path, files)
    if problem:
        raise CheckpointError(f"{path}: {problem}: run.output must be one place for all workers")
    marker = Marker(files, [sorted(written) for written in of_ranks])
    marker.write(path)
    return marker


def _copy(path: AnyPath, own: list[str], marker: Marker | None, gather: Gather) -> None:
    """Writes the checkpoint at `path`, which rank 0 committed with `marker`, once more, each rank its `own` files."""
    copy = path.with_name(path.name.replace(_PREFIX, _COPY))
    if marker:
        _remove(copy)
    gather(None)
    try:
        copy_files(path, copy, [*own, TRAINER] if marker else own)
    except OSError as error:
        if isinstance(path, Path):
            raise _unwritten(copy, path, error) from error
        raise
    gather(None)
    if marker:  # of what was written first: a copy of a file that was damaged since then does not count either
        marker.write(copy)


def _unwritten(path: AnyPath, own: Path, error: Exception) -> Exception:
    """What to raise when shards could not be written: in words where the disk is full, else the error as it is."""
    free_bytes = shutil.disk_usage(own).free
    if free_bytes > _FULL_BYTES:
        return error
    return CheckpointError(
        f"{path} cannot be written: {os.strerror(errno.ENOSPC)} at {own}, {free_bytes / 1e6:.1f} MB are free; make "
        "room and start the same command again: it goes on from the newest committed checkpoint"
    )


def _problem(path: AnyPath) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        marker = Marker.read(path)
    except FileNotFoundError:
        return "it was not committed (a save was interrupted)"
    except ObjectStoreError:  # an object store that does not answer says nothing about the checkpoint
        raise
    except (OSError, ValueError) as error:
        return f"its marker {MARKER} cannot be read ({error})"
    if marker.broken:
        return marker.broken
    if isinstance(path, Path):
        return _damage(path, marker.files)
    return _missing(path, marker.files)  # the CRCs would take a download: `restore` looks at them


def _missing(path: AnyPath, files: dict[str, Fingerprint]) -> str | None:
    """The first file that is not there with its size, from one listing."""
    sizes = dict(list_files(path))
    for name, (size_bytes, _) in files.items():
        if sizes.get(name) != size_bytes:
            return f"{name} has {sizes.get(name, 'no')} bytes there, {size_bytes} were written"
    return None


def _damage(path: Path, files: dict[str, Fingerprint]) -> str | None:
    """The first file that is not what was committed, by its content."""
    for name, expected in files.items():
        try:
            found = _fingerprint(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != expected:
            return f"{name} is damaged: size and CRC {found}, committed as {expected}"
    return None


def _fingerprint(path: Path) -> Fingerprint:
    """[size in bytes, CRC-32] of a file, read in blocks of 16 MiB."""
    size_bytes = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            size_bytes, crc = size_bytes + len(block), zlib.crc32(block, crc)
    return [size_bytes, crc]


def _steps(folder: AnyPath, prefixes: tuple[str, ...] = (_COPY, _PREFIX)) -> list[AnyPath]:
    """The checkpoints that are there, committed or not, by step, each one after its copy."""
    found: Iterable[AnyPath] = folder.iterdir() if folder.is_dir() else ()
    named = (path for path in found if path.name.startswith(prefixes))
    return sorted(named, key=lambda path: (path.name.rpartition("-")[2], path.name))


def _remove(path: AnyPath) -> None:
    """Marker first, on the disk too, so that it is never half there and committed."""
    (path / MARKER).unlink(missing_ok=True)
    if isinstance(path, Path) and path.is_dir():
        fsync(path)
    remove_tree(path)


def _prune(folder: AnyPath, last: str, keep: int) -> None:
    """Removes all but the `keep` newest committed checkpoints up to `last`; a later one can only be broken.

    Copies go, but for that of `last`.
    """
    steps, copies = _steps(folder, (_PREFIX,)), _steps(folder, (_COPY,))
    committed = [path for path in steps if path.name <= last and (path / MARKER).is_file()]
    for path in (*committed[:-keep], *(path for path in copies if path.name != last.replace(_PREFIX, _COPY))):
        _remove(path)

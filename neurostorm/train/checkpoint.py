"""Checkpoints that are whole or do not count: a folder per step, with a commit marker written last.

    checkpoints/step-00000050/state/...      every rank's DeepSpeed shards
                              trainer.json   step, configuration, MLflow run, code revision, workers
                              COMMITTED      size and CRC-32 of every other file; written last, by rename

`newest` is the highest step whose marker is there and whose files are what the marker says; a broken one is passed
over with a warning. Clip order, masks and dropout follow from (seed, step), so no generator state needs saving.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MARKER = "COMMITTED"
TRAINER = "trainer.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the folder and the fix."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder, the number of finished steps, and what `trainer.json` holds."""

    path: Path
    step: int
    trainer: dict[str, Any]


def save(
    folder: Path,
    step: int,
    *,
    write_shards: Callable[[Path], None],
    barrier: Callable[[], None],
    rank: int,
    trainer: dict[str, Any],
    keep: int,
) -> None:
    """Writes and commits the checkpoint of `step` finished steps; every rank calls it.

    write_shards  saves this rank's part into the folder it is given (a collective of the engine)
    barrier       returns once all ranks have reached it
    """
    path = folder / f"step-{step:08d}"
    if rank == 0:
        shutil.rmtree(path, ignore_errors=True)  # an uncommitted rest of a killed run
        path.mkdir(parents=True)
    barrier()
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: this worker does not see what worker 0 made: run.output must be a shared folder"
        )
    write_shards(path)
    barrier()
    if rank == 0:
        _write_json(path / TRAINER, {"step": step, **trainer})
        _write_json(path / MARKER, {"files": {name: _fingerprint(path / name) for name in _files(path)}})
        _prune(folder, keep)
    barrier()


def newest(folder: Path) -> Checkpoint | None:
    """The checkpoint to resume from, or None; broken ones are passed over with a warning."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = _problem(path)
        if problem is None:
            trainer = json.loads((path / TRAINER).read_text())
            return Checkpoint(path, int(trainer["step"]), trainer)
        logger.warning("passing over checkpoint %s: %s", path, problem)
    return None


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        files = json.loads((path / MARKER).read_text())["files"]
    except FileNotFoundError:
        return "it was not committed (a save was interrupted)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its marker {MARKER} cannot be read ({error})"
    for name, expected in files.items():
        try:
            found = _fingerprint(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != expected:
            return f"{name} is damaged: size and CRC {found}, committed as {expected}"
    return None


def _files(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def _fingerprint(path: Path) -> list[int]:
    """[size in bytes, CRC-32] of a file, read in blocks of 16 MiB."""
    size_bytes = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            size_bytes, crc = size_bytes + len(block), zlib.crc32(block, crc)
    return [size_bytes, crc]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _prune(folder: Path, keep: int) -> None:
    """Removes all but the `keep` newest committed checkpoints, marker first, so that none is ever half there."""
    committed = sorted(path for path in folder.glob("step-*") if (path / MARKER).exists())
    for path in committed[:-keep]:
        (path / MARKER).unlink()
        shutil.rmtree(path)

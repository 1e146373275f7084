"""One run from its file into the store, and the attempt that keeps a broken file from stopping the others.

    header ─ bring_to_target (target.py) ─ annotations ─ one atomic write ─> Outcome
       ├──────── whatever is wrong with the file: RunError, in words ────────> quarantine
       └──────── the store cannot be written: StoreWriteError ───────────────> "unwritten", no file is to blame

`ingest_run` knows nothing of Ray: `spread.py` takes it to a cluster, a test calls it as it is.
"""

import errno
import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from neurostorm.ingest.annotations import annotations
from neurostorm.ingest.layouts.discover import Source
from neurostorm.ingest.nifti import RunError, file_sha256, open_nifti
from neurostorm.ingest.resample.standardize import SpatialPlan, Standardised, TemporalPlan
from neurostorm.ingest.resample.target import Target, bring_to_target
from neurostorm.io.object_store import UnavailableError
from neurostorm.io.paths import AnyPath, list_files
from neurostorm.store import FORMAT, FrameStore, StoreError, write_run
from neurostorm.store.files import is_node
from neurostorm.store.layout import METADATA

logger = logging.getLogger(__name__)

RECIPE, RECIPE_VERSION = "mni-voxelz", 1

Status = Literal["ingested", "complete", "changed", "quarantined", "withdrawn", "unwritten"]
_MAY_PASS = (errno.EIO, errno.ETIMEDOUT, errno.ESTALE)  # of a write, beside what an object store does not answer


class StoreWriteError(StoreError):
    """A finished run could not be put into the store: disk full, no permission, an object store without an answer.

    Attributes:
        retry: whether a later try may succeed without anybody doing something.
    """

    def __init__(self, message: str, retry: bool = False) -> None:
        super().__init__(message, retry)  # both, so that the error survives pickling between processes
        self.retry = retry

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class RunOutcome:
    """What became of one source.

    Attributes:
        source: the file.
        run: its path in the store.
        status: "ingested" now; "complete" and unchanged since; "changed": complete, but the file is another one now
            (the stored run stays); "quarantined"; "withdrawn": its participant withdrew from the store; "unwritten":
            the store could not be written, which is not the file's fault.
        reason: in words, for all but the first two.
        again: of an "unwritten" one, whether a later try may succeed without anybody doing something.
        frames, tr_s, size_bytes: of the stored run.
        coverage, tsnr_median, quantisation_db: its quality; see `Standardised`.
        seconds: spent on it.
    """

    source: str
    run: str
    status: Status
    reason: str = ""
    again: bool = False
    frames: int = 0
    tr_s: float = 0.0
    size_bytes: int = 0
    coverage: float = 0.0
    tsnr_median: float = 0.0
    quantisation_db: float = 0.0
    seconds: float = 0.0


def attempt(
    source: Source, store: AnyPath, *, chunk_frames: int | None = None, compression: str = "none", threads: int = 1
) -> RunOutcome:
    """`ingest_run`, with every failure of this one file turned into a "quarantined" outcome.

    Trouble with the store becomes an "unwritten" one.
    """
    started = time.monotonic()
    status: Status = "quarantined"
    again = False
    try:
        return ingest_run(source, store, chunk_frames=chunk_frames, compression=compression, threads=threads)
    except RunError as error:
        reason = str(error)
    except StoreError as error:
        status, reason, again = "unwritten", str(error), error.retry
    except MemoryError as error:
        reason = f"needs more memory than there is ({error or 'no details'})"
    except Exception as error:  # the border between runs: a defect met by one file must not cost the other files
        logger.exception("unexpected error in %s", source.path)
        reason = f"unexpected {type(error).__name__}: {error}"
    return RunOutcome(str(source.path), source.run, status, reason, again, seconds=time.monotonic() - started)


def ingest_run(
    source: Source, store: AnyPath, *, chunk_frames: int | None = None, compression: str = "none", threads: int = 1
) -> RunOutcome:
    """Bring one run into the store, whole, unless it is there already.

    Args:
        source: from `discover`.
        store: an existing store; its grid, mask and TR are what the run is brought to.
        chunk_frames, compression: as `write_run` takes them.
        threads: that may work at the same time, so as many as CPUs are the caller's; the stored bytes do not depend
            on it.

    Raises:
        RunError: the file, its mask or its sidecar cannot be used; the message is the reason.
        StoreWriteError: the store cannot be written. StoreError: it cannot be read.
    """
    started = time.monotonic()
    if source.refused:
        raise RunError(source.refused)
    opened = _open_store(store)
    if is_node(store / source.run):
        return outcome_of(source, store, opened.run_attributes(source.run))
    header = open_nifti(source.path)
    size, mtime_ns = size_and_time(source.path)
    digest = hashlib.sha256()
    target = Target(opened.grid.affine, opened.mask, opened.tr_s, opened.codec)
    brought = bring_to_target(source, header, target, digest, threads=threads)
    result = brought.result
    facts = _names(source) | _quality(result) | _processing(brought.spatial, brought.temporal)
    facts |= annotations(source, header.frames)
    facts |= {
        "source_sha256": digest.hexdigest(),
        "source_frames": header.frames,
        "source_tr_s": brought.source_tr_s,
        "source_size_bytes": size,
        "source_mtime_ns": mtime_ns,
    }
    if not _write(store, source.run, result, facts, chunk_frames=chunk_frames, compression=compression):
        return outcome_of(source, store, opened.run_attributes(source.run))  # another ingest came first
    return RunOutcome(
        source=str(source.path),
        run=source.run,
        status="ingested",
        frames=len(result.frames),
        tr_s=target.tr_s,
        size_bytes=sum(size for _, size in list_files(store / source.run)),
        coverage=result.coverage,
        tsnr_median=result.tsnr_median,
        quantisation_db=result.quantisation_db,
        seconds=time.monotonic() - started,
    )


def outcome_of(source: Source, store: AnyPath, facts: Mapping[str, Any]) -> RunOutcome:
    """The outcome of a source whose run is complete: "complete", or "changed" when the file is another one now.

    Size and time of the file settle it when they are as they were, another size too; otherwise its sha256 does.

    Args:
        source: as it is now.
        store: where the run is.
        facts: the run's attributes.

    RunError: the file cannot be read.
    """
    return outcome_at_a_glance(source, store, facts) or _outcome(
        source, store, facts, same=_sha256(source.path) == facts.get("source_sha256")
    )


def outcome_at_a_glance(source: Source, store: AnyPath, facts: Mapping[str, Any]) -> RunOutcome | None:
    """`outcome_of` without reading the file; None when that would be needed to tell."""
    size, mtime_ns = size_and_time(source.path)
    if size != facts.get("source_size_bytes"):
        return _outcome(source, store, facts, same=False)
    return _outcome(source, store, facts, same=True) if mtime_ns == facts.get("source_mtime_ns") else None


def size_and_time(path: AnyPath) -> tuple[int, int]:
    """Bytes of a file, and the time of its last change in nanoseconds. RunError when it cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise RunError(f"cannot be read: {error.strerror or error}") from error
    return status.st_size, status.st_mtime_ns


def _open_store(path: AnyPath) -> FrameStore:
    """A worker ingests many runs: the store's mask is read once per process, and again if the store was made anew."""
    try:
        made_ns = (path / METADATA).stat().st_mtime_ns
    except OSError:
        made_ns = 0  # opening says what is wrong
    return _open_this_store(path, made_ns)


@lru_cache(maxsize=4)
def _open_this_store(path: AnyPath, made_ns: int) -> FrameStore:
    return FrameStore.open(path)


def _write(store: AnyPath, run: str, result: Standardised, facts: dict[str, Any], **options: Any) -> bool:
    """`write_run`, with what the file system or the object store refuses as StoreWriteError."""
    try:
        return write_run(
            store, run, frames=result.frames, mean=result.mean, std=result.std, attributes=facts, **options
        )
    except OSError as error:
        may_pass = isinstance(error, UnavailableError) or error.errno in _MAY_PASS
        raise StoreWriteError(f"{run} cannot be written: {error.strerror or error}", may_pass) from error
    except StoreError as error:
        raise StoreWriteError(str(error)) from error


def _sha256(path: AnyPath) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise RunError(f"cannot be read: {error.strerror or error}") from error


def _outcome(source: Source, store: AnyPath, facts: Mapping[str, Any], *, same: bool) -> RunOutcome:
    figures = ("frames", "tr_s", "coverage", "tsnr_median", "quantisation_db")
    quality = {name: facts[name] for name in figures if facts.get(name) is not None}
    if same:
        return RunOutcome(str(source.path), source.run, "complete", **quality)
    reason = f"is not the file that was ingested; {store / source.run} was left, delete that folder to ingest it anew"
    return RunOutcome(str(source.path), source.run, "changed", reason, **quality)


def _names(source: Source) -> dict[str, Any]:
    return {
        "dataset": source.dataset,
        "subject": source.subject,
        "session": source.session,
        "task": source.task,
        "run_label": source.run_label,
        "entities": source.entities,
        "source": str(source.path),
    }


def _quality(result: Standardised) -> dict[str, Any]:
    return {
        "global_mean": result.global_mean,
        "global_std": result.global_std,
        "tsnr_median": result.tsnr_median,
        "clipped_fraction": result.clipped_fraction,
        "coverage": result.coverage,
        "quantisation_db": result.quantisation_db,
    }


def _processing(spatial: SpatialPlan, temporal: TemporalPlan) -> dict[str, Any]:
    return {
        "recipe": RECIPE,
        "recipe_version": RECIPE_VERSION,
        "resampling": spatial.kind,
        "resampling_time": temporal.kind,
        "neurostorm_format": FORMAT,
    }

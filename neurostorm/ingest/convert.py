"""One run from its file into the store, and the attempt that keeps a broken file from stopping the others.

    header ─ TR ─ field of view ─ plans ─ one pass over the frames ─ quality ─ one atomic write
       │  └─────────────────── bring_to_target ─────────────────────────┘
       └──────── whatever is wrong with the file: RunError, in words ────────> quarantine

`ingest_run` knows nothing of Ray: `fanout.py` spreads it over a cluster, a test calls it as it is. `clip.py` takes what
`bring_to_target` gives to a model without a store between.
"""

import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from neurostorm.ingest.discover import Source
from neurostorm.ingest.nifti import (
    Digest,
    RunError,
    RunHeader,
    file_sha256,
    open_run,
    read_frames,
    read_volume,
    repetition_time_s,
)
from neurostorm.ingest.standardize import (
    MASK_SHARE,
    SpatialPlan,
    Standardised,
    TemporalPlan,
    plan_spatial,
    plan_temporal,
    standardise,
)
from neurostorm.store import FORMAT, FrameStore, write_run

logger = logging.getLogger(__name__)

RECIPE, RECIPE_VERSION = "mni-voxelz", 1
MIN_COVERAGE = 0.05  # share of the store's brain that a run must show; a single slab of tissue still passes
SAME_PLACE_MM = 1e-3

Status = Literal["ingested", "complete", "changed", "quarantined"]


@dataclass(frozen=True)
class Outcome:
    """What became of one source.

    Attributes:
        source: the file.
        run: its path in the store.
        status: "ingested" now; "complete" and unchanged since; "changed": complete, but the file is another one now
            (the stored run stays); "quarantined".
        reason: in words, for "changed" and "quarantined".
        frames, tr_s, size_bytes: of the stored run.
        coverage, tsnr_median, quantisation_db: its quality; see `Standardised`.
        seconds: spent on it.
    """

    source: str
    run: str
    status: Status
    reason: str = ""
    frames: int = 0
    tr_s: float = 0.0
    size_bytes: int = 0
    coverage: float = 0.0
    tsnr_median: float = 0.0
    quantisation_db: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Target:
    """What runs are brought to: a store's properties, or those of the store that a model was trained on.

    Attributes:
        grid_affine: (4, 4) float64, voxel index -> mm.
        mask: (X, Y, Z) bool on that grid; its V voxels, in C order, are kept.
        tr_s: seconds between two frames.
    """

    grid_affine: NDArray[np.float64]
    mask: NDArray[np.bool_]
    tr_s: float


@dataclass(frozen=True)
class Brought:
    """A run on the target's grid and clock, how it came there, and the TR that it had, in seconds."""

    result: Standardised
    spatial: SpatialPlan
    temporal: TemporalPlan
    source_tr_s: float


def attempt(source: Source, store: Path, *, chunk_frames: int = 10, codec: str = "none") -> Outcome:
    """`ingest_run`, with every failure of this one file turned into a "quarantined" outcome."""
    started = time.monotonic()
    try:
        return ingest_run(source, store, chunk_frames=chunk_frames, codec=codec)
    except RunError as error:
        reason = str(error)
    except Exception as error:  # the border between runs: a defect met by one file must not cost the other files
        logger.exception("unexpected error in %s", source.path)
        reason = f"unexpected {type(error).__name__}: {error}"
    return Outcome(str(source.path), source.run, "quarantined", reason, seconds=time.monotonic() - started)


def ingest_run(source: Source, store: Path, *, chunk_frames: int = 10, codec: str = "none") -> Outcome:
    """Bring one run into the store, whole, unless it is there already.

    Args:
        source: from `discover`.
        store: an existing store; its grid, mask and TR are what the run is brought to.
        chunk_frames, codec: as `write_run` takes them.

    Raises:
        RunError: the file, its mask or its sidecar cannot be used; the message is the reason.
    """
    started = time.monotonic()
    if source.refused:
        raise RunError(source.refused)
    target = _open_store(store)
    if (done := outcome_if_complete(source, store, check_bytes=True)) is not None:
        return done
    header = open_run(source.path)
    status = source.path.stat()
    digest = hashlib.sha256()
    brought = bring_to_target(source, header, Target(target.grid.affine, target.mask, target.tr_s), digest)
    result = brought.result
    facts = _names(source) | _quality(result) | _processing(brought.spatial, brought.temporal)
    facts |= _origin(digest.hexdigest(), status, header.frames, brought.source_tr_s)
    arrays: dict[str, NDArray[Any]] = {"frames": result.frames, "mean": result.mean, "std": result.std}
    written = write_run(store, source.run, attributes=facts, chunk_frames=chunk_frames, codec=codec, **arrays)
    return Outcome(
        source=str(source.path),
        run=source.run,
        status="ingested" if written else "complete",
        frames=len(result.frames),
        tr_s=target.tr_s,
        size_bytes=sum(file.stat().st_size for file in (store / source.run).rglob("*") if file.is_file()),
        coverage=result.coverage,
        tsnr_median=result.tsnr_median,
        quantisation_db=result.quantisation_db,
        seconds=time.monotonic() - started,
    )


def bring_to_target(source: Source, header: RunHeader, target: Target, digest: Digest | None = None) -> Brought:
    """Read a run and bring it to `target`; the one way from a file to bytes.

    Args:
        source: its sidecars may state the TR, its mask bounds its field of view.
        header: of its file, from `open_run`.
        target: where to.
        digest: given every byte of the file, see `read_frames`.

    RunError: no TR, no overlap with the target, damaged data, or hardly any signal.
    """
    tr_s = repetition_time_s(header, sidecar_tr_s(source.sidecars))
    spatial = field_of_view(source, header, target)
    temporal = plan_temporal(header.frames, tr_s, target.tr_s)
    result = standardise(read_frames(header, digest), header.frames, spatial, temporal)
    if result.coverage < MIN_COVERAGE:
        raise RunError(f"shows signal in only {result.coverage:.1%} of the grid's brain mask")
    return Brought(result, spatial, temporal, tr_s)


def outcome_if_complete(source: Source, store: Path, *, check_bytes: bool) -> Outcome | None:
    """The outcome "complete" or "changed" when the store has the run; None when it has yet to be ingested.

    The file's size and time settle it when they are as they were. Otherwise its sha256 does: with `check_bytes` it is
    computed now, without it None is returned, so that a worker does it rather than the driver.
    """
    target = _open_store(store)
    if source.refused or not (store / source.run / "zarr.json").is_file():
        return None
    facts = target.run_attributes(source.run)
    figures = ("frames", "tr_s", "coverage", "tsnr_median", "quantisation_db")
    quality = {name: facts[name] for name in figures if facts.get(name) is not None}
    same = Outcome(str(source.path), source.run, "complete", **quality)
    try:
        status = source.path.stat()
        if (status.st_size, status.st_mtime_ns) == (facts.get("source_size_bytes"), facts.get("source_mtime_ns")):
            return same
        if not check_bytes:
            return None
        if file_sha256(source.path) == facts.get("source_sha256"):
            return same
    except OSError as error:
        raise RunError(f"cannot be read: {error.strerror or error}") from error
    reason = f"is not the file that was ingested; {store / source.run} was left, delete that folder to ingest it anew"
    return Outcome(str(source.path), source.run, "changed", reason, **quality)


def sidecar_tr_s(sidecars: tuple[Path, ...]) -> float | None:
    """RepetitionTime (seconds) of the nearest sidecar that has one, else None. RunError: unreadable, or no number."""
    for sidecar in sidecars:
        try:
            facts = json.loads(sidecar.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise RunError(f"has a JSON sidecar that cannot be read, {sidecar}: {error}") from error
        value = facts.get("RepetitionTime") if isinstance(facts, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if value is not None:
            raise RunError(f"has a JSON sidecar whose RepetitionTime is not a number, {sidecar}: {value!r}")
    return None


def field_of_view(source: Source, header: RunHeader, target: Target) -> SpatialPlan:
    """The plan of a run on the target's mask, without the voxels beyond its array or outside its own brain mask.

    RunError: hardly any of the target's brain is covered; the run's mask is empty, of another shape, or elsewhere.
    """
    plan = plan_spatial(header.shape, header.affine, target.grid_affine, target.mask)
    if plan.inside.mean() < MIN_COVERAGE:
        raise RunError(
            f"lies outside the grid: it covers {plan.inside.mean():.1%} of the grid's brain mask "
            f"(at least {MIN_COVERAGE:.0%} is needed); is it in MNI space?"
        )
    if source.mask_path is None:
        return plan
    plan = plan.within(_own_brain(source.mask_path, header))
    if plan.inside.mean() < MIN_COVERAGE:
        raise RunError(
            f"has a brain mask, {source.mask_path.name}, that meets only {plan.inside.mean():.1%} of the grid's: "
            "is it the mask of this run?"
        )
    return plan


def _own_brain(path: Path, header: RunHeader) -> NDArray[np.bool_]:
    """A run's brain mask on the run's voxels, bool (X * Y * Z) in Fortran order; by affine if it has another grid."""
    try:
        volume, affine = read_volume(path)
    except RunError as error:
        raise RunError(f"has a brain mask, {path.name}, that {error}") from error
    brain = np.nan_to_num(volume) > 0
    if not brain.any():
        raise RunError(f"has an empty brain mask, {path.name}: no voxel is above 0")
    if not np.allclose(affine, header.affine, rtol=0, atol=SAME_PLACE_MM):
        plan = plan_spatial(brain.shape, affine, header.affine, np.ones(header.shape, bool))
        share = plan.matrix @ brain.ravel(order="F").astype(np.float32)
        brain = (share > MASK_SHARE).reshape(header.shape)
    elif brain.shape != header.shape:
        raise RunError(
            f"has a brain mask, {path.name}, of shape {brain.shape} where the run has {header.shape} "
            "with the same affine: one of them was cropped without it"
        )
    return brain.ravel(order="F")


def _open_store(path: Path) -> FrameStore:
    """A worker ingests many runs: the store's mask is read once per process, and again if the store was made anew."""
    header = path / "zarr.json"
    return _open_this_store(path, header.stat().st_mtime_ns if header.is_file() else 0)


@lru_cache(maxsize=4)
def _open_this_store(path: Path, made_ns: int) -> FrameStore:
    return FrameStore.open(path)


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


def _origin(sha256: str, status: os.stat_result, frames: int, tr_s: float) -> dict[str, Any]:
    return {
        "source_sha256": sha256,
        "source_frames": frames,
        "source_tr_s": tr_s,
        "source_size_bytes": status.st_size,
        "source_mtime_ns": status.st_mtime_ns,
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

"""A run on a target's grid and clock: the one way from a file to bytes, for the store and for a model alike.

    header ─ TR ─ size ─ field of view ─ plans ─ one pass over the frames ─> int8 (T, V), mean, std, quality

`convert.py` writes what comes out into a store, `clip.py` gives it to a model without a store between.
"""

import json
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neurostorm.ingest.layouts.discover import Source
from neurostorm.ingest.nifti import RunError, RunHeader, first_volume, open_volume, read_stored, repetition_time_s
from neurostorm.ingest.resample.standardize import (
    MASK_SHARE,
    SpatialPlan,
    Standardised,
    TemporalPlan,
    plan_spatial,
    plan_temporal,
    standardise,
)
from neurostorm.ingest.stream import Digest, read_small
from neurostorm.io.paths import AnyPath
from neurostorm.store import INT8_16, FrameCodec, run_bytes

MIN_COVERAGE = 0.05  # share of the store's brain that a run must show; a single slab of tissue still passes
SAME_PLACE_MM = 1e-3
MAX_RUN_H = 24.0  # longer than any scan; a damaged number of frames or TR shows by it
_FLOAT_BYTES = 4
# Measured: peak memory of bringing a mask to another grid, for each voxel of the mask and of the run.
_MASK_BYTES, _GRID_BYTES = 100, 280
_MOST_MASK_BYTES = 8 * 10**9
_LARGEST_S = 1e9  # beyond it an integer may not even fit a float


@dataclass(frozen=True)
class Target:
    """What runs are brought to: a store's properties, or those of the store that a model was trained on.

    Attributes:
        grid_affine: (4, 4) float64, voxel index -> mm.
        mask: (X, Y, Z) bool on that grid; its V voxels, in C order, are kept.
        tr_s: seconds between two frames.
        codec: how frames store z-scores.
    """

    grid_affine: NDArray[np.float64]
    mask: NDArray[np.bool_]
    tr_s: float
    codec: FrameCodec = INT8_16


@dataclass(frozen=True)
class Brought:
    """A run on the target's grid and clock, how it came there, and the TR that it had, in seconds."""

    result: Standardised
    spatial: SpatialPlan
    temporal: TemporalPlan
    source_tr_s: float


def bring_to_target(
    source: Source, header: RunHeader, target: Target, digest: Digest | None = None, *, threads: int = 1
) -> Brought:
    """Read a run and bring it to `target`; the one way from a file to bytes.

    Args:
        source: its sidecars may state the TR, its mask bounds its field of view.
        header: of its file, from `open_run`.
        target: where to.
        digest: given every byte of the file, see `read_stored`.
        threads: one that reads ahead, and as many on blocks of voxels; the result is the same for any number.

    RunError: no TR, no overlap with the target, damaged data, or hardly any signal.
    """
    tr_s = repetition_time_s(header, sidecar_tr_s(source.sidecars))
    check_size(header.frames, tr_s, target.tr_s, int(target.mask.sum()))
    spatial = field_of_view(source, header, target)
    temporal = plan_temporal(header.frames, tr_s, target.tr_s)
    stored = read_stored(header, digest, threads=threads)
    scaling = (header.slope, header.intercept)
    result = standardise(stored, header.frames, spatial, temporal, scaling=scaling, codec=target.codec, threads=threads)
    if result.coverage < MIN_COVERAGE:
        raise RunError(f"shows signal in only {result.coverage:.1%} of the grid's brain mask")
    return Brought(result, spatial, temporal, tr_s)


def check_size(frames: int, source_tr_s: float, tr_s: float, voxels: int) -> None:
    """RunError for a run that no scanner made, or that this machine's memory cannot hold.

    A header of a few kB may announce any number of frames, and each is resampled to V voxels at another rate.

    Args:
        frames: in the file.
        source_tr_s, tr_s: seconds between two frames, in the file and in the store.
        voxels: V of the store.
    """
    hours = frames * source_tr_s / 3600
    if hours > MAX_RUN_H:
        raise RunError(f"would last {hours:,.0f} h ({frames:,} frames of {source_tr_s:g} s): no run is that long")
    stored = int(frames * source_tr_s / tr_s) + 1
    needed = run_bytes(stored, voxels) + frames * voxels * _FLOAT_BYTES
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise RunError(
            f"needs about {needed / 1e9:,.0f} GB of memory as {stored:,} frames of {tr_s:g} s, and this machine has "
            f"{there / 1e9:,.0f} GB"
        )


def check_mask_size(mask_voxels: int, run_voxels: int) -> None:
    """RunError for a mask that takes too much memory to be brought to the run's grid."""
    needed = _MASK_BYTES * mask_voxels + _GRID_BYTES * run_voxels
    if needed > _MOST_MASK_BYTES:
        raise RunError(
            f"needs about {needed / 1e9:,.0f} GB of memory to be brought from its grid of {mask_voxels:,} voxels to "
            f"the run's of {run_voxels:,} (at most {_MOST_MASK_BYTES / 1e9:,.0f} GB): resample it to the run's grid"
        )


def sidecar_tr_s(sidecars: tuple[AnyPath, ...]) -> float | None:
    """RepetitionTime (seconds) of the nearest sidecar that has one, else None. RunError: unreadable, or no number."""
    for sidecar in sidecars:
        try:
            facts = json.loads(read_small(sidecar).decode("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:  # the last for thousands of brackets in each other
            raise RunError(f"has a JSON sidecar that cannot be read, {sidecar}: {error}") from error
        value = facts.get("RepetitionTime") if isinstance(facts, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_S:
            return float(value)
        if value is not None:
            raise RunError(
                f"has a JSON sidecar whose RepetitionTime is no number of seconds, {sidecar}: {str(value)[:40]!r}"
            )
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


def _own_brain(path: AnyPath, header: RunHeader) -> NDArray[np.bool_]:
    """A run's brain mask on the run's voxels, bool (X * Y * Z) in Fortran order; by affine if it has another grid."""
    try:
        own = open_volume(path)
        affine = own.affine
        elsewhere = not np.allclose(affine, header.affine, rtol=0, atol=SAME_PLACE_MM)
        if elsewhere:
            check_mask_size(own.voxels, header.voxels)
        brain = np.nan_to_num(first_volume(own)) > 0
    except RunError as error:
        raise RunError(f"has a brain mask, {path.name}, that {error}") from error
    if not brain.any():
        raise RunError(f"has an empty brain mask, {path.name}: no voxel is above 0")
    if elsewhere:
        plan = plan_spatial(brain.shape, affine, header.affine, np.ones(header.shape, bool))
        share = plan.matrix @ brain.ravel(order="F").astype(np.float32)
        brain = (share > MASK_SHARE).reshape(header.shape)
    elif brain.shape != header.shape:
        raise RunError(
            f"has a brain mask, {path.name}, of shape {brain.shape} where the run has {header.shape} "
            "with the same affine: one of them was cropped without it"
        )
    return brain.ravel(order="F")

"""Functional connectivity: one vector per run, the baseline that a model of brain activity has to beat.

    store --read block by block--> region series (T, R) --connectivity--> (N, R, R) --upper--> (N, R (R - 1) / 2)
                                       '-- kept on disk: reading the store is nearly all of the time

"correlation" and "partial correlation" look at one run at a time. "tangent" places each run relative to the mean of the
training runs (Varoquaux et al. 2010, MICCAI), so it is fitted on these alone and then applied to all.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from neurostorm.downstream.methods.parcels import Parcels, parcels_from_atlas, parcels_from_mask, region_means
from neurostorm.io.atomic import atomic_write
from neurostorm.io.paths import AnyPath
from neurostorm.store import FrameStore

Kind = Literal["correlation", "partial correlation", "tangent"]
Series = NDArray[np.float32]
_BLOCK_BYTES = 1 << 25
_RUNS_AT_ONCE = 64  # as float64: bounds memory over a corpus
_READERS = 2  # runs read at once, each holds one block
_LARGEST_R = 1 - 1e-6  # arctanh of 1 is infinite


@dataclass(frozen=True)
class Connectivity:
    """A fitted measure, made by `fit_connectivity`."""

    kind: Kind
    _measure: Any  # ConnectivityMeasure of nilearn

    def transform(self, series: Sequence[Series]) -> NDArray[np.float32]:
        """Series (T_i, R) of N runs -> float32 (N, R, R), symmetric.

        A correlation r comes as Fisher's z = arctanh(r), and 0 on the diagonal and for a region without signal. Tangent
        matrices keep their diagonal.

        Raises:
            ValueError: a series is too short, not finite or of another number of regions; it is named by its number.
        """
        _check(series, self.kind)
        parts = [series[first : first + _RUNS_AT_ONCE] for first in range(0, len(series), _RUNS_AT_ONCE)]
        return np.concatenate([self._matrices(part) for part in parts])

    def _matrices(self, series: Sequence[Series]) -> NDArray[np.float32]:
        standard = [standardised(values) for values in series]
        if len(standard) == 1:  # nilearn places no run alone, though the mean it is relative to is known by now
            standard *= 2
        matrices = np.asarray(self._measure.transform(standard), np.float64)[: len(series)]
        if self.kind != "tangent":
            matrices = np.arctanh(np.clip(matrices, -_LARGEST_R, _LARGEST_R))
            diagonal = np.arange(matrices.shape[1])
            matrices[:, diagonal, diagonal] = 0
        return matrices.astype(np.float32)


def fit_connectivity(train: Sequence[Series], kind: Kind) -> Connectivity:
    """The measure fitted on the training runs: series (T_i, R); "tangent" alone learns from them.

    A correlation is Pearson's. The other two invert the covariance, which is shrunk first (Ledoit and Wolf 2004).

    Raises:
        ValueError: an unknown kind; series as `Connectivity.transform` refuses them.
    """
    from nilearn.connectome import ConnectivityMeasure  # here, as trials that look at no regions start 1 s earlier so
    from sklearn.covariance import EmpiricalCovariance, LedoitWolf

    if kind not in get_args(Kind):
        raise ValueError(f"kind = {kind!r}: one of {', '.join(get_args(Kind))}")
    # Series come standardised, so their covariance is the correlation; nilearn's own would divide by the 0 of a region
    # without signal.
    plain = kind == "correlation"
    measure = ConnectivityMeasure(
        cov_estimator=EmpiricalCovariance(store_precision=False) if plain else LedoitWolf(store_precision=False),
        kind="covariance" if plain else kind,
        standardize=False,
    )
    _check(train, kind)
    learnt_from = train if kind == "tangent" else train[:1]  # nilearn wants some run for the others too
    return Connectivity(kind, measure.fit([standardised(values) for values in learnt_from]))


def upper(matrices: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """(N, R, R) -> (N, R (R - 1) / 2) of the same dtype: what lies above the diagonal, row by row."""
    row, column = np.triu_indices(matrices.shape[-1], 1)
    return matrices[:, row, column]


def build_parcels(parcels: Path | int, store: FrameStore) -> Parcels:
    """A label NIfTI's regions, or as many as asked for, on the store's grid. ValueError as those that make it."""
    if isinstance(parcels, int):
        return parcels_from_mask(store.grid, store.mask, parcels)
    return parcels_from_atlas(parcels, store.grid, store.mask)


def region_series(store: FrameStore, run: str, parcels: Parcels) -> Series:
    """The mean z-score of each region in each frame of a run: float32 (T, R).

    Voxels outside the run's field of view do not count, and a region that lies there altogether is 0. Memory holds
    32 MiB of frames at a time.

    Raises:
        StoreError: the run is not there or cannot be read.
        ValueError: the regions are of another mask.
    """
    live = store.moments(run)[1] > 0
    total = store.frame_count(run)
    step = max(1, _BLOCK_BYTES // store.voxel_count)
    blocks = (store.frames(run, first, min(step, total - first)) for first in range(0, total, step))
    return np.concatenate([region_means(block, parcels.labels, live, store.codec) for block in blocks])


def series_cached(store: FrameStore, runs: Sequence[str], parcels: Parcels, folder: AnyPath) -> list[Series]:
    """`region_series` of each of `runs`, from `folder` where it is kept, and kept there otherwise.

    A file's name is a hash of the run's content and the regions, so a run that was ingested anew is read anew. A file
    that is damaged is made again.

    Raises:
        StoreError, ValueError: as `region_series`.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(partial(_one_cached, store, parcels, folder), runs))


def _one_cached(store: FrameStore, parcels: Parcels, folder: AnyPath, run: str) -> Series:
    frames = store.frame_count(run)
    facts = {
        "run": run,
        "source_sha256": store.run_attributes(run).get("source_sha256"),
        "frames": frames,
        "tr_s": store.tr_s,
        "recipe": store.recipe,
        "mask_sha256": store.mask_sha256,
        "parcels": parcels.sha256,
    }
    file = folder / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}.npy"
    kept = _load(file)
    if kept is not None and kept.shape == (frames, len(parcels)):
        return kept
    series = region_series(store, run, parcels)
    stream = io.BytesIO()
    np.save(stream, series)
    atomic_write(file, stream.getvalue())
    return series


def _load(file: AnyPath) -> Series | None:
    try:
        return np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):  # not there; cut off or no array
        return None


def _check(series: Sequence[Series], kind: Kind) -> None:
    """ValueError for what is no list of series of the same regions, each long enough for `kind`."""
    if not len(series):
        raise ValueError("connectivity of no runs: give one series at least")
    regions = np.shape(series[0])[-1]
    least = 2 if kind == "correlation" else 3  # the covariance of two frames has no inverse, shrunk or not
    for number, values in enumerate(series):
        if np.ndim(values) != 2 or len(values) < least or np.shape(values)[1] != regions:
            raise ValueError(
                f"series {number} has shape {np.shape(values)}: (T, {regions}) is needed, T {least} or more"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"series {number} holds values that are not finite: leave that run out")


def standardised(values: Series) -> NDArray[np.float64]:
    """(T, R): each region with mean 0 and variance 1 over the run, 0 where it does not vary."""
    wide = np.asarray(values, np.float64)
    centred = wide - wide.mean(0)
    spread = centred.std(0)
    # A constant's mean may be off by a rounding error, which must not be blown up to variance 1.
    varies = spread > 1e-6 * np.abs(wide).max(0)
    return np.where(varies, centred / np.where(varies, spread, 1), 0)

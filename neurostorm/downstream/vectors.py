"""A unit as one vector: what the methods without gradients see.

    nothing      a constant
    attributes   head motion and acquisition, mean over the unit's runs
    regions      connectivity of each run, mean over runs | mean activity of each region over the clips
    tokens       mean | of each place | how places vary together over the clips | covariance of leading directions

Tokens of a masked autoencoder follow the signal, and a z-scored signal averages to nothing over a run. What tells
people apart at rest is which places vary together; "coupling" and "covariance" look at that, as connectivity does in
parcels. What is learnt for a vector (directions, the mean of tangent connectivity) is learnt from training units.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from neurostorm.downstream.connectivity import Kind, fit_connectivity, upper
from neurostorm.downstream.examples import Examples
from neurostorm.downstream.metrics import pool
from neurostorm.downstream.simple import motion_features, motion_matrix

Values = NDArray[np.float64]
Tokens = NDArray[np.float32]
POOL_OF_KIND = {"regression": "coupling", "classification": "coupling", "identification": "covariance"}
_CLOSE = 1 - 1e-6  # arctanh of 1 is infinite
_FIT_CLIPS = 4000  # clips, at most, that directions are learnt from
_FEW_CLIPS = 4  # a unit with fewer has no correlations worth the name


def nothing(examples: Examples) -> Values:
    """(M, 1) of ones."""
    return np.ones((len(examples.units), 1))


def attributes(examples: Examples, of_run: Callable[[int], dict[str, Any]]) -> Values:
    """(M, D), nan where a run does not say: motion and acquisition of the unit's runs, averaged.

    `of_run` gives the store's attributes of the run with an index.
    """
    used = sorted(examples.clips_of_run())
    rows, _ = motion_matrix([motion_features(of_run(run)) for run in used])
    number = {run: row for row, run in enumerate(used)}
    return np.stack([rows[[number[run] for run in runs]].mean(0) for runs in runs_of_units(examples)])


def activity(examples: Examples, series: dict[int, NDArray[np.float32]]) -> Values:
    """(M, R): mean z of each region over the unit's clips; `series` by index of the run, (T, R)."""
    frames = np.arange(examples.clip_frames)
    clips = np.stack(
        [series[run][start + frames].mean(0) for run, start in zip(examples.run, examples.start, strict=True)]
    )
    return pool(examples.unit, clips)


def matrices(
    examples: Examples, series: dict[int, NDArray[np.float32]], kind: Kind, train: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """(M, R, R): connectivity of each of the unit's runs in the frames of its clips, mean over runs.

    `train` (M) tells the units that a measure which has to be fitted is fitted on.
    """
    pieces, unit_of = [], []
    for unit, runs in enumerate(runs_of_units(examples)):
        for run in runs:
            starts = examples.start[(examples.unit == unit) & (examples.run == run)]
            frames = np.unique(starts[:, None] + np.arange(examples.clip_frames))
            pieces.append(series[int(run)][frames])
            unit_of.append(unit)
    fitted = fit_connectivity([piece for piece, unit in zip(pieces, unit_of, strict=True) if train[unit]], kind)
    return pool(np.array(unit_of), fitted.transform(pieces)).astype(np.float32)


def edges(connectivity: NDArray[np.float32]) -> Values:
    """(M, R (R - 1) / 2) of matrices (M, R, R)."""
    return upper(connectivity).astype(np.float64)


def of_tokens(examples: Examples, tokens: Tokens, name: str, directions: int, train: NDArray[np.bool_]) -> Values:
    """(M, D): tokens (N, P', C') as a unit's vector; `name` is a value of adapt.pool but "auto", see `pool_name`."""
    if name == "mean":
        return pool(examples.unit, tokens.mean(1))
    if name == "places":
        return pool(examples.unit, rearrange(tokens, "n p c -> n (p c)"))
    taught = np.flatnonzero(train[examples.unit])
    taught = taught[np.linspace(0, len(taught) - 1, min(len(taught), _FIT_CLIPS)).astype(int)]
    signals = _leading_of_places(tokens, taught) if name == "coupling" else _leading(tokens, taught, directions)
    pair = np.triu_indices(signals.shape[1], 1 if name == "coupling" else 0)
    vary = _correlation if name == "coupling" else _covariance
    parts = [signals[examples.unit == unit] for unit in range(len(examples.units))]
    return np.stack([vary(part)[pair] for part in parts])


def pool_name(name: str, kind: str, examples: Examples) -> str:
    """adapt.pool, or for "auto" what suits the units: places where a unit has few clips, else by kind of task."""
    if name != "auto":
        return name
    few = np.median(np.bincount(examples.unit)) < _FEW_CLIPS
    return "places" if few else POOL_OF_KIND[kind]


def runs_of_units(examples: Examples) -> list[NDArray[np.int64]]:
    """Of each unit the indices of its runs."""
    return [np.unique(examples.run[clips]) for clips in examples.clips_by_unit()]


def _leading_of_places(tokens: Tokens, taught: NDArray[np.int64]) -> NDArray[np.float32]:
    """(N, P'): of each place the direction in which its tokens vary most over the clips `taught`."""
    signals = np.empty(tokens.shape[:2], np.float32)
    for place in range(tokens.shape[1]):
        centre = tokens[taught, place].mean(0)
        deviation = tokens[:, place] - centre
        _, vectors = np.linalg.eigh(np.cov(deviation[taught].T))
        signals[:, place] = deviation @ vectors[:, -1]
    return signals


def _leading(tokens: Tokens, taught: NDArray[np.int64], directions: int) -> NDArray[np.float32]:
    """(N, K): the leading directions of all places together, each of unit variance over `taught`."""
    flat = rearrange(tokens, "n p c -> n (p c)")
    found = PCA(min(directions, len(taught) - 1, flat.shape[1]), svd_solver="randomized", random_state=0, whiten=True)
    return np.asarray(found.fit(flat[taught]).transform(flat), np.float32)


def _correlation(signals: NDArray[np.float32]) -> Values:
    """(P', P'): Fisher's z of the correlation over the clips of one unit."""
    centred = signals - signals.mean(0, dtype=np.float64)
    size = np.maximum(np.linalg.norm(centred, axis=0), 1e-12)
    return np.arctanh(np.clip(centred.T @ centred / np.outer(size, size), -_CLOSE, _CLOSE))


def _covariance(signals: NDArray[np.float32]) -> Values:
    centred = signals - signals.mean(0, dtype=np.float64)
    return centred.T @ centred / max(1, len(signals) - 1)


class Matcher:
    """A linear map for telling people apart, fitted on training subjects in closed form.

    Vectors are centred; what differs between runs of one subject is shrunk: x -> (S_w / s + strength I)^(-1/2) x, with
    S_w the covariance within subjects and s its mean variance (within-class covariance normalisation, Hatch et al.
    2006), in the span of the training vectors. A large strength leaves the cosine of the centred vectors.
    """

    def __init__(self, strength: float) -> None:
        self._strength = strength

    def fit(self, vectors: Values, subjects: Sequence[str]) -> "Matcher":
        """Learn from (N, D) and whose each is."""
        known = ~np.isnan(vectors)
        mean = np.where(known, vectors, 0).sum(0) / np.maximum(known.sum(0), 1)
        self._centre = np.where(known.any(0), mean, np.nan)  # nan: nobody has it in training, so it tells nothing
        filled = self._filled(vectors)
        _, size, basis = np.linalg.svd(filled, full_matrices=False)
        self._basis = basis[size > 1e-9 * max(size.max(initial=0), 1e-12)].T  # (D, K)
        inside = filled @ self._basis
        names = np.array(subjects)
        within = np.concatenate([inside[names == name] - inside[names == name].mean(0) for name in np.unique(names)])
        covariance = within.T @ within / max(1, len(within))
        scale = max(float(np.trace(covariance)), 1e-12) / max(1, len(covariance))
        values, axes = np.linalg.eigh(covariance / scale + self._strength * np.eye(len(covariance)))
        self._map = (axes / np.sqrt(values)) @ axes.T
        return self

    def transform(self, vectors: Values) -> Values:
        """(N, D) -> (N, D'): directions of the training span shrunk, the rest as the least shrunk are."""
        filled = self._filled(vectors)
        inside = filled @ self._basis
        rest = (filled - inside @ self._basis.T) / np.sqrt(self._strength)
        return np.concatenate([inside @ self._map, rest], 1)

    def _filled(self, vectors: Values) -> Values:
        deviation = vectors - self._centre
        return np.where(np.isnan(deviation), 0.0, deviation)

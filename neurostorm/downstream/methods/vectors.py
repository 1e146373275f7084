"""A unit as one vector: what the methods without gradients see.

    nothing      a constant
    attributes   head motion and acquisition, mean over the unit's runs
    regions      connectivity of each run, mean over runs | mean activity of each region over the clips
    tokens       mean | of each place | how a signal of each place varies with others over the clips | covariance of
                 leading directions

Tokens of a masked autoencoder follow the signal, and a z-scored signal averages to nothing over a run. What tells
people apart at rest is which places vary together; "coupling" and "covariance" look at that, as connectivity does in
parcels. What is learnt for a vector (directions, the mean of tangent connectivity) is learnt from training units.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from neurostorm.downstream.methods.connectivity import Kind, fit_connectivity, standardised, upper
from neurostorm.downstream.methods.simple import Affine, motion_features, motion_matrix
from neurostorm.downstream.statistics.metrics import pool
from neurostorm.downstream.tasks.examples import Examples
from neurostorm.model.heads.places import Pool

Values = NDArray[np.float64]
Tokens = NDArray[np.float32]
POOL_OF_KIND: dict[str, Pool] = {"regression": "coupling", "classification": "coupling", "identification": "covariance"}
_CLOSE = 1 - 1e-6  # arctanh of 1 is infinite
_NO_VARIANCE = 1e-9  # of the largest: below it is rounding
_FIT_CLIPS = 4000  # clips, at most, that directions are learnt from
_FEW_CLIPS = 4  # a unit with fewer is told by what it does, not by what goes together


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

    Units of few clips, as events are, have too few frames for a correlation about their own mean. Theirs is the mean
    product of the regions' z-scores over the run, which in all of its frames is the correlation (edge time series,
    Faskowitz et al. 2020): so it also holds which regions are active together.

    `train` (M) tells the units that decide this, and that a measure which has to be fitted is fitted on.
    """
    pieces, unit_of = [], []
    together = kind == "correlation" and has_few_clips(examples.take(np.flatnonzero(train)))
    for unit, runs in enumerate(runs_of_units(examples)):
        for run in runs:
            starts = examples.start[(examples.unit == unit) & (examples.run == run)]
            frames = np.unique(starts[:, None] + np.arange(examples.clip_frames))
            pieces.append((standardised(series[int(run)]) if together else series[int(run)])[frames])
            unit_of.append(unit)
    if together:
        return pool(np.array(unit_of), np.stack([_products(piece) for piece in pieces])).astype(np.float32)
    fitted = fit_connectivity([piece for piece, unit in zip(pieces, unit_of, strict=True) if train[unit]], kind)
    return pool(np.array(unit_of), fitted.transform(pieces)).astype(np.float32)


def edges(connectivity: NDArray[np.float32]) -> Values:
    """(M, R (R - 1) / 2) of matrices (M, R, R)."""
    return upper(connectivity).astype(np.float64)


@dataclass(frozen=True)
class Signals:
    """K signals that are linear in a clip's tokens.

    Attributes:
        centre: float32 (P' C'), what is subtracted first.
        directions: float32 (K, P' C'), each at such a length that its signal has variance 1 over the clips it is from.
    """

    centre: NDArray[np.float32]
    directions: NDArray[np.float32]

    def of(self, tokens: Tokens) -> NDArray[np.float32]:
        """(N, K) of tokens (N, P', C')."""
        return (rearrange(tokens, "n p c -> n (p c)") - self.centre) @ self.directions.T


def learn_signals(examples: Examples, tokens: Tokens, name: str, most: int, train: NDArray[np.bool_]) -> Signals:
    """The signals of pool "coupling" (one of each place) or "covariance" (up to `most`), learnt from units `train`."""
    taught = np.flatnonzero(train[examples.unit])
    taught = taught[np.linspace(0, len(taught) - 1, min(len(taught), _FIT_CLIPS)).astype(int)]
    known = tokens[taught].astype(np.float64)
    if name == "coupling":
        return _of_places(known)
    flat = rearrange(known, "n p c -> n (p c)")
    count = signal_count(name, most, len(taught), tokens.shape[1:])
    found = PCA(count, svd_solver="randomized", random_state=0).fit(flat)
    return _signals(found.mean_, found.components_, found.explained_variance_)


def signal_count(name: str, most: int, clips: int, shape: tuple[int, ...]) -> int:
    """K of `learn_signals` from so many clips with tokens of this shape (P', C'); 0 where the pool has none."""
    if name not in ("coupling", "covariance"):
        return 0
    places, width = shape
    return places if name == "coupling" else max(1, min(most, clips - 1, places * width, _FIT_CLIPS - 1))


def of_tokens(examples: Examples, tokens: Tokens, name: str, signals: Signals | None) -> Values:
    """(M, D): tokens (N, P', C') as a unit's vector; `name` is a value of adapt.pool but "auto", see `pool_name`.

    What `model.place_heads` concludes from. `signals` belong to "coupling" and "covariance".
    """
    if name == "mean":
        return pool(examples.unit, tokens.mean(1))
    if signals is None:
        return pool(examples.unit, rearrange(tokens, "n p c -> n (p c)"))
    found = signals.of(tokens).astype(np.float64)
    coupling = name == "coupling"
    pair = np.triu_indices(found.shape[1], 1 if coupling else 0)
    vary = _correlation if coupling else _covariance
    return np.stack([vary(found[clips])[pair] for clips in examples.clips_by_unit()])


def pool_name(name: Pool | Literal["auto"], kind: str, train: Examples) -> Pool:
    """adapt.pool, or for "auto" what suits the training units: places where they have few clips, else by kind."""
    if name != "auto":
        return name
    return "places" if has_few_clips(train) else POOL_OF_KIND[kind]


def has_few_clips(examples: Examples) -> bool:
    """Whether a typical unit has too few clips to tell what goes together over them."""
    return bool(np.median(np.bincount(examples.unit)) < _FEW_CLIPS)


def runs_of_units(examples: Examples) -> list[NDArray[np.int64]]:
    """Of each unit the indices of its runs."""
    return [np.unique(examples.run[clips]) for clips in examples.clips_by_unit()]


def _of_places(tokens: Values) -> Signals:
    """Of each place the direction in which its tokens (N, P', C') vary most."""
    count, places, width = tokens.shape
    centre = tokens.mean(0)
    directions, variance = np.zeros((places, places, width)), np.zeros(places)
    for place in range(places):
        deviation = tokens[:, place] - centre[place]
        values, vectors = np.linalg.eigh(deviation.T @ deviation / max(1, count - 1))
        directions[place, place], variance[place] = vectors[:, -1], values[-1]
    return _signals(rearrange(centre, "p c -> (p c)"), rearrange(directions, "k p c -> k (p c)"), variance)


def _signals(centre: Values, directions: Values, variance: Values) -> Signals:
    """Directions at a length of 1 over the deviation along them; of those along which nothing varies, 0."""
    varies = variance > _NO_VARIANCE * max(float(variance.max(initial=0)), 1e-12)
    size = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0)
    return Signals(centre.astype(np.float32), (directions * size[:, None]).astype(np.float32))


def _products(series: Values) -> Values:
    """(R, R): mean product of regions over frames (T, R), 0 on the diagonal."""
    products = series.T @ series / len(series)
    np.fill_diagonal(products, 0)
    return products


def _correlation(signals: Values) -> Values:
    """(K, K): Fisher's z of the correlation over the clips (N, K) of one unit; 0 of what does not vary."""
    centred = signals - signals.mean(0)
    size = np.maximum(np.linalg.norm(centred, axis=0), 1e-12)
    return np.arctanh(np.clip(centred.T @ centred / np.outer(size, size), -_CLOSE, _CLOSE))


def _covariance(signals: Values) -> Values:
    centred = signals - signals.mean(0)
    return centred.T @ centred / len(signals)


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
        inside = self._widest = filled @ self._basis
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

    def affine(self, outputs: int) -> Affine:
        """The map within the training span, turned to the `outputs` directions in which training vectors lie widest."""
        inside = self._basis @ self._map  # (D, K)
        _, _, axes = np.linalg.svd(self._widest @ self._map, full_matrices=False)
        weights = np.zeros((len(self._centre), outputs))
        kept = (inside @ axes.T)[:, :outputs]
        weights[:, : kept.shape[1]] = kept
        known = ~np.isnan(self._centre)
        return Affine(
            np.where(known, self._centre, 0), np.ones(len(known)), weights * known[:, None], np.zeros(outputs)
        )

    def _filled(self, vectors: Values) -> Values:
        deviation = vectors - self._centre
        return np.where(np.isnan(deviation), 0.0, deviation)

"""Models on one vector per unit: what a network has to beat, and what moves with the head alone.

    connectivity, embeddings or motion (N, D), with gaps --fill, standardise, rotate if D > N--> ridge | logistic
    nothing -------------------------------------------------------------> the training mean | the class frequencies

Everything is learnt from the training split: fills, scales, directions. Where there are more features than units, the
features are first turned into the directions that the training units span. A ridge penalty gives weight to no other
direction (the representer theorem), so the fit is the same one, with N numbers a unit instead of D.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

Values = NDArray[np.float64]
Task = Literal["regression", "classification"]
NAMES = ("constant", "linear")

# Attributes of a run that say how the head moved and how the scanner was set, and nothing of brain activity.
MOTION_FEATURES = (
    "fd_mean_mm",
    "fd_max_mm",
    "fd_spike_fraction",
    "tsnr_median",
    "coverage",
    "clipped_fraction",
    "source_tr_s",
    "source_frames",
    "global_mean",
    "global_std",
)
_NO_DIRECTION = 1e-12  # of the largest variance: below it is rounding
_TOLERANCE, _STEPS = 1e-6, 5000
_NEVER = -30.0  # logit of a class that no training unit has


@dataclass(frozen=True)
class Affine:
    """(x - shift) / scale @ weights + bias, of x (N, D).

    Attributes:
        shift, scale: float64 (D).
        weights: float64 (D, O).
        bias: float64 (O).
    """

    shift: Values
    scale: Values
    weights: Values
    bias: Values


class VectorModel(Protocol):
    """A model on one vector per unit, made by `build_vector_model`."""

    def fit(self, x: ArrayLike, y: ArrayLike) -> Self:
        """Learn from x (N, D), nan where a value is missing, and y (N,). ValueError when they do not fit."""

    def predict(self, x: ArrayLike) -> Values:
        """Of x (N, D): the target (N,) in its own unit, or probabilities (N, K) in the order of the classes."""

    def affine(self) -> Affine:
        """What it computes of x without gaps, before probabilities: the standardised target, or a logit per class.

        Of two classes the one logit is the second's. TypeError: the model looks at no feature.
        """


def build_vector_model(
    kind: Task, strength: float, name: Literal["constant", "linear"], classes: Sequence[Hashable] = ()
) -> VectorModel:
    """A new model; it has no randomness.

    Args:
        kind: "regression" or "classification".
        strength: of the penalty on the weights, above 0. Ridge's alpha on a target of variance 1, or the inverse of
            logistic regression's C.
        name: "constant", which looks at no feature (training mean or class frequencies), or "linear".
        classes: of a classification, all that `y` may hold; the columns of what is predicted.

    Raises:
        ValueError: a name is unknown, a number impossible, or the classes are missing or stand there twice.
    """
    if kind not in ("regression", "classification") or name not in NAMES:
        raise ValueError(f"{name!r} {kind!r}: one of {', '.join(NAMES)} for regression or classification")
    if not strength > 0 or math.isinf(strength):
        raise ValueError(f"strength = {strength}: a number above 0")
    if kind == "regression":
        return _Mean() if name == "constant" else _LinearRegression(strength)
    if not len(classes) or len(set(classes)) != len(classes):
        raise ValueError(f"classes = {list(classes)}: list each class once")
    return _Frequencies(classes) if name == "constant" else _LinearClassification(classes, strength)


def motion_features(attributes: Mapping[str, Any]) -> dict[str, float]:
    """What a run's attributes say of head motion and acquisition: those of MOTION_FEATURES that are finite numbers."""
    found = {}
    for name in MOTION_FEATURES:
        value = attributes.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[name] = float(value)
    return found


def motion_matrix(features: Sequence[Mapping[str, float]]) -> tuple[Values, tuple[str, ...]]:
    """Features of N runs -> float64 (N, D) and the D names, in the order of MOTION_FEATURES.

    A feature that no run has is left out; what single runs lack is nan, for which the linear model puts the training
    mean.
    """
    names = tuple(name for name in MOTION_FEATURES if any(name in row for row in features))
    rows = [[row.get(name, math.nan) for name in names] for row in features]
    return np.array(rows, np.float64).reshape(len(features), len(names)), names


class Span(TransformerMixin, BaseEstimator):
    """Turns centred rows (N, D) with D > N into the directions that the training rows span: (N, at most N).

    Lengths and angles of the training rows stay as they were. Rows with D <= N pass as they are.
    """

    def fit(self, x: Values, y: object = None) -> Self:
        """Find the directions, by the eigenvectors of the (N, N) products of rows: cheaper than an SVD of the rows."""
        del y  # part of scikit-learn's interface
        self.directions_: Values | None = None
        if x.shape[1] > x.shape[0]:
            variance, vectors = np.linalg.eigh(x @ x.T)
            kept = variance > _NO_DIRECTION * max(variance[-1], 0)
            # All features constant: one direction of zeros, as the models take no empty matrix.
            self.directions_ = x.T @ (vectors[:, kept] / np.sqrt(variance[kept])) if kept.any() else 0 * x[:1].T
        return self

    def transform(self, x: Values) -> Values:
        """Rows (M, D) in these directions."""
        return x if self.directions_ is None else x @ self.directions_


class _Mean:
    def fit(self, x: ArrayLike, y: ArrayLike) -> Self:
        _, target = _checked(x, y)
        self._mean = float(_finite(target).mean())
        return self

    def predict(self, x: ArrayLike) -> Values:
        return np.full(len(np.asarray(x)), self._mean)

    def affine(self) -> Affine:
        raise TypeError("a constant is no map of features")


class _LinearRegression:
    def __init__(self, strength: float) -> None:
        self._pipeline = _pipeline(Ridge(alpha=strength))

    def fit(self, x: ArrayLike, y: ArrayLike) -> Self:
        rows, target = _checked(x, y)
        target = _finite(target)
        self._mean, self._spread = float(target.mean()), float(target.std()) or 1.0
        self._pipeline.fit(rows, (target - self._mean) / self._spread)
        return self

    def predict(self, x: ArrayLike) -> Values:
        return self._mean + self._spread * self._pipeline.predict(np.asarray(x, np.float64))

    def affine(self) -> Affine:
        model = self._pipeline[-1]
        return _affine(self._pipeline, np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_))


class _Frequencies:
    def __init__(self, classes: Sequence[Hashable]) -> None:
        self._classes = classes

    def fit(self, x: ArrayLike, y: ArrayLike) -> Self:
        _, target = _checked(x, y)
        self._share = np.bincount(_codes(target, self._classes), minlength=len(self._classes)) / len(target)
        return self

    def predict(self, x: ArrayLike) -> Values:
        return np.tile(self._share, (len(np.asarray(x)), 1))

    def affine(self) -> Affine:
        raise TypeError("a constant is no map of features")


class _LinearClassification:
    def __init__(self, classes: Sequence[Hashable], strength: float) -> None:
        self._classes = classes
        self._pipeline = _pipeline(
            LogisticRegression(C=1 / strength, class_weight="balanced", tol=_TOLERANCE, max_iter=_STEPS)
        )

    def fit(self, x: ArrayLike, y: ArrayLike) -> Self:
        rows, target = _checked(x, y)
        codes = _codes(target, self._classes)
        self._present = np.unique(codes)
        if len(self._present) > 1:  # else there is nothing to tell apart
            self._pipeline.fit(rows, codes)
        return self

    def predict(self, x: ArrayLike) -> Values:
        rows = np.asarray(x, np.float64)
        scores = np.zeros((len(rows), len(self._classes)))
        scores[:, self._present] = self._pipeline.predict_proba(rows) if len(self._present) > 1 else 1.0
        return scores

    def affine(self) -> Affine:
        present, classes = self._present, len(self._classes)
        if len(present) == 1:
            raise TypeError("training units of one class: no feature tells anything apart")
        model = self._pipeline[-1]
        if classes == 2:
            return _affine(self._pipeline, model.coef_, model.intercept_)
        coefficients = np.zeros((classes, model.coef_.shape[1]))
        bias = np.full(classes, _NEVER)
        both = len(present) == 2  # which have one logit between them
        coefficients[present[1:] if both else present] = model.coef_
        bias[present] = [0.0, *model.intercept_] if both else model.intercept_
        return _affine(self._pipeline, coefficients, bias)


def _pipeline(model: BaseEstimator) -> Pipeline:
    return make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler(), Span(), model)


def _affine(pipeline: Pipeline, coefficients: Values, bias: Values) -> Affine:
    """A fitted `_pipeline` with a last model of these coefficients (O, D') in the directions of its span."""
    _, scaler, span, _ = (step for _, step in pipeline.steps)
    weights = coefficients.T if span.directions_ is None else span.directions_ @ coefficients.T
    return Affine(scaler.mean_, scaler.scale_, weights, bias)


def _checked(x: ArrayLike, y: ArrayLike) -> tuple[Values, NDArray[Any]]:
    rows, target = np.asarray(x, np.float64), np.asarray(y)
    if rows.ndim != 2 or target.shape != rows.shape[:1] or not rows.size:
        raise ValueError(f"x {rows.shape} and y {target.shape}: (N, D) and (N,) are needed, neither N nor D being 0")
    return rows, target


def _finite(target: NDArray[Any]) -> Values:
    values = target.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"y[{int(np.argmin(np.isfinite(values)))}] is not finite: leave out units without a target")
    return values


def _codes(target: NDArray[Any], classes: Sequence[Hashable]) -> NDArray[np.intp]:
    """The column of each unit's class."""
    place = {name: column for column, name in enumerate(classes)}
    unknown = sorted({str(value) for value in target.tolist() if value not in place})
    if unknown:
        raise ValueError(f"y holds {', '.join(unknown)}: the classes are {', '.join(map(str, classes))}")
    return np.array([place[value] for value in target.tolist()], np.intp)

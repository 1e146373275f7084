"""How good predictions are: the numbers of every table, and what guessing would reach.

    predictions of clips --pool--> of runs or subjects --regression | classification--> {metric: value}
    metric --chance_of, higher_is_better--> what stands beside the value

The values are scikit-learn's and SciPy's. What is decided here is what they leave open: a class that no row has, a
prediction without any variance, a target that cannot be ranked. Accuracies, F1 and AUROC come from one table of counts
or ranks, to the same values: a bootstrap asks for them thousands of times, and scikit-learn takes 1 to 6 ms each time.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import pearsonr, rankdata
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

Real = NDArray[np.float64]
Whole = NDArray[np.int64]
Metric = Callable[[ArrayLike, ArrayLike], float]

SUM_TOLERANCE = 1e-3  # of a row of probabilities: what a softmax in half precision leaves
_CONSTANT = 1e-12  # of the largest value: a mean predictor's rounding is no variance
_LOWER_IS_BETTER = ("mae", "rmse")
_WITHOUT_CHANCE = (*_LOWER_IS_BETTER, "macro_f1")  # they depend on how the target is distributed


def regression(target: ArrayLike, prediction: ArrayLike) -> dict[str, float]:
    """`mae`, `rmse` (both in the target's unit), `r` (Pearson) and `r2` (coefficient of determination).

    A constant prediction has r = 0: it ranks nobody, and nan would drop the mean predictor out of a table. A constant
    target (or a single row) has r = r2 = nan: there is nothing to rank.

    Args:
        target: (N), finite.
        prediction: (N), finite, in the target's unit.

    Raises:
        ValueError: no rows, other shapes, or a value that is not finite.
    """
    truth, guess = _regression_input(target, prediction)
    return {name: compute(truth, guess) for name, compute in _REGRESSION.items()}


def classification(target: ArrayLike, scores: ArrayLike, classes: Sequence[str]) -> dict[str, float]:
    """`balanced_accuracy`, `accuracy`, `macro_f1` and `auroc`.

    Balanced accuracy (mean recall, Brodersen et al. 2010) and macro F1 are means over the classes that `target` has.
    AUROC is that of class 1's score for two classes; for more, the mean over the classes present of each against the
    rest (Fawcett 2006); nan when only one class is present. The class with the largest score is the predicted one, the
    first of equals.

    Args:
        target: integers (N), indices of `classes`.
        scores: probabilities (N, K): not negative, each row sums to 1.
        classes: the K names.

    Raises:
        ValueError: no rows, other shapes, an index that no class has, or rows that are no probabilities.
    """
    truth, probabilities = _classification_input(target, scores, classes)
    return {name: compute(truth, probabilities) for name, compute in _CLASSIFICATION.items()}


def metric_of(name: str, classes: Sequence[str] = ()) -> Metric:
    """One metric alone, as a function of (target, prediction or scores): what a bootstrap calls thousands of times.

    It gives what `regression` or `classification` (of `classes`) gives under `name`, and refuses what they refuse.
    Raises ValueError for a metric that neither has.
    """
    if name in _REGRESSION:
        return partial(_one_regression, name)
    if name in _CLASSIFICATION:
        return partial(_one_classification, name, tuple(classes))
    raise ValueError(f"metric {name!r} is none of predictions: {', '.join((*_REGRESSION, *_CLASSIFICATION))}")


def confusion(target: ArrayLike, scores: ArrayLike) -> Whole:
    """How often each class was taken for which: integers (K, K), rows are the truth, columns the largest score.

    Takes and refuses the same `target` (N) and `scores` (N, K) as `classification`.
    """
    width = np.shape(scores)[1] if np.ndim(scores) == 2 else 0
    truth, probabilities = _classification_input(target, scores, [str(number) for number in range(width)])
    return _table(truth, probabilities)


def pool(unit: ArrayLike, values: ArrayLike) -> Real:
    """The mean of the clips' predictions for each run or subject, float64 (M, ...).

    Args:
        unit: integers (N), which of the units 0 .. M-1 a clip belongs to; in any order, each at least once.
        values: (N, ...), predictions or probabilities. Means of probabilities are probabilities.

    Raises:
        ValueError: the lengths differ, or a unit has no clip.
    """
    units, rows = np.asarray(unit), np.asarray(values, np.float64)
    if units.ndim != 1 or units.dtype.kind not in "iu" or rows.shape[:1] != units.shape or not len(units):
        raise ValueError(f"unit must be integers (N), one for each of the values (N, ...): {units.shape}, {rows.shape}")
    if units.min() < 0:
        raise ValueError(f"unit {units.min()} is negative: units count from 0")
    counts = np.bincount(units)
    if not counts.all():
        raise ValueError(
            f"unit {counts.argmin()} of {len(counts)} has no clip: leave it out and number the others anew"
        )
    sums = np.add.reduceat(rows[np.argsort(units, kind="stable")], np.cumsum(counts) - counts, axis=0)
    return np.asarray(sums / counts.reshape(-1, *[1] * (rows.ndim - 1)))


def chance_of(metric: str, *, classes: int = 0, gallery: int = 0) -> float:
    """What guessing reaches on average; nan for a metric where that depends on the target (mae, rmse, macro_f1).

    `map` is that of one relevant item at a uniformly random rank among G: the mean of 1/rank, H_G / G with the harmonic
    number H_G.

    Args:
        metric: one that `regression`, `classification` or re-identification gives.
        classes: K, for accuracies.
        gallery: G, for `rank1` and `map`.

    Raises:
        ValueError: the metric is unknown, or the count that it needs is not given.
    """
    higher_is_better(metric)  # refuses what is unknown
    if metric in _WITHOUT_CHANCE:
        return float("nan")
    if metric in ("r", "r2"):
        return 0.0
    if metric == "auroc":
        return 0.5
    field, count = ("gallery", gallery) if metric in ("rank1", "map") else ("classes", classes)
    if count < 1:
        raise ValueError(f"chance of {metric} needs {field}, the number of {field}, at least 1; it is {count}")
    return float(np.mean(1 / np.arange(1, count + 1))) if metric == "map" else 1 / count


def chance_text(metric: str, level: float, digits: int = 2) -> str:
    """A chance level as people read it, `0.50`; that of a correlation says what it means, `0: no correlation`."""
    return "0: no correlation" if metric == "r" and level == 0 else f"{level:.{digits}f}"


def higher_is_better(metric: str) -> bool:
    """Whether the larger value is the better one; raises ValueError for an unknown metric."""
    known = (*_REGRESSION, *_CLASSIFICATION, "rank1", "map")
    if metric not in known:
        raise ValueError(f"metric {metric!r} is unknown: take one of {', '.join(known)}")
    return metric not in _LOWER_IS_BETTER


def _constant(values: Real) -> bool:
    return bool(np.ptp(values) <= _CONSTANT * np.abs(values).max())


def _mae(target: Real, prediction: Real) -> float:
    return float(mean_absolute_error(target, prediction))


def _rmse(target: Real, prediction: Real) -> float:
    return float(root_mean_squared_error(target, prediction))


def _r(target: Real, prediction: Real) -> float:
    if _constant(target):
        return float("nan")
    return 0.0 if _constant(prediction) else float(pearsonr(target, prediction).statistic)


def _r2(target: Real, prediction: Real) -> float:
    return float("nan") if _constant(target) else float(r2_score(target, prediction))


def _table(target: Whole, scores: Real) -> Whole:
    """How often each class (row) was taken for which (column): integers (K, K)."""
    width = scores.shape[1]
    return np.bincount(target * width + scores.argmax(axis=1), minlength=width**2).reshape(width, width)


def _balanced_accuracy(target: Whole, scores: Real) -> float:
    table = _table(target, scores)
    rows = table.sum(axis=1)
    return float((np.diagonal(table)[rows > 0] / rows[rows > 0]).mean())


def _accuracy(target: Whole, scores: Real) -> float:
    return float(np.trace(_table(target, scores)) / len(target))


def _macro_f1(target: Whole, scores: Real) -> float:
    table = _table(target, scores)
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    return float((2 * np.diagonal(table)[rows > 0] / (rows + columns)[rows > 0]).mean())


def _auroc(target: Whole, scores: Real) -> float:
    present = np.unique(target)
    if len(present) < 2:
        return float("nan")
    positives = [1] if scores.shape[1] == 2 else present
    return float(np.mean([_area(target == positive, scores[:, positive]) for positive in positives]))


def _area(positive: NDArray[np.bool_], score: Real) -> float:
    """The share of (positive, negative) pairs in the right order, ties half: U / (n1 n0) of Mann & Whitney (1947)."""
    ones = np.count_nonzero(positive)
    ranks_of_ones = float(rankdata(score)[positive].sum())
    return (ranks_of_ones - ones * (ones + 1) / 2) / (ones * (len(positive) - ones))


_REGRESSION: dict[str, Callable[[Real, Real], float]] = {"mae": _mae, "rmse": _rmse, "r": _r, "r2": _r2}
_CLASSIFICATION: dict[str, Callable[[Whole, Real], float]] = {
    "balanced_accuracy": _balanced_accuracy,
    "accuracy": _accuracy,
    "macro_f1": _macro_f1,
    "auroc": _auroc,
}


def _one_regression(name: str, target: ArrayLike, prediction: ArrayLike) -> float:
    return _REGRESSION[name](*_regression_input(target, prediction))


def _one_classification(name: str, classes: Sequence[str], target: ArrayLike, scores: ArrayLike) -> float:
    return _CLASSIFICATION[name](*_classification_input(target, scores, classes))


def _regression_input(target: ArrayLike, prediction: ArrayLike) -> tuple[Real, Real]:
    truth, guess = np.asarray(target, np.float64), np.asarray(prediction, np.float64)
    if truth.ndim != 1 or truth.shape != guess.shape or not len(truth):
        raise ValueError(f"target {truth.shape} and prediction {guess.shape} must both be (N), with N at least 1")
    for name, values in (("target", truth), ("prediction", guess)):
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"{name} of row {row} is {values[row]}: leave out rows without a value")
    return truth, guess


def _classification_input(target: ArrayLike, scores: ArrayLike, classes: Sequence[str]) -> tuple[Whole, Real]:
    truth, probabilities = np.asarray(target), np.asarray(scores, np.float64)
    count = len(classes)
    if count < 2 or truth.ndim != 1 or not len(truth) or probabilities.shape != (len(truth), count):
        raise ValueError(
            f"target {truth.shape} must be (N) and scores {probabilities.shape} (N, K) with N at least 1 and "
            f"K = {count} classes, at least 2"
        )
    if truth.dtype.kind not in "iu":
        raise ValueError(f"target is {truth.dtype}: give integers, the indices of the classes")
    if not ((truth >= 0) & (truth < count)).all():
        row = int(np.flatnonzero((truth < 0) | (truth >= count))[0])
        raise ValueError(f"target of row {row} is {truth[row]}, no index of the {count} classes {', '.join(classes)}")
    good = (probabilities >= 0).all(axis=1) & (np.abs(probabilities.sum(axis=1) - 1) <= SUM_TOLERANCE)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"scores of row {row} are {probabilities[row]}: give probabilities, which sum to 1 (a softmax)"
        )
    return truth.astype(np.int64), probabilities

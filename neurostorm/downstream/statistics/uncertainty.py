"""What stands beside a number: spread, intervals, tests, and the correction for having made many of them.

    replicates (seeds, fractions) of two methods --pair--> paired_t ------------+
    test subjects with two methods' predictions --resample--> paired_bootstrap -+--holm--> Comparison

The t-test is SciPy's. The bootstrap draws what `scipy.stats.bootstrap` draws (a test compares them) but keeps a
subject's rows together and counts the draws that leave a metric undefined, of which SciPy makes a nan interval. Holm's
correction is not in SciPy.

Two kinds of chance are kept apart. The t-test is over trainings: would other seeds say the same? The bootstrap is over
subjects: would other people say the same? Neither stands for the other, so a comparison shows both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import ttest_rel

from neurostorm.downstream.statistics.metrics import higher_is_better

Real = NDArray[np.float64]
Metric = Callable[[NDArray[Any], NDArray[Any]], float]

NAN = float("nan")
_ROUNDING = 1e-12  # of the values: smaller differences between pairs are no variance
_LEVELS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation (ddof 1; nan for one value) and count of replicates."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class TTest:
    """A paired two-sided t-test: `difference` is the mean of a - b, with its confidence interval."""

    t: float
    p: float
    pairs: int
    difference: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Interval:
    """A value and its percentile interval over `draws` resamplings, `skipped` more of which left it undefined."""

    value: float
    low: float
    high: float
    draws: int
    skipped: int


@dataclass(frozen=True)
class PairedInterval(Interval):
    """The interval of metric(a) - metric(b), and the two-sided p of its being 0."""

    p: float


@dataclass(frozen=True)
class Comparison:
    """Method `a` against method `b` in one metric of one task; `difference` is the mean of a - b over the pairs."""

    task: str
    metric: str
    a: str
    b: str
    pairs: int
    difference: float
    t: float
    p: float
    p_holm: float
    boot_low: float
    boot_high: float
    boot_p: float

    @property
    def better(self) -> str:
        """The method with the better mean, whether significantly or not; "" when equal or when there is no pair."""
        if not self.difference or np.isnan(self.difference):
            return ""
        return self.a if (self.difference > 0) == higher_is_better(self.metric) else self.b


def summary(values: ArrayLike) -> Summary:
    """Mean, standard deviation and count of `values` (n); raises ValueError for none, or one that is not finite."""
    numbers = _finite("values", values)
    if not len(numbers):
        raise ValueError("there are no values to summarise")
    return Summary(float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else NAN, len(numbers))


def paired_t(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> TTest:
    """Student's paired two-sided t-test of `a` against `b`, as the paper compares methods.

    It speaks of the pairs only: seeds of one split share their test subjects, so it says nothing of other subjects.
    With fewer than two pairs t, p and interval are nan. Without variance between the pairs: p = 1 and the interval is
    the point 0 where all differences are 0; p and interval are nan where all are one other number, because that is
    what the same run counted several times looks like, and any p would be an invention.

    Args:
        a, b: (pairs), finite; element i of both is one pair.
        level: of the confidence interval.

    Raises:
        ValueError: other shapes, or a value that is not finite.
    """
    first, second = _finite("a", a), _finite("b", b)
    if first.shape != second.shape:
        raise ValueError(f"a has {len(first)} and b {len(second)} values: give pairs")
    differences, pairs = first - second, len(first)
    difference = float(differences.mean()) if pairs else NAN
    if pairs < 2:
        return TTest(NAN, NAN, pairs, difference, NAN, NAN)
    rounding = _ROUNDING * max(np.abs(first).max(), np.abs(second).max())
    if np.ptp(differences) <= rounding:
        same = abs(difference) <= rounding
        return TTest(0.0, 1.0, pairs, 0.0, 0.0, 0.0) if same else TTest(NAN, NAN, pairs, difference, NAN, NAN)
    test = ttest_rel(first, second)
    interval = test.confidence_interval(level)
    return TTest(
        float(test.statistic), float(test.pvalue), pairs, difference, float(interval.low), float(interval.high)
    )


def bootstrap(
    subjects: Sequence[str],
    target: ArrayLike,
    score: ArrayLike,
    metric: Metric,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The percentile interval of a metric over resampled subjects (Efron & Tibshirani 1993, chapter 13).

    A subject is drawn with all of its rows, with replacement, as many subjects as there are. A draw in which the metric
    is nan (one class only, say) is skipped and counted. With one subject, or no draw left, the interval is nan.

    Args:
        subjects: (N), `dataset/sub-001` of each row.
        target: (N, ...).
        score: (N, ...), predictions or scores.
        metric: of the resampled (target, score); `metrics.metric_of` makes one.
        draws: how many.
        seed: the draws follow from it and the subjects' names.
        level: of the interval.

    Raises:
        ValueError: the lengths differ, no rows, `draws` below 1, `level` not between 0 and 1; what `metric` raises.
    """
    truth, rows = _aligned(subjects, target, score)
    values = [metric(truth[chosen], rows[chosen]) for chosen in _resampled(subjects, draws, seed)]
    return Interval(float(metric(truth, rows)), *_percentiles(np.array(values, np.float64), level))


def paired_bootstrap(
    subjects: Sequence[str],
    target: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    metric: Metric,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedInterval:
    """The interval of metric(a) - metric(b) on the same resampled subjects, and the two-sided p of no difference.

    p is twice the smaller share of draws on one side of 0, where a draw at 0 is on both sides and the observed sample
    counts as one more draw of each, so that it is never 0 (Davison & Hinkley 1997, section 4.2.3). It is 1 for equal
    predictions. Both metrics must be defined in a draw for it to count.

    Takes, resamples and refuses as `bootstrap`; `a` and `b` are two methods' (N, ...) for the same rows.
    """
    truth, first, second = _aligned(subjects, target, a, b)
    values = np.array(
        [
            metric(truth[chosen], first[chosen]) - metric(truth[chosen], second[chosen])
            for chosen in _resampled(subjects, draws, seed)
        ],
        np.float64,
    )
    value = float(metric(truth, first) - metric(truth, second))
    low, high, used, skipped = _percentiles(values, level)
    if np.isnan(low):
        return PairedInterval(value, low, high, used, skipped, NAN)
    side = int(min(np.count_nonzero(values <= 0), np.count_nonzero(values >= 0)))
    return PairedInterval(value, low, high, used, skipped, min(1.0, 2 * (side + 1) / (used + 1)))


def holm(p_values: ArrayLike) -> Real:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given; they bound the chance of any false finding.

    The k-th smallest of m becomes the largest of (m - j + 1) p_(j) over j <= k, at most 1. A nan is a test that was not
    made: it stays nan and does not count. Raises ValueError for a value outside 0 .. 1.
    """
    p = np.asarray(p_values, np.float64)
    made = np.flatnonzero(~np.isnan(p))
    if p.ndim != 1 or not ((p[made] >= 0) & (p[made] <= 1)).all():
        raise ValueError(f"p-values must be (m), each within 0 .. 1 or nan: {p}")
    order = made[np.argsort(p[made], kind="stable")]
    adjusted = np.full(len(p), NAN)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


def stars(p: float) -> str:
    """`***` below .001, `**` below .01, `*` below .05, else `n.s.`; nothing for nan, a test that was not made."""
    return "" if np.isnan(p) else next((mark for level, mark in _LEVELS if p < level), "n.s.")


def compare(
    replicates: Mapping[str, Mapping[Any, float]],
    against: str,
    *,
    task: str,
    metric: str,
    boots: Mapping[str, PairedInterval] | None = None,
) -> list[Comparison]:
    """Each method against one of them, paired on the replicates that both have; the p-values Holm-corrected together.

    A replicate whose metric is nan on either side makes no pair. Comparisons of several tasks that are shown as one
    table are one family: put the lists together and correct them anew by `with_holm`.

    Args:
        replicates: for each method, the metric by what makes a pair: the seed, or (seed, fraction).
        against: the method that all others are compared with; it is `b`, and the difference is a - b.
        task: for the table.
        metric: one that `metrics.higher_is_better` knows.
        boots: for each method, `paired_bootstrap` of it (a) and `against` (b); nan is shown for one that is missing.

    Raises:
        ValueError: `against` or a key of `boots` is no other method's name, or the metric is unknown.
    """
    higher_is_better(metric)  # refuses what is unknown, before a table is half made
    if against not in replicates:
        raise ValueError(f"method {against!r} has no replicates: take one of {', '.join(replicates)}")
    others, boots = [method for method in replicates if method != against], boots or {}
    unknown = sorted(set(boots) - set(others))
    if unknown:
        raise ValueError(f"boots has {unknown}, none of the methods compared with {against!r}: {others}")
    return with_holm([_comparison(task, metric, one, against, replicates, boots.get(one)) for one in others])


def with_holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons, with `p_holm` anew for all of them as one family."""
    adjusted = holm([comparison.p for comparison in comparisons])
    return [replace(one, p_holm=float(p)) for one, p in zip(comparisons, adjusted, strict=True)]


def _comparison(
    task: str, metric: str, a: str, b: str, replicates: Mapping[str, Mapping[Any, float]], boot: PairedInterval | None
) -> Comparison:
    pairs = [(replicates[a][key], replicates[b][key]) for key in replicates[a] if key in replicates[b]]
    defined = np.array([pair for pair in pairs if not np.isnan(pair).any()], np.float64).reshape(-1, 2)
    test = paired_t(defined[:, 0], defined[:, 1])
    low, high, p = (boot.low, boot.high, boot.p) if boot else (NAN, NAN, NAN)
    return Comparison(task, metric, a, b, test.pairs, test.difference, test.t, test.p, NAN, low, high, p)


def _finite(name: str, values: ArrayLike) -> Real:
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be (n) finite numbers: {numbers}")
    return numbers


def _aligned(subjects: Sequence[str], *columns: ArrayLike) -> list[NDArray[Any]]:
    arrays = [np.asarray(column) for column in columns]
    lengths = [len(array) if array.ndim else 0 for array in arrays]
    if not len(subjects) or set(lengths) != {len(subjects)}:
        raise ValueError(f"{len(subjects)} subjects, targets and scores of {lengths}: give one of each for every row")
    return arrays


def _resampled(subjects: Sequence[str], draws: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """For each draw, the rows of as many subjects as there are, drawn with replacement; none for a single subject."""
    if draws < 1:
        raise ValueError(f"draws {draws} must be at least 1")
    subject = np.unique(np.asarray(subjects), return_inverse=True)[1]
    rows, counts = np.argsort(subject, kind="stable"), np.bincount(subject)
    starts, generator = np.cumsum(counts) - counts, np.random.default_rng(seed)
    if len(counts) < 2:
        return
    for _ in range(draws):
        drawn = generator.integers(len(counts), size=len(counts))
        lengths = counts[drawn]
        ends = np.cumsum(lengths)
        # Row j of a drawn subject that begins at `end - length` here lies at `start + j` among the ordered rows.
        yield rows[np.arange(ends[-1]) + np.repeat(starts[drawn] - ends + lengths, lengths)]


def _percentiles(values: Real, level: float) -> tuple[float, float, int, int]:
    """Low and high of the middle `level` of `values`, how many were defined, and how many were not."""
    if not 0 < level < 1:
        raise ValueError(f"level {level} must be between 0 and 1")
    defined = int(np.count_nonzero(~np.isnan(values)))
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2]) if defined else (NAN, NAN)
    return float(low), float(high), defined, len(values) - defined

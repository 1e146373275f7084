"""Intervals that cover as often as they say, tests against their definitions, and comparisons of what can be paired."""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from neurostorm.downstream.statistics.metrics import metric_of
from neurostorm.downstream.statistics.uncertainty import (
    PairedInterval,
    bootstrap,
    compare,
    holm,
    paired_bootstrap,
    paired_t,
    stars,
    summary,
    with_holm,
)

P_VALUES = st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.01, 0.04, 1.0])


def mean_score(target: np.ndarray, score: np.ndarray) -> float:
    return float(score.mean())


def names(count: int) -> list[str]:
    return [f"ds/sub-{number:03d}" for number in range(count)]


def test_summary() -> None:
    found = summary([1.0, 2.0, 6.0])
    assert (found.mean, found.n) == (3.0, 3)
    assert found.sd == pytest.approx(np.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2))
    one = summary([4])
    assert (one.mean, one.n) == (4.0, 1)
    assert np.isnan(one.sd)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 10), st.floats(0.5, 0.99))
def test_paired_t_is_that_of_the_definition(seed: int, pairs: int, level: float) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.normal(0.6, 0.1, pairs), generator.normal(0.5, 0.1, pairs)
    difference, error = (a - b).mean(), (a - b).std(ddof=1) / np.sqrt(pairs)
    found = paired_t(a, b, level=level)
    half = student.ppf((1 + level) / 2, pairs - 1) * error
    assert found.pairs == pairs
    assert found.t == pytest.approx(difference / error)
    assert found.p == pytest.approx(2 * student.sf(abs(difference / error), pairs - 1))
    assert (found.difference, found.ci_low, found.ci_high) == pytest.approx(
        (difference, difference - half, difference + half)
    )


def test_no_variance_between_pairs() -> None:
    """Equal results are no difference; one difference in all pairs, up to rounding, cannot be weighed."""
    a = np.array([0.1, 0.2, 0.7])
    same = paired_t(a, a + 1e-17)
    assert (same.p, same.difference, same.ci_low, same.ci_high, same.pairs) == (1, 0, 0, 0, 3)
    shifted = paired_t(a + 0.3, a)
    assert shifted.difference == pytest.approx(0.3)
    assert np.isnan([shifted.t, shifted.p, shifted.ci_low, shifted.ci_high]).all()


def test_fewer_than_two_pairs_have_no_p() -> None:
    one, none = paired_t([0.5], [0.25]), paired_t([], [])
    assert (one.difference, one.pairs, none.pairs) == (0.25, 1, 0)
    assert np.isnan([one.t, one.p, one.ci_low, none.difference, none.p]).all()


def test_the_t_interval_covers_as_often_as_it_says() -> None:
    """Five seeds, 800 experiments: 95 % within four standard errors; and p below .05 just as rarely."""
    generator = np.random.default_rng(0)
    found = [paired_t(generator.normal(0.3, 1, 5), generator.normal(0, 0.5, 5)) for _ in range(800)]
    covered = np.mean([one.ci_low <= 0.3 <= one.ci_high for one in found])
    assert covered == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 800))
    inside = [one.ci_low <= 0 <= one.ci_high for one in found]
    assert inside == [one.p > 0.05 for one in found]


def test_the_bootstrap_covers_as_often_as_it_says() -> None:
    """60 subjects, 200 experiments, 90 %: a percentile interval is a little narrow at this size, by about 1 %."""
    generator = np.random.default_rng(1)
    covered = []
    for seed in range(200):
        found = bootstrap(
            names(60), np.zeros(60), generator.normal(2, 3, 60), mean_score, draws=150, seed=seed, level=0.9
        )
        covered.append(found.low <= 2 <= found.high)
    assert np.mean(covered) == pytest.approx(0.89, abs=4 * np.sqrt(0.9 * 0.1 / 200))


def test_the_bootstrap_of_a_mean_has_its_standard_error() -> None:
    score = np.random.default_rng(2).normal(0, 1, 80)
    found = bootstrap(names(80), score, score, mean_score)
    error = score.std() / np.sqrt(80)
    assert found.value == score.mean()
    assert (found.draws, found.skipped) == (2000, 0)
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)
    narrow = bootstrap(names(80), score, score, mean_score, level=0.5)
    assert (narrow.high - narrow.low) / (2 * 0.6745 * error) == pytest.approx(1, abs=0.1)


def test_the_bootstrap_is_that_of_scipy() -> None:
    """One row a subject, no undefined draw: the same draws from the same seed, and the same interval."""
    target, score = np.random.default_rng(10).normal(size=(2, 40))
    metric = metric_of("mae")
    found = bootstrap(names(40), target, score, metric, draws=300, seed=7, level=0.9)
    theirs = scipy.stats.bootstrap(
        (np.arange(40),), lambda rows: metric(target[rows], score[rows]), n_resamples=300, vectorized=False,
        method="percentile", confidence_level=0.9, rng=np.random.default_rng(7),
    )  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval), rel=1e-12)


def test_draws_are_of_whole_subjects() -> None:
    """The rows of a draw are those of a twin that looks each drawn subject up; subjects of 1 to 4 rows, mixed."""
    generator = np.random.default_rng(3)
    subjects = [names(6)[i] for i in generator.permutation(np.repeat(np.arange(6), [1, 2, 4, 1, 3, 2]))]
    rows_of = {name: [row for row, other in enumerate(subjects) if other == name] for name in names(6)}
    drawn: list[list[int]] = []

    def record(target: np.ndarray, score: np.ndarray) -> float:
        assert (target == score[:, 0]).all()
        drawn.append(score[:, 0].tolist())
        return 0.0

    rows = np.arange(len(subjects))
    bootstrap(subjects, rows, np.stack([rows, rows], axis=1), record, draws=50)
    *resampled, observed = drawn
    assert observed == rows.tolist()
    assert len({tuple(one) for one in resampled}) > 40
    for one in resampled:
        expected, rest = [], one
        while rest:
            whole = rows_of[subjects[rest[0]]]
            expected.append(whole)
            assert rest[: len(whole)] == whole
            rest = rest[len(whole) :]
        assert len(expected) == 6


def test_clips_of_a_subject_are_no_further_subjects() -> None:
    """Five equal rows of each subject give the interval of one row each."""
    score = np.random.default_rng(4).normal(size=30)
    single = bootstrap(names(30), score, score, mean_score)
    repeated = bootstrap(np.repeat(names(30), 5).tolist(), np.repeat(score, 5), np.repeat(score, 5), mean_score)
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high))


def test_the_seed_decides_and_the_order_of_subjects_does_not() -> None:
    score = np.random.default_rng(5).normal(size=20)
    order = np.random.default_rng(6).permutation(20)
    one = bootstrap(names(20), score, score, mean_score, seed=1)
    moved = bootstrap([names(20)[i] for i in order], score[order], score[order], mean_score, seed=1)
    assert (moved.low, moved.high) == pytest.approx((one.low, one.high))
    assert bootstrap(names(20), score, score, mean_score, seed=2).low != one.low


def test_undefined_draws_are_skipped_and_counted() -> None:
    """One of 5 subjects is of class 1: it is absent from (4/5)^5 = 33 % of the draws, where AUROC has no value."""
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.35, 0.65]])
    target = np.array([0, 0, 0, 0, 1])
    found = bootstrap(names(5), target, scores, metric_of("auroc", ("no", "yes")), draws=600)
    assert found.value == 0.75
    assert found.draws + found.skipped == 600
    assert found.skipped / 600 == pytest.approx(0.8**5, abs=4 * np.sqrt(0.33 * 0.67 / 600))
    assert 0 <= found.low <= 0.75 <= found.high <= 1
    paired = paired_bootstrap(names(5), target, scores, scores[:, ::-1], metric_of("auroc", ("no", "yes")), draws=600)
    assert (paired.draws, paired.skipped) == (found.draws, found.skipped)


def test_without_a_second_subject_or_a_defined_draw_there_is_no_interval() -> None:
    one = bootstrap(["ds/sub-1"] * 3, [1, 2, 3], [1, 2, 6], mean_score)
    assert (one.value, one.draws, one.skipped) == (3, 0, 0)
    never = paired_bootstrap(names(3), [0, 0, 0], [1.0, 2, 3], [1.0, 2, 4], lambda target, score: float("nan"), draws=7)
    assert (never.draws, never.skipped) == (0, 7)
    assert np.isnan([one.low, one.high, never.value, never.low, never.high, never.p]).all()


def test_the_paired_bootstrap_is_that_of_the_differences() -> None:
    """For a mean, the difference of the metrics is the metric of the difference: same draws, same interval."""
    generator = np.random.default_rng(7)
    a, b = generator.normal(0.2, 1, 50), generator.normal(0, 1, 50)
    found, twin = (
        paired_bootstrap(names(50), a, a, b, mean_score, seed=3),
        bootstrap(names(50), a, a - b, mean_score, seed=3),
    )
    assert (found.value, found.low, found.high) == pytest.approx((twin.value, twin.low, twin.high))
    swapped = paired_bootstrap(names(50), a, b, a, mean_score, seed=3)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert swapped.p == found.p


def test_the_p_of_the_paired_bootstrap() -> None:
    a = np.random.default_rng(8).normal(size=40)
    assert paired_bootstrap(names(40), a, a, a, mean_score, draws=99).p == 1
    assert paired_bootstrap(names(40), a, a + 1, a, mean_score, draws=99).p == pytest.approx(2 / 100)


def test_the_p_of_no_difference_is_below_5_percent_as_rarely() -> None:
    generator = np.random.default_rng(9)
    p = [
        paired_bootstrap(names(50), np.zeros(50), *generator.normal(size=(2, 50)), mean_score, draws=100, seed=seed).p
        for seed in range(150)
    ]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / 150))
    assert np.mean(p) == pytest.approx(0.5, abs=4 * np.sqrt(1 / 12 / 150))


@settings(deadline=None, max_examples=100)
@given(st.lists(P_VALUES | st.just(float("nan")), max_size=7))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """A hypothesis falls when each set that holds it falls by Bonferroni: the principle that Holm's steps shorten."""
    made = [i for i, p in enumerate(p_values) if not np.isnan(p)]
    expected = [float("nan")] * len(p_values)
    for i in made:
        sets = [chosen for size in range(1, len(made) + 1) for chosen in combinations(made, size) if i in chosen]
        expected[i] = max(min(1.0, len(chosen) * min(p_values[j] for j in chosen)) for chosen in sets)
    np.testing.assert_allclose(holm(p_values), expected)


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.04, 0.01, np.nan, 0.03]), [0.06, 0.03, np.nan, 0.06])


def test_stars() -> None:
    marks = {0.0: "***", 0.00099: "***", 0.001: "**", 0.0099: "**", 0.01: "*", 0.049: "*", 0.05: "n.s.", 1.0: "n.s."}
    assert {p: stars(p) for p in marks} == marks
    assert stars(float("nan")) == ""


RUNS: Mapping[str, Mapping[Any, float]] = {
    "ours": {0: 0.70, 1: 0.74, 2: 0.69, 3: 0.71, 4: 0.75},
    "fc": {2: 0.66, 1: 0.65, 0: 0.64, 9: 0.99},
    "scratch": {0: 0.60, 1: 0.76, 3: 0.68, 4: float("nan")},
    "motion": {0: 0.5},
}


def test_comparisons_pair_common_keys_only() -> None:
    fc, scratch, motion = compare(RUNS, "ours", task="sex", metric="auroc")
    assert (fc.task, fc.metric, fc.a, fc.b, fc.pairs) == ("sex", "auroc", "fc", "ours", 3)
    twin = paired_t([0.64, 0.65, 0.66], [0.70, 0.74, 0.69])
    assert (fc.t, fc.p, fc.difference) == pytest.approx((twin.t, twin.p, twin.difference))
    assert (scratch.pairs, motion.pairs) == (3, 1)
    assert motion.difference == pytest.approx(-0.2)
    assert np.isnan([motion.p, motion.p_holm, fc.boot_p, fc.boot_low]).all()
    np.testing.assert_allclose([fc.p_holm, scratch.p_holm], holm([fc.p, scratch.p]))
    assert fc.p_holm == pytest.approx(2 * fc.p)


def test_the_better_one_follows_the_metric() -> None:
    assert [one.better for one in compare(RUNS, "ours", task="sex", metric="auroc")] == ["ours"] * 3
    assert [one.better for one in compare(RUNS, "ours", task="age", metric="mae")] == ["fc", "scratch", "motion"]
    nobody = {"a": {0: 1.0, 1: 2.0}, "same": {0: 1.0, 1: 2.0}, "apart": {5: 1.0}}
    assert [one.better for one in compare(nobody, "a", task="age", metric="r")] == ["", ""]


def test_the_bootstrap_stands_beside_the_test() -> None:
    boot = PairedInterval(-0.06, -0.1, -0.02, 2000, 0, 0.004)
    fc, scratch, _ = compare(RUNS, "ours", task="sex", metric="auroc", boots={"fc": boot})
    assert (fc.boot_low, fc.boot_high, fc.boot_p) == (-0.1, -0.02, 0.004)
    assert np.isnan(scratch.boot_p)


def test_tables_of_several_tasks_are_corrected_as_one_family() -> None:
    tables = [one for task in ("sex", "age") for one in compare(RUNS, "ours", task=task, metric="r")]
    joined = with_holm(tables)
    assert [one.p for one in joined] == pytest.approx([one.p for one in tables], nan_ok=True)
    np.testing.assert_allclose([one.p_holm for one in joined], holm([one.p for one in tables]))
    assert joined[0].p_holm == pytest.approx(2 * tables[0].p_holm)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summary([]), "no values"),
        (lambda: summary([1.0, np.nan]), "values must be"),
        (lambda: paired_t([1.0], [1.0, 2.0]), "a has 1 and b 2"),
        (lambda: paired_t([1.0, np.inf], [1.0, 2.0]), "a must be"),
        (lambda: holm([0.5, 1.5]), r"within 0 \.\. 1"),
        (lambda: bootstrap([], [], [], mean_score), "0 subjects"),
        (lambda: bootstrap(names(2), [1, 2], [1], mean_score), r"2 subjects, .* of \[2, 1\]"),
        (lambda: paired_bootstrap(names(2), [1, 2], [1, 2], 3.0, mean_score), r"\[2, 2, 0\]"),
        (lambda: bootstrap(names(2), [1, 2], [1, 2], mean_score, draws=0), "draws 0"),
        (lambda: bootstrap(names(2), [1, 2], [1, 2], mean_score, level=95), "level 95"),
        (lambda: compare(RUNS, "theirs", task="sex", metric="r"), "'theirs' has no replicates.*ours, fc"),
        (lambda: compare(RUNS, "ours", task="sex", metric="f2"), "'f2'"),
        (lambda: compare(RUNS, "ours", task="sex", metric="r", boots={"ours": None}), "'ours'"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

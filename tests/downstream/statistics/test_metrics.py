"""The metrics against scikit-learn and SciPy, and in the cases that those leave open."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, r2_score, roc_auc_score

from neurostorm.downstream.statistics.metrics import (
    chance_of,
    classification,
    confusion,
    higher_is_better,
    metric_of,
    pool,
    regression,
)

NAMES = ("a", "b", "c", "d", "e")


def probabilities(generator: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Rows that sum to 1, coarse enough for ties between rows and within one."""
    counts = generator.multinomial(6, np.full(width, 1 / width), size=rows)
    return counts / 6


def auroc_by_pairs(positive: np.ndarray, score: np.ndarray) -> float:
    """The share of (positive, negative) pairs in the right order, ties half."""
    pairs = [(p, n) for p in score[positive] for n in score[~positive]]
    return float(np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs]))


def test_regression_is_that_of_the_definitions() -> None:
    generator = np.random.default_rng(0)
    target = generator.normal(40, 12, 60)
    guess = target + generator.normal(3, 8, 60)
    found = regression(target, guess)
    assert found["mae"] == pytest.approx(np.abs(target - guess).mean())
    assert found["rmse"] == pytest.approx(np.sqrt(((target - guess) ** 2).mean()))
    assert (
        found["r"]
        == pytest.approx(pearsonr(target, guess).statistic)
        == pytest.approx(np.corrcoef(target, guess)[0, 1])
    )
    assert found["r2"] == pytest.approx(1 - ((target - guess) ** 2).sum() / ((target - target.mean()) ** 2).sum())
    assert found["r2"] == pytest.approx(r2_score(target, guess))


@pytest.mark.parametrize("noise", [0.0, 1e-15])
def test_a_mean_predictor_ranks_nobody(noise: float) -> None:
    """Rounding in the mean is no prediction: it could rank in any way."""
    target = np.arange(8.0)
    found = regression(target, 3.5 + noise * np.array([0, 1, 2, 3, 4, 5, 6, 7]))
    assert found["r"] == 0
    assert found["r2"] == pytest.approx(0)
    assert found["mae"] == pytest.approx(2)


@pytest.mark.parametrize("target", [[5.0], [5.0, 5.0, 5.0], [0.0, 0.0]])
def test_a_constant_target_cannot_be_ranked(target: list[float]) -> None:
    found = regression(target, np.arange(len(target)))
    assert np.isnan([found["r"], found["r2"]]).all()
    assert np.isfinite([found["mae"], found["rmse"]]).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 30))
def test_classification_against_scikit_learn_with_classes_missing(seed: int, width: int, rows: int) -> None:
    generator = np.random.default_rng(seed)
    scores = probabilities(generator, rows, width)
    target = generator.choice(generator.choice(width, generator.integers(1, width + 1), replace=False), rows)
    present, guess = np.unique(target), scores.argmax(1)
    found = classification(target, scores, NAMES[:width])
    recalls = [(guess[target == one] == one).mean() for one in present]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    if set(guess) <= set(present) and len(present) > 1:
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(target, guess))
    assert found["accuracy"] == pytest.approx((target == guess).mean())
    each = f1_score(target, guess, average=None, labels=range(width), zero_division=0)
    assert found["macro_f1"] == pytest.approx(each[present].mean())
    if len(present) == 1:
        assert np.isnan(found["auroc"])
    else:
        positives = [1] if width == 2 else present
        for area in (auroc_by_pairs, roc_auc_score):
            of_each = [area(target == one, scores[:, one]) for one in positives]
            assert found["auroc"] == pytest.approx(np.mean(of_each))
    if len(present) == width > 2:
        assert found["auroc"] == pytest.approx(roc_auc_score(target, scores, multi_class="ovr"))


def test_confusion_has_the_truth_in_rows() -> None:
    scores = np.eye(3)[[0, 2, 2, 1, 2]]
    assert confusion(np.array([0, 0, 0, 1, 1]), scores).tolist() == [[1, 0, 2], [0, 1, 1], [0, 0, 0]]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 30))
def test_confusion_and_accuracies_agree(seed: int, width: int, rows: int) -> None:
    generator = np.random.default_rng(seed)
    target, scores = generator.integers(width, size=rows), probabilities(generator, rows, width)
    table, found = confusion(target, scores), classification(target, scores, NAMES[:width])
    assert table.tolist() == confusion_matrix(target, scores.argmax(1), labels=range(width)).tolist()
    assert table.sum(axis=1).tolist() == np.bincount(target, minlength=width).tolist()
    assert np.trace(table) / rows == pytest.approx(found["accuracy"])


@pytest.mark.parametrize("name", ["mae", "rmse", "r", "r2"])
def test_one_metric_of_a_regression(name: str) -> None:
    target, guess = np.arange(6.0), np.array([1.0, 0, 2, 5, 3, 6])
    assert metric_of(name)(target, guess) == regression(target, guess)[name]


@pytest.mark.parametrize("name", ["balanced_accuracy", "accuracy", "macro_f1", "auroc"])
def test_one_metric_of_a_classification(name: str) -> None:
    target, scores = np.array([0, 1, 2, 1]), probabilities(np.random.default_rng(3), 4, 3)
    assert metric_of(name, NAMES[:3])(target, scores) == classification(target, scores, NAMES[:3])[name]
    with pytest.raises(ValueError, match="2 classes"):
        metric_of(name, NAMES[:2])(target, scores)


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    for ask in (metric_of, higher_is_better, chance_of):
        with pytest.raises(ValueError, match=r"'f2'.*balanced_accuracy"):
            ask("f2")


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from([(), (3,), (2, 3)]), st.integers(1, 6))
def test_pool_is_the_mean_of_each_unit(seed: int, shape: tuple[int, ...], count: int) -> None:
    generator = np.random.default_rng(seed)
    unit = generator.permutation(np.concatenate([np.arange(count), generator.integers(count, size=9)]))
    values = generator.normal(size=(len(unit), *shape)).astype(np.float32)
    pooled = pool(unit, values)
    assert pooled.dtype == np.float64
    assert pooled.shape == (count, *shape)
    for one in range(count):
        np.testing.assert_allclose(pooled[one], values[unit == one].astype(float).mean(axis=0), atol=1e-12)


def test_chance() -> None:
    assert chance_of("r") == chance_of("r2") == 0
    assert chance_of("auroc") == 0.5
    assert chance_of("accuracy", classes=4) == chance_of("balanced_accuracy", classes=4) == 0.25
    assert chance_of("rank1", gallery=100) == 0.01
    assert chance_of("map", gallery=3) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert np.isnan([chance_of(name) for name in ("mae", "rmse", "macro_f1")]).all()


@pytest.mark.parametrize(("metric", "field"), [("accuracy", "classes"), ("rank1", "gallery"), ("map", "gallery")])
def test_chance_needs_its_count(metric: str, field: str) -> None:
    with pytest.raises(ValueError, match=f"{metric} needs {field}"):
        chance_of(metric)


def test_guessing_reaches_chance() -> None:
    """Within four standard errors of 4,000 guesses, whatever the classes' shares."""
    generator = np.random.default_rng(1)
    target = generator.choice(3, 4000, p=[0.6, 0.3, 0.1])
    found = classification(target, np.eye(3)[generator.integers(3, size=4000)], NAMES[:3])
    assert found["accuracy"] == pytest.approx(chance_of("accuracy", classes=3), abs=4 * np.sqrt(2 / 9 / 4000))
    rarest = np.sqrt(2 / 9 / 400)  # the standard error of the rarest class's recall
    assert found["balanced_accuracy"] == pytest.approx(chance_of("balanced_accuracy", classes=3), abs=4 * rarest)
    assert found["auroc"] == pytest.approx(chance_of("auroc"), abs=0.05)


def test_which_way_is_better() -> None:
    names = ("mae", "rmse", "r", "r2", "balanced_accuracy", "accuracy", "macro_f1", "auroc", "rank1", "map")
    assert [name for name in names if not higher_is_better(name)] == ["mae", "rmse"]


HALVES = np.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: regression([], []), "at least 1"),
        (lambda: regression([1.0, 2.0], [1.0]), r"\(2,\).*\(1,\)"),
        (lambda: regression([[1.0]], [[1.0]]), "must both be"),
        (lambda: regression([1.0, np.nan], [1.0, 2.0]), "target of row 1 is nan"),
        (lambda: regression([1.0, 2.0], [np.inf, 2.0]), "prediction of row 0 is inf"),
        (lambda: classification([], np.zeros((0, 2)), NAMES[:2]), "at least 1"),
        (lambda: classification([0, 1], HALVES, NAMES[:3]), "K = 3 classes"),
        (lambda: classification([0], [[1.0]], NAMES[:1]), "at least 2"),
        (lambda: classification([0.0, 1.0], HALVES, NAMES[:2]), "float64: give integers"),
        (lambda: classification([0, 2], HALVES, NAMES[:2]), r"row 1 is 2.*a, b"),
        (lambda: classification([-1, 1], HALVES, NAMES[:2]), "row 0 is -1"),
        (lambda: classification([0, 1], [[0.5, 0.5], [2.0, 3.0]], NAMES[:2]), "scores of row 1.*softmax"),
        (lambda: classification([0, 1], [[-0.5, 1.5], [0.5, 0.5]], NAMES[:2]), "scores of row 0"),
        (lambda: classification([0, 1], [[np.nan, 1.0], [0.5, 0.5]], NAMES[:2]), "scores of row 0"),
        (lambda: confusion([0, 1], [0.5, 0.5]), r"scores \(2,\)"),
        (lambda: pool([0, 2], [1.0, 2.0]), "unit 1 of 3 has no clip"),
        (lambda: pool([0, -1], [1.0, 2.0]), "-1 is negative"),
        (lambda: pool([0], [1.0, 2.0]), r"\(1,\), \(2,\)"),
        (lambda: pool([0.0, 1.0], [1.0, 2.0]), "integers"),
        (lambda: pool(np.zeros(0, int), []), "integers"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_r_is_pearson_and_not_rank_correlation() -> None:
    target, guess = np.arange(10.0), np.arange(10.0) ** 4
    assert spearmanr(target, guess).statistic == pytest.approx(1)
    assert regression(target, guess)["r"] < 0.95

"""Linear and constant models on vectors, and the features of motion and acquisition."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from neurostorm.downstream.methods.simple import (
    MOTION_FEATURES,
    Affine,
    Span,
    build_vector_model,
    motion_features,
    motion_matrix,
)


def some_data(units: int, features: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of different scales, a target that they tell in part, and features of further units."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((units + 9, features)) * rng.uniform(0.1, 30, features) + 5
    y = 40 + 3 * ((x - 5) @ rng.standard_normal(features) / np.sqrt(features)) + rng.standard_normal(units + 9)
    return x[:units], y[:units], x[units:]


@pytest.mark.parametrize(("units", "features"), [(60, 8), (30, 400), (12, 12)])
@pytest.mark.parametrize("strength", [0.5, 200.0])
def test_regression_is_ridge_on_standardised_features(units: int, features: int, strength: float) -> None:
    x, y, new = some_data(units, features)
    plain = make_pipeline(StandardScaler(), Ridge(alpha=strength, solver="svd")).fit(x, y)
    found = build_vector_model("regression", strength, "linear").fit(x, y).predict(new)
    np.testing.assert_allclose(found, plain.predict(new), rtol=1e-7)


@pytest.mark.parametrize(("units", "features"), [(60, 8), (30, 200)])
@pytest.mark.parametrize("classes", [2, 3])
def test_classification_is_logistic_regression_with_balanced_classes(units: int, features: int, classes: int) -> None:
    x, y, new = some_data(units, features)
    target = np.digitize(y, np.quantile(y, [0.25, 0.5][: classes - 1]))  # classes of different sizes
    logistic = LogisticRegression(C=1 / 3, class_weight="balanced", tol=1e-9, max_iter=20_000)
    plain = make_pipeline(StandardScaler(), logistic).fit(x, target)
    found = build_vector_model("classification", 3.0, "linear", range(classes)).fit(x, target).predict(new)
    np.testing.assert_allclose(found, plain.predict_proba(new), atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), units=st.integers(2, 12), more=st.integers(1, 30), copies=st.integers(0, 5))
def test_the_span_keeps_lengths_and_angles(seed: int, units: int, more: int, copies: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((units, units + more))
    x = np.concatenate([x, x[rng.integers(0, units, min(copies, more - 1))]])  # rows that add no direction
    x -= x.mean(0)
    turned = Span().fit(x).transform(x)
    assert turned.shape[1] < len(x)  # centred rows leave one direction less
    np.testing.assert_allclose(turned @ turned.T, x @ x.T, atol=1e-8 * np.abs(x @ x.T).max())


def test_edges_of_a_few_subjects_are_fitted_in_their_span() -> None:
    x, y, new = some_data(40, 4950)
    spanned = Span().fit(x - x.mean(0)).transform(new)
    assert spanned.shape == (9, 39)
    model = build_vector_model("classification", 1.0, "linear", (0, 1)).fit(x, y > np.median(y))
    assert ((model.predict(x)[:, 1] > 0.5) == (y > np.median(y))).all()


def test_the_target_keeps_its_unit_and_its_penalty() -> None:
    """Years or months: the same fit, for the penalty sees the standardised target."""
    x, y, new = some_data(50, 6)
    years = build_vector_model("regression", 10.0, "linear").fit(x, y).predict(new)
    months = build_vector_model("regression", 10.0, "linear").fit(x, 12 * y + 6).predict(new)
    np.testing.assert_allclose(months, 12 * years + 6, rtol=1e-9)
    assert np.ptp(build_vector_model("regression", 1.0, "linear").fit(x, np.full(50, 7.0)).predict(new)) < 1e-9


@pytest.mark.parametrize("features", [4, 90])
def test_constant_absent_and_missing_features_leave_no_nan(features: int) -> None:
    x, y, new = some_data(30, features)
    reference = build_vector_model("regression", 1.0, "linear").fit(x[:, 3:], y).predict(new[:, 3:])
    x[:, 0], x[:, 1], x[:, 2] = 0.1, np.nan, 1e-3
    new[:, 2] = np.nan
    filled, holed = x.copy(), x.copy()
    holed[5, 3] = np.nan
    filled[5, 3] = np.nanmean(holed[:, 3])
    found = [build_vector_model("regression", 1.0, "linear").fit(rows, y).predict(new) for rows in (holed, filled)]
    np.testing.assert_allclose(*found, rtol=1e-12)  # a gap counts as the training mean
    np.testing.assert_allclose(
        build_vector_model("regression", 1.0, "linear").fit(x, y).predict(new), reference, rtol=1e-9
    )
    probabilities = build_vector_model("classification", 1.0, "linear", (False, True)).fit(holed, y > 40).predict(new)
    assert np.isfinite(probabilities).all()


def test_units_of_whom_nothing_is_known_are_no_error_and_no_warning() -> None:
    x = np.full((4, 2), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predicted = build_vector_model("regression", 1.0, "linear").fit(x, [1.0, 2.0, 3.0, 6.0]).predict(x[:1])
    assert predicted.tolist() == [3]


def test_features_that_are_all_constant_predict_what_is_known_without_them() -> None:
    x, y = np.full((6, 20), 2.0), np.array([1.0, 2, 3, 4, 5, 9])
    assert build_vector_model("regression", 1.0, "linear").fit(x, y).predict(x[:2]).tolist() == [4, 4]
    model = build_vector_model("classification", 1.0, "linear", (False, True)).fit(x, y > 4)
    np.testing.assert_allclose(model.predict(x[:1]), [[0.5, 0.5]], atol=1e-4)  # balanced: both alike


def test_the_constant_models_know_the_training_split_alone() -> None:
    x, y, new = some_data(8, 3)
    mean = build_vector_model("regression", 1.0, "constant").fit(x, y).predict(new)
    assert mean.tolist() == [y.mean()] * 9
    model = build_vector_model("classification", 1.0, "constant", ("a", "b", "c"))
    target = np.array(["c", "a", "c", "c", "a", "c", "c", "c"])
    assert model.fit(x, target).predict(new).tolist() == [[0.25, 0, 0.75]] * 9


@pytest.mark.parametrize("present", [("young", "old"), ("middle",), ("old", "middle")])
def test_columns_are_the_given_classes_and_absent_ones_get_none(present: tuple[str, ...]) -> None:
    classes = ("young", "middle", "old")  # not in the order of the alphabet
    x = np.array([[0.0], [0.1], [3.0], [3.1]])
    target = [present[0], present[0], present[-1], present[-1]]
    scores = build_vector_model("classification", 0.1, "linear", classes).fit(x, target).predict(x)
    np.testing.assert_allclose(scores.sum(1), 1)
    for column, name in enumerate(classes):
        assert (scores[:, column] > 0).all() if name in present else not scores[:, column].any()
    assert [classes[column] for column in scores.argmax(1)] == target


def applied(found: Affine, x: np.ndarray) -> np.ndarray:
    return (x - found.shift) / found.scale @ found.weights + found.bias


def with_flaws(x: np.ndarray) -> np.ndarray:
    """The same features with gaps, one that never varies and one that nobody has."""
    flawed = x.copy()
    flawed[1::4, 2] = np.nan
    flawed[:, 0], flawed[:, 1] = 0.1, np.nan
    return flawed


FEWER_AND_MORE = pytest.mark.parametrize(("units", "features"), [(60, 8), (30, 200)])


@FEWER_AND_MORE
@pytest.mark.parametrize("strength", [0.5, 200.0])
def test_as_a_map_a_regression_gives_the_standardised_target(units: int, features: int, strength: float) -> None:
    x, y, new = some_data(units, features)
    for train in (x, with_flaws(x)):
        model = build_vector_model("regression", strength, "linear").fit(train, y)
        found = applied(model.affine(), new)
        assert found.shape == (9, 1) and np.ptp(found) > 0.05
        np.testing.assert_allclose(found[:, 0] * y.std() + y.mean(), model.predict(new), rtol=1e-9)


@FEWER_AND_MORE
@pytest.mark.parametrize(("classes", "present"), [(2, (0, 1)), (3, (0, 1, 2)), (3, (0, 1)), (3, (0, 2)), (3, (1, 2))])
def test_as_a_map_a_classification_gives_logits(units: int, features: int, classes: int, present) -> None:
    x, y, new = some_data(units, features)
    edges = np.quantile(y, [0.3, 0.6][: len(present) - 1])
    target = np.array(present)[np.digitize(y, edges)]
    for train in (x, with_flaws(x)):
        model = build_vector_model("classification", 3.0, "linear", range(classes)).fit(train, target)
        logits, expected = applied(model.affine(), new), model.predict(new)
        assert logits.shape == (9, 1 if classes == 2 else 3)
        assert np.ptp(expected[:, present[-1]]) > 0.1
        found = expit(logits[:, 0]) if classes == 2 else softmax(logits, 1)
        np.testing.assert_allclose(found, expected[:, 1] if classes == 2 else expected, atol=1e-9)


def test_what_tells_nothing_apart_is_no_map() -> None:
    x, y, _ = some_data(12, 3)
    constant = (
        build_vector_model("regression", 1.0, "constant").fit(x, y),
        build_vector_model("classification", 1.0, "constant", (0, 1)).fit(x, np.arange(12) % 2),
    )
    for model in constant:
        with pytest.raises(TypeError, match="a constant is no map of features"):
            model.affine()
    for classes in (2, 3):
        model = build_vector_model("classification", 1.0, "linear", range(classes)).fit(x, np.ones(12, int))
        with pytest.raises(TypeError, match="training units of one class: no feature tells anything apart"):
            model.affine()


def test_a_fit_has_no_randomness_and_starts_anew() -> None:
    x, y, new = some_data(30, 100)
    model = build_vector_model("classification", 1.0, "linear", (False, True))
    first = model.fit(x, y > 40).predict(new)
    other = model.fit(x[::-1] ** 2, y > 41).predict(new)
    assert not np.array_equal(first, other)
    assert np.array_equal(model.fit(x, y > 40).predict(new), first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("regression", 1.0, "forest"), "forest.*constant, linear"),
        (("ranking", 1.0, "linear"), "ranking"),
        (("regression", 0.0, "linear"), "strength = 0.0"),
        (("regression", math.nan, "linear"), "strength = nan"),
        (("regression", math.inf, "linear"), "strength = inf"),
        (("classification", 1.0, "linear"), "list each class once"),
        (("classification", 1.0, "constant", ("a", "b", "a")), "list each class once"),
    ],
)
def test_models_that_cannot_be_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_vector_model(*arguments)


@pytest.mark.parametrize("name", ["constant", "linear"])
def test_data_that_do_not_fit_are_refused(name: Any) -> None:
    regression = build_vector_model("regression", 1.0, name)
    for x, y in ((np.zeros((3, 2)), np.zeros(4)), (np.zeros(3), np.zeros(3)), (np.zeros((0, 2)), np.zeros(0))):
        with pytest.raises(ValueError, match=r"\(N, D\) and \(N,\) are needed"):
            regression.fit(x, y)
    with pytest.raises(ValueError, match=r"y\[1\] is not finite"):
        regression.fit(np.zeros((3, 2)), [1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match="y holds x, z: the classes are a, b"):
        build_vector_model("classification", 1.0, name, ("a", "b")).fit(np.zeros((4, 2)), ["a", "z", "x", "b"])


def test_motion_features_are_the_finite_numbers_of_motion_and_acquisition() -> None:
    attributes = {
        "fd_mean_mm": 0.2, "fd_max_mm": None, "coverage": math.nan, "source_frames": 100, "global_std": True,
        "tsnr_median": "50", "frames": 48, "subject": "sub-1", "events": [[0.0, 1.0, "go"]],
    }  # fmt: skip
    assert motion_features(attributes) == {"fd_mean_mm": 0.2, "source_frames": 100.0}
    assert set(motion_features(dict.fromkeys(MOTION_FEATURES, 1))) == set(MOTION_FEATURES)


def test_the_motion_matrix_drops_what_nobody_has_and_marks_what_some_lack() -> None:
    rows = [{"coverage": 0.9, "fd_mean_mm": 0.1}, {"coverage": 0.8}, {"source_tr_s": 2.0, "coverage": 1.0}]
    matrix, names = motion_matrix(rows)
    assert names == ("fd_mean_mm", "coverage", "source_tr_s")
    np.testing.assert_array_equal(matrix, [[0.1, 0.9, np.nan], [np.nan, 0.8, np.nan], [np.nan, 1.0, 2.0]])
    assert motion_matrix([{}, {}])[0].shape == (2, 0)
    predicted = build_vector_model("regression", 1.0, "linear").fit(matrix, [1.0, 2.0, 3.0]).predict(matrix)
    assert np.isfinite(predicted).all()

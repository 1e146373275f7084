"""The matcher: vectors of people seen again, shrunk along what differs within a person."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from neurostorm.downstream.methods import vectors
from neurostorm.downstream.methods.simple import Affine
from neurostorm.downstream.statistics.reid import ranks_of

RNG = np.random.default_rng


def people_of(count: int, size: int, runs: int = 4) -> tuple[NDArray[np.float64], list[str]]:
    """Vectors (count x runs, size) of people in a small signal, with large noise in few directions that all share."""
    rng = RNG([count, size])
    persons = rng.standard_normal((count, size))
    noisy = rng.standard_normal((3, size))
    found = np.repeat(persons, runs, 0) + 0.3 * rng.standard_normal((count * runs, size))
    found += 5 * rng.standard_normal((count * runs, 3)) @ noisy
    return found + 7 * rng.standard_normal(size), [
        f"d/sub-{number:03d}" for number in range(count) for _ in range(runs)
    ]


def found_again(given: NDArray[np.float64]) -> float:
    """Mean of 1/rank with the even rows as gallery and the odd ones as queries, whose neighbours they are."""
    unit = given / np.linalg.norm(given, axis=1, keepdims=True)
    return float((1 / ranks_of(unit[::2], unit[1::2])).mean())


def cosines(given: NDArray[np.float64]) -> NDArray[np.float64]:
    unit = given / np.linalg.norm(given, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("size", [8, 40])  # fewer and more numbers than the 24 training vectors
def test_a_large_strength_leaves_the_cosine_of_centred_vectors(size: int) -> None:
    given, subjects = people_of(10, size)
    train, test = given[:24], given[24:]
    matcher = vectors.Matcher(1e9).fit(train, subjects[:24])
    for rows in (train, test):
        np.testing.assert_allclose(cosines(matcher.transform(rows)), cosines(rows - train.mean(0)), atol=1e-6)


@pytest.mark.parametrize("size", [12, 120])
def test_shrinking_what_differs_within_people_finds_others_again(size: int) -> None:
    given, subjects = people_of(60, size)
    trained = 4 * 30
    test = given[trained:].reshape(30, 4, size)[:, :2].reshape(60, size)
    plain = found_again(test - given[:trained].mean(0))
    shrunk = found_again(vectors.Matcher(0.01).fit(given[:trained], subjects[:trained]).transform(test))
    assert shrunk > 0.8 > 0.6 > plain


def test_the_map_is_that_of_the_formula() -> None:
    given, subjects = people_of(10, 6)
    centred = given - given.mean(0)
    within = np.concatenate([centred[4 * n : 4 * n + 4] - centred[4 * n : 4 * n + 4].mean(0) for n in range(10)])
    covariance = within.T @ within / len(within)
    values, axes = np.linalg.eigh(covariance / np.trace(covariance) * 6 + 2.0 * np.eye(6))
    expected = centred @ axes @ np.diag(values**-0.5) @ axes.T
    found = vectors.Matcher(2.0).fit(given, subjects).transform(given)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, rtol=1e-6)


def applied(found: Affine, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return (rows - found.shift) / found.scale @ found.weights + found.bias


@pytest.mark.parametrize("size", [8, 40])  # fewer and more numbers than the 24 training vectors
@pytest.mark.parametrize("strength", [0.01, 1.0, 1e4])
def test_as_a_map_the_matcher_has_the_same_cosines_in_the_training_span(size: int, strength: float) -> None:
    given, subjects = people_of(10, size)
    train = given[:24]
    matcher = vectors.Matcher(strength).fit(train, subjects[:24])
    mixed = train.mean(0) + RNG(3).standard_normal((9, 24)) @ (train - train.mean(0))
    for outputs in (24, 60):
        found = matcher.affine(outputs)
        assert found.weights.shape == (size, outputs)
        for rows in (train, mixed):
            mapped, expected = applied(found, rows), matcher.transform(rows)
            np.testing.assert_allclose(mapped @ mapped.T, expected @ expected.T, atol=1e-8 * (expected**2).sum())
            np.testing.assert_allclose(cosines(mapped), cosines(expected), atol=1e-6)
        directions = min(size, 23)
        assert mapped[:, :directions].any(0).all() and not mapped[:, directions:].any(), "the rest is zero"


@pytest.mark.parametrize("size", [8, 40])
def test_fewer_outputs_than_directions_are_those_in_which_training_vectors_lie_widest(size: int) -> None:
    given, subjects = people_of(10, size)
    train = given[:24]
    matcher = vectors.Matcher(0.5).fit(train, subjects[:24])
    expected = PCA(3, svd_solver="full").fit(matcher.transform(train)).transform(matcher.transform(train))
    found = applied(matcher.affine(3), train)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-6 * np.abs(expected).max())


def test_what_nobody_in_training_has_gets_no_weight_in_the_map() -> None:
    given, subjects = people_of(10, 8)
    wider = np.insert(given, 3, np.nan, axis=1)
    matcher = vectors.Matcher(1.0).fit(wider[:24], subjects[:24])
    found, without = matcher.affine(8), vectors.Matcher(1.0).fit(given[:24], subjects[:24]).affine(8)
    assert all(np.isfinite(part).all() for part in (found.shift, found.scale, found.weights, found.bias))
    assert not found.weights[3].any()
    wider[:, 3] = 1e3
    np.testing.assert_allclose(cosines(applied(found, wider)), cosines(applied(without, given)), atol=1e-6)


def test_gaps_and_constants_do_not_harm_the_matcher() -> None:
    given, subjects = people_of(10, 8)
    full = vectors.Matcher(1.0).fit(given[:24], subjects[:24]).transform(given)
    wider = np.concatenate([given, np.full((40, 1), 3.0), RNG(0).standard_normal((40, 1))], 1)
    wider[:24, 9] = np.nan  # a feature that nobody in training has says nothing of the others
    np.testing.assert_allclose(
        cosines(vectors.Matcher(1.0).fit(wider[:24], subjects[:24]).transform(wider)), cosines(full), atol=1e-6
    )
    gaps = given.copy()
    gaps[RNG(1).random(gaps.shape) < 0.1] = np.nan
    assert np.isfinite(vectors.Matcher(1.0).fit(gaps[:24], subjects[:24]).transform(gaps)).all()


def test_vectors_that_are_all_equal_or_of_one_run_each_are_mapped() -> None:
    same = vectors.Matcher(4.0).fit(np.ones((4, 3)), ["a", "a", "b", "b"])
    assert not same.transform(np.ones((2, 3))).any()
    np.testing.assert_allclose(same.transform(np.array([[2.0, 1.0, 1.0]])), [[0.5, 0, 0]])
    given = RNG(2).standard_normal((6, 4))
    single = vectors.Matcher(1.0).fit(given, list("abcdef")).transform(given)
    np.testing.assert_allclose(cosines(single), cosines(given - given.mean(0)), atol=1e-9)

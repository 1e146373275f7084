"""A unit's vector: equal to slow twins, and learnt from training units alone."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from neurostorm.downstream.methods import vectors
from neurostorm.downstream.methods.networks import start_head
from neurostorm.downstream.methods.simple import Affine
from neurostorm.downstream.tasks.examples import Examples
from neurostorm.model.heads.places import PlaceHead

RNG = np.random.default_rng


@pytest.fixture
def examples(make_runs) -> Examples:
    """Six units of three people, seven clips each."""
    return make_runs(3, clips=7)


def tokens_of(examples: Examples, seed: int = 0, places: int = 4, width: int = 3) -> NDArray[np.float32]:
    return RNG(seed).standard_normal((len(examples), places, width)).astype(np.float32)


def series_of(examples: Examples, seed: int = 0, regions: int = 5) -> dict[int, NDArray[np.float32]]:
    return {
        number: RNG([seed, number]).standard_normal((run.frames, regions)).astype(np.float32)
        for number, run in enumerate(examples.runs)
    }


def clips_of(examples: Examples, unit: int) -> list[int]:
    return [clip for clip in range(len(examples)) if examples.unit[clip] == unit]


def told(
    examples: Examples, tokens: NDArray[np.float32], name: str, most: int, train: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Units as vectors, of the signals that the units `train` teach."""
    return vectors.of_tokens(examples, tokens, name, vectors.learn_signals(examples, tokens, name, most, train))


def test_nothing_is_the_same_for_everybody(examples: Examples) -> None:
    assert np.array_equal(vectors.nothing(examples), np.ones((6, 1)))


def subject_with_two_runs(make_runs) -> Examples:
    """The runs of `make_runs` as three subjects with two runs each: clips 0 to 13 are of the first."""
    of_runs = make_runs(3, clips=7)
    people = tuple(sorted(set(of_runs.subjects)))
    return Examples(
        of_runs.runs, 5, of_runs.run, of_runs.start, of_runs.unit // 2, people, people, np.array([1.0, 2.0, 3.0])
    )


def test_attributes_are_averaged_over_a_units_runs_and_missing_where_one_does_not_say(make_runs) -> None:
    said: list[dict[str, Any]] = [{"fd_mean_mm": 0.1 * n, "source_frames": 100 + n, "task": "rest"} for n in range(6)]
    del said[3]["fd_mean_mm"]
    found = vectors.attributes(subject_with_two_runs(make_runs), lambda run: said[run])
    np.testing.assert_allclose(found, [[0.05, 100.5], [np.nan, 102.5], [0.45, 104.5]])


def test_activity_is_the_mean_over_the_frames_of_the_clips(examples: Examples) -> None:
    series = series_of(examples)
    shorter = examples.take(np.array([4, 1]))
    brute = []
    for unit in range(2):
        frames = [
            series[shorter.run[clip]][frame]
            for clip in clips_of(shorter, unit)
            for frame in range(shorter.start[clip], shorter.start[clip] + 5)
        ]
        brute.append(np.mean(frames, 0))
    np.testing.assert_allclose(vectors.activity(shorter, series), brute, atol=1e-6)


def test_matrices_are_fishers_z_in_the_frames_of_the_clips_averaged_over_runs(make_runs) -> None:
    given = subject_with_two_runs(make_runs)
    kept = np.setdiff1d(np.arange(len(given)), [0, 6, 20])  # a unit does not have all frames of its runs
    given = Examples(
        given.runs, 5, given.run[kept], given.start[kept], given.unit[kept], given.units, given.subjects, given.targets
    )
    series, above = series_of(given), np.triu_indices(5, 1)
    brute = []
    for unit in range(3):
        of_runs = []
        for run in (2 * unit, 2 * unit + 1):
            starts = [given.start[clip] for clip in clips_of(given, unit) if given.run[clip] == run]
            frames = sorted({frame for start in starts for frame in range(start, start + 5)})
            of_runs.append(np.arctanh(np.corrcoef(series[run][frames].T)[above]))
        brute.append(np.mean(of_runs, 0))
    found = vectors.matrices(given, series, "correlation", np.array([True, True, False]))
    assert found.dtype == np.float32 and found.shape == (3, 5, 5)
    np.testing.assert_allclose(vectors.edges(found), brute, atol=1e-5)


def test_matrices_of_few_clips_are_mean_products_about_the_mean_of_the_whole_run(make_subjects) -> None:
    given = make_subjects([1.0, 2.0, 3.0], clips=3)
    kept = np.array([0, 2, 4, 6, 7])  # two clips of the first person, one of the second, two of the third
    given = Examples(
        given.runs, 5, given.run[kept], given.start[kept], given.unit[kept], given.units, given.subjects, given.targets
    )
    series = {run: 3 + 2 * values for run, values in series_of(given).items()}
    brute = np.zeros((3, 5, 5))
    for unit in range(3):
        values = series[unit].astype(np.float64)
        z = (values - values.mean(0)) / values.std(0)
        frames = [frame for clip in clips_of(given, unit) for frame in range(given.start[clip], given.start[clip] + 5)]
        for one in range(5):
            for other in range(5):
                products = [z[frame, one] * z[frame, other] for frame in frames]
                brute[unit, one, other] = np.mean(products) if one != other else 0
    train = np.ones(3, bool)
    found = vectors.matrices(given, series, "correlation", train)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, brute, atol=1e-5)
    whole = vectors.matrices(make_subjects([1.0, 2.0, 3.0], clips=3), series, "correlation", train)
    for unit in range(3):
        correlation = np.corrcoef(series[unit].T) * (1 - np.eye(5))
        np.testing.assert_allclose(whole[unit], correlation, atol=1e-5, err_msg="in all frames it is the correlation")


def test_tangent_connectivity_learns_from_training_units_alone(make_runs) -> None:
    given = make_runs(5, clips=7)
    train = np.arange(10) < 6
    series, other = series_of(given, regions=3), series_of(given, regions=3)
    for run in range(6, 10):
        other[run] = 5 * other[run][::-1] @ RNG(1).standard_normal((3, 3)).astype(np.float32)
    first, second = (vectors.matrices(given, values, "tangent", train) for values in (series, other))
    assert np.array_equal(first[train], second[train])
    assert not np.allclose(first[~train], second[~train], atol=1e-3)
    everybody = vectors.matrices(given, series, "tangent", np.ones(10, bool))
    assert not np.allclose(first[train], everybody[train], atol=1e-3), "the mean of more people is another"


def test_a_mean_of_tokens_is_that_of_all_and_places_are_kept_apart(examples: Examples) -> None:
    tokens = tokens_of(examples)
    mean = [np.mean([tokens[clip].mean(0) for clip in clips_of(examples, unit)], 0) for unit in range(6)]
    places = [np.mean([tokens[clip].ravel() for clip in clips_of(examples, unit)], 0) for unit in range(6)]
    np.testing.assert_allclose(vectors.of_tokens(examples, tokens, "mean", None), mean, atol=1e-6)
    np.testing.assert_allclose(vectors.of_tokens(examples, tokens, "places", None), places, atol=1e-6)


def test_coupling_is_the_correlation_of_the_places_leading_directions(examples: Examples) -> None:
    tokens, train = tokens_of(examples), np.arange(6) < 4
    taught = [clip for clip in range(len(examples)) if examples.unit[clip] < 4]
    signals = np.stack(
        [PCA(1).fit(tokens[taught, place]).transform(tokens[:, place])[:, 0] for place in range(4)], 1
    )  # PCA's sign is arbitrary, and so is the sign of a correlation with it
    brute = [np.arctanh(np.corrcoef(signals[clips_of(examples, unit)].T)[np.triu_indices(4, 1)]) for unit in range(6)]
    found = told(examples, tokens, "coupling", 9, train)
    assert found.shape == (6, 6)
    np.testing.assert_allclose(np.abs(found), np.abs(brute), atol=1e-4)
    signs = np.sign(found * np.array(brute))
    assert np.all(signs == signs[0]), "a direction is the same one for every unit"


def test_covariance_is_that_of_the_leading_directions_at_unit_variance(examples: Examples) -> None:
    tokens, train = tokens_of(examples), np.arange(6) < 4
    taught = [clip for clip in range(len(examples)) if examples.unit[clip] < 4]
    flat = tokens.reshape(len(tokens), -1).astype(np.float64)
    signals = PCA(5, whiten=True, svd_solver="full").fit(flat[taught]).transform(flat)
    pair = np.triu_indices(5)
    brute = np.array([np.cov(signals[clips_of(examples, unit)].T, bias=True)[pair] for unit in range(6)])
    found = told(examples, tokens, "covariance", 5, train)
    assert found.shape == (6, 15)
    np.testing.assert_allclose(np.abs(found), np.abs(brute), atol=0.02)  # the fast solver is approximate


@pytest.mark.parametrize("name", ["coupling", "covariance"])
def test_directions_are_learnt_from_training_units_alone(examples: Examples, name: str) -> None:
    train = np.array([True, False, True, True, False, True])
    tokens, other = tokens_of(examples), tokens_of(examples)
    test_clips = ~train[examples.unit]
    other[test_clips] = 100 * tokens_of(examples, seed=1)[test_clips]
    first, second = (told(examples, values, name, 5, train) for values in (tokens, other))
    assert np.array_equal(first[train], second[train])
    assert not np.allclose(first[~train], second[~train])
    swapped = told(examples, other, name, 5, ~train)
    assert not np.allclose(swapped[train], first[train]), "what is learnt depends on who trains"


@pytest.mark.parametrize("name", ["coupling", "covariance"])
def test_a_unit_of_one_clip_and_a_place_without_any_variance_have_finite_vectors(make_runs, name: str) -> None:
    given = make_runs(3, clips=7).take(np.arange(6))
    single = given.one_clip_each()
    tokens = tokens_of(given)
    tokens[:, 2] = 0.25
    assert np.isfinite(told(given, tokens, name, 5, np.ones(6, bool))).all()
    alone = told(single, tokens[:6], name, 5, np.ones(6, bool))
    assert not alone.any(), "one clip has neither correlation nor covariance"


@pytest.mark.parametrize("name", ["coupling", "covariance"])
def test_signals_are_projections_of_variance_one_over_the_training_clips(examples: Examples, name: str) -> None:
    tokens, train = tokens_of(examples), np.arange(6) < 4
    tokens[:, 0] = 10 * tokens[:, 0] + 7
    learnt = vectors.learn_signals(examples, tokens, name, 5, train)
    found = learnt.of(tokens)
    assert found.dtype == learnt.centre.dtype == learnt.directions.dtype == np.float32
    flat = tokens.reshape(len(tokens), -1).astype(np.float64)
    brute = [[np.dot(clip - learnt.centre, direction) for direction in learnt.directions] for clip in flat]
    np.testing.assert_allclose(found, brute, atol=1e-4)
    taught = train[examples.unit]
    np.testing.assert_allclose(found[taught].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(found[taught].var(0, ddof=1), 1, rtol=1e-3)
    if name == "coupling":
        places = learnt.directions.reshape(4, 4, 3)
        assert all((places[one, other] != 0).any() == (one == other) for one in range(4) for other in range(4))


def told_by(silent: NDArray[np.bool_], name: str) -> NDArray[np.bool_]:
    """The numbers of a vector that a silent signal has a part in."""
    one, other = np.triu_indices(len(silent), 1 if name == "coupling" else 0)
    return silent[one] | silent[other]


@pytest.mark.parametrize("name", ["coupling", "covariance"])
def test_along_what_does_not_vary_there_is_no_signal(examples: Examples, name: str) -> None:
    train = np.arange(6) < 4
    tokens = tokens_of(examples)
    tokens[:, 2] = 0.25
    tokens[~train[examples.unit], 2] = 9.0  # people of the test do vary there, which training cannot know of
    learnt = vectors.learn_signals(examples, tokens, name, 12, train)
    assert len(learnt.directions) == {"coupling": 4, "covariance": 12}[name]
    silent = ~learnt.directions.any(1)
    assert silent.sum() == {"coupling": 1, "covariance": 3}[name]
    assert not vectors.of_tokens(examples, tokens, name, learnt)[:, told_by(silent, name)].any()
    assert not learnt.of(tokens)[:, silent].any()


@pytest.mark.parametrize("name", ["mean", "places", "coupling", "covariance"])
@pytest.mark.parametrize(("most", "taught", "width"), [(5, 6, 3), (50, 6, 3), (50, 2, 9), (30, 6, 9), (3, 1, 3)])
def test_how_many_signals_there_will_be_is_known_before_they_are_learnt(
    examples: Examples, monkeypatch: pytest.MonkeyPatch, name: str, most: int, taught: int, width: int
) -> None:
    monkeypatch.setattr(vectors, "_FIT_CLIPS", 20)
    tokens, train = tokens_of(examples, width=width), np.arange(6) < taught
    count = vectors.signal_count(name, most, 7 * taught, tokens.shape[1:])
    if name in ("mean", "places"):
        assert count == 0
    else:
        learnt = vectors.learn_signals(examples, tokens, name, most, train)
        assert learnt.directions.shape == (count, 4 * width) and learnt.directions.any(1).all()
        directions = min(most, min(7 * taught, 20) - 1, 4 * width)  # centred clips leave one direction less
        assert count == (4 if name == "coupling" else directions)


@pytest.mark.parametrize("name", ["mean", "places", "coupling", "covariance"])
def test_a_head_that_starts_from_signals_concludes_from_the_same_vectors(examples: Examples, name: str) -> None:
    """In float32 and with tokens far from zero, too: what is common to them is subtracted before the products."""
    tokens, train = 30 + tokens_of(examples), np.arange(6) < 4
    learnt = None if name in ("mean", "places") else vectors.learn_signals(examples, tokens, name, 5, train)
    expected = vectors.of_tokens(examples, tokens, name, learnt)
    size = expected.shape[1]
    head = PlaceHead(3, size, 4, name, 0 if learnt is None else len(learnt.directions))
    start_head(head, Affine(np.full(size, 2.0), np.full(size, 0.5), np.roll(np.eye(size), 1, 1), np.ones(size)), learnt)
    with torch.no_grad():
        features = head(torch.from_numpy(tokens))
        means = torch.stack([features[clips_of(examples, unit)].mean(0) for unit in range(6)])
        found = head.conclude(means).numpy()
    np.testing.assert_allclose(found, (np.roll(expected, 1, 1) - 2) / 0.5 + 1, rtol=1e-4, atol=2e-4)


def test_signals_are_learnt_from_so_many_clips_spread_evenly(
    examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, train = tokens_of(examples), np.arange(6) < 4
    monkeypatch.setattr(vectors, "_FIT_CLIPS", 10)
    learnt = vectors.learn_signals(examples, tokens, "coupling", 5, train)
    used = [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    np.testing.assert_allclose(learnt.centre, tokens[used].mean(0).ravel(), atol=1e-6)


def test_the_vector_that_suits_the_units_is_chosen(make_runs, make_subjects) -> None:
    assert vectors.pool_name("mean", "regression", make_subjects([1.0, 2.0], clips=1)) == "mean"
    assert vectors.pool_name("auto", "classification", make_subjects([1.0, 2.0], clips=3)) == "places"
    assert vectors.pool_name("auto", "regression", make_subjects([1.0, 2.0], clips=4)) == "coupling"
    assert vectors.pool_name("auto", "identification", make_runs(2, clips=4)) == "covariance"

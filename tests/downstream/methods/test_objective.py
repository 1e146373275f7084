"""Objectives: losses equal the plain formulas, predictions are in the target's own terms, metrics are metrics.py's."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import log_loss
from torch.nn.functional import cosine_similarity, cross_entropy

from neurostorm.downstream.methods.objective import Objective, embeddings_of, objective_of
from neurostorm.downstream.statistics import metrics
from neurostorm.downstream.statistics.reid import across_sessions
from neurostorm.downstream.tasks.examples import Examples

RNG = np.random.default_rng


def of(kind: str, train: Examples, **changes: Any) -> Objective:
    given = {"embedding": 16, "temperature": 0.2, "gallery": 5, "repeats": 3, "seed": 0, **changes}
    return objective_of(kind, train, **given)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(RNG(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture
def ages(make_subjects) -> Examples:
    return make_subjects([21.0, 35.0, 50.0, 80.0])


@pytest.fixture
def two_classes(make_subjects) -> Examples:
    return make_subjects([0, 1, 0, 0, 0, 1, 0, 0], classes=("F", "M"))


@pytest.fixture
def three_classes(make_subjects) -> Examples:
    return make_subjects([0, 2, 1, 2, 2, 1, 2, 2], classes=("a", "b", "c"))


def test_a_regressions_loss_is_the_squared_error_in_deviations_of_the_training_targets(ages) -> None:
    objective, outputs = of("regression", ages), drawn(4, 1)
    z = (ages.targets - ages.targets.mean()) / ages.targets.std()
    loss = objective.loss(outputs, torch.tensor(ages.targets, dtype=torch.float32))
    assert float(loss) == pytest.approx(float(np.mean((outputs[:, 0].numpy() - z) ** 2)), rel=1e-5)
    assert objective.outputs == 1 and objective.head(6)(drawn(4, 3, 6)).shape == (4, 1)


def test_a_regressions_prediction_is_back_in_the_targets_unit(ages) -> None:
    objective = of("regression", ages)
    z = (ages.targets - ages.targets.mean()) / ages.targets.std()
    np.testing.assert_allclose(objective.predictions(z[:, None]), ages.targets)
    np.testing.assert_allclose(objective.predictions(np.zeros((1, 1))), [ages.targets.mean()])


@pytest.mark.parametrize("value", [7.0, 0.1])  # three times .1 has a deviation by rounding
def test_equal_targets_are_refused(make_subjects, value: float) -> None:
    with pytest.raises(ValueError, match=rf"all 3 training targets are {value:g}: nothing to learn"):
        of("regression", make_subjects([value] * 3))


def test_the_loss_of_classes_weighs_each_class_alike(three_classes) -> None:
    objective, outputs = of("classification", three_classes), drawn(8, 3)
    counts = np.bincount(three_classes.targets)
    weight = (1 / counts)[three_classes.targets]
    expected = log_loss(three_classes.targets, softmax(outputs.double().numpy(), 1), sample_weight=weight)
    loss = objective.loss(outputs, torch.from_numpy(three_classes.targets).float())
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert objective.outputs == 3 and objective.head(6)(drawn(4, 3, 6)).shape == (4, 3)


def test_the_loss_of_two_classes_with_one_logit_is_that_with_two(two_classes) -> None:
    objective, outputs = of("classification", two_classes), drawn(8, 1)
    targets = torch.from_numpy(two_classes.targets)
    both = torch.cat([torch.zeros_like(outputs), outputs], 1)  # softmax of (0, x) is the logistic of x
    expected = cross_entropy(both, targets, torch.tensor([1 / 6, 1 / 2]))
    assert float(objective.loss(outputs, targets.float())) == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) == pytest.approx(
        log_loss(two_classes.targets, 1 / (1 + np.exp(-outputs[:, 0].double().numpy())),
                 sample_weight=np.where(two_classes.targets, 1 / 2, 1 / 6)), rel=1e-5,
    )  # fmt: skip
    assert objective.outputs == 1 and objective.head(6)(drawn(4, 3, 6)).shape == (4, 1)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_losses_of_batches_average_to_that_of_all_whichever_classes_are_in_them(make_subjects, classes) -> None:
    train = make_subjects([0, 0, 0, 0, 0, 0, 1, 0, classes - 1], classes=("a", "b", "c")[:classes])
    objective = of("classification", train)
    outputs, targets = drawn(9, objective.outputs), torch.from_numpy(train.targets).float()
    probability = objective.predictions(outputs.double().numpy())
    share = np.bincount(train.targets, minlength=classes) / 9
    terms = [
        -np.log(probability[row, target]) / share[target] / np.count_nonzero(share)
        for row, target in enumerate(train.targets)
    ]
    parts = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]  # the first two have one class alone
    found = [float(objective.loss(outputs[part], targets[part])) for part in parts]
    np.testing.assert_allclose(found, [np.mean([terms[row] for row in part]) for part in parts], rtol=1e-5)
    assert np.mean(found) == pytest.approx(float(objective.loss(outputs, targets)), rel=1e-5)
    assert found[2] > 2 * max(found[:2]), "a batch of a frequent class alone counts for less"


def test_a_class_without_training_units_has_no_weight(make_subjects) -> None:
    train = make_subjects([0, 2, 2], classes=("a", "b", "c"))
    objective = of("classification", train)
    np.testing.assert_allclose(objective.weights, [1.5, 0, 0.75])
    assert objective.outputs == 3
    only = of("classification", make_subjects([1, 1], classes=("F", "M")))
    assert torch.isfinite(only.loss(drawn(2, 1), torch.ones(2)))


def test_predictions_of_classes_are_probabilities_in_the_classes_order(two_classes, three_classes) -> None:
    two, three = of("classification", two_classes), of("classification", three_classes)
    logits = RNG(1).standard_normal((9, 3)) * 5
    np.testing.assert_allclose(three.predictions(logits), softmax(logits, 1))
    found = two.predictions(np.array([[-3.0], [0.0], [3.0], [-1e4], [1e4]]))
    np.testing.assert_allclose(found.sum(1), 1)
    np.testing.assert_allclose(found[:3, 1], 1 / (1 + np.exp([3.0, 0.0, -3.0])))
    np.testing.assert_array_equal(found[3:], [[1, 0], [0, 1]])  # above 0 is the second class, M
    np.testing.assert_allclose(three.predictions(np.array([[1e5, 0, -1e5]])), [[1, 0, 0]])


def test_the_loss_of_pairs_is_nt_xent_without_a_persons_other_clips() -> None:
    objective = Objective("identification", embedding=4, temperature=0.2)
    outputs, targets = drawn(6, 4), torch.tensor([7.0, 7.0, 2.0, 2.0, 7.0, 7.0])
    similar = np.array(
        [[float(cosine_similarity(one, two, 0)) / 0.2 for two in outputs.double()] for one in outputs.double()]
    )
    terms = []
    for clip in range(6):
        partner = clip ^ 1
        others = [other for other in range(6) if targets[other] != targets[clip]]
        scores = similar[clip, [partner, *others]]
        terms.append(np.log(np.exp(scores).sum()) - scores[0])
    assert float(objective.loss(outputs, targets)) == pytest.approx(np.mean(terms), rel=1e-4)
    head = objective.head(6).eval()
    assert head(drawn(4, 3, 6)).shape == (4, 4) and objective.outputs == 4


def test_what_is_measured_is_what_metrics_say_and_the_chance_of_the_one_that_selects(ages, three_classes) -> None:
    guess = np.add(ages.targets, [3, -4, 9, 0])
    measured = of("regression", ages).measure(ages, guess)
    assert measured == metrics.regression(ages.targets, guess) | {"chance": 0.0}
    scores = softmax(RNG(2).standard_normal((8, 3)), 1)
    measured = of("classification", three_classes).measure(three_classes, scores)
    expected = metrics.classification(three_classes.targets, scores, ("a", "b", "c"))
    assert measured == expected | {"chance": pytest.approx(1 / 3)}


def test_identification_is_measured_across_sessions(make_runs) -> None:
    units = make_runs(6, sessions=3, clips=1)
    vectors = RNG(3).standard_normal((18, 8)) + 0.5 * np.repeat(RNG(4).standard_normal((6, 8)), 3, 0)
    objective = of("identification", units)
    measured = objective.measure(units, objective.predictions(vectors))
    expected = across_sessions(embeddings_of(units, vectors), gallery=5, repeats=3, seed=0)
    assert {name: measured[name] for name in ("rank1", "map", "gallery")} == {
        name: expected[name] for name in ("rank1", "map", "gallery")
    }
    assert measured["gallery"] == 5 and measured["chance"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5)


def test_vectors_keep_the_session_and_source_of_their_run(make_runs) -> None:
    units = make_runs(3, clips=2).take(np.array([4, 1, 0]))
    found = embeddings_of(units, np.arange(6.0).reshape(3, 2))
    assert found.run == ("runs/d/sub-002/ses-0", "runs/d/sub-000/ses-1", "runs/d/sub-000/ses-0")
    assert found.subject == ("d/sub-002", "d/sub-000", "d/sub-000")
    assert found.session == ("0", "1", "0") and found.source[0] == "sha of d/sub-002 0"
    np.testing.assert_array_equal(found.vectors, [[0, 1], [2, 3], [4, 5]])

"""Training by gradient: it learns what is there, nothing that is not, keeps the best epoch and repeats bit by bit."""

import copy
import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cosine_similarity

from neurostorm.downstream.cohort import open_cohort
from neurostorm.downstream.methods.inputs import ClipInputs, HeldInputs
from neurostorm.downstream.methods.objective import objective_of
from neurostorm.downstream.methods.training import Fitted, Trainer, load_trained, pooled, trained_state
from neurostorm.downstream.tasks.examples import Examples
from neurostorm.downstream.tasks.task import Age, Cut
from neurostorm.model.heads.adapt import AttentionPool, adapt
from neurostorm.model.hub.pretrained import NeuroStorm
from neurostorm.train.health.limits import NonFiniteError
from tests.downstream.trainers import METRIC, PLACES, RNG, WIDTH, parts_of, planted, quiet, settings_of, trainer_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kind", "classes", "least"),
    [("regression", 0, 0.8), ("classification", 2, 0.85), ("classification", 3, 0.8), ("identification", 0, 0.6)],
)
def test_what_is_planted_is_found_in_units_that_were_held_out(make_subjects, make_runs, kind, classes, least) -> None:
    examples, tokens = planted(make_subjects, make_runs, kind, classes, 0)
    train, validation, test = parts_of(len(examples.units))
    trainer = trainer_of(kind, examples, tokens, train, epochs=30, batch_clips=32)
    untrained = trainer.objective.measure(examples.take(test), trainer.predict(test))
    fitted = trainer.fit(train, validation, quiet)
    measured = trainer.objective.measure(examples.take(test), trainer.predict(test))
    assert kind != "identification" or untrained["map"] < measured["map"] - 0.2, "random vectors find some people too"
    assert measured[METRIC[kind]] > least > measured["chance"] + 0.2
    assert fitted.validation[METRIC[kind]] > least
    if kind == "regression":
        assert measured["mae"] < 6 < np.abs(examples.targets[test] - examples.targets[train].mean()).mean()


@pytest.mark.parametrize(("kind", "classes"), [("regression", 0), ("classification", 2), ("identification", 0)])
def test_of_noise_nothing_is_learnt_that_holds_for_others(make_subjects, make_runs, kind: str, classes: int) -> None:
    beyond = []
    for seed in range(10):
        examples, tokens = planted(make_subjects, make_runs, kind, classes, seed, signal=0.0)
        train, validation, test = parts_of(len(examples.units))
        trainer = trainer_of(kind, examples, tokens, train, seed=seed, epochs=3)
        trainer.fit(train, validation, quiet)
        measured = trainer.objective.measure(examples.take(test), trainer.predict(test))
        beyond.append(measured[METRIC[kind]] - measured["chance"])
    error = np.std(beyond, ddof=1) / math.sqrt(len(beyond))
    assert abs(np.mean(beyond)) < 2 * error


def fitted_with(make_subjects, make_runs, kind: str, seed: int, **changes: Any) -> tuple[Trainer, Fitted]:
    examples, tokens = planted(make_subjects, make_runs, kind, 3, 0)
    train, validation, _ = parts_of(len(examples.units))
    trainer = trainer_of(kind, examples, tokens, train, seed=seed, epochs=2, **changes)
    return trainer, trainer.fit(train, validation, quiet)


@pytest.mark.parametrize("kind", METRIC)
def test_a_seed_gives_the_same_bits_and_another_one_others(make_subjects, make_runs, kind: str) -> None:
    (_, first), (_, second), (_, other) = (fitted_with(make_subjects, make_runs, kind, seed) for seed in (3, 3, 4))
    assert first.validation == second.validation and first.epoch == second.epoch
    assert first.state.keys() == second.state.keys()
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)
    assert not all(torch.equal(first.state[name], other.state[name]) for name in first.state)


def test_predictions_and_state_do_not_follow_from_test_targets_or_test_clips(make_subjects, make_runs) -> None:
    examples, tokens = planted(make_subjects, make_runs, "classification", 2, 0)
    train, validation, test = parts_of(80)
    shuffled, changed, scores = examples.targets.copy(), tokens.copy(), []
    trainer = trainer_of("classification", examples, tokens, train)
    fitted, predicted = trainer.fit(train, validation, quiet), trainer.predict(test)
    for seed in range(20):
        shuffled[test] = RNG(seed).permutation(examples.targets[test])
        scores.append(trainer.objective.measure(replace(examples, targets=shuffled).take(test), predicted))
    changed[np.isin(examples.unit, test)] = 9.0
    again = trainer_of("classification", replace(examples, targets=shuffled), changed, train)
    refitted = again.fit(train, validation, quiet)
    assert all(torch.equal(fitted.state[name], refitted.state[name]) for name in fitted.state)
    again = replace(again, inputs=HeldInputs(tokens, "cpu"))
    assert np.array_equal(again.predict(test), predicted)
    assert trainer.objective.measure(examples.take(test), predicted)["balanced_accuracy"] > 0.85
    by_chance = [measured["balanced_accuracy"] for measured in scores]
    assert abs(np.mean(by_chance) - 0.5) < 3 * np.std(by_chance, ddof=1) / math.sqrt(20)


def stepped(kind: str, examples: Examples, rows: NDArray[np.float32], weight: list[float], **changes: Any) -> Trainer:
    """A linear map of rows (N, 3) whose pooled output is squared, after an epoch of one step on all units."""
    network = nn.Linear(3, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([weight]))
        network.bias.fill_(0.2)
    trainer = Trainer(
        network=network, inputs=HeldInputs(rows, "cpu"), examples=examples, objective=objective_of(
            kind, examples, embedding=0, temperature=1.0, gallery=0, repeats=0, seed=0
        ), metric=METRIC[kind], settings=settings_of(epochs=1, batch_clips=99, **changes), seed=0, backbone_lr=0.0,
        device="cpu", conclude=torch.square,
    )  # fmt: skip
    everybody = np.arange(len(examples.units))
    trainer.fit(everybody, everybody, quiet)
    return trainer


def by_hand(kind: str, examples: Examples, rows: NDArray[np.float32], weight: list[float]) -> NDArray[np.float64]:
    """Gradient by weight and bias, (4), of the loss of squares of the units' mean outputs."""
    gradients = []
    for unit, target in enumerate(examples.targets):
        mean = np.mean([[*rows[clip], 1.0] for clip in np.flatnonzero(examples.unit == unit)], 0)
        output = float(mean @ [*weight, 0.2])
        if kind == "regression":
            by_output = 2 * (output**2 - (target - examples.targets.mean()) / examples.targets.std())
        else:
            share = np.mean(examples.targets == target)
            by_output = (1 / (1 + math.exp(-(output**2))) - target) / (2 * share)
        gradients.append(by_output * 2 * output * mean)
    return np.mean(gradients, 0)


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("size", [0.3, 5.0])
def test_the_loss_is_that_of_a_views_pooled_and_concluded_output(make_subjects, kind: str, size: float) -> None:
    targets, classes = ([3.0, 5.0, 11.0], ()) if kind == "regression" else ([0, 1, 0], ("F", "M"))
    examples = make_subjects(targets, clips=2, classes=classes)
    rows = (size * RNG(5).standard_normal((6, 3))).astype(np.float32)
    weight = [0.3, -0.2, 0.4]
    trainer = stepped(kind, examples, rows, weight)
    expected = by_hand(kind, examples, rows, weight)
    expected /= max(1, np.linalg.norm(expected))
    found = torch.cat([parameter.grad.flatten() for parameter in trainer.network.parameters()])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        outputs = trainer.network(torch.from_numpy(rows))[:, 0].double().numpy()
    squares = np.array([[outputs[[2 * unit, 2 * unit + 1]].mean() ** 2] for unit in range(3)])
    np.testing.assert_allclose(
        trainer.predict(np.arange(3)), trainer.objective.predictions(squares), rtol=1e-5,
        err_msg="and so is what is predicted",
    )  # fmt: skip


def test_the_loss_of_pairs_is_that_of_their_pooled_outputs(make_runs) -> None:
    examples = make_runs(3, clips=2)
    tokens = RNG(6).standard_normal((12, PLACES, WIDTH)).astype(np.float32)
    everybody = np.arange(6)
    trainer = trainer_of("identification", examples, tokens, everybody, epochs=1, batch_clips=99)
    network = nn.Sequential(nn.Flatten(), nn.Linear(PLACES * WIDTH, 4))
    twin = copy.deepcopy(network)
    replace(trainer, network=network, conclude=torch.tanh).fit(everybody, everybody, quiet)
    pooled_runs = [torch.tanh(twin(torch.from_numpy(tokens[2 * run : 2 * run + 2])).mean(0)) for run in everybody]
    terms = []
    for run in everybody:
        similar = [cosine_similarity(pooled_runs[run], other, 0) / 0.1 for other in pooled_runs]
        others = [similar[other] for other in everybody if other // 2 != run // 2]
        terms.append(torch.logsumexp(torch.stack([similar[run ^ 1], *others]), 0) - similar[run ^ 1])
    torch.stack(terms).mean().backward()
    nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    for found, expected in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5)


def test_views_of_any_length_are_averaged_each_by_itself() -> None:
    features, clips = torch.from_numpy(RNG(4).standard_normal((9, 3))), [2, 1, 5, 1]
    ends = np.cumsum(clips)
    brute = [np.mean(features.numpy()[end - size : end], 0) for end, size in zip(ends, clips, strict=True)]
    np.testing.assert_allclose(pooled(features, clips).numpy(), brute, rtol=1e-12)


def test_a_unit_is_predicted_from_all_of_its_clips_or_as_many_as_asked_for(make_subjects) -> None:
    examples = make_subjects(np.arange(8.0), clips=7)
    tokens = RNG(1).standard_normal((56, PLACES, WIDTH)).astype(np.float32)
    trainer = trainer_of("regression", examples, tokens, np.arange(8), batch_clips=5)
    units = np.array([6, 1, 3])
    with torch.no_grad():
        outputs = trainer.network.eval()(torch.from_numpy(tokens))[:, 0].double().numpy()
    mean = np.array([outputs[7 * unit : 7 * unit + 7].mean() for unit in units])
    expected = mean * examples.targets.std() + examples.targets.mean()
    np.testing.assert_allclose(trainer.predict(units), expected, rtol=1e-6)
    few = np.array([outputs[[7 * unit, 7 * unit + 3, 7 * unit + 6]].mean() for unit in units])
    np.testing.assert_allclose(trainer.predict(units, 3), few * examples.targets.std() + 3.5, rtol=1e-6)
    place, of_clips = trainer.clip_features(units, 1)
    assert place.tolist() == [0, 1, 2]
    np.testing.assert_allclose(of_clips[:, 0], outputs[7 * units], rtol=1e-5)


def test_a_vector_does_not_follow_from_what_else_is_in_the_batch(make_subjects, make_runs) -> None:
    trainer, _ = fitted_with(make_subjects, make_runs, "identification", 0)
    together = trainer.predict(np.arange(6))
    np.testing.assert_allclose(together[[4]], trainer.predict(np.array([4])), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(trainer.clip_features(np.arange(6))[1], axis=1), 1, rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_before_it_is_applied(make_subjects) -> None:
    examples = make_subjects(np.arange(12.0))
    train, validation, _ = parts_of(12)
    tokens = np.full((36, PLACES, WIDTH), np.nan, np.float32)
    trainer = trainer_of("regression", examples, tokens, train, lr=0.25)
    before = trained_state(trainer.network)
    with pytest.raises(NonFiniteError, match=r"the loss became nan with adapt\.lr=0\.25: take a lower one"):
        trainer.fit(train, validation, quiet)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_state(trainer.network).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {name: state[name] for name in state if "query" not in name}, r"missing \['pool\.query'\]"),
        (lambda state: {**state, "other": torch.zeros(1)}, r"too many \['other'\]"),
        (lambda state: {**state, "pool.query": torch.zeros(3)}, r"of another shape \['pool\.query'\]"),
    ],
)
def test_what_another_network_learnt_is_not_taken(make_subjects, make_runs, change, message: str) -> None:
    trainer, fitted = fitted_with(make_subjects, make_runs, "classification", 0)
    with pytest.raises(ValueError, match=f"kept weights do not fit: .*{message}"):
        load_trained(trainer.network, change(fitted.state))


def test_what_was_kept_is_put_into_a_new_network(make_subjects, make_runs) -> None:
    trainer, fitted = fitted_with(make_subjects, make_runs, "identification", 0)
    assert "head.bn1.running_mean" in fitted.state, "without it a vector would be another one"
    torch.manual_seed(9)
    other = nn.Sequential(OrderedDict(pool=AttentionPool(WIDTH, 2), head=trainer.objective.head(WIDTH)))
    load_trained(other, fitted.state)
    units = np.arange(8)
    assert np.array_equal(replace(trainer, network=other).predict(units), trainer.predict(units))
    other.get_parameter("pool.query").data += 1
    assert not torch.equal(other.get_parameter("pool.query"), fitted.state["pool.query"]), "the kept one is a copy"


@pytest.mark.parametrize(
    ("method", "backbone_lr", "head_lr", "changed"),
    [
        ("attention", 1e-2, None, {"pool", "head"}),
        ("attention", 1e-2, 0.0, {"pool"}),
        ("tpt", 1e-2, None, {"prompts", "head"}),
        ("tpt", 0.0, 0.0, {"prompts"}),
        ("full", 1e-2, None, {"backbone", "head"}),
        ("full", 0.0, 1e-2, {"head"}),
        ("full", 1e-2, 0.0, {"backbone"}),
    ],
)
def test_a_frozen_backbone_stays_and_the_rest_is_trained(
    ball_store: Path, model: Path, method: str, backbone_lr: float, head_lr: float | None, changed: set[str]
) -> None:
    cohort = open_cohort(ball_store)
    labels = {subject: float(number) for number, subject in enumerate(cohort.subjects)}
    examples = Age().examples(cohort, labels, Cut(10, 10))
    train = np.arange(4)
    torch.manual_seed(0)
    encoder = NeuroStorm.from_pretrained(model).network.encoder()
    objective = objective_of(
        "regression", examples.take(train), embedding=8, temperature=0.1, gallery=2, repeats=1, seed=0
    )
    network = adapt(encoder, objective.head(encoder.config.width(1)), method, prompts=3)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    trainer = Trainer(
        network=network, inputs=ClipInputs(cohort.store, examples, encoder, "voxel", "cpu"), examples=examples,
        objective=objective, metric="mae", settings=settings_of(epochs=1, clips_per_unit=1, batch_clips=2), seed=0,
        backbone_lr=backbone_lr, device="cpu", head_lr=head_lr,
    )  # fmt: skip
    fitted = trainer.fit(train, np.arange(4, 6), quiet)
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}

    def part(name: str) -> str:
        if name.startswith("encoder."):
            return "prompts" if name.endswith(".prompt") else "backbone"
        return name.split(".")[0]

    assert {part(name) for name in moved} == changed
    trained = {"attention": {"pool", "head"}, "tpt": {"prompts", "head"}, "full": {"backbone", "head"}}[method]
    assert {part(name) for name in fitted.state} == trained


def test_people_too_few_to_tell_apart_are_refused(make_runs) -> None:
    examples = make_runs(4, clips=3)
    tokens = RNG(0).standard_normal((len(examples), PLACES, WIDTH)).astype(np.float32)
    trainer = trainer_of("identification", examples, tokens, np.arange(2))
    with pytest.raises(ValueError, match=r"2 training unit\(s\) make no batch: an identification takes two people"):
        trainer.fit(np.arange(2), np.arange(2, 8), quiet)

"""Which epoch of a training is kept, and when patience ends it."""

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from neurostorm.downstream.methods.objective import Objective
from neurostorm.downstream.methods.training import trained_state
from neurostorm.downstream.tasks.examples import Examples
from tests.downstream.trainers import PLACES, RNG, WIDTH, noting, parts_of, planted, trainer_of

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Scripted(Objective):
    """A regression of which validation says, epoch after epoch, what the script says."""

    script: list[float] = field(default_factory=list)

    def measure(self, units: Examples, predictions: NDArray[np.float64]) -> dict[str, float]:
        return {"r": self.script.pop(0), "mae": 0.0, "chance": 0.0}


@pytest.mark.parametrize(
    ("script", "metric", "best", "epochs"),
    [
        ([0.1, 0.5, 0.3, 0.4, 0.5, 0.9], "r", 2, 5),  # three epochs without a better one end it; an equal is no better
        ([0.1, 0.5, 0.3, 0.4, 0.6, 0.2], "r", 5, 6),
        ([math.nan, -0.5, -0.9, -0.8, -0.7, 0.9], "r", 2, 5),  # a number is better than none
        ([0.3, math.nan, math.nan, math.nan, 0.9, 0.9], "r", 1, 4),
    ],
)
def test_the_best_epoch_is_kept_and_patience_ends_the_training(make_subjects, script, metric, best, epochs) -> None:
    examples = make_subjects(np.arange(12.0))
    train, validation, test = parts_of(12)
    trainer = trainer_of("regression", examples, RNG(0).standard_normal((36, 4, 8)).astype(np.float32), train,
                         epochs=6, patience=3)  # fmt: skip
    made = trainer.objective
    scripted = Scripted("regression", mean=made.mean, deviation=made.deviation, script=list(script))
    trainer = replace(trainer, objective=scripted, metric=metric)
    told: list[tuple[int, dict[str, float], Any]] = []
    states = []

    def note(epoch: int, measured: dict[str, float], state: Any) -> None:
        told.append((epoch, measured, state))
        states.append(trained_state(trainer.network))

    fitted = trainer.fit(train, validation, note)
    assert (fitted.epoch, [epoch for epoch, *_ in told]) == (best, list(range(1, epochs + 1)))
    assert fitted.validation["r"] == script[best - 1]
    for name, tensor in trained_state(trainer.network).items():
        assert torch.equal(tensor, states[best - 1][name]) and torch.equal(fitted.state[name], tensor)
        if best < epochs and "key" in name:
            assert not torch.equal(tensor, states[-1][name]), "later epochs had gone on"
    running = [number for number, (_, _, state) in enumerate(told) if state is not None]
    assert running[-1] == best - 1 and 0 in running
    assert torch.equal(told[best - 1][2]["head.head.head.weight"], fitted.state["head.head.head.weight"])
    kept = copy.deepcopy(trainer.network)
    assert np.array_equal(replace(trainer, network=kept).predict(test), trainer.predict(test))


def test_a_metric_that_should_be_low_is_kept_low(make_subjects) -> None:
    examples = make_subjects(np.arange(12.0))
    train, validation, _ = parts_of(12)
    trainer = trainer_of("regression", examples, RNG(0).standard_normal((36, 4, 8)).astype(np.float32), train, epochs=8)
    found: list[float] = []
    fitted = replace(trainer, metric="mae").fit(
        train, validation, lambda _, measured, __: found.append(measured["mae"])
    )
    assert fitted.validation["mae"] == min(found) and fitted.epoch == 1 + int(np.argmin(found))


@pytest.mark.parametrize(
    ("script", "best", "epochs"),
    [
        ([0.5, 0.1, 0.5, 0.3, 0.9], 0, 3),  # no better one in three epochs: what began is kept
        ([0.5, 0.1, 0.6, 0.3, 0.2, 0.1], 2, 5),
        ([math.nan, -0.3, -0.5, -0.4, -0.6], 1, 4),
    ],
)
def test_what_is_begun_counts_as_epoch_zero(make_subjects, script: list[float], best: int, epochs: int) -> None:
    examples = make_subjects(np.arange(12.0))
    train, validation, _ = parts_of(12)
    tokens = RNG(0).standard_normal((36, PLACES, WIDTH)).astype(np.float32)
    trainer = trainer_of("regression", examples, tokens, train, epochs=6, patience=3)
    began = trained_state(trainer.network)
    scripted = Scripted("regression", mean=5.0, deviation=3.0, script=list(script))
    told: list[tuple[int, dict[str, float], Any]] = []
    fitted = replace(trainer, objective=scripted, begun=True).fit(train, validation, noting(told))
    assert [epoch for epoch, *_ in told] == list(range(epochs + 1))
    assert ["loss" in measured for _, measured, _ in told] == [False] + [True] * epochs
    assert [measured["r"] for _, measured, _ in told] == pytest.approx(script[: epochs + 1], nan_ok=True)
    assert all(torch.equal(told[0][2][name], began[name]) for name in began), "it is told before the first step"
    assert (fitted.epoch, fitted.validation["r"]) == (best, script[best])
    kept = trained_state(trainer.network)
    assert all(torch.equal(kept[name], fitted.state[name]) for name in began)
    assert all(torch.equal(kept[name], began[name]) for name in began) == (best == 0)


def test_a_beginning_changes_nothing_of_the_epochs_after_it(make_subjects, make_runs) -> None:
    examples, tokens = planted(make_subjects, make_runs, "regression", 0, 0)
    train, validation, _ = parts_of(80)
    seen = []
    for begun in (False, True):
        told: list[tuple[int, dict[str, float], Any]] = []
        trainer = replace(trainer_of("regression", examples, tokens, train, epochs=2), begun=begun)
        trainer.fit(train, validation, noting(told))
        seen.append([(epoch, measured) for epoch, measured, _ in told])
    assert seen[0] == seen[1][1:] and len(seen[0]) == 2

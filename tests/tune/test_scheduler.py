"""Early stopping: within a cell the worse of two goes, and cells with other scales know nothing of each other."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from neurostorm.tune.scheduler import EPOCH, SCORE, CellScheduler

GO, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def trials_of(scheduler: CellScheduler, count: int) -> list[Any]:
    """Trials as Ray's driver shows them: a name, and the configuration with their index."""
    trials = [SimpleNamespace(trial_id=str(number), config={"index": number}) for number in range(count)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    return trials


def told(scheduler: CellScheduler, trial: Any, epoch: int, score: float) -> str:
    return scheduler.on_trial_result(None, trial, {EPOCH: epoch, SCORE: score})


def test_the_worse_of_a_cell_is_stopped_after_its_grace() -> None:
    scheduler = CellScheduler(["a", "a", "a"], grace_epochs=2, max_epochs=8)
    best, middle, worst = trials_of(scheduler, 3)
    assert [told(scheduler, trial, 1, score) for trial, score in ((best, 0.9), (middle, 0.5), (worst, 0.1))] == [GO] * 3
    assert told(scheduler, best, 2, 0.9) == GO  # nobody else has come so far
    assert told(scheduler, middle, 2, 0.5) == STOP
    assert told(scheduler, worst, 2, 0.1) == STOP
    assert [told(scheduler, best, epoch, 0.9) for epoch in range(3, 9)] == [GO] * 6


def test_cells_of_other_scales_do_not_stop_each_other() -> None:
    """An error of -12 years is no worse than an accuracy of 0.5. One ASHA for all would stop the trials of age."""
    cells = ["age", "sex", "age", "sex"]
    scheduler = CellScheduler(cells, grace_epochs=1, max_epochs=4)
    age, sex, worse_age, worse_sex = trials_of(scheduler, 4)
    answers = [
        told(scheduler, trial, 1, score)
        for trial, score in ((sex, 0.9), (age, -12.0), (worse_sex, 0.4), (worse_age, -15.0))
    ]
    assert answers == [GO, GO, STOP, STOP]
    one_for_all = CellScheduler(["same"] * 4, grace_epochs=1, max_epochs=4)
    sex, age, *_ = trials_of(one_for_all, 4)
    assert [told(one_for_all, sex, 1, 0.9), told(one_for_all, age, 1, -12.0)] == [GO, STOP]


@pytest.mark.parametrize("score", [-1e9, 0.0, float("nan")])
def test_who_is_alone_in_a_cell_is_never_stopped(score: float) -> None:
    scheduler = CellScheduler(["a", "b", "b"], grace_epochs=1, max_epochs=3)
    alone, *_ = trials_of(scheduler, 3)
    assert [told(scheduler, alone, epoch, score) for epoch in range(1, 4)] == [GO] * 3
    scheduler.on_trial_complete(None, alone, {EPOCH: 3, SCORE: score})


def test_the_last_word_of_a_trial_is_no_reason_to_stop_it() -> None:
    """It repeats the best epoch, or 0 where there are none; a closed form ends with its first word."""
    scheduler = CellScheduler(["a", "a"], grace_epochs=5, max_epochs=3)  # a grace beyond the end counts as the end
    one, other = trials_of(scheduler, 2)
    for epoch in (1, 2, 3):
        assert told(scheduler, one, epoch, 0.5) == GO
    assert told(scheduler, one, 2, 0.6) == GO
    scheduler.on_trial_complete(None, one, {EPOCH: 2, SCORE: 0.6})
    scheduler.on_trial_complete(None, other, {})  # it failed before it said anything

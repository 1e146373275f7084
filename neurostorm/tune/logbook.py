"""What Ray Tune's driver hears of its trials, written to MLflow: the driver alone writes, whatever runs where.

    trial starts -> MLflow run below the sweep's    reports -> metrics by epoch    ends -> FINISHED | FAILED, with why

A trial that ASHA stops ends like another: its run never stays open.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback

from neurostorm.downstream.record import record_end, record_epoch, record_start
from neurostorm.downstream.trial import Trial, read_outcome, settle_trial
from neurostorm.tracking import Tracker
from neurostorm.tune.scheduler import EPOCH, SCORE

logger = logging.getLogger(__name__)

STOPPED, ERROR = "neurostorm.stopped", "neurostorm.error"
_LONGEST_ERROR = 2000


class Logbook(Callback):
    """Keeps the MLflow runs of `trials`; a Tune trial names one by the `index` in its configuration."""

    def __init__(self, trials: Sequence[Trial], parent: str) -> None:
        self._trials, self._parent = trials, parent
        self._trackers: dict[int, Tracker] = {}
        self.errors: dict[int, str] = {}

    def tracker(self, index: int) -> Tracker:
        """The MLflow run of a trial."""
        if index not in self._trackers:
            self._trackers[index] = record_start(self._trials[index], self._parent)
        return self._trackers[index]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tracker(_index(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        measured = result.get("measured")
        if measured and result.get(EPOCH, 0) > 0:
            record_epoch(self.tracker(_index(trial)), measured, int(result[EPOCH]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.finish(_index(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.fail(_index(trial), _reason(trial))

    def fail(self, index: int, reason: str) -> None:
        """The trial cannot be trained, or not be tested: its run says why."""
        self.errors[index] = reason
        tracker = self.tracker(index)
        tracker.tag(ERROR, reason[-_LONGEST_ERROR:])
        tracker.close("FAILED")
        logger.warning("%s failed: %s", self._trials[index].key, reason.splitlines()[-1])

    def finish(self, index: int) -> None:
        """The trial has ended well, now or before: close its run with what it gave."""
        trial, tracker = self._trials[index], self.tracker(index)
        outcome = read_outcome(trial)
        if outcome is None:
            outcome = settle_trial(trial)
            tracker.tag(STOPPED, "ASHA: worse than others of its cell")
        if outcome is not None:
            record_end(tracker, trial, outcome)
        tracker.close("FINISHED")


def score_of(measured: dict[str, float], metric: str, better_high: bool) -> dict[str, float]:
    """What the scheduler goes by."""
    return {SCORE: measured[metric] if better_high else -measured[metric]}


def _index(trial: Any) -> int:
    return int(trial.config["index"])


def _reason(trial: Any) -> str:
    """What the last try of a trial ended with, from the file where Tune writes it (`get_error` looks elsewhere)."""
    file = Path(trial.error_file) if trial.error_file else None
    text = file.read_text(errors="replace") if file is not None and file.is_file() else ""
    return text.rpartition("Failure # ")[2].strip() or "its process died"

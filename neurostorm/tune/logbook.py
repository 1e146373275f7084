"""What Ray Tune's driver hears of its trials: written to MLflow, shown as a progress bar, judged for giving up.

    trial starts -> MLflow run below the sweep's    reports -> metrics by epoch    ends -> FINISHED | FAILED, with why
    the first trials all fail alike -> `gave_up` -> GiveUp.stop_all

The driver alone writes to MLflow, whatever runs where. A trial that ASHA stops ends like another: its run never stays
open. Tracebacks go to FOLDER/errors, one file for each trial.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from ray.tune import Callback, Stopper

from neurostorm.downstream.errors import alike, keep_traceback, reason_in
from neurostorm.downstream.record import record_end, record_epoch, record_start
from neurostorm.downstream.trial import Trial, read_outcome, settle_trial
from neurostorm.io.paths import AnyPath
from neurostorm.runtime.progress import Bar, progress
from neurostorm.tracking.tracker import Tracker
from neurostorm.tune.scheduler import EPOCH, SCORE

STOPPED, ERROR = "neurostorm.stopped", "neurostorm.error"
REFUSED, REASON = "refused", "reason"  # of a report: traceback and message of an error that a second try meets again
_LONGEST_ERROR, _SHOWN_ERROR = 2000, 200  # characters: in MLflow, and while others run; the end shows all of it


class Logbook(Callback):
    """Keeps the MLflow runs of `trials`; a Tune trial names one by the `index` in its configuration.

    Args:
        trials: all of the sweep.
        parent: the sweep's MLflow run.
        folder: of the sweep; gets `errors/`.
        give_up_after: failures in a row, from the first trial on and all alike, that end the sweep; 0: none do.
        succeeded: whether an earlier start left a trial that is done.

    Attributes:
        errors: trial -> why it failed, in one line.
        tracebacks: trial -> the file with its traceback.
        gave_up: whether the rest of the sweep would fail for the same reason.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        parent: Tracker,
        folder: AnyPath,
        *,
        give_up_after: int = 0,
        succeeded: bool = False,
    ) -> None:
        self._trials, self._parent, self._folder = trials, parent, folder
        self._give_up_after, self._succeeded = give_up_after, succeeded
        self._trackers: dict[int, Tracker] = {}
        self._open: set[int] = set()
        self._bar: Bar | None = None
        self.errors: dict[int, str] = {}
        self.tracebacks: dict[int, AnyPath] = {}
        self.gave_up = False

    @contextlib.contextmanager
    def watching(self, count: int) -> Iterator[None]:
        """A progress bar over `count` trials while Tune runs them; what has not ended then counts as killed."""
        try:
            with progress(count, "sweep", "trial") as self._bar:
                yield
        finally:
            self._bar = None
            for index in sorted(self._open):
                self.tracker(index).tag(ERROR, "the sweep ended before this trial did")
                self._close(index, "KILLED")

    def tracker(self, index: int) -> Tracker:
        """The MLflow run of a trial."""
        if index not in self._trackers:
            self._trackers[index] = record_start(self._trials[index], self._parent)
            self._open.add(index)
        return self._trackers[index]

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._bar is not None:
            running = sum(trial.status == "RUNNING" for trial in trials)
            state = {"running": running} if running else {} if self._bar.n else {"running": "starting"}
            self._bar.note(failed=len(self.errors), **state)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tracker(_index(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if refused := result.get(REFUSED):
            self.fail(_index(trial), refused, result[REASON])
            return
        measured = result.get("measured")
        if measured and result.get(EPOCH, 0) > 0:
            record_epoch(self.tracker(_index(trial)), measured, int(result[EPOCH]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if _index(trial) not in self.errors:
            self.finish(_index(trial))
        self._count()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.fail(_index(trial), _traceback(trial))
        self._count()

    def fail(self, index: int, traceback: str, message: str = "") -> None:
        """The trial cannot be trained, or not be tested: its run says why, and a file has the traceback."""
        key, reason = self._trials[index].key, reason_in(message or traceback)
        self.errors[index] = reason
        self.tracebacks[index] = file = keep_traceback(self._folder, key, traceback or reason)
        tracker = self.tracker(index)
        tracker.tag(ERROR, reason[-_LONGEST_ERROR:])
        tracker.artifact(file)
        self._close(index, "FAILED")
        Bar.write(f"{key} failed: {shorten(reason, _SHOWN_ERROR)} (traceback: {file})")
        enough = 0 < self._give_up_after <= len(self.errors)
        self.gave_up |= enough and not self._succeeded and len({alike(text) for text in self.errors.values()}) == 1

    def finish(self, index: int) -> None:
        """The trial has ended well, now or before: close its run with what it gave."""
        trial, tracker = self._trials[index], self.tracker(index)
        self._succeeded = True
        outcome = read_outcome(trial)
        if outcome is None:
            outcome = settle_trial(trial)
            tracker.tag(STOPPED, "ASHA: worse than others of its cell")
        if outcome is not None:
            record_end(tracker, trial, outcome)
        self._close(index, "FINISHED")

    def _close(self, index: int, status: str) -> None:
        self._trackers[index].close(status)
        self._open.discard(index)

    def _count(self) -> None:
        if self._bar is not None:
            self._bar.update()


class GiveUp(Stopper):
    """Stops all trials when the logbook has given up."""

    def __init__(self, logbook: Logbook) -> None:
        self._logbook = logbook

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._logbook.gave_up


def score_of(measured: dict[str, float], metric: str, better_high: bool) -> dict[str, float]:
    """What the scheduler goes by."""
    return {SCORE: measured[metric] if better_high else -measured[metric]}


def _index(trial: Any) -> int:
    return int(trial.config["index"])


def _traceback(trial: Any) -> str:
    """What the last try of a trial ended with, from the file where Tune writes it (`get_error` looks elsewhere)."""
    file = Path(trial.error_file) if trial.error_file else None
    text = file.read_text(errors="replace") if file is not None and file.is_file() else ""
    return text.rpartition("Failure # ")[2].strip()

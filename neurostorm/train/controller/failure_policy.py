"""What a run changes in Ray Train's controller, a process of its own that loads no torch."""

import logging
from typing import Any

import ray.train
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

from neurostorm.io.errors import may_pass
from neurostorm.io.paths import AnyPath
from neurostorm.train.checkpoint.checkpoints import newest_committed

logger = logging.getLogger(__name__)
# Tells an actor of Ray's every 20 s what the run needs. On a busy machine the answer takes longer than the 5 s that it
# waits, and it warns with a traceback that this is safe to ignore.
_CHATTY = "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client"


class FewerWarnings(ControllerCallback):
    """Leaves out warnings that say themselves that they are safe to ignore.

    Ray sends callbacks to the controller before it starts; unpickled there, this one sets the filter.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _set_up, ()


def _set_up() -> FewerWarnings:
    logging.getLogger(_CHATTY).setLevel(logging.ERROR)
    return FewerWarnings()


class FailuresSinceCheckpoint(DefaultFailurePolicy):
    """Ray Train's failure policy, with a budget that a new checkpoint fills up again.

    A run of weeks meets many failures; a run that is stuck meets the same one again and again, without a new checkpoint
    between. What would only repeat itself, see `errors.may_pass`, ends the run at once.

    Args:
        failures: `max_failures` of it may follow one another without a new checkpoint.
        checkpoints: the run's folder of checkpoints.
    """

    def __init__(self, failures: ray.train.FailureConfig, checkpoints: AnyPath) -> None:
        super().__init__(failures)
        self._checkpoints = checkpoints
        self._newest = self._look()

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Ray's hook: RETRY or RAISE."""
        if not may_pass(training_failed_error):
            self._log_decision(FailureDecision.RAISE, training_failed_error, error_count=1, retry_limit=0)
            return FailureDecision.RAISE
        newest = self._look()
        if newest != self._newest:
            self._newest = newest
            self._worker_group_failures = self._controller_failures = self._preemption_failures = 0
        return super().make_decision(training_failed_error)

    def _look(self) -> str | None:
        """Name of the newest committed checkpoint; what it was before when its storage does not answer."""
        try:
            path = newest_committed(self._checkpoints)
        except OSError as error:
            logger.warning("%s cannot be listed now (%s)", self._checkpoints, error)
            return getattr(self, "_newest", None)
        return None if path is None else path.name

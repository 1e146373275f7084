"""What a run changes in Ray Train's controller, a process of its own that loads no torch."""

import logging
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback

# Asks an actor of Ray's for resources again and again; on a busy machine an answer takes longer than its 5 s.
_CHATTY = "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client"


class OneLineWarnings(ControllerCallback):
    """Takes the tracebacks off warnings that say themselves that they are safe to ignore.

    Ray sends callbacks to the controller before it starts; unpickled there, this one sets the filter.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _set_up, ()


def _set_up() -> OneLineWarnings:
    logging.getLogger(_CHATTY).addFilter(_without_traceback)
    return OneLineWarnings()


def _without_traceback(record: logging.LogRecord) -> bool:
    if record.levelno <= logging.WARNING:
        record.exc_info = record.exc_text = None
    return True

"""What a run changes in Ray Train's controller, a process of its own that loads no torch."""

import logging
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback

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

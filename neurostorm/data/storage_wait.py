"""Waiting for storage that does not answer: a file server that is away, expired credentials, a busy object store.

    work() --StoreUnavailableError--> pause, longer each time --> work() ... --limit_s--> the error, which ends the run

Damaged data is another matter: its errors pass through at once.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from neurostorm.store.layout import StoreUnavailableError

SAY_EVERY_S, SAY_CHANGES_EVERY_S = 60.0, 10.0  # of a process, however many threads wait
SHORTEST_S, LONGEST_S = 0.5, 10.0  # pauses between two attempts
logger = logging.getLogger(__name__)
T = TypeVar("T")


class StorageAwayError(StoreUnavailableError):
    """Storage was away for as long as a run may wait for it."""

    retry = False


@dataclass
class _Said:
    """What this process last said of its storage, and when."""

    lock: threading.Lock
    away: bool = False
    at_s: float = float("-inf")


_SAID = _Said(threading.Lock())


def wait_for_storage(
    work: Callable[[], T],
    limit_s: float,
    *,
    stop: threading.Event | None = None,
    clock_s: Callable[[], float] = time.monotonic,
) -> tuple[T, float]:
    """Returns what `work` returns, and for how many seconds its storage was away.

    Args:
        work: is called again while it raises StoreUnavailableError.
        limit_s: longest time from the first call to the last failure, seconds.
        stop: ends the wait when it is set.
        clock_s: tells the time.

    Raises:
        StorageAwayError: storage was away for `limit_s`, or `stop` was set meanwhile.
    """
    stop = threading.Event() if stop is None else stop
    began_s, pause_s, away = clock_s(), SHORTEST_S, False
    while True:
        try:
            result = work()
        except StoreUnavailableError as error:
            waited_s = clock_s() - began_s
            if waited_s >= limit_s or stop.is_set():
                raise StorageAwayError(
                    f"{error}. Its storage was away for {waited_s:.0f} s (data.unavailable_s={limit_s:g}): when it "
                    "answers again start the same command, which resumes from the newest checkpoint"
                ) from error
            _say(True, "%s; waiting for it, %.0f s so far (data.unavailable_s=%g)", str(error), waited_s, limit_s)
            away = True
            stop.wait(min(pause_s, max(limit_s - waited_s, 0.0)))
            pause_s = min(2 * pause_s, LONGEST_S)
        else:
            waited_s = clock_s() - began_s if away else 0.0
            if away:
                _say(False, "storage answers again after %.0f s", waited_s)
            return result, waited_s


def _say(away: bool, message: str, *values: object) -> None:
    """A warning when storage goes or comes back, once for all threads that wait, and again while it stays away."""
    with _SAID.lock:
        now_s = time.monotonic()
        pause_s = SAY_EVERY_S if away == _SAID.away else SAY_CHANGES_EVERY_S
        _SAID.away = away
        if now_s - _SAID.at_s < pause_s:
            return
        _SAID.at_s = now_s
    logger.warning(message, *values)

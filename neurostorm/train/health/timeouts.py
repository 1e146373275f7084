"""How long a rank waits for the others in a collective: a multiple of what recent ones took, so that hangs show soon.

    during("step" | "meet" | "validation" | "checkpoint") --> 0.9 quantile of its recent times x 20, within bounds
                                                          --> timeout of the collectives inside

A timeout that suits every machine and model is half an hour, which every rank that stops without dying would cost. The
first steps of a process start CUDA, compile and meet ranks that are not ready: they may take the upper bound, and do
not count for later ones.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FACTOR = 20.0
FIRST_STEPS = 3
_RECENT = 64  # times that are kept of each kind
_QUANTILE = 0.9
_WORTHWHILE = 1.25  # a change by less is not made


class CollectiveTimeouts:
    """Sets the timeout of collectives from this rank's own recent times.

    Args:
        least_s: lower bound of the timeout, seconds.
        most_s: upper bound, which is also the timeout of a kind without recent times.
        apply: sets the timeout.
        at_least_s: higher lower bounds of some kinds.
        clock_s: tells the time.
    """

    def __init__(
        self,
        least_s: float,
        most_s: float,
        apply: Callable[[float], None],
        at_least_s: dict[str, float] | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._least_s, self._most_s, self._apply, self._clock_s = least_s, most_s, apply, clock_s
        self._at_least_s = at_least_s or {}
        self._first = {"step": FIRST_STEPS}  # that do not count yet
        self._recent_s: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))
        self.timeout_s = most_s

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Collectives inside time out as suits `kind`; measures how long it takes. May be nested."""
        outside_s = self.timeout_s
        self._set(self._timeout_s(kind))
        begun_s = self._clock_s()
        yield
        if self._first.get(kind, 0) > 0:
            self._first[kind] -= 1
        else:
            self._recent_s[kind].append(self._clock_s() - begun_s)
        self._set(outside_s)

    def _timeout_s(self, kind: str) -> float:
        recent_s = sorted(self._recent_s[kind])
        if not recent_s:
            return self._most_s
        usual_s = recent_s[math.ceil(_QUANTILE * len(recent_s)) - 1]
        least_s = max(self._least_s, self._at_least_s.get(kind, 0.0))
        return min(max(FACTOR * usual_s, least_s), self._most_s)

    def _set(self, timeout_s: float) -> None:
        if max(timeout_s, self.timeout_s) / min(timeout_s, self.timeout_s) >= _WORTHWHILE:
            self.timeout_s = timeout_s
            self._apply(timeout_s)

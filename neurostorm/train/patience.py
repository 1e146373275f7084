"""How long to wait for the other ranks: a multiple of what was measured, so that a rank that hangs is noticed soon.

    during("step" | "validation" | "checkpoint") --> the longest of its kind so far x 20, within bounds
                                                 --> timeout of the collectives inside

A timeout that suits every machine and model is half an hour, and costs half an hour for every rank that stops without
dying. Of a kind that was not measured yet it is that long; the first step, which compiles and meets ranks that are not
ready, makes the later ones patient.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FACTOR = 20.0
_WORTHWHILE = 1.25  # a change by less is not made


class Patience:
    """Sets the timeout of collectives from this rank's own times.

    least_s, most_s  bounds of the timeout; most_s is what it is at the start
    apply            sets it
    clock_s          tells the time
    """

    def __init__(
        self, least_s: float, most_s: float, apply: Callable[[float], None],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._least_s, self._most_s, self._apply, self._clock_s = min(least_s, most_s), most_s, apply, clock_s
        self._longest_s: dict[str, float] = {}
        self.timeout_s = most_s

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Waits inside for as long as suits what `kind` took before; measures it."""
        timeout_s = self._most_s
        if kind in self._longest_s:
            timeout_s = min(max(FACTOR * self._longest_s[kind], self._least_s), self._most_s)
        if max(timeout_s, self.timeout_s) / min(timeout_s, self.timeout_s) >= _WORTHWHILE:
            self.timeout_s = timeout_s
            self._apply(timeout_s)
        begun_s = self._clock_s()
        yield
        self._longest_s[kind] = max(self._longest_s.get(kind, 0.0), self._clock_s() - begun_s)

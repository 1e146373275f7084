"""How long a run still takes: the remaining steps, validations and checkpoints, at what each has lately taken.

    took("step", 1.2), timed("validation") --> median of recent times --> values(done) -> {"left_s": 321}

The first step of a process compiles and waits for the data loader; the caller leaves it out.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median

RECENT = 50  # times of a kind that are kept


class TimeLeft:
    """Estimates the time to the last step.

    Args:
        total_steps: steps of the whole run.
        every: interval, in steps, of each kind of pause ("validation", "checkpoint"); each also follows the last step.
    """

    def __init__(self, total_steps: int, every: Mapping[str, int]) -> None:
        self._total_steps, self._every = total_steps, dict(every)
        self._recent_s: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    def took(self, kind: str, time_s: float) -> None:
        """Takes note that a step, or a pause of the given kind, took `time_s` seconds."""
        self._recent_s[kind].append(time_s)

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Takes note of how long the body took."""
        begun_s = time.perf_counter()
        yield
        self.took(kind, time.perf_counter() - begun_s)

    def values(self, done: int) -> dict[str, int]:
        """Returns {"left_s": whole seconds} before the pauses that follow step `done`; {} before any step was timed.

        A kind of pause that has not been timed yet adds nothing.
        """
        if not self._recent_s["step"]:
            return {}
        left_s = (self._total_steps - done) * median(self._recent_s["step"])
        for kind, every in self._every.items():
            if self._recent_s[kind]:
                left_s += self._pauses(done, every) * median(self._recent_s[kind])
        return {"left_s": round(left_s)}

    def _pauses(self, done: int, every: int) -> int:
        """How many pauses at multiples of `every` are at or after step `done`, with the one after the last step."""
        return self._total_steps // every - (done - 1) // every + bool(self._total_steps % every)

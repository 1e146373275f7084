"""The lines that rank 0 prints as training goes: one event each, for people and for grep.

    line("step", "120/5000", loss=0.41234, wait=percent(0.002)) -> step 120/5000 loss=0.4123 wait=0.2%

An event's name comes first, then what it is about, then key=value without blanks. Keys carry their unit, as metrics do;
names and keys that are there stay, new ones come last.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median

RECENT = 50  # times of a kind that are kept

SIGNIFICANT = 4  # digits of a number

NOBODY_HELD_OUT = (
    "Everybody who was held out withdrew: from now on there is no held-out loss. The run goes on; to have one, start a "
    "run under another --name, which holds out others."
)


def line(event: str, about: str = "", **values: object) -> str:
    """One line; floats are rounded to 4 significant digits."""
    return " ".join([event, *filter(None, [about]), *(f"{key}={_text(value)}" for key, value in values.items())])


def percent(share: float) -> str:
    """0.002 -> 0.2%."""
    return f"{100 * share:.1f}%"


def _text(value: object) -> str:
    return f"{value:.{SIGNIFICANT}g}" if isinstance(value, float) else str(value)


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


def held_out(
    loss: float | None, baseline: float | None, *, normalise_targets: bool, longer: str = "--train.epochs"
) -> list[str]:
    """One to three lines on the held-out masked loss of a pretraining run.

    Args:
        loss: `loss/validation`, the squared error averaged over hidden voxels of held-out clips; None without one.
        baseline: `loss/validation_predicting_mean`, the same of predicting the mean.
        normalise_targets: the run's `model.normalize_targets`: the mean is then each patch's own (baseline 1), else
            each voxel's over its run.
        longer: the option that makes the run longer.
    """
    if loss is None or baseline is None:
        return [NOBODY_HELD_OUT]
    if not math.isfinite(loss):
        return [
            f"Held-out masked loss {loss}: training has diverged.",
            "  Lower --train.lr, or raise --train.warmup_fraction, and start again under another --name.",
        ]
    if baseline <= 0:
        return [
            f"Held-out masked loss {loss:.4f}, and no held-out voxel varies, so there is nothing to compare it with: "
            "check the store with `python tools/store.py verify STORE`."
        ]
    mean = "each patch's own mean (model.normalize_targets)" if normalise_targets else "each voxel's mean over its run"
    if loss < baseline:
        return [
            f"Held-out masked loss {loss:.4f}: {100 * (1 - loss / baseline):.1f} % below the {baseline:.4f} of "
            f"predicting {mean}."
        ]
    return [
        f"Held-out masked loss {loss:.4f}: not below the {baseline:.4f} of predicting {mean}.",
        "  The model cannot fill in what is hidden yet: it needs more steps, another learning rate or more data.",
        f"  Train longer ({longer} N), check that loss/train falls in MLflow (else change --train.lr), or ingest "
        "more runs; then start again under another --name.",
    ]

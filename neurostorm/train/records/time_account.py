"""Where the time of a run goes, over all its starts: an account in which every second stands once.

    driver starts --startup--> wait | step | log | validation | checkpoint, again and again --> SIGKILL
                                                  ^ the account is kept, in RUN/goodput.json          :
    next start    <------------------------------ down -----------------------------------------------+
                  --startup--> wait | repeated (a step that an earlier start had reached) ... | step | ... --> end

`charge` books the time since the call before it, so the parts add up to the wall time whatever happens. What a killed
start did after it last kept its account counts as down, and what it did after its newest checkpoint is done again:
as `repeated` up to the last step that the account knows, so no work counts twice. The first step of every start, which
compiles and allocates, counts as `startup`. Goodput is the share of `step`.

Time is counted on rank 0: where it waits for a slower rank's clips is in its step. Nanoseconds are whole numbers, so
that sums are exact.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from neurostorm.io.atomic import atomic_write
from neurostorm.io.paths import AnyPath

logger = logging.getLogger(__name__)
EVERY_S = 10.0

logger = logging.getLogger(__name__)
ACCOUNT = "goodput.json"
Part = Literal["step", "wait", "checkpoint", "validation", "startup", "repeated", "down", "log"]
PARTS: tuple[Part, ...] = get_args(Part)
# Read once, so that within a process time only goes forward, whoever sets the host's clock meanwhile.
_EPOCH_NS = time.time_ns() - time.monotonic_ns()


def now_ns() -> int:
    """Unix time."""
    return _EPOCH_NS + time.monotonic_ns()


class TimeAccount:
    """The time of one run as this process counts it; kept only if `folder`, the run's, is given (on rank 0).

    started_ns  when the driver started this process' run; the same for all workers that it ever starts
    clock_ns    tells the time
    """

    def __init__(
        self, folder: AnyPath | None = None, started_ns: int | None = None, clock_ns: Callable[[], int] = now_ns
    ) -> None:
        self._file = None if folder is None else folder / ACCOUNT
        self._remote = None if self._file is None or isinstance(self._file, Path) else LatestFile(self._file)
        self._clock_ns, self._alive_ns = clock_ns, clock_ns()
        self._started_ns = self._alive_ns if started_ns is None else started_ns
        self.spent_ns: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self.reached = 0  # steps that any start has done
        self._failed = False
        self.saved_ns = 0  # wall time of the run when a checkpoint was last saved
        self._begin()
        self.known = self.reached  # steps that earlier starts had done

    @property
    def wall_ns(self) -> int:
        """Time from the run's first start to the last `charge`."""
        return sum(self.spent_ns.values())

    def charge(self, part: Part) -> None:
        """Books the time since the last call."""
        before_ns, self._alive_ns = self._alive_ns, self._clock_ns()
        self.spent_ns[part] += max(0, self._alive_ns - before_ns)

    def stepped(self, done: int, *, startup: bool = False) -> None:
        """Books the time since the last call as that of the step with which `done` steps are finished.

        Args:
            done: steps that are finished now.
            startup: whether this is the first step of a start, whose time is that of compiling and allocating.
        """
        self.charge("startup" if startup else "repeated" if done <= self.known else "step")
        self.reached = max(self.reached, done)

    def saved(self) -> None:
        """Books the time since the last call as that of a checkpoint, which is committed now, and keeps the account."""
        self.charge("checkpoint")
        self.saved_ns = self.wall_ns
        self.keep("checkpoint")

    def keep(self, part: Part) -> None:
        """Books the time since the last call, and that of writing the account to the run's folder."""
        self.charge(part)
        if self._file is not None:
            content = {
                "started_ns": self._started_ns, "alive_ns": self._alive_ns, "reached": self.reached,
                "saved_ns": self.saved_ns, "spent_ns": self.spent_ns,
            }  # fmt: skip
            self._write(json.dumps(content).encode())
            self.charge(part)

    def flush(self, within_s: float = 60.0) -> None:
        """Waits until the account is in the run's folder, so many seconds at most."""
        if self._remote is not None:
            self._remote.flush(within_s)

    def _write(self, content: bytes) -> None:
        """Best effort: neither a busy object store nor a file system in trouble ends training for an account."""
        assert self._file is not None
        if self._remote is not None:
            self._remote.put(content)
            return
        try:
            atomic_write(self._file, content)
        except OSError as error:
            if not self._failed:
                logger.warning("%s cannot be written (%s); training goes on without it", self._file, error)
            self._failed = True

    def metrics(self) -> dict[str, float]:
        """The account as metrics in seconds, and the share of useful steps, which is 0 before time has passed."""
        values = {f"time/{part}_s": spent_ns / 1e9 for part, spent_ns in self.spent_ns.items()}
        values["time/wall_s"] = self.wall_ns / 1e9
        values["time/goodput"] = self.spent_ns["step"] / max(self.wall_ns, 1)
        values["checkpoint/age_s"] = (self.wall_ns - self.saved_ns) / 1e9
        return values

    def _begin(self) -> None:
        """Goes on from the account that the run's last start kept, if any; the time between is down.

        A new driver's start-up counts from its own beginning. Workers that the same driver starts again begin now.
        """
        now_ns = self._alive_ns
        begun_ns = min(self._started_ns, now_ns)
        kept = self._kept()
        if kept is not None:
            self.spent_ns |= kept["spent_ns"]
            self.reached, self.saved_ns = kept["reached"], kept["saved_ns"]
            last_ns = kept["alive_ns"]
            # max: a driver that starts while another's workers are alive, or whose host's clock is behind theirs
            begun_ns = now_ns if kept["started_ns"] == self._started_ns else min(max(begun_ns, last_ns), now_ns)
            self.spent_ns["down"] += max(0, begun_ns - last_ns)
        self._alive_ns = begun_ns
        self.keep("startup")

    def _kept(self) -> dict[str, Any] | None:
        if self._file is None or not self._file.is_file():
            return None
        try:
            kept = json.loads(self._file.read_text())
            return {name: kept[name] for name in ("started_ns", "alive_ns", "reached", "saved_ns", "spent_ns")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._file} is no account of a run's time ({type(error).__name__}: {error}): delete it, and the "
                "time counts from this start"
            ) from error


def in_words(metrics: Mapping[str, float]) -> str:
    """One line for people: wall time, goodput, and the parts from the largest down.

    A run that ended under a version that kept no account has a summary without these metrics.
    """
    if "time/wall_s" not in metrics:
        return "not known, no account was kept"
    parts: list[tuple[str, float]] = [(part, metrics[f"time/{part}_s"]) for part in PARTS]
    named = [f"{part} {spent_s:.0f} s" for part, spent_s in sorted(parts, key=lambda each: -each[1])]
    return f"{metrics['time/wall_s']:.0f} s, goodput {metrics['time/goodput']:.0%}: {', '.join(named)}"


class LatestFile:
    """Keeps `file` at what was put last, as well as its storage allows.

    Args:
        file: what is written.
        every_s: shortest time between two writes, seconds.
    """

    def __init__(self, file: AnyPath, every_s: float = EVERY_S) -> None:
        self._file, self._every_s = file, every_s
        self._changed = threading.Condition()
        self._waiting: bytes | None = None
        self._writing = self._urgent = False
        threading.Thread(target=self._run, name=f"writes {file.name}", daemon=True).start()

    def put(self, content: bytes) -> None:
        """Has `content` written soon, unless other content comes before."""
        with self._changed:
            self._waiting = content
            self._changed.notify_all()

    def flush(self, within_s: float) -> bool:
        """Waits until what was put last is written, `within_s` seconds at most; whether it is."""
        with self._changed:
            self._urgent = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._waiting is None and not self._writing, within_s)

    def _run(self) -> None:
        failed = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                content, self._waiting, self._writing, self._urgent = self._waiting, None, True, False
            assert content is not None
            began_s = time.monotonic()
            try:
                atomic_write(self._file, content)
                failed = False
            except OSError as error:
                if not failed:
                    logger.warning("%s cannot be written (%s); training goes on without it", self._file, error)
                failed = True
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                rest_s = self._every_s - (time.monotonic() - began_s)
                self._changed.wait_for(lambda: self._urgent, max(rest_s, 0.0))

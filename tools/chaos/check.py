"""What chaos.py holds a run to, as arithmetic: steps lost, equality with the twin, clips used once. Nothing runs here.

    rank 0's ledger:  0 1 2 3 4 5 | 3 4 5 6 7 ...     after the bar 3 steps are done again: replays -> [3]
    all ranks' last words, step -> (loss, rows)       against the twin's --> loss_error, problems

A replay within the interval of checkpoints is what a crash may cost. Nothing else may differ.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

REL = 1e-6  # of the loss, in fp32: a step repeats the same operations on the same numbers
Words = Mapping[int, tuple[float, list[int]]]


@dataclass
class Outcome:
    """What one fault did to a run over its rounds.

    lost_steps      done again, in each restart
    allowed_steps   at most as many in one
    recovery_s      from each fault to the next new step
    loss_error      the largest relative difference from the twin's loss
    problems        what is not as it should be
    skipped         why the fault could not be tried
    """

    fault: str
    allowed_steps: int
    lost_steps: list[int] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)
    loss_error: float = math.nan
    once: bool = False
    problems: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def status(self) -> str:
        """`ok`, `FAILED` or `skipped`."""
        return "skipped" if self.skipped else "FAILED" if self.problems else "ok"

    def judge(self, steps: Sequence[int], expected: Words, found: Words) -> None:
        """Takes in rank 0's ledger as it was written, and the last words of the twin and of this run."""
        self.lost_steps = replays(steps)
        self.loss_error = loss_error(expected, found)
        unlike = [*clip_problems(expected, found), *loss_problems(expected, found)]
        self.once = not clip_problems(expected, found)
        self.problems += unlike
        if max(self.lost_steps, default=0) > self.allowed_steps:
            self.problems.append(f"{max(self.lost_steps)} steps lost, at most {self.allowed_steps} may be")

    def as_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        median_s = statistics.median(self.recovery_s) if self.recovery_s else None
        return {**asdict(self), "status": self.status, "median_recovery_s": median_s}


def replays(steps: Sequence[int]) -> list[int]:
    """How many steps each restart did again, given the steps in the order in which they were done.

    A restart that dies before it is back at the step that was reached has its own, and counts to where it was.
    """
    lost, before = [], -1
    for step in steps:
        if step <= before:
            lost.append(before - step + 1)
        before = step
    return lost


def loss_error(expected: Words, found: Words) -> float:
    """The largest relative difference of a loss that both have; infinite if one is not finite."""
    worst = 0.0
    for step in expected.keys() & found.keys():
        one, other = expected[step][0], found[step][0]
        error = abs(one - other) / max(abs(one), 1e-300)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def loss_problems(expected: Words, found: Words) -> list[str]:
    """The first step whose loss is not the twin's."""
    for step in sorted(expected.keys() & found.keys()):
        if not math.isclose(expected[step][0], found[step][0], rel_tol=REL):
            return [f"step {step}: loss {found[step][0]!r}, the twin's is {expected[step][0]!r}"]
    return []


def clip_problems(expected: Words, found: Words) -> list[str]:
    """Steps that are missing, clips that were used twice or never, or in another step than the twin's."""
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"{len(missing)} steps are not in the ledger, the first is {missing[0]}")
    if more := sorted(found.keys() - expected.keys()):
        problems.append(f"{len(more)} steps that the twin does not have, the first is {more[0]}")
    wanted = Counter(row for _, rows in expected.values() for row in rows)
    used = Counter(row for _, rows in found.values() for row in rows)
    if twice := sorted(row for row, times in used.items() if times > 1):
        problems.append(f"{len(twice)} clips were used more than once, the first is row {twice[0]}")
    if never := sorted(wanted.keys() - used.keys()):
        problems.append(f"{len(never)} clips were not used, the first is row {never[0]}")
    moved = [step for step in sorted(expected.keys() & found.keys()) if expected[step][1] != found[step][1]]
    if moved:
        problems.append(f"step {moved[0]}: clips {found[moved[0]][1]}, the twin's are {expected[moved[0]][1]}")
    return problems


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes in lines for people, with what is wrong below."""
    head = f"{'fault':<22}{'lost':>6}{'at most':>9}{'back after s':>14}{'loss error':>12}{'clips once':>12}  verdict"
    lines = [head]
    for one in outcomes:
        if one.skipped:
            lines.append(f"{one.fault:<22}{'':>53}  skipped: {one.skipped}")
            continue
        back = f"{statistics.median(one.recovery_s):.1f}" if one.recovery_s else "never"
        lines.append(
            f"{one.fault:<22}{max(one.lost_steps, default=0):>6}{one.allowed_steps:>9}{back:>14}{one.loss_error:>12.1e}"
            f"{'yes' if one.once else 'NO':>12}  {one.status}"
        )
    wrong = [f"{one.fault}: {problem}" for one in outcomes for problem in one.problems]
    return "\n".join([*lines, *([""] if wrong else []), *wrong])

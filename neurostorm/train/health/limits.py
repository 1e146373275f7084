"""What stops a run that has gone wrong: steps that are not finite, and clips that are damaged or missing.

    SkipGuard.check(applied)        -> NonFiniteError after too many skipped steps in a row
    DamagedClips.note(batch, clips) -> named in RUN/unreadable-RANK.jsonl; UnreadableClipsError past the share

Both name the clips concerned, so that a person can look at them. All ranks stop at the same step.
"""

from collections import deque
from collections.abc import Sequence

from neurostorm.data.clips import ClipBatch
from neurostorm.io.errors import UserError
from neurostorm.io.paths import AnyPath
from neurostorm.train.health.barrier import StepClips
from neurostorm.train.records.jsonl import Journal

WINDOW_CLIPS = 10_000  # over which the share of damaged clips is taken, all ranks together
FEWEST_CLIPS = 1_000  # that a share is taken of: the first damaged clips of a start are not all there is


class NonFiniteError(UserError, RuntimeError):
    """Loss or gradients stayed NaN or infinite."""


class UnreadableClipsError(UserError, RuntimeError):
    """Too large a share of the recent clips is damaged or missing."""


def clip_names(batch: ClipBatch, runs: Sequence[str]) -> list[str]:
    """`run[start]` of each clip of a batch."""
    places = zip(batch.run.tolist(), batch.start.tolist(), strict=True)
    return [f"{runs[run]}[{start}]" for run, start in places]


class SkipGuard:
    """Counts steps that were skipped because a gradient was not finite; gives up after `limit` in a row."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row, self.total = limit, 0, 0

    def check(self, applied: bool, *, step: int, clips: Sequence[str]) -> None:
        """Takes note of one step; raises NonFiniteError when too many in a row were skipped."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.total += not applied
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"step {step}: the gradients were not finite for {self.in_a_row} steps in a row; lower train.lr, or "
                f"look at this worker's clips: {', '.join(clips)}"
            )


class DamagedClips:
    """Counts the damaged clips of all ranks over a recent window, and names those of one worker.

    Attributes:
        total: damaged clips of all ranks since this start.
    """

    def __init__(self, folder: AnyPath, rank: int, max_fraction: float) -> None:
        self._folder, self._max_fraction = folder, max_fraction
        self._journal = Journal(folder, f"unreadable-{rank}")
        self._recent: deque[StepClips] = deque()
        self._clips = self._damaged = self.total = 0  # of the steps in `_recent`; of all

    def note(self, batch: ClipBatch, runs: Sequence[str], step: int, clips: StepClips) -> None:
        """Takes note of one step: of this worker's batch, and of the clips of all ranks.

        UnreadableClipsError past the configured share of the last 10,000 clips; fewer than 1,000 count as 1,000.
        """
        named = [name for name, bad in zip(clip_names(batch, runs), batch.bad.tolist(), strict=True) if bad]
        for name in named:
            self._journal.add(step=step, clip=name)
        self._recent.append(clips)
        self._clips, self._damaged = self._clips + clips.total, self._damaged + clips.damaged
        self.total += clips.damaged
        while self._clips - self._recent[0].total >= WINDOW_CLIPS:
            old = self._recent.popleft()
            self._clips, self._damaged = self._clips - old.total, self._damaged - old.damaged
        if self._damaged > self._max_fraction * max(self._clips, FEWEST_CLIPS):
            self.keep(step + 1)
            raise UnreadableClipsError(
                f"step {step}: {self._damaged} of the last {self._clips} clips are damaged or missing, more than "
                f"data.max_bad_fraction={self._max_fraction} allows"
                + (f"; one is {named[-1]}" if named else "")
                + f". All are named in {self._folder}/unreadable-*: check the store with `python tools/store.py "
                "verify STORE`, repair it, and start the same command again"
            )

    def keep(self, done: int) -> None:
        """Makes sure, after `done` steps, that the names outlive this process."""
        self._journal.keep(done)

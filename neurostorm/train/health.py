"""What stops a run that has gone wrong: steps that are not finite, and clips that cannot be read.

    every step: SkipGuard.check(applied)      -> NonFiniteError after too many skipped steps in a row
    every batch: BadClips.note(batch)         -> named in RUN/unreadable-RANK.jsonl; UnreadableClipsError past the share

Both name the clips concerned, so that a person can look at them.
"""

from collections.abc import Sequence

from neurostorm.data.clips import ClipBatch
from neurostorm.errors import UserError
from neurostorm.places import Place
from neurostorm.train.journal import Journal


class NonFiniteError(UserError, RuntimeError):
    """Loss or gradients stayed NaN or infinite."""


class UnreadableClipsError(UserError, RuntimeError):
    """Too large a share of the clips could not be read."""


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


class BadClips:
    """Counts and names the clips of one worker that could not be read."""

    def __init__(self, folder: Place, rank: int, max_fraction: float) -> None:
        self._journal, self._max_fraction = Journal(folder, f"unreadable-{rank}"), max_fraction
        self.bad = self.seen = 0

    def note(self, batch: ClipBatch, runs: Sequence[str], step: int) -> None:
        """Takes note of one batch; raises UnreadableClipsError past the configured share (of at least 100 clips)."""
        self.seen += len(batch.bad)
        if not batch.bad.any():
            return
        named = [name for name, bad in zip(clip_names(batch, runs), batch.bad.tolist(), strict=True) if bad]
        self.bad += len(named)
        for name in named:
            self._journal.add(step=step, clip=name)
        if self.bad > self._max_fraction * max(self.seen, 100):
            self.keep(step + 1)
            raise UnreadableClipsError(
                f"{self.bad} of {self.seen} clips could not be read, more than data.max_bad_fraction="
                f"{self._max_fraction}; the last: {named[-1]}; all are in {self._journal}"
            )

    def keep(self, done: int) -> None:
        """Makes sure, after `done` steps, that the names outlive this process."""
        self._journal.keep(done)

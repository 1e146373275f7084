"""What the async logger sends entries to, and how it learns what a failure means."""

import enum
from typing import Protocol

from neurostorm.tracking.unsent import Entry, Part


class Verdict(enum.Enum):
    """What to do with an entry that could not be sent."""

    AWAY = enum.auto()  # the server cannot be reached: try again
    REFUSED = enum.auto()  # it would be refused again: drop
    LATER = enum.auto()  # it fails although the server answers: keep in a file, go on


class Sink(Protocol):
    """Where entries go. All methods are called by the thread; `keep` also by `AsyncLogger.release`."""

    @property
    def title(self) -> str:
        """For messages, such as "the MLflow run of OUTPUT/NAME"."""

    def send(self, entry: Entry | None) -> None:
        """Sends one entry; None only opens the sink. Any exception is judged."""

    def judge(self, error: Exception, entry: Entry | None, tries: int) -> Verdict:
        """What an exception of `send` means, after so many tries of this entry."""

    def keep(self, entries: list[Entry]) -> Part:
        """Writes entries to a file. OSError when that fails."""

    def read(self, part: Part) -> list[Entry]:
        """The entries of such a file. OSError or ValueError when that fails."""

    def remove(self, part: Part) -> None:
        """Deletes such a file. OSError when that fails."""

    def count(self, *, refused: int = 0, lost: int = 0) -> None:
        """Takes note of entries that were refused, or lost for want of memory."""

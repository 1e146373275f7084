"""What a job answers with a sentence instead of a traceback, and where tracebacks go instead."""

import re
from collections import Counter
from collections.abc import Iterable

from neurostorm.io.atomic import atomic_write
from neurostorm.io.errors import UserError
from neurostorm.io.paths import AnyPath

ERRORS = "errors"  # folder of a run with the tracebacks of its trials


class TrialsFailed(UserError, RuntimeError):
    """Training or testing failed; the message names the reasons and where the tracebacks are."""


_PACKAGE = re.compile(r"^(?:\w+\.)+(?=\w+: )")
_PATH = re.compile(r"[^\s'\"(),;=]*/[^\s'\"(),;]*")
_NUMBER = re.compile(r"\b(?:0x)?[0-9a-f]{8,}\b|\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")


def reason_in(text: str) -> str:
    """The last line of a traceback or message, which says what went wrong; "its process died" for an empty one.

    Without the package of an exception's class: `ValueError: ...`.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _PACKAGE.sub("", lines[-1]) if lines else "its process died"


def told_by(error: BaseException) -> str:
    """The message of a task's error that says all there is to say; "" if only its traceback does."""
    cause = getattr(error, "cause", error)  # Ray wraps what a task raised
    return str(cause) if isinstance(cause, UserError) else ""


def alike(reason: str) -> str:
    """A reason without its numbers and paths: equal for trials that failed of one cause."""
    return _NUMBER.sub("N", _PATH.sub("PATH", reason))


def count_alike(reasons: Iterable[str]) -> list[tuple[str, int]]:
    """Each distinct reason, as it was first given, and how many are like it; the most frequent first."""
    given = list(reasons)
    first: dict[str, str] = {}
    for reason in given:
        first.setdefault(alike(reason), reason)
    return [(first[kind], count) for kind, count in Counter(map(alike, given)).most_common()]


def keep_traceback(folder: AnyPath, key: str, text: str) -> AnyPath:
    """Write a traceback to FOLDER/errors/KEY.txt; the file."""
    file = folder / ERRORS / f"{key}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, (text.rstrip() + "\n").encode())
    return file

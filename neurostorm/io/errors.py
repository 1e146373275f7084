"""Errors for people: the base class of those that a user can act upon, and the reason of a failure in one line.

    WorkerGroupError -> UserExceptionWithTraceback -> StoreError       => "StoreError: S has no manifest: ..."
    RayTaskError     -> UserCodeException -> (text of a traceback)     => "ValueError: ..."

Ray wraps what its workers raise in errors of its own. Nothing here loads Ray: its classes are known by their module.
"""

import difflib
import importlib
import re
from collections.abc import Iterable, Iterator

LONGEST = 600  # characters of a message that is not ours
_LAST_LINE = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Mismatch|Exit)): (.*)$", re.MULTILINE)
# What the other ranks see when one has failed, or what Ray knows when a process is gone.
_FOLLOWS = re.compile(
    r"gloo|NCCL|ProcessGroup|DistBackendError|DistNetworkError|closed by peer|Connection reset|Broken pipe"
)


class UserError(Exception):
    """Input, a setting or the machine cannot be used; the message says what is wrong, where, and what to do.

    Attributes:
        retry: whether the same work may succeed when it is started again without a change.
    """

    retry = False


def reason_of(error: BaseException) -> str:
    """Returns `Class: message` of the exception that a user can act upon, in one line.

    Ray's wrappers are taken off. Of several workers' exceptions the project's own come first, then others, and last
    those that only follow from another worker's end; each different one of the first kind found is given once.

    Args:
        error: what a job ended with, from Ray Train, Ray Tune, a Ray task or this process.

    Returns:
        One line; two or more different reasons are joined by " | ".
    """
    ranked: dict[int, dict[str, None]] = {}
    for found in _unwrapped(error):
        text = _described(found)
        ranked.setdefault(_rank(found, text), {})[text] = None
    return " | ".join(ranked[min(ranked)])


def may_pass(error: BaseException) -> bool:
    """Returns whether work that ended with `error` may succeed when it is started again without a change.

    Args:
        error: what a worker group ended with, possibly in Ray's wrappers. It would only repeat itself when any worker
            raised a `UserError` whose `retry` is False; what other workers raised then follows from it.
    """
    return all(_retry(found) for found in _unwrapped(error))


def _retry(error: BaseException) -> bool:
    if not isinstance(error, _Told):
        return bool(getattr(error, "retry", True))
    module, _, name = str(error.args[1]).rpartition(".")
    if not module.startswith("neurostorm."):
        return True
    try:
        return bool(getattr(getattr(importlib.import_module(module), name, None), "retry", True))
    except ImportError:
        return True


def _unwrapped(error: BaseException) -> Iterator[BaseException]:
    """The exceptions below Ray's wrappers: the innermost that is not Ray's, or Ray's own if there is none."""
    if not _of_ray(error):
        yield error
        return
    failures = getattr(error, "worker_failures", None)
    if failures:
        for rank in sorted(failures):
            yield from _unwrapped(failures[rank])
        return
    for name in ("controller_failure", "_base_exc", "cause", "__cause__"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException) and inner is not error:
            found = list(_unwrapped(inner))
            # Pickled, an exception of Ray's loses what it was raised from; its wrapper's text still has it.
            if len(found) == 1 and _of_ray(found[0]) and (told := _from_text(str(error))):
                found = [told]
            yield from found
            return
    yield error


class _Told(Exception):
    """An exception of which the text of a traceback is all that is left."""


def _from_text(text: str) -> _Told | None:
    own = [found for found in _LAST_LINE.finditer(text) if not found[1].startswith("ray.")]
    return _Told(f"{own[0][1].rpartition('.')[2]}: {own[0][2]}", own[0][1]) if own else None


def _of_ray(error: BaseException) -> bool:
    return any(base.__module__.partition(".")[0] == "ray" for base in type(error).__mro__)


def _ours(error: BaseException) -> bool:
    name = error.args[1] if isinstance(error, _Told) else type(error).__module__
    return str(name).startswith("neurostorm.")


def _rank(error: BaseException, text: str) -> int:
    if _ours(error):
        return 0
    return 2 if _of_ray(error) or _FOLLOWS.search(text) else 1


def _described(error: BaseException) -> str:
    if isinstance(error, _Told):
        return str(error.args[0])
    message = " ".join(str(error).split())
    if not _ours(error) and len(message) > LONGEST:
        message = f"{message[:LONGEST].rstrip()} ..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def nearest_names(typed: str, known: Iterable[str], count: int = 1, cutoff: float = 0.4) -> list[str]:
    """Those of `known` that are spelled most like `typed`, at most `count` of them; maybe none."""
    return difflib.get_close_matches(typed, list(known), n=count, cutoff=cutoff)


def did_you_mean(typed: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """`; did you mean NAME?` for a name that is not among `known`, or "" when none is like it."""
    near = nearest_names(typed, known, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""

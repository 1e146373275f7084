"""Requests to an object store: one client for each bucket, retries for five minutes, errors as those of files.

    request(where, call) -> obstore's own retries (no answer, 5xx, 429) -> ours (what it does not try again)
                         -> FileNotFoundError, FileExistsError, UnavailableError, ObjectStoreError

Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, ...) or the role of the machine, not from files such as ~/.aws.
"""

import contextlib
import itertools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn, Protocol, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from neurostorm.io.errors import UserError

RETRY_VARIABLE = "NEUROSTORM_STORAGE_RETRY_S"
RETRY_S = float(os.environ.get(RETRY_VARIABLE, "300"))  # for how long a request is tried again
REQUEST_TIMEOUT_S = 60.0  # of one try
CONNECT_TIMEOUT_S = 10.0
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0  # between two tries; doubled each time
_SAY_FIRST_S, _SAY_EVERY_S = 5.0, 60.0  # of a request without an answer
_ANSWER = re.compile(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", re.DOTALL)
# In the client's text: it gives all of these as GenericError.
_TEMPORARY = re.compile(
    r"HTTP error|error sending request|timed? ?out|connect|status: 5\d\d|\b(401|403|408|425|429|5\d\d) [A-Z]|"
    r"SlowDown|ServiceUnavailable|InternalError|ExpiredToken|RequestTimeTooSkewed|body|credential",
    re.IGNORECASE,
)
_REFUSED = re.compile(r"\b40[13] [A-Z]|ExpiredToken")
logger = logging.getLogger(__name__)
T = TypeVar("T")
_clients: dict[tuple[int, str, str], Any] = {}  # by process, scheme and bucket


class Address(Protocol):
    """What a request is about: prints as the address of an object."""

    @property
    def bucket(self) -> str:
        """Name of the bucket."""


class ObjectStoreError(UserError, OSError):
    """An object store refused or did not answer, after all retries; the message names the place."""

    retry = True


class UnavailableError(ObjectStoreError):
    """An object store does not answer or does not let us in now: a later request may succeed."""


def request(where: Address, call: Callable[[], T]) -> T:
    """Returns what `call` returns; calls it again for RETRY_S seconds while the store does not answer as it should.

    The client itself tries most requests again. It does not when an answer breaks off in its middle, or when a request
    of which two are not the same as one meets no answer: `call` must be one that may be made twice.

    Raises:
        FileNotFoundError: there is no such object.
        FileExistsError: a condition of the request does not hold.
        UnavailableError: no answer came in time, or access is refused now.
        ObjectStoreError: the store refuses the request for good.
    """
    began_s, pause_s = time.monotonic(), _SHORTEST_PAUSE_S
    while True:
        try:
            with errors(where):
                return call()
        except UnavailableError as error:
            left_s = began_s + RETRY_S - time.monotonic()
            if left_s <= 0 or _is_refused(error):
                raise
            time.sleep(min(pause_s * random.uniform(0.5, 1), left_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class _Watch:
    """Says which request has waited for long, at first after 5 s and then once a minute, for the whole process."""

    def __init__(self) -> None:
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self._began: dict[int, tuple[float, Address]] = {}
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def over(self, where: Address) -> Iterator[None]:
        """Watches the request inside."""
        number = next(self._numbers)
        self._began[number] = time.monotonic(), where
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="object store watch", daemon=True)
                    self._thread.start()
        try:
            yield
        finally:
            del self._began[number]

    def _run(self) -> None:
        said_s = float("-inf")
        while True:
            time.sleep(_SAY_FIRST_S / 2)
            now_s = time.monotonic()
            waiting = list(self._began.values())
            began_s, where = min(waiting, key=lambda each: each[0], default=(now_s, None))
            if now_s - began_s >= _SAY_FIRST_S and now_s - said_s >= _SAY_EVERY_S:
                said_s = now_s
                logger.warning(
                    "%s has not answered for %.0f s, and %d other requests; they are tried again for up to %.0f s (%s)",
                    where, now_s - began_s, len(waiting) - 1, RETRY_S, RETRY_VARIABLE,
                )  # fmt: skip


def client(scheme: str, bucket: str) -> Any:
    """The client of a bucket, one per process; it keeps connections open and tries failed requests again.

    ObjectStoreError in a process that was forked from one with a client: its threads are gone, so a request would never
    end.
    """
    mine = (os.getpid(), scheme, bucket)
    if mine not in _clients:
        if any(process != mine[0] for process, *_ in list(_clients)):
            raise ObjectStoreError(
                f"{scheme}://{bucket}: this process was forked from one that had used an object store already; "
                "start it with multiprocessing's `spawn` or `forkserver`"
            )
        _clients.setdefault(mine, _new_client(scheme, bucket))
    return _clients[mine]


def _new_client(scheme: str, bucket: str) -> Any:
    options: Any = {
        "timeout": timedelta(seconds=REQUEST_TIMEOUT_S),
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
    }
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["allow_http"] = True  # a server of the laboratory's own may speak plain HTTP; it says so by its address
    retries: Any = {
        "max_retries": 10**6,
        "retry_timeout": timedelta(seconds=RETRY_S),
        "backoff": {
            "init_backoff": timedelta(seconds=_SHORTEST_PAUSE_S),
            "max_backoff": timedelta(seconds=_LONGEST_PAUSE_S),
            "base": 2,
        },
    }
    special: Any = {}
    if scheme == "s3" and "AWS_COPY_IF_NOT_EXISTS" not in os.environ:
        special["copy_if_not_exists"] = "multipart"
    return obstore.store.from_url(f"{scheme}://{bucket}", client_options=options, retry_config=retries, **special)


@contextlib.contextmanager
def errors(where: Address) -> Iterator[None]:
    """The client's errors as those of a file: FileNotFoundError, FileExistsError (a condition failed), or our own."""
    try:
        with _watch().over(where):
            yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            fail(where, error)
        raise FileNotFoundError(2, "No such object", str(where)) from None
    except (AlreadyExistsError, PreconditionError):
        raise FileExistsError(17, "The object is there, or changed in between", str(where)) from None
    except BaseError as error:
        fail(where, error)


def fail(where: Address, error: Exception) -> NoReturn:
    """ObjectStoreError with what the client and the server say; the rest of the client's text is its inner state."""
    text = str(error).split("\n\nDebug source")[0]
    answer = _ANSWER.search(text)
    if answer is not None and answer[1] == "NoSuchBucket":
        raise ObjectStoreError(f"{where}: there is no bucket {where.bucket!r}: mend the address, or make it") from error
    first = (text.strip().splitlines() or [type(error).__name__])[0].partition("<")[0].rstrip(": ")
    kind = UnavailableError if _may_pass(error, text) else ObjectStoreError
    raise kind(f"{where}: {first}" + (f": {answer[1]}, {answer[2]}" if answer else "")) from error


def _is_refused(error: UnavailableError) -> bool:
    """Whether access was refused: only new credentials change that."""
    cause = error.__cause__
    return isinstance(cause, PermissionDeniedError | UnauthenticatedError) or bool(_REFUSED.search(str(cause)))


def _may_pass(error: Exception, text: str) -> bool:
    """Whether the same request may succeed later: no answer, a busy server, or credentials that are refused now."""
    refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
    return refused or _TEMPORARY.search(text) is not None


_watches: dict[int, _Watch] = {}  # by process: a fork has no threads


def _watch() -> _Watch:
    return _watches.setdefault(os.getpid(), _Watch())

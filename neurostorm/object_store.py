"""What lies in an object store, offered as pathlib offers files: `s3://bucket/key`, `gs://bucket/key`.

    ObjectPath --/ name--> ObjectPath --read_bytes, read_range, open("rb"), stat, iterdir--> one request each, or a few

Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, ...) or the role of the machine, not from files such as ~/.aws. Requests are tried again
a bounded number of times; what fails for good is an OSError that names the place. `places.py` builds on this what is
the same for files and objects.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import PurePosixPath
from typing import Any, NoReturn

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from neurostorm.errors import UserError

SCHEMES = ("s3", "gs")
MAX_RETRIES = 6  # with pauses of 0.1 s, doubled each time: about 6 s of trouble are sat out
RETRY_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
STREAM_BYTES = 8 << 20
_ANSWER = re.compile(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", re.DOTALL)
# In the client's text: it gives all of these as GenericError.
_TEMPORARY = re.compile(
    r"HTTP error|error sending request|timed? ?out|connect|status: 5\d\d|\b(401|403|408|425|429|5\d\d) [A-Z]|"
    r"SlowDown|ServiceUnavailable|InternalError|ExpiredToken|RequestTimeTooSkewed|body|credential",
    re.IGNORECASE,
)
_clients: dict[tuple[int, str, str], Any] = {}  # by process, scheme and bucket


class PlaceError(UserError, OSError):
    """An object store refused or did not answer, after all retries; the message names the place."""

    retry = True


class UnavailableError(PlaceError):
    """An object store does not answer or does not let us in now: a later request may succeed."""


@dataclass(frozen=True)
class ObjectStat:
    """What `os.stat_result` says, as far as an object store knows: size, time of the last put, and its tag."""

    st_size: int
    st_mtime_ns: int
    e_tag: str | None


@dataclass(frozen=True, order=True)
class ObjectPath:
    """An object, or the prefix of some, in an object store: `s3://bucket/key`. Offers what of Path is needed here.

    Attributes:
        scheme: "s3" or "gs".
        bucket: its name.
        key: path inside the bucket without slashes at its ends; "" is the bucket itself.
    """

    scheme: str
    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    @property
    def client(self) -> Any:
        """The client of its bucket. PlaceError in a process that cannot have one, see `client`."""
        return client(self.scheme, self.bucket)

    @property
    def object_key(self) -> str:
        """The key, where only that of an object will do. IsADirectoryError for the bucket itself."""
        if not self.key:
            raise IsADirectoryError(21, "A bucket is no object", str(self))
        return self.key

    def __truediv__(self, part: str | PurePosixPath) -> "ObjectPath":
        """One or more steps down, slashes at the ends do not count. ValueError for `.` and `..`, which name nothing."""
        steps = [step for step in str(part).split("/") if step]
        if {".", ".."} & set(steps):
            raise ValueError(f"{self} / {str(part)!r}: `.` and `..` have no meaning in an object store")
        return ObjectPath(self.scheme, self.bucket, "/".join((self.key, *steps) if self.key else steps))

    @property
    def name(self) -> str:
        """The last step of the key."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """The name's last suffix, with its dot."""
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> "ObjectPath":
        """One step up; the bucket is its own parent."""
        above = PurePosixPath(self.key).parent.as_posix()
        return ObjectPath(self.scheme, self.bucket, "" if above == "." else above)

    @property
    def parents(self) -> tuple["ObjectPath", ...]:
        """All steps up, the nearest first, the bucket last."""
        return (self.parent, *self.parent.parents) if self.key else ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Bucket and steps of the key."""
        return (f"{self.scheme}://{self.bucket}", *PurePosixPath(self.key).parts)

    def as_posix(self) -> str:
        """The same as `str`."""
        return str(self)

    def absolute(self) -> "ObjectPath":
        """Itself: an address is always absolute."""
        return self

    def with_name(self, name: str) -> "ObjectPath":
        """The same place with another last step."""
        return self.parent / name

    def relative_to(self, above: "ObjectPath") -> PurePosixPath:
        """The way from `above` to here. ValueError when this is not below it."""
        here, there = (PurePosixPath(path.scheme, path.bucket, path.key) for path in (self, above))
        return here.relative_to(there)

    def read_bytes(self) -> bytes:
        """The whole object. FileNotFoundError, or PlaceError after all retries."""
        with errors(self):
            return bytes(obstore.get(self.client, self.object_key).bytes())

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text, every line end as a newline."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding=encoding).read()

    def read_range(self, offset: int, size: int) -> memoryview:
        """`size` bytes from `offset` on in one request, fewer at the end; errors as `read_bytes`."""
        if size == 0:
            return memoryview(b"")
        try:
            with errors(self):
                return memoryview(obstore.get_range(self.client, self.object_key, start=offset, length=size))
        except PlaceError:
            if offset >= self.stat().st_size:  # servers refuse a range that begins behind the end
                return memoryview(b"")
            raise

    def write_bytes(self, data: bytes | memoryview | Iterable[bytes]) -> int:
        """Put the object, whole or not at all, and return its size; large ones, and pieces, go up in several parts.

        PlaceError after all retries. What raises while pieces are made leaves no object.
        """
        if isinstance(data, bytes | memoryview):
            with errors(self):
                obstore.put(self.client, self.object_key, data)
            return memoryview(data).nbytes
        sizes: list[int] = []
        with ThreadPoolExecutor(1) as pool, errors(self):
            obstore.put(self.client, self.object_key, _made_in(pool, iter(data), sizes))
        return sum(sizes)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        """Put text, whole or not at all."""
        return self.write_bytes(text.encode(encoding))

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """A stream from the front, fetched in pieces of 8 MB. FileNotFoundError, or PlaceError after all retries."""
        if mode != "rb":
            raise ValueError(f"{self}: an object is read with open('rb') and put whole with write_bytes, not {mode!r}")
        with errors(self):
            reader = obstore.open_reader(self.client, self.object_key, buffer_size=STREAM_BYTES)
        return io.BufferedReader(_Stream(self, reader), STREAM_BYTES)

    def stat(self) -> ObjectStat:
        """Size and time of the object. FileNotFoundError, or PlaceError after all retries."""
        with errors(self):
            found = obstore.head(self.client, self.object_key)
        return ObjectStat(found["size"], int(found["last_modified"].timestamp() * 1e9), found["e_tag"])

    def is_file(self) -> bool:
        """Whether there is an object of this very key."""
        try:
            self.stat()
        except (FileNotFoundError, IsADirectoryError):
            return False
        return True

    def is_dir(self) -> bool:
        """Whether any object lies below, or this is a bucket. PlaceError when the bucket is not there."""
        with errors(self):
            pages = obstore.list(self.client, f"{self.key}/" if self.key else None, chunk_size=1)
            return any(page for page in pages) or not self.key

    def exists(self) -> bool:
        """Whether there is an object of this key, or any below."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator["ObjectPath"]:
        """What lies one step below: objects, and prefixes that stand for folders."""
        with errors(self):
            found = obstore.list_with_delimiter(self.client, self.key or None)
        keys = {*found["common_prefixes"], *(entry["path"] for entry in found["objects"])}
        for key in sorted(keys - {self.key}):  # some tools mark a folder by an empty object of its name
            yield ObjectPath(self.scheme, self.bucket, key)

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: an object store has no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object. FileNotFoundError when it is not there, unless `missing_ok`."""
        if not missing_ok:
            self.stat()
        with errors(self), contextlib.suppress(FileNotFoundError):
            obstore.delete(self.client, self.object_key)


def client(scheme: str, bucket: str) -> Any:
    """The client of a bucket, one per process; it keeps connections open and tries failed requests again.

    PlaceError in a process that was forked from one with a client: its threads are gone, so a request would never end.
    """
    mine = (os.getpid(), scheme, bucket)
    if mine not in _clients:
        if any(process != mine[0] for process, *_ in list(_clients)):
            raise PlaceError(
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
    retries: Any = {"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S)}
    special: Any = {}
    if scheme == "s3" and "AWS_COPY_IF_NOT_EXISTS" not in os.environ:
        special["copy_if_not_exists"] = "multipart"
    return obstore.store.from_url(f"{scheme}://{bucket}", client_options=options, retry_config=retries, **special)


def _made_in(pool: ThreadPoolExecutor, pieces: Iterator[bytes], sizes: list[int]) -> Iterator[bytes]:
    """The pieces, each made by the thread of `pool`: what makes them may use the client, which cannot call itself."""
    while (piece := pool.submit(next, pieces, None).result()) is not None:
        sizes.append(len(piece))
        yield piece


@contextlib.contextmanager
def errors(where: ObjectPath) -> Iterator[None]:
    """The client's errors as those of a file: FileNotFoundError, FileExistsError (a condition failed), PlaceError."""
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            fail(where, error)
        raise FileNotFoundError(2, "No such object", str(where)) from None
    except (AlreadyExistsError, PreconditionError):
        raise FileExistsError(17, "The object is there, or changed in between", str(where)) from None
    except BaseError as error:
        fail(where, error)


def fail(where: ObjectPath, error: Exception) -> NoReturn:
    """PlaceError with what the client and the server say; the rest of the client's text is its inner state."""
    text = str(error).split("\n\nDebug source")[0]
    answer = _ANSWER.search(text)
    if answer is not None and answer[1] == "NoSuchBucket":
        raise PlaceError(f"{where}: there is no bucket {where.bucket!r}: mend the address, or make it") from error
    first = (text.strip().splitlines() or [type(error).__name__])[0].partition("<")[0].rstrip(": ")
    kind = UnavailableError if _may_pass(error, text) else PlaceError
    raise kind(f"{where}: {first}" + (f": {answer[1]}, {answer[2]}" if answer else "")) from error


def _may_pass(error: Exception, text: str) -> bool:
    """Whether the same request may succeed later: no answer, a busy server, or credentials that are refused now."""
    refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
    return refused or _TEMPORARY.search(text) is not None


class _Stream(io.RawIOBase):
    """An object read forwards, as Python's own buffers want it."""

    def __init__(self, where: ObjectPath, reader: Any) -> None:
        super().__init__()
        self._where, self._reader = where, reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with errors(self._where):
            try:
                data = memoryview(self._reader.read(len(buffer)))
            except OSError as error:  # the reader speaks of a request, not of the object
                fail(self._where, error)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._reader.close()
        super().close()

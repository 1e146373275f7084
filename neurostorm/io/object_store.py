"""What lies in an object store, offered as pathlib offers files: `s3://bucket/key`, `gs://bucket/key`.

    ObjectPath --/ name--> ObjectPath --read_bytes, read_range, open("rb"), stat, iterdir--> one request each, or a few

What fails for good is an OSError that names the place; see `object_requests.py` for retries and credentials.
`places.py` builds on this what is the same for files and objects.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import obstore

from neurostorm.io.object_requests import ObjectStoreError, UnavailableError, client, errors, fail, request

__all__ = [
    "SCHEMES",
    "STREAM_BYTES",
    "AnyPath",
    "ObjectPath",
    "ObjectStat",
    "ObjectStoreError",
    "UnavailableError",
    "errors",
    "request",
]

SCHEMES = ("s3", "gs")
STREAM_BYTES = 8 << 20


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
        """The client of its bucket. ObjectStoreError in a process that cannot have one, see `client`."""
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
        """The whole object. FileNotFoundError, or ObjectStoreError after all retries."""
        return request(self, lambda: bytes(obstore.get(self.client, self.object_key).bytes()))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text, every line end as a newline."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding=encoding).read()

    def read_range(self, offset: int, size: int) -> memoryview:
        """`size` bytes from `offset` on in one request, fewer at the end; errors as `read_bytes`."""
        if size == 0:
            return memoryview(b"")
        try:
            return memoryview(
                request(self, lambda: obstore.get_range(self.client, self.object_key, start=offset, length=size))
            )
        except ObjectStoreError:
            if offset >= self.stat().st_size:  # servers refuse a range that begins behind the end
                return memoryview(b"")
            raise

    def write_bytes(self, data: bytes | memoryview | Iterable[bytes]) -> int:
        """Put the object, whole or not at all, and return its size; large ones, and pieces, go up in several parts.

        ObjectStoreError after all retries. What raises while pieces are made leaves no object.
        """
        if isinstance(data, bytes | memoryview):
            request(self, lambda: obstore.put(self.client, self.object_key, data))
            return memoryview(data).nbytes
        sizes: list[int] = []
        with ThreadPoolExecutor(1) as pool, errors(self):
            obstore.put(self.client, self.object_key, _made_in(pool, iter(data), sizes))
        return sum(sizes)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        """Put text, whole or not at all."""
        return self.write_bytes(text.encode(encoding))

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """A stream from the front, fetched in pieces of 8 MB. FileNotFoundError; ObjectStoreError after all retries."""
        if mode != "rb":
            raise ValueError(f"{self}: an object is read with open('rb') and put whole with write_bytes, not {mode!r}")
        reader = request(self, lambda: obstore.open_reader(self.client, self.object_key, buffer_size=STREAM_BYTES))
        return io.BufferedReader(_Stream(self, reader), STREAM_BYTES)

    def stat(self) -> ObjectStat:
        """Size and time of the object. FileNotFoundError, or ObjectStoreError after all retries."""
        found = request(self, lambda: obstore.head(self.client, self.object_key))
        return ObjectStat(found["size"], int(found["last_modified"].timestamp() * 1e9), found["e_tag"])

    def is_file(self) -> bool:
        """Whether there is an object of this very key."""
        try:
            self.stat()
        except (FileNotFoundError, IsADirectoryError):
            return False
        return True

    def is_dir(self) -> bool:
        """Whether any object lies below, or this is a bucket. ObjectStoreError when the bucket is not there."""
        prefix = f"{self.key}/" if self.key else None
        return request(self, lambda: any(obstore.list(self.client, prefix, chunk_size=1))) or not self.key

    def exists(self) -> bool:
        """Whether there is an object of this key, or any below."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator["ObjectPath"]:
        """What lies one step below: objects, and prefixes that stand for folders."""
        found = request(self, lambda: obstore.list_with_delimiter(self.client, self.key or None))
        keys = {*found["common_prefixes"], *(entry["path"] for entry in found["objects"])}
        for key in sorted(keys - {self.key}):  # some tools mark a folder by an empty object of its name
            yield ObjectPath(self.scheme, self.bucket, key)

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: an object store has no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object. FileNotFoundError when it is not there, unless `missing_ok`."""
        if not missing_ok:
            self.stat()
        with contextlib.suppress(FileNotFoundError):
            request(self, lambda: obstore.delete(self.client, self.object_key))

    def listed(self) -> Iterator[tuple[str, int]]:
        """(key below here, size in bytes) of every object below, in order; a listing that breaks off goes on."""
        prefix, last, pages = f"{self.key}/" if self.key else "", None, None

        def next_page() -> Any:
            nonlocal pages
            if pages is None:
                pages = iter(obstore.list(self.client, prefix or None, offset=last, chunk_size=1000))
            try:
                return next(pages, None)
            except Exception:
                pages = None
                raise

        while page := request(self, next_page):
            last = page[-1]["path"]
            for entry in page:
                if len(entry["path"]) > len(prefix):  # some tools mark a folder by an empty object of its name
                    yield entry["path"][len(prefix) :], entry["size"]


def _made_in(pool: ThreadPoolExecutor, pieces: Iterator[bytes], sizes: list[int]) -> Iterator[bytes]:
    """The pieces, each made by the thread of `pool`: what makes them may use the client, which cannot call itself."""
    while (piece := pool.submit(next, pieces, None).result()) is not None:
        sizes.append(len(piece))
        yield piece


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


AnyPath = Path | ObjectPath

"""The bytes of one file from front to back: local or remote, plain or gzip, hashed on the way, read ahead or not.

    place.open("rb") ──> Tap: sha256 of the bytes as they lie ──> gzip, if the first two bytes say so ──> stream
    items of an iterator ──> a thread and a queue of a few places ──> the same items: `read_ahead`

Inflating is what costs most of an ingest, so it is done by ISA-L, which is about three times as fast as zlib. It and
sha256 leave Python's lock to others while they work, so a thread that reads ahead does run beside the arithmetic.
"""

import errno
import gzip
import io
import queue
import threading
import zlib
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol, TypeVar, cast

from isal import igzip, isal_zlib

from neurostorm.io.object_store import ObjectPath
from neurostorm.io.paths import AnyPath

GZIP_MAGIC = b"\x1f\x8b"
# What reading a stream raises when the file is cut off or damaged; an OSError means that it cannot be read at all.
DAMAGE: tuple[type[Exception], ...] = (
    EOFError, zlib.error, gzip.BadGzipFile, cast(type[Exception], isal_zlib.error),
)  # fmt: skip
_HEAD_BYTES = 1 << 16
MAX_SMALL_BYTES = 1 << 28  # of a table or sidecar of one run: tables of confounds have some MB
MAX_PARTICIPANTS_BYTES = 1 << 31  # 500,000 people with 4 kB each

Stream = IO[bytes] | gzip.GzipFile
Item = TypeVar("Item")


class Digest(Protocol):
    """What `hashlib.sha256()` returns, as far as it is needed here."""

    def update(self, data: bytes | memoryview, /) -> None: ...


class TooLarge(ValueError):
    """A file that is no table or sidecar: it is too large to be read whole."""


def read_small(path: AnyPath, most_bytes: int = MAX_SMALL_BYTES) -> bytes:
    """A table or sidecar beside a run, whole.

    Raises:
        TooLarge: it has more than `most_bytes`.
        OSError: it cannot be read, or is a folder, a pipe or a device.
    """
    if isinstance(path, Path) and path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    size = path.stat().st_size
    if size > most_bytes:
        raise TooLarge(f"{path} has {size:,} bytes, more than {most_bytes:,}")
    return path.read_bytes()


def open_stream(path: AnyPath, digest: Digest | None = None) -> tuple[Stream, bool]:
    """The file's decompressed bytes, to be read forwards, and whether it is compressed; its bytes say so, not its name.

    Args:
        path: local or in an object store.
        digest: given every byte of the file as it lies there, once the stream was read to its end.

    OSError when it cannot be opened. Reading raises one of DAMAGE where the file is damaged.
    """
    file = path.open("rb")
    compressed = file.peek(2)[:2] == GZIP_MAGIC
    tapped = file if digest is None else cast(IO[bytes], _Tap(file, digest))
    return (_OwningGzip(tapped) if compressed else tapped), compressed


def open_head(path: AnyPath) -> tuple[Stream, bool]:
    """`open_stream` for who wants a header only: of an object just its first 64 kB are fetched."""
    if not isinstance(path, ObjectPath):
        return open_stream(path)
    head = bytes(path.read_range(0, _HEAD_BYTES))
    compressed = head[:2] == GZIP_MAGIC
    return (_OwningGzip(io.BytesIO(head)) if compressed else io.BytesIO(head)), compressed


def read_ahead(items: Generator[Item, None, None], depth: int) -> Iterator[Item]:
    """The same items in the same order, made by a thread that is at most `depth` + 1 items ahead of who takes them.

    An error inside `items` is raised where its item would have come. When the taker stops early, `items` is closed and
    the thread has ended before `close()` of this iterator returns.
    """
    waiting: queue.Queue[tuple[Item | None, Exception | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def produce() -> None:
        error: Exception | None = None
        try:
            for item in items:
                waiting.put((item, None))
                if stopped.is_set():
                    return
        except Exception as raised:  # goes to the taker, whose work it concerns
            error = raised
        finally:
            items.close()
        waiting.put((None, error))

    thread = threading.Thread(target=produce, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
        with suppress(queue.Empty):  # room for what the thread is just about to leave; then it sees that it shall end
            while True:
                waiting.get_nowait()
        thread.join()


class _Tap(io.RawIOBase):
    """A file that shows every byte it hands out to a digest."""

    def __init__(self, file: io.BufferedReader, digest: Digest) -> None:
        super().__init__()
        self._file, self._digest = file, digest

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # what RawIOBase.read hands over
        count = self._file.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _OwningGzip(igzip.IGzipFile):
    """A gzip stream that never inflates more than is asked for, and closes the file below it.

    `GzipFile.read` fills a buffer of its own first, so that damage behind a piece would be met before it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._below = file

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return super().read(size)
        pieces = []
        while size > 0 and (piece := self.read1(size)):
            pieces.append(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        super().close()
        self._below.close()

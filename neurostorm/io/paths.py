"""Paths: local ones as they are, and the same few operations on what lies in an object store.

    to_path("stores/hcp") -> pathlib.Path          to_path("s3://bucket/stores/hcp") -> ObjectPath   (gs:// likewise)
                 └─── list_files, copy_files, remove_tree ; in one step: `atomic.py` ───┘

All that differs between the two is here and in `atomic.py`, so that the rest of the code does not ask where data lie.
"""

import contextlib
import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import obstore

from neurostorm.io.atomic import make_folder, name_errors, replace_pieces
from neurostorm.io.object_store import (
    SCHEMES,
    STREAM_BYTES,
    AnyPath,
    ObjectPath,
    ObjectStoreError,
    UnavailableError,
    request,
)

COPY_BYTES = 1 << 30  # the largest object that is copied in one request, which has to answer in time
TRANSFERS = 8  # files moved at once between a folder and an object store
# A file server that is away, a mount that is stale, or rights that have expired; what lies there may be whole.
_UNAVAILABLE = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EREMOTEIO, errno.ENODEV,
    errno.ENXIO, errno.EAGAIN, errno.EACCES, errno.EPERM, errno.EKEYEXPIRED, errno.ESHUTDOWN,
}  # fmt: skip
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_SECRET = re.compile(r"(?i)pass(word|wd)?$|secret|token|signature|credential|(access|api)[-_]?key")  # in a URL's query


def to_path(address: str | os.PathLike[str] | ObjectPath) -> AnyPath:
    """A local path or an object store's address as a AnyPath.

    Raises:
        ValueError: an address of another kind, or one without a bucket, with what is understood; one with a secret.
    """
    if isinstance(address, ObjectPath):
        return address
    if not isinstance(address, str | os.PathLike):
        raise ValueError(f"{address!r} is no place: give a path, or an address as text")
    text = os.fspath(address)
    matched = _URL.fullmatch(text)
    if matched is None:
        if text.partition(":/")[0] in SCHEMES:
            raise ValueError(
                f"{text!r} lacks a slash: an object store's address reads s3://BUCKET/KEY or gs://BUCKET/KEY"
            )
        return Path(text).expanduser()  # no shell does it behind `--data.store=`
    scheme, rest = matched[1].lower(), matched[2]
    if scheme in SCHEMES:
        without_credentials(text)
    if scheme == "file":
        return Path("/" + rest.lstrip("/"))
    bucket, _, key = rest.partition("/")
    if scheme not in SCHEMES or not bucket:
        raise ValueError(
            f"{text!r} is no place that is understood: use a local path, s3://BUCKET/KEY or gs://BUCKET/KEY"
        )
    steps = [step for step in key.split("/") if step]
    if {".", ".."} & set(steps):
        raise ValueError(f"{text!r}: `.` and `..` have no meaning in an object store")
    return ObjectPath(scheme, bucket, "/".join(steps))


def is_unavailable(error: BaseException) -> bool:
    """Returns whether storage did not answer, as opposed to answering that something is missing or damaged.

    Args:
        error: of a read or write; what it was raised from counts, too.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, UnavailableError | TimeoutError | ConnectionError):
            return True
        if isinstance(found, OSError) and not isinstance(found, ObjectStoreError) and found.errno in _UNAVAILABLE:
            return True
        found = found.__cause__
    return False


def without_credentials(address: str) -> str:
    """`address`, unless it is a URL that holds credentials, which would be logged with it.

    ValueError for a user or password before the host, or a password, token, key or signature in the query. It says
    where they belong and does not repeat them.
    """
    matched = _URL.fullmatch(address)
    if matched is None:
        return address
    try:
        parts = urlsplit(address)
        query = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    except ValueError as error:
        raise ValueError(f"an address of {matched[1]}:// that cannot be read ({type(error).__name__})") from None
    if "@" in parts.netloc or any(_SECRET.search(name) for name in query):
        raise ValueError(
            f"an address of {matched[1]}:// that holds credentials (not shown): it would be logged with the run. Put "
            "them in the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or AWS_..., GOOGLE_..."
        )
    return address


def relative_path(name: str) -> str:
    """`name`, if it is a path relative to a folder that stays below it; else ValueError naming it."""
    if not isinstance(name, str) or "\0" in name or {"", ".", ".."} & set(name.split("/")):
        raise ValueError(f"{name!r} leads out of its folder: expected a relative path without `.` and `..`")
    return name


def path_component(name: str) -> str:
    """`name`, if it can name one file or folder; else ValueError naming it."""
    relative_path(name)
    if "/" in name or "\\" in name or not name.isprintable():
        raise ValueError(f"{name!r} cannot name a file or folder: use no slashes and no control characters")
    return name


def list_files(folder: AnyPath) -> Iterator[tuple[str, int]]:
    """(path relative to `folder`, size in bytes) of every file below it, in no order; nothing if there is no folder.

    OSError when a folder cannot be listed. A file that goes away meanwhile is left out.
    """
    if isinstance(folder, Path):
        for home, _, names in os.walk(folder, onerror=_unless_gone):
            for name in names:
                path = Path(home, name)
                with contextlib.suppress(FileNotFoundError):
                    yield path.relative_to(folder).as_posix(), path.stat().st_size
        return
    yield from folder.listed()


def remove_tree(folder: AnyPath) -> None:
    """Delete a folder or prefix with all it holds; nothing if it is not there. OSError for what cannot be deleted."""
    if isinstance(folder, Path):
        if folder.is_dir():
            shutil.rmtree(folder)
        return
    keys = [(folder / name).key for name, _ in list_files(folder)]
    for first in range(0, len(keys), 1000):
        part = keys[first : first + 1000]
        request(folder, functools.partial(obstore.delete, folder.client, part))


def copy_files(source: AnyPath, target: AnyPath, names: Iterable[str]) -> None:
    """Copy the files `names`, relative to both folders, several at a time; each is there whole or not at all.

    What stays within a bucket is copied there, and does not pass through here. OSError names the first that failed;
    others may have been copied. A name that leads out of the folders is one.
    """

    def copy(name: str) -> None:
        try:
            relative_path(name)  # lists of names come from files, and an object's key may hold anything
        except ValueError as error:
            raise ObjectStoreError(f"{source}: {error}") from error
        here, there = source / name, target / name
        if isinstance(here, ObjectPath) and isinstance(there, ObjectPath) and _copied_within(here, there):
            return
        with name_errors(here, there):
            if isinstance(there, ObjectPath):
                request(there, lambda: _stream(here, there.write_bytes))
            else:
                make_folder(there.parent)
                _stream(here, functools.partial(replace_pieces, there))

    with ThreadPoolExecutor(TRANSFERS) as pool:
        for _ in pool.map(copy, names):
            pass


def _stream(source: AnyPath, write: Callable[[Iterator[bytes]], object]) -> None:
    """Has the pieces of a file written."""
    with source.open("rb") as reader:
        write(iter(lambda: reader.read(STREAM_BYTES), b""))


def _copied_within(here: ObjectPath, there: ObjectPath) -> bool:
    """Let the store copy an object within its bucket; False when it cannot: another bucket, too large, refused."""
    if (here.scheme, here.bucket) != (there.scheme, there.bucket) or here.stat().st_size > COPY_BYTES:
        return False
    try:
        request(here, lambda: obstore.copy(here.client, here.object_key, there.object_key))
    except ObjectStoreError:  # it may still let us read and write
        return False
    return True


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error

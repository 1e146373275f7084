"""Places: local paths as they are, and the same few operations on what lies in an object store.

    place("stores/hcp") -> pathlib.Path          place("s3://bucket/stores/hcp") -> ObjectPath   (gs:// likewise)
                 └─── list_files, copy_files, remove_tree ; replace, create, update in one step ───┘

An object store has no rename, no append and no lock, but a put is seen whole or not at all, and may be made to depend
on what is there. All that must be safe with several writers is built here on either kind's own means, so that the rest
of the code does not ask where its data lie.
"""

import contextlib
import errno
import functools
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import obstore

from neurostorm.io.locks import locked, open_locked, temporary_name
from neurostorm.io.object_store import SCHEMES, STREAM_BYTES, ObjectPath, ObjectStoreError, UnavailableError, request

COPY_BYTES = 1 << 30  # the largest object that is copied in one request, which has to answer in time
TRANSFERS = 8  # files moved at once between a folder and an object store
_UPDATES = 50  # tries to change an object that others change at the same time
_TEMPORARY, _LOCK = ".partial", ".update.lock"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# A file server that is away, a mount that is stale, or rights that have expired; what lies there may be whole.
_UNAVAILABLE = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EREMOTEIO, errno.ENODEV,
    errno.ENXIO, errno.EAGAIN, errno.EACCES, errno.EPERM, errno.EKEYEXPIRED, errno.ESHUTDOWN,
}  # fmt: skip
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_SECRET = re.compile(r"(?i)pass(word|wd)?$|secret|token|signature|credential|(access|api)[-_]?key")  # in a URL's query

AnyPath = Path | ObjectPath


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
                _stream(here, functools.partial(_replace, there))

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


@contextlib.contextmanager
def name_errors(*files: AnyPath) -> Iterator[None]:
    """Puts the names of one or two files into an OSError that has none, as those of writing to a full disk."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ObjectStoreError) or error.filename is not None:
            raise
        one, *other = map(str, files)
        raise OSError(error.errno, error.strerror or str(error), one, None, *other) from error


def atomic_write(target: AnyPath, data: bytes) -> None:
    """Make `data` the content of `target` in one step, flushed to disk: readers see the old content or the new."""
    if isinstance(target, ObjectPath):
        target.write_bytes(data)
    else:
        with name_errors(target):
            _replace(target, [data])


def put_if_absent(target: AnyPath, data: bytes) -> bool:
    """Make `target` with `data`, unless it is there: False then, and it stays as it is."""
    try:
        if isinstance(target, ObjectPath):
            request(target, lambda: obstore.put(target.client, target.object_key, data, mode="create"))
        else:
            with name_errors(target), _beside(target, [data]) as partial:
                _link(partial, target)
                fsync(target.parent)
    except FileExistsError:
        return False
    return True


def copy_if_absent(uploaded: ObjectPath, target: ObjectPath) -> bool:
    """Copy an object to `target` in its own bucket, unless one is there: False then. The `create` of what is large.

    OSError when the store refuses; on S3 and its like this is a multipart copy whose completion bears the condition.
    """
    try:
        request(target, lambda: obstore.copy(target.client, uploaded.object_key, target.object_key, overwrite=False))
    except FileExistsError:
        return False
    return True


def atomic_update(target: AnyPath, change: Callable[[bytes | None], bytes | None]) -> None:
    """Read `target` (None: not there), `change` it, write it back; what others change at the same time is not lost.

    `change` may be called several times, and on its own result when an answer was lost; what it returns is written,
    None writes nothing. OSError when it cannot be read or written, or when too many others keep changing it.
    """
    if isinstance(target, Path):
        with locked(target.parent / _LOCK):
            before = target.read_bytes() if target.is_file() else None
            after = change(before)
            if after is not None and after != before:
                atomic_write(target, after)
        return
    for _ in range(_UPDATES):
        before, version = _read_versioned(target)
        after = change(before)
        if after is None or after == before:
            return
        mode: Any = version or "create"
        try:
            options = {"mode": mode, "use_multipart": False}
            request(target, functools.partial(obstore.put, target.client, target.object_key, after, **options))
            return
        except (FileExistsError, FileNotFoundError):  # it changed, or went
            time.sleep(random.uniform(0.01, 0.2))  # those who collide wait differently long
    raise ObjectStoreError(f"{target}: others changed it {_UPDATES} times in a row while this process tried to")


def fsync(path: Path) -> None:
    """Force a local file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a local folder and those above it, as far as they are missing; they outlast a power failure."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


def _replace(target: Path, pieces: Iterable[bytes]) -> None:
    with _beside(target, pieces) as partial:
        os.replace(partial, target)
        fsync(target.parent)


@contextlib.contextmanager
def _beside(target: Path, pieces: Iterable[bytes]) -> Iterator[Path]:
    """A flushed temporary file with `pieces` in the folder of `target`, gone at the end."""
    if not target.parent.is_dir():
        raise FileNotFoundError(2, "No such folder", str(target.parent))
    partial = target.with_name(temporary_name(f".{target.name}.") + _TEMPORARY)
    try:
        with open_locked(partial) as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            yield partial
    finally:
        partial.unlink(missing_ok=True)


def _link(partial: Path, target: Path) -> None:
    """Give `partial` the name `target` as well. FileExistsError when it is taken, which a rename would not say."""
    try:
        os.link(partial, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with locked(target.parent / _LOCK):  # those who come here wait for each other
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "It is there", str(target)) from None
            os.replace(partial, target)


def _read_versioned(target: ObjectPath) -> tuple[bytes | None, dict[str, str] | None]:
    """The object and what tells this version of it from others: S3 goes by the tag, Google by the version."""

    def get() -> tuple[Any, bytes]:
        answer = obstore.get(target.client, target.object_key)
        return answer, bytes(answer.bytes())

    try:
        found, data = request(target, get)
    except FileNotFoundError:
        return None, None
    facts = {"e_tag": found.meta["e_tag"], "version": found.meta["version"]}
    return data, {name: fact for name, fact in facts.items() if fact is not None}


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error

"""Files and objects that are changed in one step: readers see the old content or the new, never a part.

    atomic_write(path, data)      put_if_absent(path, data) -> made?      atomic_update(path, change)

An object store has no rename, no append and no lock, but a put is seen whole or not at all, and may be made to depend
on what is there. A local file is written beside its place, flushed and renamed; those who change one at the same time
wait for each other.
"""

import contextlib
import errno
import functools
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import obstore

from neurostorm.io.locks import locked, open_locked, temporary_name
from neurostorm.io.object_store import AnyPath, ObjectPath, ObjectStoreError, request

_UPDATES = 50  # tries to change an object that others change at the same time
_TEMPORARY, _LOCK = ".partial", ".update.lock"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def atomic_write(target: AnyPath, data: bytes) -> None:
    """Make `data` the content of `target` in one step, flushed to disk: readers see the old content or the new."""
    if isinstance(target, ObjectPath):
        target.write_bytes(data)
    else:
        with name_errors(target):
            replace_pieces(target, [data])


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


def make_folder(path: Path) -> None:
    """Make a local folder and those above it, as far as they are missing; they outlast a power failure."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


def fsync(path: Path) -> None:
    """Force a local file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def replace_pieces(target: Path, pieces: Iterable[bytes]) -> None:
    """Make `pieces` the content of a local file in one step, flushed to disk."""
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

"""Files that say whether their writer lives: a lock that ends with its process, on this machine or another.

    writer: open_locked(FILE) ... writes ... closes       sweeper: orphaned(FILE)? --> remove_if_orphaned(FILE, remove)
    several processes, one after another: locked(FILE)

On a file system without locks age decides.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

STALE_S = 24 * 3600.0


def orphaned(file: Path) -> bool:
    """Whether the process that wrote `file` under `open_locked` is gone, see `remove_if_orphaned`."""
    return remove_if_orphaned(file, lambda: None)


def remove_if_orphaned(file: Path, remove: Callable[[], object]) -> bool:
    """Call `remove` if the process that wrote `file` under `open_locked` is gone; whether it is.

    A lock ends with its process, on this machine or another. It is held while `remove` is at work, so that a writer who
    comes between finds out. On a file system without locks age decides.
    """
    try:
        with file.open("rb+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                if time.time() - file.stat().st_mtime < STALE_S:
                    return False
            remove()
    except FileNotFoundError:  # somebody else was faster
        return False
    return True


@contextlib.contextmanager
def open_locked(file: Path, buffering: int = -1) -> Iterator[BinaryIO]:
    """A new file to write, locked until it is closed: says to `remove_if_orphaned` that somebody is at work."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb", buffering=buffering) as handle:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle.fileno()).st_nlink:  # else it was taken for an orphan before the lock was there
                yield handle
                return


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """The file `path`, made if need be, locked: those who come here wait for each other."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

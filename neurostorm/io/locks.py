"""Files by which processes on one or many machines keep out of each other's way, on any file system that they share.

    several processes, one after another:  locked(FILE)
    writer: open_locked(FILE) ... writes ... closes       sweeper: orphaned(FILE)? --> remove_if_orphaned(FILE, remove)

`locked` needs no locks of the file system: it makes FILE, which only one can, and removes it. A FILE that stays behind
is taken away when its process is gone, or, of another machine, when it shows no life for a minute.

What `open_locked` writes is locked with flock until it is closed. Some network file systems have no flock (then age
decides), and on some it is seen on the own machine alone: what another machine wrote also has to be old.
"""

import contextlib
import fcntl
import json
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from neurostorm.io.processes import is_alive, machine_tag, this_process

STALE_S = 24 * 3600.0  # of a file whose writer cannot be asked
QUIET_S = 15 * 60.0  # of a file of another machine, whose lock this one may not see
SILENT_S, _BEAT_S = 60.0, 10.0  # a lock without a sign of life for so long is stale; between two signs
_SAY_S = 10.0  # of waiting for a lock
logger = logging.getLogger(__name__)


def temporary_name(stem: str = "") -> str:
    """A name that nothing else has, and that says to `remove_if_orphaned` that this machine writes it."""
    return f"{stem}{machine_tag()}-{uuid.uuid4().hex}"


def orphaned(file: Path) -> bool:
    """Whether the process that wrote `file` under `open_locked` is gone, see `remove_if_orphaned`."""
    return remove_if_orphaned(file, lambda: None)


def remove_if_orphaned(file: Path, remove: Callable[[], object]) -> bool:
    """Call `remove` if the process that wrote `file` under `open_locked` is gone; whether it is.

    Its lock ends with the process. It is held while `remove` is at work, so that a writer who comes between finds out.
    Of a file of another machine the lock may not be seen here: it has to be older than 15 minutes as well. On a file
    system without locks a file has to be a day old.
    """
    try:
        with file.open("rb+") as handle:
            age_s = time.time() - file.stat().st_mtime
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                if age_s < STALE_S:
                    return False
            if machine_tag() not in f"{file.parent.name}/{file.name}" and age_s < QUIET_S:
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
    """Those who come here with the same `path`, from any machine, wait for each other; the folder exists."""
    mine = json.dumps({**this_process(), "token": uuid.uuid4().hex}).encode()
    waiting = _Waiting(path)
    while not _make(path, mine):
        waiting.look()
    _beats().add(path)
    try:
        yield
    finally:
        _beats().discard(path)
        with contextlib.suppress(OSError):
            if path.read_bytes() == mine:  # else it was taken for stale, after this process stood still
                path.unlink()


def _make(path: Path, content: bytes) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(handle, content)
    except OSError:  # the disk is full
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    return True


class _Waiting:
    """Waits for a lock that another process has, and takes it away once that one shows no sign of life."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[bytes, int] | None = None  # what the lock was, and when it gave its last sign of life
        self._since_s = self._began_s = self._said_s = time.monotonic()

    def look(self) -> None:
        """A short pause; removes the lock if it is stale."""
        now_s = time.monotonic()
        try:
            seen = self._path.read_bytes(), self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if seen != self._seen:
            self._seen, self._since_s = seen, now_s
        owner = _owner(seen[0])
        alive = is_alive(owner)
        if alive is False or (alive is None and now_s - self._since_s > SILENT_S):
            self._take_away(seen[0], owner)
            return
        if now_s - self._said_s > _SAY_S:
            self._said_s = now_s
            logger.warning(
                "waiting for %s, held by process %s on %s, for %.0f s",
                self._path, owner.get("pid"), owner.get("host"), now_s - self._began_s,
            )  # fmt: skip
        time.sleep(random.uniform(0.002, 0.05))

    def _take_away(self, content: bytes, owner: dict[str, Any]) -> None:
        """Removes the lock, unless it is another one by now."""
        aside = self._path.with_name(temporary_name(f"{self._path.name}."))
        try:
            if self._path.read_bytes() != content:
                return
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        if aside.read_bytes() == content:
            logger.warning("removed %s, left by process %s on %s", self._path, owner.get("pid"), owner.get("host"))
        else:  # somebody took it between the two lines above
            with contextlib.suppress(FileExistsError, OSError):
                os.link(aside, self._path)
        aside.unlink(missing_ok=True)


def _owner(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:  # it is being written, or its writer was killed before
        return {}
    return found if isinstance(found, dict) else {}


class _Beats:
    """Touches the locks of this process again and again, so that others see it live."""

    def __init__(self) -> None:
        self._paths: set[Path] = set()
        self._change = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, path: Path) -> None:
        with self._change:
            self._paths.add(path)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="lock beats", daemon=True)
                self._thread.start()

    def discard(self, path: Path) -> None:
        with self._change:
            self._paths.discard(path)

    def _run(self) -> None:
        while True:
            time.sleep(_BEAT_S)
            with self._change:
                paths = list(self._paths)
            for path in paths:
                with contextlib.suppress(OSError):
                    os.utime(path)


_of_processes: dict[int, _Beats] = {}  # a fork has no threads


def _beats() -> _Beats:
    return _of_processes.setdefault(os.getpid(), _Beats())

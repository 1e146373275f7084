"""A run's folder belongs to one driver at a time: a lease file says to which, and that it is still at work.

    held(RUN): no lease.json ------------------------> made, renewed every 15 s, removed at the end
               of a living process of this host -----> refused at once
               of one that is gone from this host ---> taken over at once
               of another host: renewed within 60 s? -> refused, else taken over

Liveness on another host is what this process sees change, so clocks need not agree and no file system needs locks. A
driver that finds its lease taken over, after it stood still for long, ends.
"""

import getpass
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from neurostorm.config.base import ConfigError
from neurostorm.io.atomic import atomic_update, put_if_absent
from neurostorm.io.errors import UserError
from neurostorm.io.paths import AnyPath
from neurostorm.io.processes import is_alive, this_process
from neurostorm.runtime.interrupts import end_with
from neurostorm.runtime.run_folder import require_writable

LEASE = "lease.json"
RENEW_S = 15.0
STALE_S = 60.0  # without a renewal, by the watch of the one who waits: four are missed
_LOOK_S = 1.0
_FIELDS = ("token", "host", "pid", "user", "command", "since", "renewed")
logger = logging.getLogger(__name__)


class LeaseLostError(UserError, RuntimeError):
    """Another driver has taken over the run's folder."""


@contextmanager
def hold_lease(folder: AnyPath, *, renew_s: float = RENEW_S, stale_s: float = STALE_S) -> Iterator[None]:
    """Holds the lease of a run's folder inside; makes the folder, and removes it when nothing came into it.

    Args:
        folder: of the run.
        renew_s: time between renewals, seconds.
        stale_s: a lease of another host that does not change for so many seconds is taken over.

    Raises:
        ConfigError: another driver is at work on this run, or the folder cannot be written.
        LeaseLostError: in the main thread, when the lease was taken over meanwhile.
    """
    require_writable(folder, f"run.output={folder.parent}")
    made = _make(folder)
    lease = _Lease(folder / LEASE)
    lease.take(stale_s)
    ended = threading.Event()
    renewing = threading.Thread(target=lease.renew, args=(ended, renew_s), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        lease.release()
        for path in made:
            with suppress(OSError):  # it is not empty
                path.rmdir()


class _Lease:
    """The lease file, as this process may own it."""

    def __init__(self, file: AnyPath) -> None:
        self._file = file
        self._mine = {
            "token": uuid.uuid4().hex, **this_process(), "user": _user(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300],
            "since": datetime.now().astimezone().isoformat(" ", "seconds"), "renewed": 0,
        }  # fmt: skip
        self._lock = threading.Lock()

    def take(self, stale_s: float) -> None:
        """Makes the lease this process's own. ConfigError when it is another living driver's."""
        while not put_if_absent(self._file, _encode(self._mine)):
            owner = self._read()
            if owner is None or owner.get("token") == self._mine["token"]:
                if owner is None:
                    continue  # it was released between
                return  # the answer to our own request was lost
            alive = is_alive(owner)
            if alive is None:
                alive = self._is_renewed(owner, stale_s)
            if alive:
                raise ConfigError(self._refusal(owner))
            if self._replace(owner):
                logger.warning("taking over %s from %s, which has ended", self._file.parent, _words(owner))
                return

    def renew(self, ended: threading.Event, every_s: float) -> None:
        """Says again and again that this process lives; ends it when the lease is another's."""
        while not ended.wait(every_s):
            with self._lock:
                if ended.is_set():
                    return
                before, after = self._mine, {**self._mine, "renewed": self._mine["renewed"] + 1}
                self._mine = after
                try:
                    lost = not self._replace(before, after)
                except OSError as error:  # the storage is away: whoever wants the lease cannot have it either
                    logger.warning("%s cannot be renewed now (%s)", self._file, error)
                    continue
            if lost:
                owner = self._read() or {}
                end_with(
                    LeaseLostError(
                        f"{self._file.parent} was taken over by {_words(owner)}, as this process stood still for too "
                        "long. It ends without writing; the other one goes on with the run"
                    )
                )
                return

    def release(self) -> None:
        """Removes the lease, if it is still this process's."""
        with self._lock, suppress(OSError):
            owner = self._read()
            if owner is not None and owner.get("token") == self._mine["token"]:
                self._file.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        """The owner's words; None when there is no lease; without a token when they cannot be understood."""
        try:
            found = json.loads(self._file.read_text())
            return {name: found.get(name) for name in (*_FIELDS, "process")}
        except FileNotFoundError:
            return None
        except (ValueError, AttributeError):
            return {}

    def _replace(self, owner: dict[str, Any], mine: dict[str, Any] | None = None) -> bool:
        """Puts our words where `owner`'s are; False when they are others' by now."""
        done = False

        def change(before: bytes | None) -> bytes | None:
            nonlocal done
            found = _decode(before)
            content = mine or self._mine
            done = found.get("token") in (owner.get("token"), content["token"])
            return _encode(content) if done else None

        atomic_update(self._file, change)
        return done

    def _is_renewed(self, owner: dict[str, Any], stale_s: float) -> bool:
        """Whether the lease changes while this process looks at it."""
        logger.warning(
            "%s is held by %s: waiting for up to %.0f s to see whether it is alive",
            self._file.parent, _words(owner), stale_s,
        )  # fmt: skip
        end_s = time.monotonic() + stale_s
        while time.monotonic() < end_s:
            time.sleep(min(_LOOK_S, stale_s / 10))
            now = self._read()
            if now is None:
                return False
            if (now.get("token"), now.get("renewed")) != (owner.get("token"), owner.get("renewed")):
                return True
        return False

    def _refusal(self, owner: dict[str, Any]) -> str:
        return (
            f"{self._file.parent} is in use by {_words(owner)}: two drivers would write over each other. Stop that "
            "one, or choose another --name"
        )


def _make(folder: AnyPath) -> list[Path]:
    """Makes a local folder; which ones had to be made, the deepest first."""
    if not isinstance(folder, Path):
        return []
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _words(owner: dict[str, Any]) -> str:
    if not owner.get("host"):
        return "a process that is not known"
    return f"process {owner['pid']} on {owner['host']} ({owner['user']}, since {owner['since']}, `{owner['command']}`)"


def _encode(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _decode(data: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

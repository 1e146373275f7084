"""Which process is which, and whether it lives: for files that keep processes of many hosts from each other's work.

this_process() -> {"host", "pid", "process"}, kept in a file ... is_alive(them): True, False, or None elsewhere
"""

import hashlib
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

_PROC = Path("/proc/self/stat").exists()


def this_process() -> dict[str, Any]:
    """What `is_alive` needs to know of this process, as JSON values."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "process": _process(os.getpid())}


def is_alive(owner: Mapping[str, Any]) -> bool | None:
    """Whether a process lives; None when this one cannot know, as the other ran on another host or in a container.

    Args:
        owner: what `this_process` gave there.
    """
    process, pid = str(owner.get("process")), owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return None
    if _PROC and not process.startswith(_namespace()):
        return None
    return _process(pid) == process


@lru_cache(maxsize=1)
def machine_tag() -> str:
    """Eight characters for this machine and its boot, the same in all its containers; fit for a file's name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return hashlib.sha256((boot.read_text() if boot.exists() else socket.gethostname()).encode()).hexdigest()[:8]


def _process(pid: int) -> str | None:
    """What tells a process from all others that ever had its number; None when it is gone.

    The machine's boot, the namespace of process numbers, the process's start. Where there is no /proc: its number.
    """
    if not _PROC:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, 0)
            return str(pid)
        return None
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else f"{_namespace()} {rest[18]}"


def _namespace() -> str:
    """This boot of this machine, and the namespace of its process numbers: containers have their own."""
    return f"{machine_tag()} {os.readlink('/proc/self/ns/pid')}"

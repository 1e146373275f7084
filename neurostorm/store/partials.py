"""What writers left in a store when they were killed: found, and swept away.

    .partial/<uuid>/                        a run that was being written     } whose writer holds no lock any more; in
    .*.partial in the root and the groups   a table or a group's metadata    } an object store, an upload of a day ago

A shard that got to its place in an object store without its metadata serves the next attempt, or `care.repair` deletes
it. Parts of an upload that was cut off are not to be seen there: the bucket's lifecycle rules clear them.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from neurostorm.io.locks import STALE_S, orphaned, remove_if_orphaned
from neurostorm.io.object_store import ObjectPath
from neurostorm.io.paths import AnyPath, list_files
from neurostorm.store.files import StorePath, store_place
from neurostorm.store.layout import PARTIAL, RUNS
from neurostorm.store.shard import SHARD_FILE

logger = logging.getLogger(__name__)

_MOMENT_S = 60.0  # between making a folder and opening the file in it


def remove_partials(path: StorePath) -> int:
    """Delete what `find_partials` finds; returns how many runs and files."""
    removed = sum(_remove(entry) for entry in find_partials(path))
    if removed:
        logger.info("removed %d unfinished file(s) from %s", removed, path)
    return removed


def find_partials(path: StorePath) -> Sequence[AnyPath]:
    """Folders of unfinished runs, temporary files and uploads, whose writers are gone."""
    root = store_place(path)
    if isinstance(root, ObjectPath):
        uploads = [root / PARTIAL / name for name, _ in list_files(root / PARTIAL)]
        return [upload for upload in uploads if _is_stale(upload)]
    homes = (root, *root.glob(f"{RUNS}/*/"), *root.glob(f"{RUNS}/*/*/"))
    files = [file for home in homes for file in home.glob(f".*{PARTIAL}") if orphaned(file)]
    return [entry for entry in sorted((root / PARTIAL).glob("*/")) if _abandoned(entry)] + files


def _is_stale(upload: ObjectPath) -> bool:
    try:
        return time.time() - upload.stat().st_mtime_ns / 1e9 > STALE_S
    except FileNotFoundError:  # finished just now
        return False


def _abandoned(entry: Path) -> bool:
    shard = entry / SHARD_FILE
    try:
        return orphaned(shard) or (not shard.exists() and time.time() - entry.stat().st_mtime > _MOMENT_S)
    except FileNotFoundError:  # finished just now
        return False


def _remove(entry: AnyPath) -> bool:
    """Delete it, a file while its lock is held; a writer that came between stays."""
    if isinstance(entry, ObjectPath):
        entry.unlink(missing_ok=True)
        return True
    if not entry.is_dir():
        return remove_if_orphaned(entry, partial(entry.unlink, missing_ok=True))
    clear = partial(shutil.rmtree, entry, ignore_errors=True)
    if (entry / SHARD_FILE).exists():
        return remove_if_orphaned(entry / SHARD_FILE, clear)
    clear()
    return True

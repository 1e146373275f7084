"""Local folders for what can only use file names: DeepSpeed, safetensors, Parquet's writer, MLflow.

    with outgoing(PLACE) as folder:  write files there  --> each appears below PLACE in one step, flushed to disk
    with fetched(PLACE) as path:     read them          <-- PLACE itself if it is local, else a copy

A local PLACE costs a rename. Copies of an object store's files lie in the temporary folder of the machine (TMPDIR says
which) for as long as the `with` lasts. Files that appear have the permissions of any new file, which the umask sets.
"""

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE, S_IXUSR
from tempfile import TemporaryDirectory

from neurostorm.io.atomic import fsync, make_folder
from neurostorm.io.paths import AnyPath, copy_files, list_files

_PREFIX = "neurostorm-"


@contextmanager
def upload_folder(target: AnyPath) -> Iterator[Path]:
    """An empty local folder; the files that are in it at the end then lie below `target`.

    Nothing appears when the `with` ends by an error. Several processes may have a folder for the same target.

    Raises:
        OSError: what was written cannot be brought to its place, in part or as a whole.
    """
    if not isinstance(target, Path):
        with TemporaryDirectory(prefix=_PREFIX) as folder:
            yield Path(folder)
            copy_files(Path(folder), target, [name for name, _ in list_files(Path(folder))])
        return
    make_folder(target)
    with TemporaryDirectory(prefix=".", suffix=".partial", dir=target, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
        names = sorted(name for name, _ in list_files(Path(folder)))
        follow_umask(*(Path(folder, name) for name in names))
        for name in names:
            fsync(Path(folder, name))
            make_folder((target / name).parent)
            os.replace(Path(folder, name), target / name)
            fsync((target / name).parent)


def follow_umask(*files: Path) -> None:
    """Give local files the permissions that a new file beside the first of them gets: 0644 with umask 022.

    safetensors and `tempfile` make files that only their owner can read. A file system that knows no permissions is
    left as it is.
    """
    if not files:
        return
    probe = files[0].with_name(f".{uuid.uuid4().hex}")  # `os.umask` would change it for all threads, if briefly
    probe.touch(exist_ok=False)
    try:
        plain = S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
    executable = plain | (plain & 0o444) >> 2  # for those who may read it, as DeepSpeed's zero_to_fp32.py
    for file in files:
        found = S_IMODE(file.stat().st_mode)
        wanted = executable if found & S_IXUSR else plain
        if found != wanted:
            with suppress(PermissionError):
                file.chmod(wanted)


@contextmanager
def local_copy(source: AnyPath, names: Iterable[str] | None = None) -> Iterator[Path]:
    """A file, or a folder (of it only the files `names`, if given), as a local path.

    Raises:
        FileNotFoundError: one of `names` is not there.
        ObjectStoreError: an object store does not answer.
    """
    if isinstance(source, Path):
        yield source
        return
    with TemporaryDirectory(prefix=_PREFIX) as scratch:
        local = Path(scratch, source.name)
        if names is None and source.is_file():
            copy_files(source.parent, local.parent, [source.name])
        else:
            local.mkdir(exist_ok=True)
            copy_files(source, local, [name for name, _ in list_files(source)] if names is None else names)
        yield local

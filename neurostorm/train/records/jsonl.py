"""Lines of JSON that one worker writes as training goes: the clip ledger, and the clips that could not be read.

    a folder:         FOLDER/NAME.jsonl, every line added at once
    an object store:  FOLDER/NAME/step-00000500.jsonl, ..., the lines of one checkpoint interval each

An object store cannot append, so lines wait in memory for the next checkpoint. A crash loses those of the steps since
the newest one, which a resumed run does again; what it writes for an interval replaces what was there of it.
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from neurostorm.io.atomic import atomic_write, name_errors
from neurostorm.io.paths import AnyPath

_BLOCK_BYTES = 1 << 16


class Journal:
    """The lines of one worker; `folder` need not exist."""

    def __init__(self, folder: AnyPath, name: str) -> None:
        self._folder, self._name = folder, name
        self._waiting: list[str] = []
        self._end: int | None = None  # of the whole lines in the file; a full disk or a kill may leave a part of one

    def __str__(self) -> str:
        return str(self._folder / (f"{self._name}.jsonl" if isinstance(self._folder, Path) else self._name))

    def add(self, **entry: Any) -> None:
        """Adds one line."""
        line = json.dumps(entry) + "\n"
        if isinstance(self._folder, Path):
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{self._name}.jsonl"
            with name_errors(path), path.open("r+b" if path.exists() else "x+b") as file:
                if self._end is None:
                    self._end = _end_of_last_line(file)
                file.seek(self._end)
                file.write(line.encode())
                file.flush()
                self._end += len(line.encode())
                if file.seek(0, os.SEEK_END) > self._end:
                    file.truncate(self._end)
        else:
            self._waiting.append(line)

    def keep(self, done: int) -> None:
        """Makes sure, after `done` steps, that all lines so far outlive this process."""
        if self._waiting:
            atomic_write(self._folder / self._name / f"step-{done:08d}.jsonl", "".join(self._waiting).encode())
            self._waiting = []


def _end_of_last_line(file: BinaryIO) -> int:
    """The number of bytes up to and with the last newline."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        first = max(0, end - _BLOCK_BYTES)
        file.seek(first)
        place = file.read(end - first).rfind(b"\n")
        if place >= 0:
            return first + place + 1
        end = first
    return 0

"""Lines of JSON that one worker writes as training goes: the clip ledger, and the clips that could not be read.

    a folder:         FOLDER/NAME.jsonl, every line added at once
    an object store:  FOLDER/NAME/step-00000500.jsonl, ..., the lines of one checkpoint interval each

An object store cannot append, so lines wait in memory for the next checkpoint. A crash loses those of the steps since
the newest one, which a resumed run does again; what it writes for an interval replaces what was there of it.
"""

import json
from pathlib import Path
from typing import Any

from neurostorm.io.atomic import atomic_write, name_errors
from neurostorm.io.paths import AnyPath


class Journal:
    """The lines of one worker; `folder` need not exist."""

    def __init__(self, folder: AnyPath, name: str) -> None:
        self._folder, self._name = folder, name
        self._waiting: list[str] = []

    def __str__(self) -> str:
        return str(self._folder / (f"{self._name}.jsonl" if isinstance(self._folder, Path) else self._name))

    def add(self, **entry: Any) -> None:
        """Adds one line."""
        line = json.dumps(entry) + "\n"
        if isinstance(self._folder, Path):
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{self._name}.jsonl"
            with name_errors(path), path.open("a") as file:
                file.write(line)
        else:
            self._waiting.append(line)

    def keep(self, done: int) -> None:
        """Makes sure, after `done` steps, that all lines so far outlive this process."""
        if self._waiting:
            atomic_write(self._folder / self._name / f"step-{done:08d}.jsonl", "".join(self._waiting).encode())
            self._waiting = []

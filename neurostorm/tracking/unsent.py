"""What a run logs, as entries that can be sent to MLflow now, or kept in the run's folder and sent later.

    RUN/unsent/run.json                    the MLflow run that they belong to: server, experiment, parameters, tags
    RUN/unsent/part-000001-00042.jsonl     42 entries, one a line: metrics, pictures, artifacts, tags, the run's end
    RUN/unsent/picture-ID.png              a picture of one of them

A part is written once and deleted when all of it is sent, so the same code serves a disk and an object store. Artifacts
are listed by their path; their content stays where it is.
"""

import io
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurostorm.io.atomic import atomic_write
from neurostorm.io.paths import AnyPath, list_files, remove_tree

FOLDER, RUN = "unsent", "run.json"
METRICS, IMAGE, ARTIFACT, TAG, END = "metrics", "image", "artifact", "tag", "end"
_PART = re.compile(r"part-(\d+)-(\d+)\.jsonl")
_FACTS_BYTES = 200  # of an entry in memory, beside its values
_VALUE_BYTES = 150  # of one value with its name


@dataclass(frozen=True)
class Entry:
    """One thing to log.

    Attributes:
        kind: METRICS, IMAGE, ARTIFACT, TAG or END.
        facts: what JSON can hold of it; it includes the time at which it was logged.
        picture: (H, W, 3) uint8, of an IMAGE that has not been written to a file.
    """

    kind: str
    facts: dict[str, Any]
    picture: NDArray[np.uint8] | None = field(default=None, compare=False)

    @property
    def size_bytes(self) -> int:
        """About how much memory it takes."""
        picture = 0 if self.picture is None else self.picture.nbytes
        return _FACTS_BYTES + _VALUE_BYTES * len(self.facts.get("values", ())) + picture


@dataclass(frozen=True)
class Part:
    """A file of entries in RUN/unsent: its number in the order of writing, and how many it holds."""

    number: int
    count: int

    @property
    def name(self) -> str:
        return f"part-{self.number:06d}-{self.count:05d}.jsonl"


def parts_in(folder: AnyPath) -> list[Part]:
    """The parts of the run folder `folder`, oldest first. OSError when it cannot be listed."""
    found = (_PART.fullmatch(name) for name, _ in list_files(folder / FOLDER))
    return sorted((Part(int(each[1]), int(each[2])) for each in found if each), key=lambda part: part.number)


def write_part(folder: AnyPath, number: int, entries: Sequence[Entry], run: dict[str, Any]) -> Part:
    """Writes `entries` as a part, and `run` as run.json. OSError when they cannot be written."""
    home = folder / FOLDER
    if isinstance(home, Path):
        home.mkdir(parents=True, exist_ok=True)
    lines = []
    for entry in entries:
        facts = {"kind": entry.kind, **entry.facts}
        if entry.picture is not None:
            facts["file"] = f"picture-{uuid.uuid4().hex}.png"
            atomic_write(home / facts["file"], _png(entry.picture))
        lines.append(json.dumps(facts) + "\n")
    atomic_write(home / RUN, json.dumps(run, indent=1).encode())
    part = Part(number, len(lines))
    atomic_write(home / part.name, "".join(lines).encode())
    return part


def read_part(folder: AnyPath, part: Part) -> list[Entry]:
    """The entries of a part; without pictures whose file is gone, because they were sent before.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    entries = []
    for line in (folder / FOLDER / part.name).read_text().splitlines():
        facts = json.loads(line)
        kind, file = facts.pop("kind"), facts.get("file")
        picture = None
        if file is not None:
            try:
                picture = _pixels((folder / FOLDER / file).read_bytes())
            except FileNotFoundError:
                continue
        entries.append(Entry(kind, facts, picture))
    return entries


def read_run(folder: AnyPath) -> dict[str, Any]:
    """run.json of the run folder `folder`. OSError or ValueError when it cannot be read."""
    found: dict[str, Any] = json.loads((folder / FOLDER / RUN).read_text())
    return found


def remove_picture(folder: AnyPath, entry: Entry) -> None:
    """Deletes the file of a picture that is sent, so that it is not sent twice."""
    if (file := entry.facts.get("file")) is not None:
        (folder / FOLDER / file).unlink(missing_ok=True)


def remove_part(folder: AnyPath, part: Part) -> None:
    """Deletes a part that is sent, and RUN/unsent with the last one."""
    (folder / FOLDER / part.name).unlink(missing_ok=True)
    if not parts_in(folder):
        remove_tree(folder / FOLDER)


def _png(picture: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _pixels(data: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

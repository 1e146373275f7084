"""What all layouts share: the name of a run as its path says it, BIDS entities, labels that fit into a store."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Protocol

from neurostorm.io.paths import AnyPath

EXTENSIONS = (".nii.gz", ".nii")
VERSION_ENTITIES = ("space", "cohort", "res", "den", "desc")  # they tell versions of a run apart, not runs
_DERIVATIVES = "derivatives"
_EVENTS = "events.tsv"
_CIFTI = re.compile(r"\.[dp](tseries|scalar|label|conn)$")


@dataclass(frozen=True)
class Name:
    """What one path says.

    Attributes:
        subject: `sub-<label>`, as in participants.tsv.
        session, task, run_label: as the layout has them, "" for none.
        entities: every key and value of the name, space and desc included.
        stem: name of the run in the store, below dataset and subject.
        key: equal for the versions of one run.
        rank: the lowest of the versions is taken.
        refused: why the file cannot be used whatever it holds, or "".
    """

    subject: str
    session: str
    task: str
    run_label: str
    stem: str
    key: tuple[str, ...]
    rank: tuple[int | str, ...]
    entities: dict[str, str] = field(default_factory=dict, hash=False)
    refused: str = ""


class Layout(Protocol):
    """How one kind of corpus lies on disk. Several files may be versions of one run (template spaces, resolutions,
    with and without cleaning): their names share `key`, and the lowest `rank` is taken.

    Attributes:
        name: key in `LAYOUTS`.
        looks_for: its names in words, for the error when no run is found.
    """

    name: str
    looks_for: str

    def parse(self, path: PurePosixPath) -> Name | None:
        """What a NIfTI file's path below the source says; None when it is not a run of this layout."""

    def mask_names(self, path: PurePosixPath) -> list[str]:
        """Names that the brain mask beside a run may have, best first; `*` stands for anything."""

    def motion_names(self, path: PurePosixPath) -> list[str]:
        """Names that the table of a run's head motion beside it may have, best first."""

    def is_motion(self, name: str) -> bool:
        """Whether a file's name is that of a table of head motion."""


def stem_of(path: PurePosixPath) -> str | None:
    """The file name without `.nii` or `.nii.gz`; None for other files and for CIFTI, which only borrows the ending."""
    for extension in EXTENSIONS:
        if path.name.endswith(extension):
            stem = path.name.removesuffix(extension)
            return None if not stem or _CIFTI.search(stem) else stem
    return None


def entities_of(stem: str) -> tuple[dict[str, str], str] | None:
    """The `key-value` pairs of a BIDS name and its suffix; None unless it reads `sub-<label>_..._<suffix>`."""
    *pairs, suffix = stem.split("_")
    split = [pair.split("-", 1) for pair in pairs]
    if not split or split[0][0] != "sub" or any(len(pair) != 2 or not all(pair) for pair in split):
        return None
    return {key: value for key, value in split}, suffix


def is_bids_bold(path: PurePosixPath) -> bool:
    """Whether a path is BOLD in BIDS names, preprocessed or raw: then the tree is BIDS and other files are no runs."""
    parsed = entities_of(stem_of(path) or "")
    return parsed is not None and parsed[1] == "bold"


def is_events(name: str) -> bool:
    """Whether a file's name is that of a BIDS table of events; at a dataset's top it may name no subject."""
    return name.rpartition("_")[2] == _EVENTS


def applying(names: Iterable[str], entities: Mapping[str, str]) -> list[str]:
    """Of one folder's files those that hold for a run by BIDS inheritance, the most specific first.

    A file holds for every run that has all the entities of its name; `task-rest_bold.json` need not name a subject.
    """
    fitting = [(pairs, name) for name in names if (pairs := _pairs(name)).items() <= entities.items()]
    return [name for _, name in sorted(fitting, key=lambda entry: (-len(entry[0]), entry[1]))]


def raw_folders(run: AnyPath) -> tuple[AnyPath, ...]:
    """Folders of the raw dataset that may describe a run below its `derivatives/`, the nearest first; () elsewhere.

    `raw/derivatives/fmriprep/sub-1/func/x.nii.gz` -> `raw/sub-1/func`, `raw/sub-1`.
    """
    parts = run.parts
    if _DERIVATIVES not in parts:
        return ()
    top = len(parts) - 1 - parts[::-1].index(_DERIVATIVES)
    subject = next((at for at in range(top + 1, len(parts) - 1) if parts[at].startswith("sub-")), None)
    if subject is None:
        return ()
    raw = run.parents[len(parts) - 1 - top]
    return tuple(raw / "/".join(parts[subject:end]) for end in range(len(parts) - 1, subject, -1))


def safe_label(text: str) -> str:
    """`text` if it can stand in a path of the store; else cleaned, with digits of its hash so that names stay apart."""
    clean = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).lstrip(".") or "x"
    if clean == text:
        return text
    return f"{clean}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def slug(text: str) -> str:
    """A readable dataset name for the store from free text: at most 64 letters, digits and . _ + -."""
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text).strip("-.")[:64].strip("-.") or "dataset"


def _pairs(name: str) -> dict[str, str]:
    """Entities of the name of a file that is no image; unlike an image's, it need not begin with a subject."""
    split = [pair.split("-", 1) for pair in name.split("_")[:-1]]
    return {pair[0]: pair[-1] for pair in split}

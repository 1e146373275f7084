"""The names below a folder or a prefix of an object store, and what a run inherits from the folders around it.

    walk(root)          one pass over folders, or one listing ─┐
    around(file)        the folders of one file ───────────────┴> Tree ─> Ancestors: dataset, mask, sidecars,
                                                               events, head motion of a run

Names are all that is looked at, so a corpus takes one listing of an object store and no request per file; only the
few dataset_description.json are opened, for the dataset's Name.
"""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from neurostorm.ingest.layouts import LAYOUTS
from neurostorm.ingest.layouts.layout import applying, entities_of, is_events, stem_of
from neurostorm.ingest.stream import read_small
from neurostorm.io.object_store import ObjectPath
from neurostorm.io.paths import AnyPath, list_files

logger = logging.getLogger(__name__)

DESCRIPTION, PARTICIPANTS = "dataset_description.json", "participants.tsv"
_PIPELINE_FOLDERS = {"derivatives", "fmriprep", "output", "outputs", "out"}


@dataclass(frozen=True)
class Tree:
    """The names that matter below a root; all paths are relative to it.

    Attributes:
        root: the folder or prefix.
        images: NIfTI files, sorted.
        beside: names of the NIfTI files of a folder.
        sidecars: names of the JSON files of a folder that may belong to BOLD runs.
        events, motion: names of the tables of events, and of head motion, of a folder.
        described, tabled: folders that hold a dataset_description.json, a participants.tsv.
    """

    root: AnyPath
    images: list[PurePosixPath] = field(default_factory=list)
    beside: dict[PurePosixPath, set[str]] = field(default_factory=lambda: defaultdict(set))
    sidecars: dict[PurePosixPath, list[str]] = field(default_factory=lambda: defaultdict(list))
    events: dict[PurePosixPath, list[str]] = field(default_factory=lambda: defaultdict(list))
    motion: dict[PurePosixPath, list[str]] = field(default_factory=lambda: defaultdict(list))
    described: set[PurePosixPath] = field(default_factory=set)
    tabled: set[PurePosixPath] = field(default_factory=set)

    def at(self, path: PurePosixPath) -> AnyPath:
        """The place of a path of this tree."""
        return self.root / path if path.parts else self.root

    def add(self, folder: PurePosixPath, names: Iterable[str]) -> None:
        """Take note of a folder's files."""
        for name in sorted(names):
            if name == DESCRIPTION:
                self.described.add(folder)
            elif name == PARTICIPANTS:
                self.tabled.add(folder)
            elif name.endswith("bold.json"):
                self.sidecars[folder].append(name)
            elif is_events(name):
                self.events[folder].append(name)
            elif any(layout.is_motion(name) for layout in LAYOUTS.values()):
                self.motion[folder].append(name)
            elif not name.startswith(".") and stem_of(PurePosixPath(name)) is not None:
                self.images.append(folder / name)
                self.beside[folder].add(name)


@dataclass(frozen=True)
class Dataset:
    """The dataset that a run belongs to: its name, and its participants.tsv, or None."""

    name: str
    participants: AnyPath | None


def walk(root: AnyPath) -> Tree:
    """All names below `root`; what is hidden is left out. OSError when an object store cannot be listed."""
    tree = Tree(root)
    for folder, names in _objects(root) if isinstance(root, ObjectPath) else _folders(root):
        tree.add(folder, names)
    tree.images.sort()
    return tree


def around(file: AnyPath) -> Tree:
    """The names around one file: in its folder and those above, up to the outermost that describes a dataset.

    Without any such folder it is the file's own. A folder that cannot be listed counts as empty.
    """
    parents: list[AnyPath] = [*file.parents]
    described = [number for number, home in enumerate(parents) if (home / DESCRIPTION).is_file()]
    homes = parents[: described[-1] + 1 if described else 1]
    tree = Tree(homes[-1])
    for home, steps in zip(homes, range(len(homes) - 1, -1, -1), strict=True):
        tree.add(PurePosixPath(*home.parts[len(home.parts) - steps :]), _names_in(home))
    return tree


class Ancestors:
    """What the runs of a tree inherit from the folders around them, up to the outermost dataset."""

    def __init__(self, tree: Tree) -> None:
        self._root, self._tree = tree.root, tree
        self._above: list[AnyPath] = [parent for parent in tree.root.parents if (parent / DESCRIPTION).is_file()]
        above = [(home, _names_in(home)) for home in self._above]
        self._sidecars_above = [(home, [name for name in names if name.endswith("bold.json")]) for home, names in above]
        self._events_above = [(home, [name for name in names if is_events(name)]) for home, names in above]
        self._datasets: dict[tuple[PurePosixPath, ...], Dataset] = {}

    def dataset(self, path: PurePosixPath) -> Dataset:
        """The dataset around a run; of nested ones the raw one gives the name, the nearest the participants."""
        inside = tuple(home for home in path.parents if home in self._tree.described)
        if inside not in self._datasets:
            roots = (*(self._tree.at(home) for home in inside), *self._above)
            self._datasets[inside] = Dataset(_dataset_name(roots, self._root), self._participants(inside))
        return self._datasets[inside]

    def sidecars(self, path: PurePosixPath) -> tuple[AnyPath, ...]:
        """JSON files for a BIDS run: in its folder or above, with no entity that it lacks.

        The nearest folder comes first, in a folder the most specific file.
        """
        return tuple(self._inherited(path, self._tree.sidecars, self._sidecars_above))

    def events(self, path: PurePosixPath) -> AnyPath | None:
        """The table of events that holds for a BIDS run: as `sidecars`, but the first one replaces the others."""
        return next(self._inherited(path, self._tree.events, self._events_above), None)

    def motion(self, path: PurePosixPath, layout: str) -> AnyPath | None:
        """The table of head motion beside a run, by the names that its layout gives it."""
        beside = self._tree.motion.get(path.parent, ())
        name = next((name for name in LAYOUTS[layout].motion_names(path) if name in beside), None)
        return self._tree.at(path.parent / name) if name else None

    def mask(self, path: PurePosixPath, layout: str) -> AnyPath | None:
        """The brain mask beside a run, by the names that its layout gives it."""
        beside = sorted(self._tree.beside.get(path.parent, set()) - {path.name})
        for pattern in LAYOUTS[layout].mask_names(path):
            for name in beside:
                if fnmatchcase(name, pattern):
                    return self._tree.at(path.parent / name)
        return None

    def _inherited(
        self, path: PurePosixPath, inside: Mapping[PurePosixPath, list[str]], above: list[tuple[AnyPath, list[str]]]
    ) -> Iterator[AnyPath]:
        """Files that hold for a BIDS run, of those inside the tree and above it; none for another name."""
        parsed = entities_of(stem_of(path) or "")
        if parsed is None:
            return
        for folder in path.parents:
            yield from (self._tree.at(folder / name) for name in applying(inside.get(folder, ()), parsed[0]))
        for home, names in above:
            yield from (home / name for name in applying(names, parsed[0]))

    def _participants(self, inside: tuple[PurePosixPath, ...]) -> AnyPath | None:
        here = PurePosixPath(".")
        for home in inside:
            if home in self._tree.tabled:
                return self._tree.at(home / PARTICIPANTS)
        above = next((home / PARTICIPANTS for home in self._above if (home / PARTICIPANTS).is_file()), None)
        return above or (self._root / PARTICIPANTS if here in self._tree.tabled else None)


def _folders(root: Path) -> Iterator[tuple[PurePosixPath, list[str]]]:
    """Folders of a local tree with their files; links are followed but never in a circle."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield PurePosixPath(Path(folder).relative_to(root).as_posix()), files


def _objects(root: ObjectPath) -> Iterator[tuple[PurePosixPath, list[str]]]:
    """What would be the folders of a prefix, each with one of its objects at a time."""
    for name, _ in list_files(root):
        path = PurePosixPath(name)
        if not any(part.startswith(".") for part in path.parts[:-1]):
            yield path.parent, [path.name]


def _names_in(home: AnyPath) -> list[str]:
    try:
        return [entry.name for entry in home.iterdir()]
    except OSError:
        return []


def _unreadable(error: OSError) -> None:
    logger.warning("%s cannot be listed (%s): what it holds is left out", error.filename, error.strerror)


def _dataset_name(roots: tuple[AnyPath, ...], source: AnyPath) -> str:
    """Name of the raw dataset that encloses a run, else of the derivative (unless that is only the pipeline's name)."""
    described = [_description(home) for home in roots]
    for facts in described:
        if facts.get("Name") and not _is_derivative(facts):
            return str(facts["Name"])
    for facts in described:
        if facts.get("Name") and not str(facts["Name"]).lower().startswith("fmriprep"):
            return str(facts["Name"])
    home = roots[0] if roots else source
    names = (part.rpartition("/")[2] for part in reversed(home.parts))  # a bucket's part reads s3://bucket
    return next((name for name in names if name.lower() not in _PIPELINE_FOLDERS), "dataset")


def _description(home: AnyPath) -> dict[str, object]:
    try:
        facts = json.loads(read_small(home / DESCRIPTION).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s cannot be read (%s): its Name is not used", home / DESCRIPTION, error)
        return {}
    return facts if isinstance(facts, dict) else {}


def _is_derivative(facts: dict[str, object]) -> bool:
    if "DatasetType" in facts:
        return facts["DatasetType"] == "derivative"
    return "GeneratedBy" in facts or "PipelineDescription" in facts

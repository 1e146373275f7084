"""Finding the runs below a folder, whichever of three naming schemes it follows.

    one walk  ->  BIDS and HCP names, else plain ones  ->  one version of each run  ->  its mask, sidecars, dataset

In a tree with BIDS or HCP names only those are runs; masks, references, anatomy and surfaces never are. The result
depends on names alone (and on the Name in dataset_description.json), so it is quick over a corpus and the same
whatever order a file system lists in. No image is opened here.
"""

import csv
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pyarrow as pa

from neurostorm.ingest.names import (
    Name,
    bids_name,
    entities_of,
    hcp_name,
    is_bids_bold,
    mask_names,
    plain_name,
    slug,
    stem_of,
)
from neurostorm.store import run_path

logger = logging.getLogger(__name__)

DESCRIPTION, PARTICIPANTS = "dataset_description.json", "participants.tsv"
_EMPTY = {"", "n/a", "na", "nan"}
_PIPELINE_FOLDERS = {"derivatives", "fmriprep", "output", "outputs", "out"}


class DiscoverError(ValueError):
    """The source folder, or a table beside it, is not usable; the message names it and the fix."""


@dataclass(frozen=True)
class Source:
    """One run as it was found.

    Attributes:
        path: the NIfTI file.
        dataset, subject, session, task, run_label: what its name says; `subject` as in participants.tsv (sub-...).
        stem: name of the run in the store, below dataset and subject.
        format: "bids", "hcp" or "plain".
        entities: keys and values of the name.
        mask_path: the brain mask beside it, or None.
        sidecars: JSON files that may state RepetitionTime, nearest first (BIDS inheritance).
        participants: the participants.tsv of its dataset, or None.
        refused: why it cannot be ingested, known from its name; "" for none.
    """

    path: Path
    dataset: str
    subject: str
    session: str
    task: str
    run_label: str
    stem: str
    format: str
    entities: dict[str, str] = field(default_factory=dict, hash=False)
    mask_path: Path | None = None
    sidecars: tuple[Path, ...] = ()
    participants: Path | None = None
    refused: str = ""

    @property
    def run(self) -> str:
        """Path of the run in the store."""
        return run_path(self.dataset, self.subject, self.stem)


def discover(source: Path, dataset: str | None = None) -> list[Source]:
    """All runs below `source`, sorted by path.

    Args:
        source: the folder.
        dataset: name in the store for all of them; default: the Name of the dataset that holds each.

    Raises:
        DiscoverError: no such folder, or no run in it; says which names are looked for.
    """
    root = Path(os.path.abspath(source))
    if not root.is_dir():
        what = "is a file: give the folder that holds it" if root.is_file() else "does not exist"
        raise DiscoverError(f"--source {source}: {what}")
    tree = _walk(root)
    found = _named(tree.images)
    if not found:
        raise DiscoverError(_nothing_found(source, tree.images))
    ancestors = _Ancestors(root, tree)
    sources = []
    for path, scheme, name in found:
        home = ancestors.dataset(path.parent)
        sources.append(
            Source(
                path=root / path,
                dataset=slug(dataset or home.name),
                subject=name.subject,
                session=name.session,
                task=name.task,
                run_label=name.run_label,
                stem=name.stem,
                format=scheme,
                entities=name.entities,
                mask_path=_mask(root, path, scheme, tree),
                sidecars=ancestors.sidecars(path),
                participants=home.participants,
                refused=name.refused,
            )
        )
    return _without_clashes(sources)


def read_participants(path: Path, dataset: str) -> pa.Table:
    """A participants.tsv as a table with `dataset`, `participant_id` (sub-...) and its other columns.

    A column is float64 when every value is a number ("n/a" is null), else text. A subject's first row counts.
    DiscoverError when the file cannot be read as such a table.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.DictReader(file, delimiter="\t") if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DiscoverError(f"{path}: cannot be read as tab-separated text ({error})") from error
    if not rows or "participant_id" not in rows[0]:
        raise DiscoverError(f"{path}: has no column participant_id, or no row")
    unique: dict[str, dict[str, str]] = {}
    for row in rows:
        unique.setdefault("sub-" + (row["participant_id"] or "").strip().removeprefix("sub-"), row)
    columns = {name: _typed([row.get(name) for row in unique.values()]) for name in rows[0] if name}
    columns |= {"dataset": pa.array([dataset] * len(unique)), "participant_id": pa.array(list(unique))}
    return pa.table(columns)


@dataclass(frozen=True)
class _Tree:
    """Paths relative to the root, and per folder the names that matter."""

    images: list[PurePosixPath]
    beside: dict[PurePosixPath, set[str]]
    sidecars: dict[PurePosixPath, list[str]]
    described: set[PurePosixPath]


def _walk(root: Path) -> _Tree:
    """One pass over the folders; hidden ones are left out, links are followed but never in a circle."""
    tree = _Tree([], defaultdict(set), defaultdict(list), set())
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in sorted(files):
            if name == DESCRIPTION:
                tree.described.add(here)
            elif name.endswith("bold.json"):
                tree.sidecars[here].append(name)
            elif not name.startswith(".") and stem_of(PurePosixPath(name)) is not None:
                tree.images.append(here / name)
                tree.beside[here].add(name)
    tree.images.sort()
    return tree


def _unreadable(error: OSError) -> None:
    logger.warning("%s cannot be listed (%s): what it holds is left out", error.filename, error.strerror)


def _named(images: Iterable[PurePosixPath]) -> list[tuple[PurePosixPath, str, Name]]:
    """The runs among `images`, one version of each, in their order, with the scheme each was recognised by."""
    images = list(images)
    schemes: tuple[tuple[str, Callable[[PurePosixPath], Name | None]], ...] = (("bids", bids_name), ("hcp", hcp_name))
    found = [(path, scheme, name) for path in images for scheme, parse in schemes if (name := parse(path))]
    if not found and not any(is_bids_bold(path) for path in images):
        found = [(path, "plain", name) for path in images if (name := plain_name(path))]
    best: dict[tuple[str, ...], tuple[PurePosixPath, str, Name]] = {}
    for entry in found:
        held = best.get(entry[2].key)
        if held is None or entry[2].rank < held[2].rank:
            best[entry[2].key] = entry
    return sorted(best.values(), key=lambda entry: entry[0])


def _nothing_found(source: Path, images: list[PurePosixPath]) -> str:
    raw = sum(is_bids_bold(path) for path in images)
    seen = f"{len(images)} NIfTI file(s) there, for example {images[0]}" if images else "no NIfTI file there"
    hint = f"; {raw} of them are raw BOLD, which has to be preprocessed first (fMRIPrep)" if raw else ""
    return (
        f"--source {source}: no run found ({seen}{hint}). Looked for BIDS derivatives "
        "(sub-*_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz), HCP names "
        "(<subject>/MNINonLinear/Results/rfMRI_*/rfMRI_*.nii.gz, tfMRI_*) and, without either, any *.nii or *.nii.gz"
    )


@dataclass(frozen=True)
class _Dataset:
    """The dataset that a run belongs to."""

    name: str
    participants: Path | None


class _Ancestors:
    """What a run inherits from the folders above it, up to the outermost dataset that encloses the source."""

    def __init__(self, root: Path, tree: _Tree) -> None:
        self._root, self._tree = root, tree
        self._above = [parent for parent in root.parents if (parent / DESCRIPTION).is_file()]
        self._sidecars_above = [(home, sorted(file.name for file in home.glob("*bold.json"))) for home in self._above]
        self._datasets: dict[tuple[Path, ...], _Dataset] = {}

    def dataset(self, folder: PurePosixPath) -> _Dataset:
        """The dataset around `folder`; of nested ones the raw one gives the name, the nearest the participants."""
        inside = (self._root / home for home in (folder, *folder.parents) if home in self._tree.described)
        roots = (*inside, *self._above)
        if roots not in self._datasets:
            tables = (home / PARTICIPANTS for home in (*roots, self._root))
            participants = next((table for table in tables if table.is_file()), None)
            self._datasets[roots] = _Dataset(_dataset_name(roots, self._root), participants)
        return self._datasets[roots]

    def sidecars(self, path: PurePosixPath) -> tuple[Path, ...]:
        """JSON files for a BIDS run: in its folder or above, with no entity that it lacks; the most specific first."""
        parsed = entities_of(stem_of(path) or "")
        if parsed is None:
            return ()
        inside = [(self._root / home, self._tree.sidecars.get(home, [])) for home in path.parents]
        wanted = parsed[0].items()
        applying: list[Path] = []
        for home, names in inside + self._sidecars_above:
            fitting = [(pairs, name) for name in names if (pairs := _json_entities(name)).items() <= wanted]
            applying += [home / name for _, name in sorted(fitting, key=lambda entry: (-len(entry[0]), entry[1]))]
        return tuple(applying)


def _json_entities(name: str) -> dict[str, str]:
    """Entities of a sidecar's name; higher up it need not begin with a subject (`task-rest_bold.json`)."""
    pairs = [pair.split("-", 1) for pair in name.removesuffix(".json").split("_")[:-1]]
    return {pair[0]: pair[-1] for pair in pairs}


def _mask(root: Path, path: PurePosixPath, scheme: str, tree: _Tree) -> Path | None:
    beside = sorted(tree.beside[path.parent] - {path.name})
    for pattern in mask_names(path, scheme):
        for name in beside:
            if fnmatchcase(name, pattern):
                return root / path.parent / name
    return None


def _dataset_name(roots: tuple[Path, ...], source: Path) -> str:
    """Name of the raw dataset that encloses a run, else of the derivative (unless that is only the pipeline's name)."""
    described = [(home, _description(home)) for home in roots]
    for _, facts in described:
        if facts.get("Name") and not _is_derivative(facts):
            return str(facts["Name"])
    for _, facts in described:
        if facts.get("Name") and not str(facts["Name"]).lower().startswith("fmriprep"):
            return str(facts["Name"])
    home = roots[0] if roots else source
    return next((part for part in reversed(home.parts) if part.lower() not in _PIPELINE_FOLDERS), "dataset")


def _description(home: Path) -> dict[str, object]:
    try:
        facts = json.loads((home / DESCRIPTION).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): its Name is not used", home / DESCRIPTION, error)
        return {}
    return facts if isinstance(facts, dict) else {}


def _is_derivative(facts: dict[str, object]) -> bool:
    if "DatasetType" in facts:
        return facts["DatasetType"] == "derivative"
    return "GeneratedBy" in facts or "PipelineDescription" in facts


def _without_clashes(sources: list[Source]) -> list[Source]:
    """Two files must not become one run: the later ones are refused, with the reason."""
    taken: dict[str, Path] = {}
    for position, source in enumerate(sources):
        if source.refused:
            continue
        first = taken.setdefault(source.run, source.path)
        if first != source.path:
            reason = f"would be stored as {source.run}, like {first}: ingest one of the two under another --dataset"
            sources[position] = replace(source, refused=reason)
    return sources


def _typed(values: list[str | None]) -> pa.Array:
    texts = [None if value is None or value.strip().lower() in _EMPTY else value.strip() for value in values]
    try:
        return pa.array([None if text is None else float(text) for text in texts], pa.float64())
    except ValueError:
        return pa.array(texts, pa.string())

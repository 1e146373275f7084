"""Finding the runs below a folder, in whichever layout it has.

    one walk  ->  BIDS and HCP names, else plain ones  ->  one version of each run  ->  its mask, tables, dataset ...
    one file  ->  the same for it alone: `source_of`

In a tree with BIDS or HCP names only those are runs; masks, references, anatomy and surfaces never are. The result
depends on names alone (and on the Name in dataset_description.json), so it is quick over a corpus and the same
whatever order a file system or an object store lists in. No image is opened here.
"""

import contextlib
import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa

from neurostorm.ingest.layouts import FALLBACK, LAYOUTS
from neurostorm.ingest.layouts.layout import Name, is_bids_bold, safe_label, slug
from neurostorm.ingest.layouts.tree import Ancestors, around, walk
from neurostorm.ingest.nifti import RunError
from neurostorm.ingest.stream import MAX_PARTICIPANTS_BYTES, TooLarge, read_small
from neurostorm.io.errors import UserError
from neurostorm.io.paths import AnyPath, path_component
from neurostorm.io.tsv import Row, is_code, number, read_tsv
from neurostorm.store import run_path

EMPTY = {"", "n/a", "na", "nan"}  # what stands for no value in a table, in small letters


class DiscoverError(UserError, ValueError):
    """The source folder, or a table beside it, is not usable; the message names it and the fix."""


@dataclass(frozen=True)
class Source:
    """One run as it was found.

    Attributes:
        path: the NIfTI file, local or in an object store.
        dataset, subject, session, task, run_label: what its name says; `subject` as in participants.tsv (sub-...).
        stem: name of the run in the store, below dataset and subject.
        format: name of its layout, as in LAYOUTS.
        entities: keys and values of the name.
        mask_path: the brain mask beside it, or None.
        sidecars: JSON files that may state RepetitionTime, nearest first (BIDS inheritance).
        events: the table of its events by BIDS inheritance, or None; a raw dataset around its derivative may hold
            another (`annotations.py`).
        motion: the table of its head motion beside it, or None.
        participants: the participants.tsv of its dataset, or None.
        refused: why it cannot be ingested, known from its name; "" for none.
    """

    path: AnyPath
    dataset: str
    subject: str
    session: str
    task: str
    run_label: str
    stem: str
    format: str
    entities: dict[str, str] = field(default_factory=dict, hash=False)
    mask_path: AnyPath | None = None
    sidecars: tuple[AnyPath, ...] = ()
    events: AnyPath | None = None
    motion: AnyPath | None = None
    participants: AnyPath | None = None
    refused: str = ""

    @property
    def run(self) -> str:
        """Path of the run in the store."""
        return run_path(self.dataset, self.subject, self.stem)


def discover(source: AnyPath, dataset: str | None = None) -> list[Source]:
    """All runs below `source`, sorted by path.

    Args:
        source: the folder, or a prefix of an object store.
        dataset: name in the store for all of them; default: the Name of the dataset that holds each.

    Raises:
        DiscoverError: no such folder, or no run in it; says which names are looked for.
        OSError: an object store that cannot be listed.
    """
    root = Path(os.path.abspath(source)) if isinstance(source, Path) else source
    if not root.is_dir():
        what = "is a file: give the folder that holds it" if root.is_file() else "does not exist"
        raise DiscoverError(f"--source {source}: {what}")
    tree = walk(root)
    found = _named(tree.images)
    if not found:
        raise DiscoverError(_nothing_found(source, tree.images))
    ancestors = Ancestors(tree)
    return _without_clashes([_source(root, ancestors, *entry, dataset) for entry in found])


def source_of(file: AnyPath) -> Source:
    """One file as `discover` finds it: with the brain mask beside it and the sidecars of its folder and dataset.

    The dataset reaches up to the outermost folder with a dataset_description.json; without any it is the file's own
    folder. RunError when the name is not that of a preprocessed run.
    """
    file = file.absolute()
    pure = PurePosixPath(file.as_posix())
    named = {layout.name: layout.parse(pure) for layout in LAYOUTS.values() if layout is not FALLBACK}
    if not is_bids_bold(pure):
        named[FALLBACK.name] = FALLBACK.parse(PurePosixPath(file.name))
    layout, name = next(((layout, name) for layout, name in named.items() if name), ("", None))
    if name is None:
        raise RunError(
            "is not named as a preprocessed run: neither *_desc-preproc_bold.nii.gz, nor HCP's, nor another .nii or "
            ".nii.gz that is not a mask, a reference or anatomy"
        )
    tree = around(file)
    relative = PurePosixPath(*file.parts[len(tree.root.parts) :])
    return _source(tree.root, Ancestors(tree), relative, layout, name, None)


def read_participants(path: AnyPath, dataset: str) -> pa.Table:
    """A participants.tsv as a table with `dataset`, `participant_id` (sub-..., as runs name it) and its other columns.

    A column is float64 when every value is a number ("n/a" is null), else text; 001 is text. A subject may have several
    rows that agree.

    DiscoverError when the file cannot be read as such a table, or when two rows of a subject disagree.
    """
    try:
        header, rows = read_tsv(read_small(path, MAX_PARTICIPANTS_BYTES))
    except (OSError, TooLarge, UnicodeDecodeError, csv.Error) as error:
        raise DiscoverError(f"{path}: cannot be read as tab-separated text ({error})") from error
    if not rows or "participant_id" not in header:
        raise DiscoverError(f"{path}: has no column participant_id, or no row")
    unique: dict[str, Row] = {}
    for row in rows:
        if len(row.cells) > len(header):
            raise DiscoverError(
                f"{path}: line {row.line} has {len(row.cells)} cells, but the header has {len(header)}: take the tabs "
                "out of its cells"
            )
        row = Row(row.line, [*row.cells, *[""] * (len(header) - len(row.cells))])
        subject = _subject(path, row.cells[header.index("participant_id")])
        first = unique.setdefault(subject, row)
        differing = [name for name, one, two in zip(header, first.cells, row.cells, strict=True) if one != two]
        if subject != "sub-" and set(differing) - {"participant_id"}:
            raise DiscoverError(
                f"{path}: lines {first.line} and {row.line} both are {subject} and differ in {', '.join(differing)}: "
                "keep one row for each participant, or give a table of labels to the task (--labels)"
            )
    cells = [row.cells for row in unique.values()]
    columns = {name: _typed([row[place] for row in cells]) for place, name in enumerate(header) if name}
    columns |= {"dataset": pa.array([dataset] * len(unique)), "participant_id": pa.array(list(unique))}
    return pa.table(columns)


def _subject(path: AnyPath, participant_id: str) -> str:
    """`sub-...` as runs name it. DiscoverError for an ID that cannot be part of a path."""
    label = participant_id.removeprefix("sub-")
    if not label:
        return "sub-"
    try:
        path_component(label)
    except ValueError as error:
        raise DiscoverError(f"{path}: participant_id: {error}") from error
    return f"sub-{safe_label(label)}"


def _named(images: Iterable[PurePosixPath]) -> list[tuple[PurePosixPath, str, Name]]:
    """The runs among `images`, one version of each, in their order, with the layout each was recognized by."""
    images = list(images)
    special = [layout for layout in LAYOUTS.values() if layout is not FALLBACK]
    found = [(path, layout.name, name) for path in images for layout in special if (name := layout.parse(path))]
    if not found and not any(is_bids_bold(path) for path in images):
        found = [(path, FALLBACK.name, name) for path in images if (name := FALLBACK.parse(path))]
    best: dict[tuple[str, ...], tuple[PurePosixPath, str, Name]] = {}
    for entry in found:
        held = best.get(entry[2].key)
        if held is None or entry[2].rank < held[2].rank:
            best[entry[2].key] = entry
    return sorted(best.values(), key=lambda entry: entry[0])


def _source(
    root: AnyPath, ancestors: Ancestors, path: PurePosixPath, layout: str, name: Name, dataset: str | None
) -> Source:
    home = ancestors.dataset(path)
    return Source(
        path=root / path,
        dataset=slug(dataset or home.name),
        subject=name.subject,
        session=name.session,
        task=name.task,
        run_label=name.run_label,
        stem=name.stem,
        format=layout,
        entities=name.entities,
        mask_path=ancestors.mask(path, layout),
        sidecars=ancestors.sidecars(path),
        events=ancestors.events(path),
        motion=ancestors.motion(path, layout),
        participants=home.participants,
        refused=name.refused,
    )


def _nothing_found(source: AnyPath, images: list[PurePosixPath]) -> str:
    special = ", ".join(layout.looks_for for layout in LAYOUTS.values() if layout is not FALLBACK)
    raw = sum(is_bids_bold(path) for path in images)
    seen = f"{len(images)} NIfTI file(s) there, for example {images[0]}" if images else "no NIfTI file there"
    hint = f"; {raw} of them are raw BOLD, which has to be preprocessed first (fMRIPrep)" if raw else ""
    names = f"Looked for {special} and, without either, {FALLBACK.looks_for}"
    return f"--source {source}: no run found ({seen}{hint}). {names}"


def _without_clashes(sources: list[Source]) -> list[Source]:
    """Two files must not become one run: the later ones are refused, with the reason."""
    taken: dict[str, AnyPath] = {}
    for position, source in enumerate(sources):
        if source.refused:
            continue
        first = taken.setdefault(source.run, source.path)
        if first != source.path:
            reason = f"would be stored as {source.run}, like {first}: ingest one of the two under another --dataset"
            sources[position] = replace(source, refused=reason)
    return sources


def _typed(values: list[str]) -> pa.Array:
    texts = [None if value.lower() in EMPTY else value for value in values]
    if not any(is_code(text) for text in texts if text is not None):
        with contextlib.suppress(ValueError):
            return pa.array([None if text is None else number(text) for text in texts], pa.float64())
    return pa.array(texts, pa.string())

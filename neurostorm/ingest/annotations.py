"""What stands beside a run about it: the events of its task and the motion of its head, as attributes of the store.

    Source.events, or the raw dataset's func folder ─ onset, duration, trial_type ──> `events`
    Source.motion ─ framewise_displacement, or six parameters (fMRIPrep, HCP) ─────> `fd_mean_mm`, `fd_max_mm`, ...

A table that says nothing usable is named in a warning and the run goes without it: frames are worth keeping without
their annotation. Whether a run is complete or has changed never depends on these tables.
"""

import csv
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from neurostorm.ingest.layouts.discover import EMPTY, Source
from neurostorm.ingest.layouts.layout import applying, is_events, raw_folders
from neurostorm.ingest.nifti import RunError
from neurostorm.ingest.stream import read_small
from neurostorm.io.paths import AnyPath
from neurostorm.io.tsv import number, read_tsv
from neurostorm.store.events import (
    DIGITS,
    EVENTS,
    PARAMETERS,
    Event,
    events_attribute,
    framewise_displacement,
    motion_facts,
)

logger = logging.getLogger(__name__)

MAX_EVENTS = 20_000  # of a run; they lie in its zarr.json, which every manifest reads
_DISPLACEMENT = "framewise_displacement"
_HCP_COLUMNS = 12  # three shifts in mm, three rotations in degrees, and the change of each from frame to frame
_LARGEST = 1e9  # of any number in these tables: 30 years in seconds
_NOT_THERE = (FileNotFoundError, NotADirectoryError, PermissionError)

T = TypeVar("T")


def annotations(source: Source, frames: int) -> dict[str, Any]:
    """The attributes that the tables beside a run add to it, JSON values.

    Args:
        source: from `discover`.
        frames: of its file; a table of motion must have as many rows.

    Returns:
        `events` ([[onset_s, duration_s, trial_type], ...], see `store.events`), and `fd_mean_mm`, `fd_max_mm`,
        `fd_spike_fraction` (see `motion_facts`); without those whose table is missing or unusable, which is logged.

    Raises:
        RunError: a place does not answer. The run may then be tried again; stored now, it would lack them for good.
    """
    facts: dict[str, Any] = {}
    table = events_table(source)
    events = None if table is None else _usable(table, source, read_events)
    if events is not None:
        if len(events) > MAX_EVENTS:
            logger.warning("%s: of %d events the first %d are kept", table, len(events), MAX_EVENTS)
        facts[EVENTS] = events_attribute(events[:MAX_EVENTS])
    if source.motion is not None:
        parse = hcp_displacement if source.format == "hcp" else confounds_displacement
        facts |= _usable(source.motion, source, lambda data: _motion(parse(data), frames)) or {}
    return facts


def events_table(source: Source) -> AnyPath | None:
    """The `_events.tsv` that holds for a run, or None.

    fMRIPrep leaves the events in the raw dataset, so a table in the derivative is the nearest, then comes one in the
    subject's own raw folders, then one further up. RunError when a place cannot be listed.
    """
    folders = raw_folders(source.path) if source.format == "bids" else ()
    if not folders or (source.events is not None and source.events.parent not in folders[0].parents):
        return source.events
    for folder in folders:
        names = applying(filter(is_events, _names_in(folder)), source.entities)
        if names:
            return folder / names[0]
    return source.events


def read_events(data: bytes) -> list[Event]:
    """The events of a BIDS `_events.tsv`, sorted. A duration that is n/a becomes 0 s.

    Rows without onset or trial_type are left out. ValueError or csv.Error for what is not such a table.
    """
    columns = _columns(_table(data), ("onset", "duration", "trial_type"))
    events = []
    for onset, duration, trial_type in zip(*columns, strict=True):
        onset_s, duration_s = _number(onset), 0.0 if _is_empty(duration) else _number(duration)
        if not math.isnan(onset_s) and not _is_empty(trial_type):
            events.append(Event(_rounded(onset_s), _rounded(duration_s), trial_type.strip()))
    return sorted(events)


def confounds_displacement(data: bytes) -> NDArray[np.float64]:
    """Framewise displacement (T) in mm by fMRIPrep's table of confounds: its own, else that of trans_x to rot_z.

    ValueError or csv.Error for a table that has neither.
    """
    table = _table(data)
    columns = _columns(table, (_DISPLACEMENT,) if _DISPLACEMENT in table[0] else PARAMETERS)
    values = np.array([[_number(text) for text in column] for column in columns])
    return values[0] if len(values) == 1 else framewise_displacement(values)


def hcp_displacement(data: bytes) -> NDArray[np.float64]:
    """Framewise displacement (T) in mm by the HCP's Movement_Regressors.txt, whose rotations are in degrees.

    The columns are those that the HCP 1200 reference manual lists. ValueError for another table.
    """
    rows = [[_number(text) for text in line.split()] for line in data.decode().splitlines() if line.strip()]
    if not rows or {len(row) for row in rows} != {_HCP_COLUMNS}:
        raise ValueError(f"no table of {_HCP_COLUMNS} columns")
    motion = np.array(rows).T[:6]
    return framewise_displacement(np.concatenate([motion[:3], np.radians(motion[3:])]))


def _motion(displacement_mm: NDArray[np.float64], frames: int) -> dict[str, float]:
    if len(displacement_mm) != frames:
        raise ValueError(f"{len(displacement_mm)} rows where the run has {frames} frames")
    return motion_facts(displacement_mm)


def _usable(table: AnyPath, source: Source, parse: Callable[[bytes], T]) -> T | None:
    """A table's content, or None with a warning. RunError as `annotations`."""
    try:
        return parse(_read(table))
    except RunError:
        raise
    except (*_NOT_THERE, ValueError, csv.Error) as error:
        logger.warning("%s is stored without what %s says: %s", source.run, table, error)
        return None


def _read(table: AnyPath) -> bytes:
    try:
        return read_small(table)
    except _NOT_THERE:
        raise
    except OSError as error:
        raise RunError(f"has a table beside it that cannot be read, {table}: {error.strerror or error}") from error


def _names_in(folder: AnyPath) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except _NOT_THERE:
        return []
    except OSError as error:
        raise RunError(f"belongs to a folder that cannot be listed, {folder}: {error.strerror or error}") from error


def _table(data: bytes) -> tuple[list[str], list[list[str]]]:
    """Names of the columns and rows of a tab-separated table. ValueError or csv.Error for what is no text."""
    header, rows = read_tsv(data)
    return header, [row.cells for row in rows]


def _columns(table: tuple[list[str], list[list[str]]], names: Sequence[str]) -> list[list[str]]:
    """The columns `names` of a table; a row that ends early has "" there. ValueError naming those that it lacks."""
    header, rows = table
    lacking = [name for name in names if name not in header]
    if lacking:
        raise ValueError(f"no column {', '.join(lacking)}")
    places = [header.index(name) for name in names]
    return [[row[place] if place < len(row) else "" for row in rows] for place in places]


def _number(text: str) -> float:
    """A number of a table, nan for n/a. ValueError for other text and for what no scanner measures."""
    value = math.nan if _is_empty(text) else number(text)
    if abs(value) > _LARGEST:
        raise ValueError(f"impossible value {text}")
    return value


def _rounded(value: float) -> float:
    return round(value, DIGITS) + 0.0  # a negative zero becomes zero


def _is_empty(text: str) -> bool:
    return text.strip().lower() in EMPTY

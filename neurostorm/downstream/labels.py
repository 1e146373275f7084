"""Who has which label, and what did not match: a column of a table, brought to the subjects of a store.

    participants.parquet | .tsv .csv .parquet --ids as ingest spells them--> rows of each subject --> Labels
                                                     |
                                                     '--> MatchReport: no row, no value, unknown and ambiguous ids

A subject is named "dataset/sub-001". Nobody is dropped without a word: who is missing, on either side, is in the
report, and two rows of one subject that disagree are refused.
"""

import csv
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from neurostorm.ingest.layouts.layout import safe_label, slug
from neurostorm.io.errors import UserError, nearest_names
from neurostorm.io.paths import AnyPath
from neurostorm.io.tsv import number, read_rows
from neurostorm.store import StoreError, read_participants
from neurostorm.store.layout import PARTICIPANTS

MISSING = frozenset({"", "n/a", "na", "nan"})  # in lower case, as ingest reads participants.tsv
DATASET, PARTICIPANT = "dataset", "participant_id"
_DELIMITERS = {".tsv": "\t", ".csv": ","}
_LISTED_COLUMNS = 20
_Value = TypeVar("_Value", bound=Hashable)


class LabelError(UserError, ValueError):
    """A table of labels cannot be used; the message names it, the column or subject, and the fix."""


@dataclass(frozen=True)
class MatchReport:
    """How the ids of a table and the subjects of a store met; `subjects` = matched + without_row + without_value.

    Attributes:
        subjects: how many the store has.
        matched: how many of them have a value.
        without_row: subjects of the store that the table has no row for.
        without_value: subjects whose row has no value (empty, n/a, na, nan).
        unknown: ids of the table that the store has no subject for, as the table spells them.
        ambiguous: ids without a dataset that fit subjects of several datasets; they are left out.
    """

    subjects: int
    matched: int
    without_row: tuple[str, ...]
    without_value: tuple[str, ...]
    unknown: tuple[str, ...]
    ambiguous: tuple[str, ...]

    def lines(self, most: int = 5) -> list[str]:
        """Counts first, then up to `most` examples of all that did not match, and a hint at ids that nearly match."""
        lines = [f"{self.matched} of {self.subjects} subject(s) of the store have a value"]
        for ids, what in (
            (self.without_row, "subject(s) of the store have no row in the table"),
            (self.without_value, "subject(s) have a row without a value"),
            (self.unknown, "id(s) of the table are no subject of the store"),
            (self.ambiguous, "id(s) fit subjects of several datasets: add a column `dataset`, or write dataset/id"),
        ):
            if ids:
                more = ", ..." if len(ids) > most else ""
                lines.append(f"{len(ids)} {what}: {', '.join(ids[:most])}{more}")
        hint = self._hint()
        return [*lines, hint] if hint else lines

    def _hint(self) -> str:
        if not self.unknown or not self.without_row:
            return ""
        near = {_core(subject): subject for subject in reversed(self.without_row)}
        for name in self.unknown:
            if _core(name) in near:
                return (
                    f"the table's {name} may be the store's {near[_core(name)]}: datasets must agree, and ids too, "
                    "with their leading zeros, punctuation and case"
                )
        if self.matched or self.without_value:
            return ""
        return f"the ids differ in kind: {self.unknown[0]} in the table, {self.without_row[0]} in the store"


@dataclass(frozen=True)
class Labels:
    """The values of one column by subject, and how they were found.

    Attributes:
        target: the column.
        source: the file, or the store's participants.parquet.
        values: subject -> its value, a finite float if numbers were asked for, else text; only subjects of the store.
        columns: further column -> subject -> text; who has none is left out.
        report: what matched and what did not.
    """

    target: str
    source: str
    values: Mapping[str, float | str]
    columns: Mapping[str, Mapping[str, str]]
    report: MatchReport


@dataclass(frozen=True)
class _Table:
    """Some columns of a table as text (None: missing), and the names of all that it has."""

    where: str
    names: tuple[str, ...]
    cells: Mapping[str, Sequence[str | None]]


def read_labels(
    store: AnyPath,
    subjects: Sequence[str],
    target: str,
    *,
    file: AnyPath | None = None,
    id_column: str = PARTICIPANT,
    columns: Sequence[str] = (),
    numeric: bool | None = None,
) -> Labels:
    """The column `target` for `subjects` ("dataset/sub-001"), from `file` or from the store's participants.parquet.

    Args:
        store: the frame store.
        subjects: those of the store.
        target: the column.
        file: a .tsv, .csv or .parquet table, local or in an object store. Its ids read `sub-001`, `001` or
            `dataset/sub-001`; a column `dataset`, if there, says whose they are.
        id_column: the file's column of ids.
        columns: further columns, from the same table; one that the file lacks is taken from the store's.
        numeric: True reads finite numbers. False, or None, reads text; a column of numbers reads "1", not "1.0".

    Raises:
        LabelError: no such file or column, a subject with two different values, a value that is no finite number, no
            subject that has a value.
        StoreError: the store's participants.parquet cannot be read.
    """
    if not subjects:
        raise LabelError(f"{store} has no subjects to label: ingest some first (jobs/ingest.py)")
    wanted = {DATASET, target, *columns}
    own = _participants(store, wanted | {PARTICIPANT})
    if file is None:
        if not own.names:
            raise LabelError(f"{own.where}: no dataset came with a participants.tsv; give a table of labels (file)")
        table, id_column = own, PARTICIPANT
    else:
        table = _read(file, wanted | {id_column})
    _require(table, id_column, "the ids")
    _require(table, target, "the label")
    rows, unknown, ambiguous = _match(table, id_column, subjects)
    values: dict[str, Any] = _values(table, target, rows, number if numeric else str)
    without_row, without_value = set(subjects) - rows.keys(), rows.keys() - values.keys()
    missing = tuple(sorted(without_row)), tuple(sorted(without_value))
    report = MatchReport(len(set(subjects)), len(values), *missing, tuple(sorted(unknown)), tuple(sorted(ambiguous)))
    if not values:
        raise LabelError(f"{table.where}, column {target}: no subject has a label. {'; '.join(report.lines())}")
    further = {column: _further(column, table, rows, own, subjects) for column in columns}
    return Labels(target, table.where, values, further, report)


def column_names(store: AnyPath, file: AnyPath | None = None) -> tuple[str, ...]:
    """The columns that can be labels: of `file`, or else of the store's participants; () if neither can be read."""
    table = _any_table(store, file, set())
    return tuple(name for name in table.names if name not in (DATASET, PARTICIPANT))


def is_numeric(store: AnyPath, file: AnyPath | None, column: str) -> bool:
    """Whether all values of a column that are there are numbers."""
    try:
        for text in _any_table(store, file, {column}).cells[column]:
            number(text or "0")
    except (KeyError, ValueError):
        return False
    return True


def _any_table(store: AnyPath, file: AnyPath | None, wanted: set[str]) -> _Table:
    """`file`, or the store's participants; without columns if it cannot be read."""
    try:
        return _participants(store, wanted) if file is None else _read(file, wanted)
    except (LabelError, StoreError, OSError):
        return _Table(str(file or store), (), {})


def _further(
    column: str, table: _Table, rows: Mapping[str, Sequence[int]], own: _Table, subjects: Sequence[str]
) -> dict[str, str]:
    """A further column, from `table` or else from the store's own."""
    if column not in table.names and column in own.names:
        table, rows = own, _match(own, PARTICIPANT, subjects)[0]
    _require(table, column, f"nor has {own.where}" if own is not table else "a further column")
    return _values(table, column, rows, str)


def _match(table: _Table, id_column: str, subjects: Sequence[str]) -> tuple[dict[str, list[int]], set[str], set[str]]:
    """Subject -> its rows, in the order of `subjects`; the ids that fit none; those that fit several datasets."""
    namesakes: dict[str, list[str]] = {}
    for subject in dict.fromkeys(subjects):
        namesakes.setdefault(subject.rpartition("/")[2], []).append(subject)
    found: dict[str, list[int]] = {subject: [] for subject in subjects}
    unknown: set[str] = set()
    ambiguous: set[str] = set()
    datasets = table.cells.get(DATASET) or [None] * len(table.cells[id_column])
    for row, (name, dataset) in enumerate(zip(table.cells[id_column], datasets, strict=True)):
        home, _, bare = (name or "").rpartition("/")
        home = home or dataset or ""
        label = f"sub-{safe_label(bare.removeprefix('sub-'))}" if bare else ""
        fits = [subject for subject in namesakes.get(label, []) if not home or _is_of(subject, home)]
        if len(fits) == 1:
            found[fits[0]].append(row)
        else:
            shown = f"{home}/{bare}" if home else bare
            (ambiguous if fits else unknown).add(shown if bare else "(no id)")
    return {subject: rows for subject, rows in found.items() if rows}, unknown, ambiguous


def _is_of(subject: str, dataset: str) -> bool:
    """Whether a subject is of a dataset, whose name may be written as it was before ingest made it fit for paths."""
    return subject.rpartition("/")[0] in (dataset, slug(dataset))


def _values(
    table: _Table, column: str, rows: Mapping[str, Sequence[int]], parse: Callable[[str], _Value]
) -> dict[str, _Value]:
    """Subject -> its one value; rows of a subject that agree are one, those without a value do not count."""
    cells = table.cells[column]
    values: dict[str, _Value] = {}
    for subject, numbers in rows.items():
        texts = [text for number in numbers if (text := cells[number]) is not None]
        try:
            distinct = {parse(text): text for text in texts}
        except ValueError as error:
            raise LabelError(
                f"{table.where}, column {column}: {subject} has {' and '.join(dict.fromkeys(texts))}, where a finite "
                "number is needed: correct it, write n/a, or read the column as classes"
            ) from error
        if len(distinct) > 1:
            raise LabelError(
                f"{table.where}, column {column}: {subject} has several rows with different values "
                f"({', '.join(distinct.values())}): keep the rows of one session or age"
            )
        if distinct:
            values[subject] = next(iter(distinct))
    return values


def _require(table: _Table, column: str, what: str) -> None:
    """LabelError unless the table has the column, once."""
    count = table.names.count(column)
    if count > 1:
        raise LabelError(f"{table.where}: has {count} columns named {column}: rename or drop all but one")
    if count == 0:
        near = nearest_names(column, table.names, cutoff=0.5)
        guess = f" Did you mean {near[0]}?" if near else ""
        more = ", ..." if len(table.names) > _LISTED_COLUMNS else ""
        names = ", ".join(table.names[:_LISTED_COLUMNS]) or "none"
        raise LabelError(f"{table.where}: has no column {column} ({what}).{guess} Its columns: {names}{more}")


def _participants(store: AnyPath, wanted: set[str]) -> _Table:
    """The store's own table; without any column when no dataset came with one."""
    table, where = read_participants(store), str(store / PARTICIPANTS)
    if table is None:
        return _Table(where, (), {})
    return _from_arrow(where, table.column_names, table.select([name for name in table.column_names if name in wanted]))


def _read(file: AnyPath, wanted: set[str]) -> _Table:
    """The columns `wanted`, as far as the file has them; what is read is chosen by its ending."""
    ending = file.suffix.lower()
    if ending != ".parquet" and ending not in _DELIMITERS:
        raise LabelError(f"{file}: labels are read from .tsv, .csv or .parquet; save the table as one of them")
    try:
        data = file.read_bytes()
        if ending == ".parquet":
            names = pq.read_schema(pa.BufferReader(data)).names
            once = [name for name in names if name in wanted and names.count(name) == 1]
            return _from_arrow(str(file), names, pq.read_table(pa.BufferReader(data), columns=once))
        return _from_text(str(file), data, _DELIMITERS[ending], wanted)
    except FileNotFoundError as error:
        raise LabelError(f"{file}: there is no such table of labels; give its path, --labels FILE") from error
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise LabelError(f"{file}: cannot be read as a {ending} table ({error}): give a UTF-8 file") from error


def _from_arrow(where: str, names: Sequence[str], table: pa.Table) -> _Table:
    cells = {name: [_text(value) for value in table[name].to_pylist()] for name in table.column_names}
    return _Table(where, tuple(names), cells)


def _from_text(where: str, data: bytes, delimiter: str, wanted: set[str]) -> _Table:
    """Every cell stays the text that it is: an id keeps its leading zeros."""
    names, rows = read_rows(data, delimiter)
    fix = "take the tabs out of its cells" if delimiter == "\t" else "quote cells that hold the delimiter"
    places = {name: names.index(name) for name in wanted if name in names}
    cells: dict[str, list[str | None]] = {name: [] for name in places}
    for row in rows:
        if any(row.cells[len(names) :]):
            raise LabelError(
                f"{where}: line {row.line} has {len(row.cells)} cells, but the header has {len(names)}: {fix}"
            )
        for name, place in places.items():
            cells[name].append(_text(row.cells[place]) if place < len(row.cells) else None)
    return _Table(where, tuple(names), cells)


def _text(value: object) -> str | None:
    """A cell as text, None for a missing one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    return None if text.lower() in MISSING else text


def _core(name: str) -> str:
    """An id without what people and spreadsheets change: dataset, sub-, case, punctuation, leading zeros."""
    bare = name.rpartition("/")[2].removeprefix("sub-")
    return re.sub(r"[^a-z0-9]", "", bare.casefold()).lstrip("0")

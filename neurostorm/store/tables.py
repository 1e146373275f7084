"""Tables at the root of a store, changed in one step; among them what it leaves out: quarantine, who withdrew."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from neurostorm.io.atomic import atomic_update
from neurostorm.io.paths import AnyPath
from neurostorm.store.files import StorePath, read_header, store_place, unreadable
from neurostorm.store.layout import (
    MANIFEST,
    QUARANTINE,
    WITHDRAWN,
    StoreError,
    run_path,
)


def add_quarantine(path: StorePath, rows: Sequence[Mapping[str, Any]]) -> None:
    """Record inputs that could not be ingested.

    Args:
        path: the store.
        rows: `source`, `reason` and `when` (ISO 8601 text, or a datetime; now, if absent). A source that stands in the
            table already is replaced, and the last row of a source counts.
    """
    now = datetime.now(UTC)
    fresh = {str(row["source"]): _quarantine_row(row, now) for row in rows}
    _change_quarantine(path, drop=fresh, add=fresh.values())


def clear_quarantine(path: StorePath, sources: Iterable[str]) -> None:
    """Take sources that now succeeded off the quarantine table; unknown ones are ignored."""
    _change_quarantine(path, drop=sources, add=())


def read_quarantine(path: StorePath) -> pa.Table:
    """`source`, `reason`, `when` of every input that could not be ingested, sorted by source; maybe empty."""
    table = read_table(store_place(path) / QUARANTINE)
    return QUARANTINE_SCHEMA.empty_table() if table is None else table


def read_withdrawn(path: StorePath) -> pa.Table:
    """`dataset`, `subject` (sub-...), `when` of every participant who withdrew, sorted; maybe empty."""
    table = read_table(store_place(path) / WITHDRAWN)
    return WITHDRAWN_SCHEMA.empty_table() if table is None else table


def withdrawn_subjects(path: StorePath) -> set[tuple[str, str]]:
    """(dataset, subject) of everybody who withdrew."""
    table = read_withdrawn(path)
    return set(zip(table.column("dataset").to_pylist(), table.column("subject").to_pylist(), strict=True))


def is_withdrawn(dataset: str, participant: str, gone: Container[tuple[str, str]]) -> bool:
    """Whether a row of participants, whose id may lack the `sub-` of the runs, is of somebody in `gone`."""
    return (dataset, participant) in gone or (dataset, f"sub-{participant}") in gone


def add_withdrawn(path: StorePath, subjects: Iterable[tuple[str, str]]) -> None:
    """Record that (dataset, subject) withdrew, now; who stands there already keeps the time.

    StoreError for names that cannot be of a run: folders are deleted by them.
    """
    read_header(path)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    asked = sorted(set(subjects))
    for dataset, subject in asked:
        try:
            run_path(dataset, subject, "run")
        except ValueError as error:
            raise StoreError(f"{WITHDRAWN}: dataset or subject: {error}") from error

    def change(old: pa.Table | None) -> pa.Table | None:
        rows = [] if old is None else old.to_pylist()
        there = {(row["dataset"], row["subject"]) for row in rows}
        fresh = [{"dataset": key[0], "subject": key[1], "when": when} for key in asked if key not in there]
        table = pa.Table.from_pylist(rows + fresh, schema=WITHDRAWN_SCHEMA)
        return table.sort_by([("dataset", "ascending"), ("subject", "ascending")]) if fresh else None

    change_table(store_place(path) / WITHDRAWN, change)


def _quarantine_row(row: Mapping[str, Any], now: datetime) -> dict[str, str]:
    when = row.get("when") or now
    text = when.isoformat(timespec="seconds") if isinstance(when, datetime) else str(when)
    return {"source": str(row["source"]), "reason": str(row["reason"]), "when": text}


def _change_quarantine(path: StorePath, drop: Iterable[str], add: Iterable[Mapping[str, str]]) -> None:
    read_header(path)
    fresh = pa.Table.from_pylist(list(add), schema=QUARANTINE_SCHEMA)
    dropped = pa.array(list(drop), pa.string())

    def change(old: pa.Table | None) -> pa.Table | None:
        table = QUARANTINE_SCHEMA.empty_table() if old is None else old
        stays = table.filter(pc.invert(pc.is_in(table.column("source"), dropped)))
        after = pa.concat_tables([_with_old_times(fresh, table), stays]).sort_by("source")
        return None if after.equals(table) else after

    change_table(store_place(path) / QUARANTINE, change)


def _with_old_times(fresh: pa.Table, old: pa.Table) -> pa.Table:
    """`fresh` with the time of the first failure where source and reason are those of an old row."""
    times = {(row["source"], row["reason"]): row["when"] for row in old.to_pylist()}
    rows = [row | {"when": times.get((row["source"], row["reason"]), row["when"])} for row in fresh.to_pylist()]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)


QUARANTINE_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string()), ("when", pa.string())])
WITHDRAWN_SCHEMA = pa.schema([("dataset", pa.string()), ("subject", pa.string()), ("when", pa.string())])


def change_table(file: AnyPath, change: Callable[[pa.Table | None], pa.Table | None]) -> pa.Table:
    """The table after `change` of what it was (None: not there); None leaves it. StoreError when it is unreadable."""
    held: list[pa.Table | None] = [None]

    def change_bytes(before: bytes | None) -> bytes | None:
        old = None if before is None else _parse(file, before)
        held[0] = change(old)
        if held[0] is None:
            held[0] = old
            return None
        return _parquet(held[0])

    atomic_update(file, change_bytes)
    return held[0]


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_table(file: AnyPath, columns: Sequence[str] | None = None) -> pa.Table | None:
    try:
        return _parse(file, file.read_bytes(), columns)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(f"{file} cannot be read: {error}", error) from error


def _parse(file: AnyPath, data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """A table, or those of `columns` that it has."""
    try:
        opened = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        chosen = None if columns is None else [name for name in opened.schema_arrow.names if name in columns]
        # In this thread: Arrow's own may still run when a short command ends, which then aborts (seen once under load).
        return opened.read(columns=chosen, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        fix = "rebuild it with tools/store.py repair" if file.name == MANIFEST else "remove it and ingest again"
        raise StoreError(f"{file} cannot be read as Parquet ({error}): {fix}") from error

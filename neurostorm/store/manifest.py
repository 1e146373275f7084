"""The store's three tables, as Parquet at its root.

    manifest.parquet      a row per run: all that planning needs; rebuilt from the runs at any time
    participants.parquet  a row per subject: labels, from participants.tsv and phenotype tables
    quarantine.parquet    a row per input that could not be ingested, with the reason

Each is replaced whole, by a rename. Participants and quarantine are added to under the store's lock, so that two
ingests into one store keep each other's rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from neurostorm.store.files import StorePath, find_runs, local_path, locked, read_attributes, read_header, replace_file
from neurostorm.store.layout import MANIFEST, PARTICIPANTS, QUARANTINE, StoreError, split_run

MANIFEST_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("run", "dataset", "subject", "session", "task", "run_label")),
        ("frames", pa.int32()),
        ("tr_s", pa.float32()),
        ("source", pa.string()),
        ("source_sha256", pa.string()),
        ("source_tr_s", pa.float32()),
        ("source_frames", pa.int32()),
        *(
            (name, pa.float32())
            for name in ("tsnr_median", "clipped_fraction", "coverage", "global_mean", "global_std")
        ),
    ]
)
QUARANTINE_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string()), ("when", pa.string())])
_PARTICIPANT_KEY = ("dataset", "participant_id")


def build_manifest(path: StorePath) -> pa.Table:
    """A row per complete run, sorted by run, from the runs' own attributes.

    Figures that a run does not state are null, texts empty. StoreError: not a store, or a run whose attributes cannot
    be read or have a value of the wrong kind.
    """
    root = local_path(path)
    read_header(root)
    rows = [_manifest_row(root, run) for run in sorted(find_runs(root))]
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def write_manifest(path: StorePath) -> pa.Table:
    """Rebuild `manifest.parquet` from the runs, replace it in one step, and return it. Errors as `build_manifest`."""
    table = build_manifest(path)
    _replace(local_path(path) / MANIFEST, table)
    return table


def read_manifest(path: StorePath) -> pa.Table:
    """The manifest as it was last written, with `MANIFEST_SCHEMA`. StoreError: no store, or no readable manifest."""
    read_header(path)
    file = local_path(path) / MANIFEST
    table = _read(file)
    if table is None:
        raise StoreError(
            f"{file} is missing: run the ingest again, or rebuild it with store.write_manifest({str(path)!r})"
        )
    missing = sorted(set(MANIFEST_SCHEMA.names) - set(table.column_names))
    if missing:
        raise StoreError(
            f"{file} has no column {', '.join(missing)}: rebuild it with store.write_manifest({str(path)!r})"
        )
    return table.select(MANIFEST_SCHEMA.names).cast(MANIFEST_SCHEMA)


def write_participants(path: StorePath, table: pa.Table) -> pa.Table:
    """Add subjects to `participants.parquet` and return all of them, sorted by dataset and participant_id.

    Args:
        path: the store.
        table: `dataset`, `participant_id` (both needed) and any labels. A subject that is there already gets the new
            row; other datasets keep theirs, with nulls in columns that only one of them has. A column that is text in
            one and numbers in the other becomes text.

    Raises:
        ValueError: one of the two key columns is missing, or a subject stands in `table` twice.
    """
    missing = [name for name in _PARTICIPANT_KEY if name not in table.column_names]
    if missing:
        raise ValueError(f"participants need the columns {', '.join(_PARTICIPANT_KEY)}; missing: {', '.join(missing)}")
    keys = _keys(table)
    if len(set(keys)) != len(keys):
        raise ValueError(f"participants: {next(key for key in keys if keys.count(key) > 1)} stands in the table twice")
    read_header(path)
    with locked(path):
        old = read_participants(path)
        if old is not None:
            new = set(keys)
            old = old.filter(pa.array([key not in new for key in _keys(old)], pa.bool_()))
            table = _union(old, table)
        table = table.sort_by([(name, "ascending") for name in _PARTICIPANT_KEY])
        _replace(local_path(path) / PARTICIPANTS, table)
    return table


def read_participants(path: StorePath) -> pa.Table | None:
    """The participants table, or None if no dataset came with one. StoreError if it cannot be read."""
    return _read(local_path(path) / PARTICIPANTS)


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
    table = _read(local_path(path) / QUARANTINE)
    return QUARANTINE_SCHEMA.empty_table() if table is None else table


def _manifest_row(root: Path, run: str) -> dict[str, Any]:
    """One run's row, each value of its column's kind."""
    attributes = read_attributes(root / run)
    dataset, subject, entities = split_run(run)
    known = {"run": run, "dataset": dataset, "subject": subject, "run_label": attributes.get("run_label", entities)}
    row: dict[str, Any] = {}
    for field in MANIFEST_SCHEMA:
        value = known.get(field.name, attributes.get(field.name))
        try:
            if pa.types.is_string(field.type):
                row[field.name] = "" if value is None else str(value)
            else:
                row[field.name] = None if value is None else pa.scalar(value, field.type).as_py()
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise StoreError(
                f"{root / run / 'zarr.json'}: `{field.name}` is {value!r} ({error}): ingest the run again"
            ) from error
    return row


def _keys(table: pa.Table) -> list[tuple[str, str]]:
    dataset, participant = (table.column(name).cast(pa.string()).to_pylist() for name in _PARTICIPANT_KEY)
    return list(zip(dataset, participant, strict=True))


def _union(old: pa.Table, new: pa.Table) -> pa.Table:
    """Both tables' rows with both tables' columns; where the kinds of a column do not agree it becomes text."""
    for name in set(old.column_names) & set(new.column_names):
        kinds = {table.schema.field(name).type for table in (old, new)} - {pa.null()}
        if len(kinds) > 1 and not all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
            old, new = (_as_text(table, name) for table in (old, new))
    return pa.concat_tables([old, new], promote_options="permissive")


def _as_text(table: pa.Table, name: str) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, table.column(name).cast(pa.string()))


def _quarantine_row(row: Mapping[str, Any], now: datetime) -> dict[str, str]:
    when = row.get("when") or now
    text = when.isoformat(timespec="seconds") if isinstance(when, datetime) else str(when)
    return {"source": str(row["source"]), "reason": str(row["reason"]), "when": text}


def _change_quarantine(path: StorePath, drop: Iterable[str], add: Iterable[Mapping[str, str]]) -> None:
    read_header(path)
    with locked(path):
        table = read_quarantine(path)
        stays = pc.invert(pc.is_in(table.column("source"), pa.array(list(drop), pa.string())))
        fresh = pa.Table.from_pylist(list(add), schema=QUARANTINE_SCHEMA)
        after = pa.concat_tables([table.filter(stays), fresh]).sort_by("source")
        if not after.equals(table):
            _replace(local_path(path) / QUARANTINE, after)


def _replace(file: Path, table: pa.Table) -> None:
    replace_file(file, lambda partial: pq.write_table(table, partial, compression="zstd"))


def _read(file: Path) -> pa.Table | None:
    if not file.is_file():
        return None
    try:
        return pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{file} cannot be read as Parquet ({error}): remove it and ingest again") from error

"""The store's four tables, as Parquet at its root.

    manifest.parquet      a row per run: all that planning and finding rows needs; rebuilt from the runs at any time
    participants.parquet  a row per subject: labels, from participants.tsv and phenotype tables
    quarantine.parquet    a row per input that could not be ingested, with the reason
    withdrawn.parquet     a row per subject who withdrew: never to be ingested again

Each is read, changed and put back in one step (`places.update`), so that two ingests into one store keep each other's
rows. A subject who withdrew is looked up inside that step: no rebuilt manifest and no labels bring them back.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from neurostorm.io.atomic import atomic_update
from neurostorm.io.paths import AnyPath, path_component
from neurostorm.store.files import StorePath, find_runs, read_header, read_many, store_place
from neurostorm.store.layout import (
    MANIFEST,
    METADATA,
    PARTICIPANTS,
    RUN_PATTERN,
    StoreError,
    split_run,
)
from neurostorm.store.shard import ShardError, layout_of
from neurostorm.store.tables import _parquet, change_table, is_withdrawn, read_table, withdrawn_subjects

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
        ("chunk_frames", pa.int32()),
        ("compression", pa.string()),
    ]
)
LAYOUT_COLUMNS = ("chunk_frames", "compression")  # a reader finds rows by them; not in tables of earlier versions
_LATER = {*LAYOUT_COLUMNS, "global_mean", "global_std"}  # these two in what training runs keep of a manifest
_PARTICIPANT_KEY = ("dataset", "participant_id")


def build_manifest(path: StorePath) -> pa.Table:
    """A row per complete run, sorted by run, from the runs' own metadata; none for subjects who withdrew.

    Figures that a run does not state are null, texts empty, and so is the layout of one whose metadata is damaged.

    Raises:
        StoreError: not a store, or a run whose metadata cannot be read or has a value of the wrong kind.
    """
    root = store_place(path)
    read_header(root)
    gone = withdrawn_subjects(root)
    runs = sorted(run for run in find_runs(root) if split_run(run)[:2] not in gone)
    rows = [manifest_row(root, run, found) for run, found in zip(runs, read_many(root, runs), strict=True)]
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def write_manifest(path: StorePath) -> pa.Table:
    """Rebuild `manifest.parquet` from the runs, replace it in one step, and return it. Errors as `build_manifest`."""
    held: list[pa.Table] = []

    def rebuild(_: bytes | None) -> bytes:  # whatever is there, readable or not
        held[:] = [build_manifest(path)]
        return _parquet(held[0])

    atomic_update(store_place(path) / MANIFEST, rebuild)
    return held[0]


def read_manifest(path: StorePath, columns: Sequence[str] = tuple(MANIFEST_SCHEMA.names)) -> pa.Table:
    """The manifest as it was last written, with `MANIFEST_SCHEMA`; only `columns` of it, `run` among them, if given.

    StoreError: no store, no readable manifest, or one that names what cannot be a run.
    """
    read_header(path)
    file = store_place(path) / MANIFEST
    table = read_table(file, columns)
    if table is None:
        raise StoreError(f"{file} is missing: run the ingest again, or rebuild it with tools/store.py repair {path}")
    missing = sorted(set(columns) - {*LAYOUT_COLUMNS, *table.column_names})
    if missing:
        raise StoreError(f"{file} has no column {', '.join(missing)}: rebuild it with tools/store.py repair {path}")
    return check_paths(with_columns(table, columns), file)


def with_columns(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """The columns `names` of a manifest, of `MANIFEST_SCHEMA`'s types; null where an earlier version wrote none.

    KeyError for a column that all versions wrote.
    """
    schema = pa.schema([MANIFEST_SCHEMA.field(name) for name in names])
    for field in schema:
        if field.name in _LATER and field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names).cast(schema)


def check_paths(table: pa.Table, file: AnyPath) -> pa.Table:
    """A manifest, read from `file`, whose runs all lie inside the store; else StoreError with the first that does not.

    Others make paths of their own from a run's, so one from elsewhere that reads `runs/../../x` ends here.
    """
    safe = pc.fill_null(pc.match_substring_regex(table.column("run"), RUN_PATTERN), False)
    if not pc.all(safe, min_count=0).as_py():
        run = table.filter(pc.invert(safe)).column("run")[0].as_py()
        raise StoreError(
            f"{file}: `run` is {run!r}, which is not the path of a run: rebuild it with tools/store.py repair"
        )
    return table


def write_participants(path: StorePath, table: pa.Table) -> pa.Table:
    """Add subjects to `participants.parquet` and return all of them, sorted by dataset and participant_id.

    Args:
        path: the store.
        table: `dataset`, `participant_id` (both needed) and any labels. A subject that is there already gets the new
            row; other datasets keep theirs, with nulls in columns that only one of them has. A column that is text in
            one and numbers in the other becomes text. Subjects who withdrew are left out.

    Raises:
        ValueError: one of the two key columns is missing, a subject stands in `table` twice, or an id is no name.
    """
    missing = [name for name in _PARTICIPANT_KEY if name not in table.column_names]
    if missing:
        raise ValueError(f"participants need the columns {', '.join(_PARTICIPANT_KEY)}; missing: {', '.join(missing)}")
    keys = _keys(table)
    if len(set(keys)) != len(keys):
        raise ValueError(f"participants: {next(key for key in keys if keys.count(key) > 1)} stands in the table twice")
    for key in keys:
        for column, value in zip(_PARTICIPANT_KEY, key, strict=True):
            try:
                path_component(value)
            except ValueError as error:
                raise ValueError(f"participants: {column}: {error}") from error
    read_header(path)

    def change(old: pa.Table | None) -> pa.Table:
        if old is None:
            added = table
        else:
            added = _union(old.filter(pa.array([key not in fresh for key in _keys(old)], pa.bool_())), table)
        gone = withdrawn_subjects(path)
        stays = added.filter(pa.array([not is_withdrawn(*key, gone) for key in _keys(added)], pa.bool_()))
        return stays.sort_by([(name, "ascending") for name in _PARTICIPANT_KEY])

    fresh = set(keys)
    return change_table(store_place(path) / PARTICIPANTS, change)


def read_participants(path: StorePath) -> pa.Table | None:
    """The participants table, or None if no dataset came with one. StoreError if it cannot be read."""
    return read_table(store_place(path) / PARTICIPANTS)


def drop_rows(path: StorePath, name: str, drop: Callable[[dict[str, Any]], bool]) -> int:
    """Take the rows for which `drop` is true off the table `name` (MANIFEST, ...), in one step; returns how many.

    StoreError when the table cannot be read; a table that is not there has no rows.
    """
    dropped = 0

    def change(old: pa.Table | None) -> pa.Table | None:
        nonlocal dropped
        if old is None:
            return None
        stays = old.filter(pa.array([not drop(row) for row in old.to_pylist()], pa.bool_()))
        dropped = old.num_rows - stays.num_rows
        return stays if dropped else None

    change_table(store_place(path) / name, change)
    return dropped


def manifest_row(root: AnyPath, run: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The row of the manifest for a run's zarr.json, each value of its column's kind.

    StoreError names a field of another kind.
    """
    dataset, subject, entities = split_run(run)
    attributes = metadata.get("attributes", {})
    known = {"run": run, "dataset": dataset, "subject": subject, "run_label": attributes.get("run_label", entities)}
    known |= dict.fromkeys(LAYOUT_COLUMNS)
    with contextlib.suppress(ShardError):  # whoever reads the run says what is wrong with it
        layout = layout_of(metadata)
        known |= {"chunk_frames": layout.chunk_frames, "compression": layout.compression}
    row: dict[str, Any] = {}
    for field in MANIFEST_SCHEMA:
        value = known[field.name] if field.name in known else attributes.get(field.name)
        try:
            if pa.types.is_string(field.type):
                row[field.name] = "" if value is None else str(value)
            else:
                row[field.name] = None if value is None else pa.scalar(value, field.type).as_py()
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise StoreError(
                f"{root / run / METADATA}: `{field.name}` is {value!r} ({error}): ingest the run again"
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

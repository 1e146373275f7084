"""What is kept of each embedded run, and the tables made of all of them.

    worker: one run --> OUT/parts/<dataset>/<subject>/<run>.<key>.parquet, put in its place whole
    driver: all parts, in the order of the runs --> clips.parquet --> runs.parquet --> subjects.parquet

A part that is there is finished; its key says from what content of the run it was made. A run of which something could
not be read leaves `<run>.<key>.failed.parquet` instead: it counts, and the next start tries it again. The tables follow
from the parts alone, so that it does not matter how often a job was interrupted before.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from neurostorm.ingest.layouts.discover import Source
from neurostorm.io.atomic import atomic_write
from neurostorm.io.local_copies import upload_folder
from neurostorm.io.paths import AnyPath, list_files
from neurostorm.runtime.progress import tracked

PARTS = "parts"
CLIPS, RUNS, SUBJECTS, FAILED = "clips.parquet", "runs.parquet", "subjects.parquet", "failed.parquet"
GROUP_CLIPS = 20_000  # clips per row group of clips.parquet: bounds what assembling holds
READ_PARTS = 64  # parts that assembling holds, read by some threads at a time: each is a round trip to an object store
_READ_THREADS = 16
Vector = NDArray[np.float32]
_VECTOR = pa.list_(pa.float32())
_NAMES = [(name, pa.string()) for name in ("dataset", "subject", "session", "task", "run")]
PART_SCHEMA = pa.schema([("start_frame", pa.int32()), ("embedding", _VECTOR), ("reason", pa.string())])
CLIPS_SCHEMA = pa.schema([*_NAMES, ("start_frame", pa.int32()), ("start_s", pa.float64()), ("embedding", _VECTOR)])
RUNS_SCHEMA = pa.schema([*_NAMES, ("clips", pa.int32()), ("embedding", _VECTOR)])
SUBJECTS_SCHEMA = pa.schema([*_NAMES[:2], ("runs", pa.int32()), ("embedding", _VECTOR)])
FAILED_SCHEMA = pa.schema(
    [("run", pa.string()), ("start_frame", pa.int32()), ("source", pa.string()), ("reason", pa.string())]
)


@dataclass(frozen=True)
class RunToEmbed:
    """One run that is to be embedded.

    Attributes:
        run: its path in the store, or the one that it would have there.
        dataset, subject, session, task: as in the store's manifest.
        place: where it is read from, for messages.
        content: identifies its bytes; another content is another part.
        frames: of the stored run; 0 when only reading the file tells.
        source: the file and what belongs to it, for a run that is read from NIfTI.
        starts: first frames of the clips of a stored run; () for those that follow from the stride.
    """

    run: str
    dataset: str
    subject: str
    session: str
    task: str
    place: str
    content: str
    frames: int = 0
    source: Source | None = None
    starts: tuple[int, ...] = ()

    @property
    def names(self) -> dict[str, str]:
        """The columns that every table of runs begins with."""
        return {name: getattr(self, name) for name, _ in _NAMES}


@dataclass(frozen=True)
class ClipResult:
    """One clip's vector, float32 (C',), or why there is none; `start_frame` is None for a run without any clip."""

    start_frame: int | None
    embedding: Vector | None
    reason: str | None = None


@dataclass(frozen=True)
class Assembled:
    """What the tables hold: how many clips, runs and subjects, the failures, the width of a vector (0 for none)."""

    clips: int
    runs: int
    subjects: int
    failed: tuple[dict[str, object], ...]
    width: int


def unfinished(out: AnyPath, runs: Sequence[RunToEmbed]) -> list[RunToEmbed]:
    """Those of `runs` whose part is not there; found by one listing of all parts."""
    there = {name for name, _ in list_files(out / PARTS)}
    return [run for run in runs if _part(run) not in there]


def write_part(out: AnyPath, run: RunToEmbed, clips: Sequence[ClipResult]) -> None:
    """Keep what was made of a run, in one step."""
    failed = any(clip.reason is not None for clip in clips)
    target = out / PARTS / _part(run, failed)
    target.parent.mkdir(parents=True, exist_ok=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([vars(clip) for clip in clips], schema=PART_SCHEMA), sink)
    atomic_write(target, sink.getvalue().to_pybytes())
    if not failed:
        (out / PARTS / _part(run, failed=True)).unlink(missing_ok=True)


def assemble(out: AnyPath, runs: Sequence[RunToEmbed], tr_s: float, missing: str) -> Assembled:
    """Write the tables of `runs`, in their order, from their parts.

    Args:
        out: the result's place.
        runs: those of one subject beside each other.
        tr_s: seconds between two frames.
        missing: the reason that stands in failed.parquet for a run without a part.
    """
    means: list[tuple[RunToEmbed, int, Vector]] = []
    failed: list[dict[str, object]] = []

    def clip_tables() -> Iterator[pa.Table]:
        parts = zip(runs, read_parts(out, runs), strict=True)
        for run, part in tracked(parts, len(runs), "tables", "run"):
            clips = part or [ClipResult(None, None, missing)]
            good = [(clip.start_frame or 0, clip.embedding) for clip in clips if clip.embedding is not None]
            failed.extend(
                {"run": run.run, "start_frame": clip.start_frame, "source": run.place, "reason": clip.reason}
                for clip in clips
                if clip.embedding is None
            )
            if good:
                means.append((run, len(good), _mean([vector for _, vector in good])))
            rows = [
                {**run.names, "start_frame": start, "start_s": start * tr_s, "embedding": vector}
                for start, vector in good
            ]
            yield pa.Table.from_pylist(rows, schema=CLIPS_SCHEMA)

    with upload_folder(out) as tables:
        clip_count = _write_grouped(tables / CLIPS, clip_tables())
        rows = [{**run.names, "clips": count, "embedding": mean} for run, count, mean in means]
        _write(tables / RUNS, rows, RUNS_SCHEMA)
        subjects = _subjects(means)
        _write(tables / SUBJECTS, subjects, SUBJECTS_SCHEMA)
        if failed:
            _write(tables / FAILED, failed, FAILED_SCHEMA)
    if not failed:
        (out / FAILED).unlink(missing_ok=True)
    return Assembled(clip_count, len(means), len(subjects), tuple(failed), len(means[0][2]) if means else 0)


def _part(run: RunToEmbed, failed: bool = False) -> str:
    """The part's path below OUT/parts."""
    key = hashlib.sha256(run.content.encode()).hexdigest()[:12]
    _, dataset, subject, stem = run.run.split("/")  # runs/<dataset>/<subject>/<entities>
    return f"{dataset}/{subject}/{stem}.{key}{'.failed' if failed else ''}.parquet"


def read_parts(out: AnyPath, runs: Sequence[RunToEmbed]) -> Iterator[list[ClipResult] | None]:
    """The parts of `runs`, in their order; None for a run without one."""
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for first in range(0, len(runs), READ_PARTS):
            yield from pool.map(partial(_read_part, out), runs[first : first + READ_PARTS])


def _read_part(out: AnyPath, run: RunToEmbed) -> list[ClipResult] | None:
    for failed in (False, True):
        try:
            data = (out / PARTS / _part(run, failed)).read_bytes()
        except FileNotFoundError:
            continue
        table = pq.ParquetFile(pa.BufferReader(data)).read()
        vectors = [row.values.to_numpy() if row.is_valid else None for row in table["embedding"]]
        starts, reasons = table["start_frame"].to_pylist(), table["reason"].to_pylist()
        return [ClipResult(*clip) for clip in zip(starts, vectors, reasons, strict=True)]
    return None


def _mean(vectors: Sequence[Vector]) -> Vector:
    """Mean of float32 vectors, summed in float64."""
    return np.asarray(np.mean(np.stack(vectors), axis=0, dtype=np.float64), np.float32)


def _subjects(means: Sequence[tuple[RunToEmbed, int, Vector]]) -> list[dict[str, object]]:
    """A row per subject, the mean of its runs' vectors; every run counts alike."""
    rows: list[dict[str, object]] = []
    for (dataset, subject), group in groupby(means, key=lambda mean: (mean[0].dataset, mean[0].subject)):
        vectors = [vector for _, _, vector in group]
        rows.append({"dataset": dataset, "subject": subject, "runs": len(vectors), "embedding": _mean(vectors)})
    return rows


def _write_grouped(file: Path, tables: Iterator[pa.Table]) -> int:
    """Write the clips' tables as one file in row groups of about GROUP_CLIPS; how many rows in all."""
    rows = count = 0
    waiting = [CLIPS_SCHEMA.empty_table()]
    with pq.ParquetWriter(file, CLIPS_SCHEMA) as writer:
        for table in tables:
            waiting.append(table)
            rows, count = rows + table.num_rows, count + table.num_rows
            if count >= GROUP_CLIPS:
                writer.write_table(pa.concat_tables(waiting), row_group_size=count)
                waiting, count = [], 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=max(1, count))
    return rows


def _write(file: Path, rows: Sequence[dict[str, object]], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), file)

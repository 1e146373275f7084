"""What an ingest would do, without doing it: which runs, how many bytes, how long. Nothing is written.

    survey ─> waiting runs ─ headers, several at a time ─> frames, TR ─> bytes and files of the store, time on the cores
                                   └─ unusable by its header ─> refused, with the reason

The time is a model of two figures that tools/bench/ingest.py measures: what a core inflates and resamples of the
source's numbers in a second, and what it rounds and writes of the store's.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ray

from neurostorm.config import Config
from neurostorm.ingest.convert import RECIPE, RECIPE_VERSION, RunOutcome
from neurostorm.ingest.layouts.discover import Source
from neurostorm.ingest.nifti import RunError, open_nifti, repetition_time_s
from neurostorm.ingest.report import listed, with_reasons, withdrawn_lines
from neurostorm.ingest.resample.standardize import plan_temporal
from neurostorm.ingest.resample.target import check_size, sidecar_tr_s
from neurostorm.ingest.resample.template import brain_mask
from neurostorm.ingest.survey import STAT_THREADS, Survey, survey
from neurostorm.io.paths import AnyPath
from neurostorm.runtime.session import ensure_ray
from neurostorm.store import GRIDS, create_store, run_bytes, run_files
from neurostorm.store.files import is_node

SAMPLE_RUNS = 200
METADATA_BYTES = 2500  # of a run's zarr.json
# Fitted to one core's times in tools/bench/ingest.py for gzip runs of 2, 2.4 and 4 mm, which it meets to 20 %:
# megabytes of decompressed source, and of stored frames, that take a second.
SOURCE_MB_PER_S, STORED_MB_PER_S = 600.0, 80.0


@dataclass(frozen=True)
class Size:
    """What one waiting run comes to.

    Attributes:
        file_bytes: of its file as it lies.
        source_bytes: of its frames, decompressed.
        frames: that the store would hold.
        stored_bytes: that the store would grow by.
    """

    file_bytes: int
    source_bytes: int
    frames: int
    stored_bytes: int

    @property
    def core_s(self) -> float:
        """Seconds of one core."""
        return self.source_bytes / 1e6 / SOURCE_MB_PER_S + self.stored_bytes / 1e6 / STORED_MB_PER_S


@dataclass(frozen=True)
class Estimate:
    """What an ingest would do.

    Attributes:
        survey: what was found.
        refused: outcomes of runs that would be quarantined.
        waiting: runs that would be ingested, and what each comes to.
        cores: that would work.
        files: that the store would grow by.
        free_bytes: in the store's file system; None in an object store.
        store: where.
    """

    survey: Survey
    refused: tuple[RunOutcome, ...]
    waiting: list[tuple[Source, Size]]
    cores: int
    files: int
    free_bytes: int | None
    store: AnyPath

    @property
    def stored_bytes(self) -> int:
        """Bytes that the store would grow by."""
        return sum(size.stored_bytes for _, size in self.waiting)

    @property
    def seconds(self) -> float:
        """How long it would take: the cores share the runs, and the longest takes one of them as long as it does."""
        longest = max((size.core_s for _, size in self.waiting), default=0.0)
        return max(longest, sum(size.core_s for _, size in self.waiting) / self.cores)

    @property
    def in_store(self) -> int:
        """Runs of this source that the store would hold."""
        return len(self.waiting) + len(self.survey.unsure) + len(self._having("complete", "changed"))

    def lines(self) -> list[str]:
        """Counts per dataset, names, bytes and time."""
        counts = Counter(self._states())
        lines = [f"dry run: nothing is written; {len(self.survey.sources)} run(s) found, {self.store}"]
        for dataset in sorted({dataset for dataset, _ in counts}):
            parts = (f"{counts[dataset, state]} {state}" for state in _STATES if counts[dataset, state])
            lines.append(f"  {dataset}: {', '.join(parts)}")
        lines += listed("to ingest", [f"{source.path} -> {source.run}" for source, _ in self.waiting])
        lines += listed("to compare (same size, another time)", [str(source.path) for source in self.survey.unsure])
        lines += withdrawn_lines(self._having("withdrawn"))
        lines += listed("readmitted", ["/".join(person) for person in self.survey.readmitted])
        lines += with_reasons("changed since they were ingested", self._having("changed"))
        lines += with_reasons("refused, would be quarantined", self.refused)
        return lines + self._sums()

    def _having(self, *status: str) -> list[RunOutcome]:
        """Outcomes of one status or several that need no task."""
        return [outcome for outcome in self.survey.known.values() if outcome.status in status]

    def _states(self) -> Iterator[tuple[str, str]]:
        """Dataset of each run, and what would become of it."""
        words: dict[str, str] = {name: outcome.status for name, outcome in self.survey.known.items()}
        words |= {str(source.path): "to compare" for source in self.survey.unsure}
        words |= {outcome.source: "refused" for outcome in self.refused}
        for source in self.survey.sources:
            yield source.dataset, words.get(str(source.path), "to ingest")

    def _sums(self) -> list[str]:
        frames = sum(size.frames for _, size in self.waiting)
        read_gb = sum(size.file_bytes for _, size in self.waiting) / 1e9
        room = "" if self.free_bytes is None else f"; {self.free_bytes / 1e9:,.1f} GB are free there"
        core_s = sum(size.core_s for _, size in self.waiting)
        rate = f" ({frames / core_s:,.0f} frames/s per core)" if core_s else ""
        lines = [
            f"to read: {read_gb:,.2f} GB; the store would grow by {frames:,} frames, {self.stored_bytes / 1e9:,.2f} GB "
            f"in {self.files:,} file(s){room}",
            f"time: about {_duration(self.seconds)} on {self.cores} core(s){rate}, and the start of Ray",
        ]
        if self.free_bytes is not None and self.stored_bytes > self.free_bytes:
            lines.append(f"NOT ENOUGH ROOM: {(self.stored_bytes - self.free_bytes) / 1e9:,.2f} GB are missing")
        return lines


_STATES = ("to ingest", "to compare", "complete", "changed", "refused", "withdrawn")


def dry_run(config: Config) -> Estimate:
    """Find out what `ingest` would do with the same configuration. Errors as `ingest`; nothing is written."""
    settings, store = config.ingest, config.data.store
    found = survey(settings, store)
    grid = GRIDS[settings.grid]
    mask = brain_mask(grid, settings.mask)
    if is_node(store):  # then nothing is made, only compared
        create_store(store, grid=grid, mask=mask, tr_s=settings.tr_s, recipe=RECIPE, recipe_version=RECIPE_VERSION)
    refused = [outcome for outcome in found.known.values() if outcome.status == "quarantined"]
    waiting = []
    unsure = set(found.unsure)
    to_ingest = [source for source in found.waiting if source not in unsure]
    for source, size in measure(to_ingest, settings.tr_s, int(mask.sum()), settings.chunk_frames):
        if isinstance(size, str):
            refused.append(RunOutcome(str(source.path), source.run, "quarantined", size))
        else:
            waiting.append((source, size))
    groups = {step for source, _ in waiting for step in _groups(source) if not (store / step).is_dir()}
    files = run_files() * len(waiting) + len(groups)
    return Estimate(found, tuple(refused), waiting, _cores(), files, free_bytes(store), store)


def measure(
    sources: Sequence[Source], tr_s: float, voxels: int, chunk_frames: int | None = None
) -> Iterable[tuple[Source, Size | str]]:
    """Each source with what it comes to, or with the reason why it cannot be ingested; by headers, in their order.

    Args:
        sources: the runs.
        tr_s: seconds between two frames of the store.
        voxels: V of the store.
        chunk_frames: as `write_run` takes it.
    """

    def look(source: Source) -> tuple[Source, Size | str]:
        try:
            return source, _size(source, tr_s, voxels, chunk_frames)
        except RunError as error:
            return source, str(error)

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        yield from pool.map(look, sources)


def sampled_growth(sources: Sequence[Source], tr_s: float, voxels: int) -> int:
    """Bytes that a store would grow by, from the headers of some of the runs, evenly taken."""
    sample = sources[:: -(-len(sources) // SAMPLE_RUNS)]
    stored = sum(size.stored_bytes for _, size in measure(sample, tr_s, voxels) if isinstance(size, Size))
    return round(stored * len(sources) / len(sample))


def free_bytes(store: AnyPath) -> int | None:
    """Bytes that may still be written at a local path, which need not exist; None for an object store."""
    if not isinstance(store, Path):
        return None
    home = next(folder for folder in (store, *store.parents) if folder.exists())
    return shutil.disk_usage(home).free


def _size(source: Source, tr_s: float, voxels: int, chunk_frames: int | None) -> Size:
    if source.refused:
        raise RunError(source.refused)
    header = open_nifti(source.path)
    source_tr_s = repetition_time_s(header, sidecar_tr_s(source.sidecars))
    check_size(header.frames, source_tr_s, tr_s, voxels)
    frames = plan_temporal(header.frames, source_tr_s, tr_s).frames
    return Size(
        file_bytes=source.path.stat().st_size,
        source_bytes=header.frames * header.frame_bytes,
        frames=frames,
        stored_bytes=run_bytes(frames, voxels, chunk_frames) + METADATA_BYTES,
    )


def _groups(source: Source) -> tuple[str, str]:
    """The groups above a run, each of which has a file of its own."""
    steps = source.run.split("/")
    return "/".join(steps[:2]), "/".join(steps[:3])


def _cores() -> int:
    """Cores that would work: those of the cluster that RAY_ADDRESS names, else this machine's."""
    if os.environ.get("RAY_ADDRESS"):
        ensure_ray()
        return max(1, int(ray.cluster_resources().get("CPU", 0.0)))
    return len(os.sched_getaffinity(0))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"

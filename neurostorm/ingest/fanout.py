"""The whole ingest: every run below a folder into one store, spread over a Ray cluster.

    discover ─> already complete? ─> Ray Data, one task per run ─> outcomes ─> participants, manifest, quarantine
                     └─────────────────────────────────────────────────^

One run is one task and one atomic write, so a start after an interruption goes on where it was, and a task that dies
(killed for memory, a lost node) costs its own run and no other.
"""

import logging
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from tqdm import tqdm

from neurostorm.config import Config, ConfigError
from neurostorm.ingest.convert import RECIPE, RECIPE_VERSION, Outcome, attempt, outcome_if_complete
from neurostorm.ingest.discover import DiscoverError, Source, discover, read_participants
from neurostorm.ingest.nifti import RunError
from neurostorm.ingest.template import brain_mask
from neurostorm.session import ensure_ray
from neurostorm.store import (
    GRIDS,
    add_quarantine,
    clear_quarantine,
    create_store,
    remove_partials,
    write_manifest,
    write_participants,
)

logger = logging.getLogger(__name__)

WAVE_RUNS = 2000  # runs handed to Ray Data at a time: bounds what the driver holds for a corpus of 66,000
CRASH_RETRIES = 2  # of a task whose process died; Ray Data's own default is without end
STALE_PARTIAL_S = 24 * 3600.0
STAT_THREADS = 16
LISTED_REASONS = 20


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did.

    Attributes:
        outcomes: one per source, in the order of the sources.
        notes: what went otherwise than hoped without stopping a run, such as an unreadable participants.tsv.
        participants: rows that participants.tsv files contributed.
        seconds: from start to end.
        store: where.
        manifest: all runs of the store, after this ingest.
    """

    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...]
    participants: int
    seconds: float
    store: Path
    manifest: pa.Table

    def having(self, *status: str) -> list[Outcome]:
        """The outcomes of one status or several."""
        return [outcome for outcome in self.outcomes if outcome.status in status]

    @property
    def in_store(self) -> int:
        """Runs of this source that the store holds now."""
        return len(self.having("ingested", "complete", "changed"))

    def lines(self) -> list[str]:
        """The closing words: counts, sizes, quality, each reason of what was left out."""
        new, bad, changed = self.having("ingested"), self.having("quarantined"), self.having("changed")
        subjects = len(
            set(zip(*(self.manifest.column(name).to_pylist() for name in ("dataset", "subject")), strict=True))
        )
        lines = [
            f"{len(new)} of {len(self.outcomes)} run(s) ingested in {self.seconds:.0f} s; "
            f"{self.in_store - len(new)} were there already, {len(bad)} quarantined",
            f"{self.store} now holds {self.manifest.num_rows} run(s) of {subjects} subject(s)",
        ]
        if new:
            hours = sum(outcome.frames * outcome.tr_s for outcome in new) / 3600
            size_mb = sum(outcome.size_bytes for outcome in new) / 1e6
            lines.append(
                f"new: {sum(outcome.frames for outcome in new):,} frames, {hours:.2f} h, {size_mb:,.1f} MB; medians: "
                f"coverage {_median(new, 'coverage'):.1%}, temporal SNR {_median(new, 'tsnr_median'):.0f}, "
                f"signal to quantisation noise {_median(new, 'quantisation_db'):.1f} dB"
            )
        lines += [f"note: {note}" for note in self.notes]
        lines += _reasons("changed since they were ingested", changed)
        lines += _reasons("quarantined (quarantine.parquet)", bad)
        return lines


def ingest(config: Config) -> IngestReport:
    """Find the runs below `ingest.source`, bring them into `data.store`, and keep the store's tables.

    The store is made when it is missing. Files that cannot be used are recorded in `quarantine.parquet`; runs that are
    complete are left as they are.

    Raises:
        ConfigError: no source is given.
        DiscoverError: the source holds no run.
        MaskError: `ingest.mask` cannot be used.
        StoreError: `data.store` is something else, or has another grid, mask or TR.
    """
    started = time.monotonic()
    settings, store = config.ingest, config.data.store.absolute()
    if settings.source is None:
        raise ConfigError("ingest.source is not set: give the folder of your NIfTI files, --source DIR")
    sources = discover(settings.source, settings.dataset)
    grid = GRIDS[settings.grid]
    mask = brain_mask(grid, settings.mask)
    create_store(store, grid=grid, mask=mask, tr_s=settings.tr_s, recipe=RECIPE, recipe_version=RECIPE_VERSION)
    remove_partials(store, STALE_PARTIAL_S)
    participants, notes = _store_participants(store, sources)
    outcomes = _already_there(sources, store)
    waiting = [source for source in sources if source.path not in outcomes]
    work = partial(attempt, store=store, chunk_frames=settings.chunk_frames, codec=settings.codec)
    for outcome in _with_progress(spread(waiting, work, settings.cpus_per_run), len(waiting)):
        outcomes[Path(outcome.source)] = outcome
    ordered = tuple(outcomes[source.path] for source in sources)
    _store_quarantine(store, ordered)
    manifest = write_manifest(store)
    return IngestReport(ordered, tuple(notes), participants, time.monotonic() - started, store, manifest)


def spread(sources: Sequence[Source], work: Callable[[Source], Outcome], cpus_per_run: float) -> Iterator[Outcome]:
    """`work` on every source as Ray Data tasks, one each; outcomes as they come, in no order.

    A source whose task died on every try gets a "quarantined" outcome: exactly one outcome comes per source.
    """
    if not sources:
        return
    os.environ.setdefault("RAY_task_oom_retries", str(CRASH_RETRIES))  # endless, otherwise
    ensure_ray()
    _warn_of_waiting(cpus_per_run)
    for first in range(0, len(sources), WAVE_RUNS):
        wave = sources[first : first + WAVE_RUNS]
        rows = [{"source": pickle.dumps(source)} for source in wave]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        with warnings.catch_warnings():
            # Ray 2.60 wants named parameters, and has none for max_retries.
            warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
            dataset = dataset.map(partial(_task, work=work), num_cpus=cpus_per_run, max_retries=CRASH_RETRIES)
        dataset.context.max_errored_blocks = -1
        dataset.context.enable_progress_bars = False
        unanswered = {source.path: source for source in wave}
        for row in dataset.iter_rows():
            outcome: Outcome = pickle.loads(row["outcome"])
            del unanswered[Path(outcome.source)]
            yield outcome
        for source in unanswered.values():
            reason = f"its task died {CRASH_RETRIES + 1} times; if memory ran out, a higher ingest.cpus_per_run helps"
            yield Outcome(str(source.path), source.run, "quarantined", reason)


def _warn_of_waiting(cpus_per_run: float) -> None:
    """Ray would wait without a word for a node that is large enough; on a growing cluster it may yet come."""
    largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if cpus_per_run > largest:
        logger.warning(
            "ingest.cpus_per_run=%g, but the largest node has %g cores: waiting for one", cpus_per_run, largest
        )


def _task(row: dict[str, Any], work: Callable[[Source], Outcome]) -> dict[str, Any]:
    """One run inside a Ray worker; sources and outcomes travel pickled, as Arrow wants one type for all entities."""
    return {"outcome": pickle.dumps(work(pickle.loads(row["source"])))}


def _with_progress(outcomes: Iterator[Outcome], total: int) -> Iterator[Outcome]:
    """The same outcomes under a progress bar; in a log file it writes a line every ten seconds at most."""
    bad = 0
    interval_s = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(outcomes, total=total, desc="ingest", unit="run", mininterval=interval_s, disable=total == 0) as bar:
        for outcome in bar:
            bad += outcome.status == "quarantined"
            bar.set_postfix(quarantined=bad, refresh=False)
            yield outcome


def _already_there(sources: Sequence[Source], store: Path) -> dict[Path, Outcome]:
    """Outcomes of the sources that need no task: the run is complete and its file has the size and time it had."""

    def look(source: Source) -> Outcome | None:
        try:
            return outcome_if_complete(source, store, check_bytes=False)
        except RunError as error:
            return Outcome(str(source.path), source.run, "quarantined", str(error))

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        return {source.path: found for source, found in zip(sources, pool.map(look, sources), strict=True) if found}


def _store_participants(store: Path, sources: Sequence[Source]) -> tuple[int, list[str]]:
    """Write every dataset's participants.tsv to the store; how many rows, and what could not be used."""
    rows, notes = 0, []
    tables = {(source.dataset, source.participants) for source in sources if source.participants is not None}
    for dataset, path in sorted(tables):
        assert path is not None
        try:
            table = read_participants(path, dataset)
        except DiscoverError as error:
            notes.append(f"labels are missing: {error}")
            continue
        write_participants(store, table)
        rows += table.num_rows
    return rows, notes


def _store_quarantine(store: Path, outcomes: Sequence[Outcome]) -> None:
    """Record what failed now, and clear what failed earlier and is in the store now."""
    bad = [
        {"source": outcome.source, "reason": outcome.reason} for outcome in outcomes if outcome.status == "quarantined"
    ]
    clear_quarantine(store, [outcome.source for outcome in outcomes if outcome.status != "quarantined"])
    if bad:
        add_quarantine(store, bad)


def _median(outcomes: Sequence[Outcome], name: str) -> float:
    values = sorted(getattr(outcome, name) for outcome in outcomes)
    return float(values[len(values) // 2])


def _reasons(title: str, outcomes: Sequence[Outcome]) -> list[str]:
    if not outcomes:
        return []
    shown = [f"  {outcome.source}: {outcome.reason}" for outcome in outcomes[:LISTED_REASONS]]
    left = len(outcomes) - len(shown)
    return [f"{title}:", *shown, *([f"  ... and {left} more"] if left else [])]

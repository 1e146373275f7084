"""The whole ingest: every run below a folder into one store, spread over a Ray cluster.

    survey ─> participants ─> waiting runs ─ spread ─> outcomes ─ tables, now and then ─> manifest ─> report
                                               ^          |─ its write failed, which may pass ─> again at the end
                                               '----------'─ the store cannot be written at all ─> stop

One run is one task and one atomic write, so a start after an interruption goes on where it was, two ingests may fill
one store, and a task that dies (killed for memory, a lost node) costs its own run and no other.
"""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from neurostorm.config import Config
from neurostorm.ingest.convert import RECIPE, RECIPE_VERSION, RunOutcome, attempt
from neurostorm.ingest.estimate import free_bytes, sampled_growth
from neurostorm.ingest.layouts.discover import Source
from neurostorm.ingest.map_runs import map_runs
from neurostorm.ingest.report import IngestReport
from neurostorm.ingest.resample.template import brain_mask
from neurostorm.ingest.survey import Survey, survey
from neurostorm.ingest.tables import Tables, store_participants
from neurostorm.io.paths import AnyPath
from neurostorm.runtime.capacity import Demand
from neurostorm.runtime.progress import progress
from neurostorm.runtime.resources import require
from neurostorm.store import GRIDS, StoreError, create_store, remove_partials, withdrawn_subjects
from neurostorm.store.maintenance.care import allow_removed

FAILED_WRITES = 20  # in a row, each tried for minutes: the store is not busy, it cannot be written
PAUSE_S = 30.0  # before the writes that failed are tried again
logger = logging.getLogger(__name__)


def ingest(config: Config) -> IngestReport:
    """Find the runs below `ingest.source`, bring them into `data.store`, and keep the store's tables.

    The store is made when it is missing. Files that cannot be used are recorded in `quarantine.parquet`; runs that are
    complete are left as they are, and participants who withdrew are left out.

    Raises:
        ConfigError: no source is given, or no node has the cores of ingest.cpus_per_run.
        DiscoverError: the source holds no run.
        MaskError: `ingest.mask` cannot be used.
        StoreError: `data.store` is something else, or has another grid, mask or TR; or it cannot be written. Then what
            is finished stays, nothing is quarantined for it, and the next start goes on.
        OSError: an object store with the source cannot be listed.
    """
    started = time.monotonic()
    settings, store = config.ingest, config.data.store
    logger.info("looking for runs in %s", settings.source)
    found = survey(settings, store)
    logger.info("%d run(s) found, %d to ingest", len(found.sources), len(found.waiting))
    if found.waiting:
        options = {"cpus": "--ingest.cpus_per_run"}
        require(Demand(1, settings.cpus_per_run, what="task", options=options), config.scale.wait_for_nodes_s)
    grid = GRIDS[settings.grid]
    mask = brain_mask(grid, settings.mask)
    with _store_trouble(store):
        create_store(store, grid=grid, mask=mask, tr_s=settings.tr_s, recipe=RECIPE, recipe_version=RECIPE_VERSION)
        remove_partials(store)
        for dataset, subject in found.readmitted:
            allow_removed(store, dataset, subject)
        participants, notes = store_participants(store, found.sources)
    notes += [f"ingest.allow_removed: nobody called {entry} withdrew from this store" for entry in found.strangers]
    _warn_of_space(found, store, settings.tr_s, int(mask.sum()))
    work = partial(
        attempt, store=store, chunk_frames=settings.chunk_frames, compression=settings.compression,
        threads=max(1, int(settings.cpus_per_run)),
    )  # fmt: skip
    waiting = found.waiting
    outcomes = dict(found.known)
    tables = Tables(store)
    with _kept_up(tables):
        for outcome in itertools.chain(found.known.values(), _spread_twice(waiting, work, settings.cpus_per_run)):
            with _store_trouble(store):
                if outcome.status == "unwritten" and not outcome.again:
                    raise OSError(outcome.reason)
                outcomes[outcome.source] = outcome
                tables.take(outcome)
    with _store_trouble(store):
        tables.flush()
        remove_partials(store)  # of tasks that died
        manifest = tables.build_manifest()
    notes += _withdrew_meanwhile(outcomes.values(), store)
    ordered = tuple(outcomes[str(source.path)] for source in found.sources)
    return IngestReport(ordered, tuple(notes), participants, time.monotonic() - started, store, manifest)


def _spread_twice(
    sources: Sequence[Source], work: Callable[[Source], RunOutcome], cpus_per_run: float
) -> Iterator[RunOutcome]:
    """The outcome of each source; those whose write failed are tried once more, after all others and a pause.

    When many writes in a row fail, the last of them has `again=False`: the store cannot be written.
    """
    left: dict[str, Source] = {str(source.path): source for source in sources}
    for last_round in (False, True):
        failed_in_a_row = 0
        with contextlib.closing(map_runs(list(left.values()), work, cpus_per_run)) as coming:
            for outcome in _with_progress(coming, len(left)):
                if outcome.status != "unwritten" or last_round:
                    left.pop(outcome.source)
                    failed_in_a_row = 0
                    yield outcome
                    continue
                failed_in_a_row += 1
                logger.warning("%s: %s; it is tried again at the end", outcome.source, outcome.reason)
                if not outcome.again or failed_in_a_row >= FAILED_WRITES:
                    yield replace(outcome, again=False)
        if not left:
            return
        if not last_round:
            logger.info("%d run(s) could not be written: trying again in %.0f s", len(left), PAUSE_S)
            time.sleep(PAUSE_S)


@contextlib.contextmanager
def _store_trouble(store: AnyPath) -> Iterator[None]:
    """An OSError inside comes from writing the store: it becomes one StoreError that says where and what to do."""
    try:
        yield
    except OSError as error:
        free = free_bytes(store)
        room = "" if free is None else f"; {free / 1e9:,.2f} GB are free there"
        raise StoreError(
            f"the store at {store} cannot be written: {error}{room}. No file was quarantined for this, and finished "
            "runs are kept: make room or mend access, and start the same command again"
        ) from error


@contextlib.contextmanager
def _kept_up(tables: Tables) -> Iterator[None]:
    """When the ingest is broken off, the tables know all outcomes that came, if they can be written."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, StoreError):  # the trouble on its way says more
            tables.flush()
            tables.build_manifest()
        raise


def _with_progress(outcomes: Iterable[RunOutcome], total: int) -> Iterator[RunOutcome]:
    """The same outcomes under a progress bar; in a log file it writes a line every ten seconds at most."""
    bad = 0
    with progress(total, "ingest", "run") as bar:
        for outcome in outcomes:
            bad += outcome.status == "quarantined"
            bar.note(quarantined=bad)
            yield outcome
            bar.update()


def _warn_of_space(found: Survey, store: AnyPath, tr_s: float, voxels: int) -> None:
    free = free_bytes(store)
    if free is None or not found.waiting:
        return
    needed = sampled_growth(found.waiting, tr_s, voxels)
    if needed > free:
        logger.warning(
            "%s needs about %.1f GB more for %d run(s), and %.1f GB are free there: the ingest will stop when the disk "
            "is full, and go on when it is started again with room",
            store, needed / 1e9, len(found.waiting), free / 1e9,
        )  # fmt: skip


def _withdrew_meanwhile(outcomes: Iterable[RunOutcome], store: AnyPath) -> list[str]:
    """Notes on participants whose withdrawal was entered while their runs were on the way into the store."""
    gone = {f"{dataset}/{subject}" for dataset, subject in withdrawn_subjects(store)}
    late = {"/".join(outcome.run.split("/")[1:3]) for outcome in outcomes if outcome.status == "ingested"} & gone
    return [f"{person} withdrew during this ingest: run tools/store.py remove once more" for person in sorted(late)]

"""What there is to do before anything is done: runs found, who withdrew, which runs the store has already.

    discover ─> Source ─┬─ its participant withdrew ──────────────> Outcome "withdrawn"
    one listing of runs ┼─ complete: one small file, one stat ────> Outcome "complete", "changed", or unsure
                        └─ everything else ───────────────────────> waiting

Nothing is written and no image is read, so the ingest and its dry run begin alike.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from neurostorm.config import ConfigError, IngestConfig
from neurostorm.ingest.convert import RunOutcome, outcome_at_a_glance
from neurostorm.ingest.layouts.discover import Source, discover
from neurostorm.ingest.nifti import RunError
from neurostorm.io.paths import AnyPath
from neurostorm.store import withdrawn_subjects
from neurostorm.store.files import find_runs, is_node, read_attributes

STAT_THREADS = 16


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        sources: all runs of the source, sorted by path.
        known: by the text of a source's path, outcomes that need no task.
        unsure: sources whose run is complete, and whose file has the size but not the time that it had: it will be read
            to tell.
        readmitted: dataset and subject of participants who withdrew and are named in `ingest.allow_removed`.
        strangers: entries of `ingest.allow_removed` that name nobody who withdrew.
    """

    sources: tuple[Source, ...]
    known: dict[str, RunOutcome]
    unsure: tuple[Source, ...]
    readmitted: tuple[tuple[str, str], ...]
    strangers: tuple[str, ...]

    @property
    def waiting(self) -> list[Source]:
        """Sources whose outcome takes a task."""
        return [source for source in self.sources if str(source.path) not in self.known]


def survey(settings: IngestConfig, store: AnyPath) -> Survey:
    """Look at the source and at the store, which may not be there yet.

    Raises:
        ConfigError: no source is given.
        DiscoverError: the source holds no run.
        StoreError: a table or a run of the store cannot be read.
        OSError: an object store cannot be listed.
    """
    if settings.source is None:
        raise ConfigError("ingest.source is not set: give the folder of your NIfTI files, --source DIR")
    sources = tuple(discover(settings.source, settings.dataset))
    if not is_node(store):
        return Survey(sources, {}, (), (), settings.allow_removed)
    gone = withdrawn_subjects(store)
    back = {person for person in gone for entry in settings.allow_removed if _names(entry, person)}
    strangers = tuple(entry for entry in settings.allow_removed if not any(_names(entry, person) for person in gone))
    known = {
        str(source.path): RunOutcome(str(source.path), source.run, "withdrawn", "its participant withdrew")
        for source in sources
        if (source.dataset, source.subject) in gone - back
    }
    complete, unsure = _complete([source for source in sources if str(source.path) not in known], store)
    return Survey(sources, known | complete, unsure, tuple(sorted(back)), strangers)


def _names(entry: str, person: tuple[str, str]) -> bool:
    """Whether `dataset/sub-ID` or `sub-ID` means this participant."""
    return entry in (person[1], "/".join(person))


def _complete(sources: Sequence[Source], store: AnyPath) -> tuple[dict[str, RunOutcome], tuple[Source, ...]]:
    """Outcomes of the sources whose run is complete, and those that the file's size and time do not settle."""

    def look(source: Source) -> RunOutcome | None:
        try:
            return outcome_at_a_glance(source, store, read_attributes(store / source.run))
        except RunError as error:
            return RunOutcome(str(source.path), source.run, "quarantined", str(error))

    there = set(find_runs(store))
    candidates = [source for source in sources if source.run in there and not source.refused]
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        found = list(zip(candidates, pool.map(look, candidates), strict=True))
    settled = {str(source.path): outcome for source, outcome in found if outcome is not None}
    return settled, tuple(source for source, outcome in found if outcome is None)

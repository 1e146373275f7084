"""The store's tables while an ingest goes on: what is known is written soon, so that a killed driver loses little.

    participants.tsv ─────────────────────────> participants.parquet      at the start
    outcomes ─ gathered for some seconds ─────> quarantine.parquet        now and then, and at the end
    the store's runs ─────────────────────────> manifest.parquet          now and then, and at the end

The manifest is rebuilt from the runs each time. On a full store this takes seconds, so the pause between two grows
with what the last one took: an interrupted ingest can be trained on at once, and hardly any time goes there.
"""

import time
from collections.abc import Sequence

import pyarrow as pa

from neurostorm.ingest.convert import RunOutcome
from neurostorm.ingest.layouts.discover import DiscoverError, Source, read_participants
from neurostorm.io.paths import AnyPath
from neurostorm.store import add_quarantine, clear_quarantine, read_quarantine, write_manifest, write_participants

QUARANTINE_EVERY_S = 20.0
MANIFEST_EVERY_S = 300.0
MANIFEST_SHARE = 0.05  # of the time, at most, that rebuilding may take while the ingest goes on


class Tables:
    """Quarantine and manifest of a store, kept up with the outcomes that come in. OSError when they cannot be."""

    def __init__(self, store: AnyPath) -> None:
        self._store = store
        self._quarantined = set(read_quarantine(store).column("source").to_pylist())
        self._bad: list[dict[str, str]] = []
        self._good: list[str] = []
        self._flushed_s = self._built_s = time.monotonic()
        self._build_took_s = 0.0

    def take(self, outcome: RunOutcome) -> None:
        """Take note of one outcome; writes what is due."""
        if outcome.status == "quarantined":
            self._bad.append({"source": outcome.source, "reason": outcome.reason})
        elif outcome.status != "unwritten" and outcome.source in self._quarantined:
            self._good.append(outcome.source)
        now_s = time.monotonic()
        if now_s - self._flushed_s > QUARANTINE_EVERY_S:
            self.flush()
        if now_s - self._built_s > max(MANIFEST_EVERY_S, self._build_took_s / MANIFEST_SHARE):
            self.build_manifest()

    def flush(self) -> None:
        """Record what failed since the last time, and clear what failed earlier and is well now."""
        if self._good:
            clear_quarantine(self._store, self._good)
        if self._bad:
            add_quarantine(self._store, self._bad)
        self._good, self._bad = [], []
        self._flushed_s = time.monotonic()

    def build_manifest(self) -> pa.Table:
        """Rebuild the manifest from the runs that are there, and return it."""
        begun_s = time.monotonic()
        table = write_manifest(self._store)
        self._built_s = time.monotonic()
        self._build_took_s = self._built_s - begun_s
        return table


def store_participants(store: AnyPath, sources: Sequence[Source]) -> tuple[int, list[str]]:
    """Write every dataset's participants.tsv to the store; how many rows they have, and what failed."""
    rows, notes = 0, []
    tables = {(source.dataset, str(source.participants)): source.participants for source in sources}
    for (dataset, _), path in sorted(tables.items(), key=lambda entry: entry[0]):
        if path is None:
            continue
        try:
            table = read_participants(path, dataset)
        except DiscoverError as error:
            notes.append(f"labels are missing: {error}")
            continue
        write_participants(store, table)
        rows += table.num_rows
    return rows, notes

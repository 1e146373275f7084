"""What an ingest did, in the words that it ends with."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from neurostorm.ingest.convert import RunOutcome
from neurostorm.io.paths import AnyPath

LISTED = 20


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

    outcomes: tuple[RunOutcome, ...]
    notes: tuple[str, ...]
    participants: int
    seconds: float
    store: AnyPath
    manifest: pa.Table

    def having(self, *status: str) -> list[RunOutcome]:
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
        there = self.in_store - len(new)
        others = [f"{there} were there already"] if there else []
        others += [f"{len(bad)} quarantined"] if bad else []
        unwritten = self.having("unwritten")
        others += [f"{len(unwritten)} could not be written"] if unwritten else []
        lines = [
            f"{len(new)} of {len(self.outcomes)} run(s) ingested in {self.seconds:.0f} s"
            + (f"; {', '.join(others)}" if others else ""),
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
        lines += withdrawn_lines(self.having("withdrawn"))
        lines += with_reasons("changed since they were ingested", changed)
        lines += with_reasons("quarantined (quarantine.parquet)", bad)
        lines += with_reasons("could not be written; start the same command again", unwritten)
        return lines


def with_reasons(title: str, outcomes: Sequence[RunOutcome]) -> list[str]:
    """A title and the first outcomes below it, each with its reason; nothing for none."""
    return listed(title, [f"{outcome.source}: {outcome.reason}" for outcome in outcomes])


def withdrawn_lines(outcomes: Sequence[RunOutcome]) -> list[str]:
    """Who withdrew, with how many runs each."""
    people = Counter("/".join(outcome.run.split("/")[1:3]) for outcome in outcomes)
    title = f"left out, {len(people)} participant(s) withdrew (--ingest.allow_removed names who may come back)"
    return listed(title, [f"{person}: {runs} run(s)" for person, runs in sorted(people.items())])


def listed(title: str, entries: Sequence[str]) -> list[str]:
    """A title and the first entries below it; nothing for none."""
    if not entries:
        return []
    left = len(entries) - LISTED
    return [
        f"{title}:",
        *(f"  {entry}" for entry in entries[:LISTED]),
        *([f"  ... and {left} more"] if left > 0 else []),
    ]


def _median(outcomes: Sequence[RunOutcome], name: str) -> float:
    values = sorted(getattr(outcome, name) for outcome in outcomes)
    return float(values[len(values) // 2])

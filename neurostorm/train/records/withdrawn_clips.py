"""Clips of subjects who withdrew after a run was planned: named in the run's folder, listed with the exported model.

every batch:  LeftOut.note -> RUN/withdrawn-RANK.jsonl
at the end:   those of all ranks + withdrawn.parquet -> removed(): who, when, from which step on
"""

import contextlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from neurostorm.data.clips import ClipBatch
from neurostorm.data.corpus import Corpus
from neurostorm.data.plan.split import subject_hash
from neurostorm.data.withdrawals import subject_of
from neurostorm.io.paths import AnyPath, list_files
from neurostorm.store.layout import StoreError
from neurostorm.train.records.jsonl import Journal

NAME = "withdrawn"
logger = logging.getLogger(__name__)


class LeftOut:
    """Names the clips of one worker that are left out because their subjects withdrew.

    Attributes:
        total: how many they are since this start.
    """

    def __init__(self, folder: AnyPath, rank: int) -> None:
        self._journal, self._told = Journal(folder, f"{NAME}-{rank}"), set[str]()
        self.total = 0

    def note(self, batch: ClipBatch, runs: Sequence[str], step: int) -> None:
        """Takes note of one batch; says so of every subject once."""
        for place in batch.withdrawn.nonzero().flatten().tolist():
            run, row = runs[int(batch.run[place])], int(batch.row[place])
            self._journal.add(step=step, row=row, clip=f"{run}[{int(batch.start[place])}]")
            self.total += 1
            if subject_of(run) not in self._told:
                self._told.add(subject_of(run))
                logger.warning("%s withdrew: their clips are left out, the first in step %d", subject_of(run), step)

    def keep(self, done: int) -> None:
        """Makes sure, after `done` steps, that the names outlive this process."""
        self._journal.keep(done)


def removed(corpus: Corpus, folder: AnyPath) -> list[dict[str, Any]]:
    """The subjects of a run's plan who have withdrawn by now, for the exported model.

    Args:
        corpus: of the run.
        folder: of the run, with the journals of all ranks.

    Returns:
        Of each subject, sorted: `subject_sha256` (`subject_hash`); `when`, as in withdrawn.parquet; `use`, "training"
        or "validation"; `clips_left_out` of training, and `first_step_left_out`, null if there is none. Weights may
        follow from clips of earlier steps.
    """
    try:
        corpus.withdrawals.look_again()
    except StoreError as error:
        logger.warning("%s: only subjects that are known to have withdrawn are listed with the model", error)
    steps = _steps_left_out(folder)
    trained = set(corpus.trained_subjects)
    found = []
    for subject, when in corpus.withdrawn.items():
        those = steps.get(subject, {})
        found.append(
            {
                "subject_sha256": subject_hash(subject),
                "when": when,
                "use": "training" if subject in trained else "validation",
                "clips_left_out": len(those),
                "first_step_left_out": min(those.values(), default=None),
            }
        )
    return sorted(found, key=lambda entry: str(entry["subject_sha256"]))


def _steps_left_out(folder: AnyPath) -> dict[str, dict[int, int]]:
    """Subject -> row -> step of the clips in the journals; steps that were done again are there twice."""
    found: dict[str, dict[int, int]] = {}
    for name, _ in list_files(folder):
        if name.startswith(f"{NAME}-") and name.endswith(".jsonl"):
            for line in (folder / name).read_text().splitlines():
                with contextlib.suppress(ValueError):  # a line that a killed worker cut off
                    entry = json.loads(line)
                    found.setdefault(subject_of(entry["clip"]), {})[entry["row"]] = entry["step"]
    return found

"""Who withdrew from a store: their clips of a plan are left out, and are no damage.

a start:   withdrawn.parquet -> subjects whose clips are not read
later:     a run is not there any more -> withdrawn.parquet again -> its subject withdrew, or the run is missing
"""

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from neurostorm.store.files import StorePath
from neurostorm.store.tables import read_withdrawn


class Withdrawals:
    """The subjects of a store who withdrew, as far as this process knows; picklable.

    Attributes:
        when: `dataset/subject` -> when they withdrew, ISO 8601. It only grows: whoever may be ingested again is left
            out until the process ends.
    """

    def __init__(self, path: StorePath, when: Mapping[str, str]) -> None:
        self._path, self._lock = path, threading.Lock()
        self.when = dict(when)

    @classmethod
    def read(cls, path: StorePath) -> "Withdrawals":
        """Those of the store's table now. StoreError when it cannot be read."""
        found = cls(path, {})
        found.look_again()
        return found

    def __reduce__(self) -> tuple[type["Withdrawals"], tuple[StorePath, dict[str, str]]]:
        return type(self), (self._path, self.when)

    def look_again(self) -> None:
        """Reads the table once more. StoreError when it cannot be read."""
        rows = read_withdrawn(self._path).to_pylist()
        self.when = self.when | {f"{row['dataset']}/{row['subject']}": row["when"] for row in rows}

    def left_out(self, runs: Sequence[str]) -> NDArray[np.bool_]:
        """(n) whether the subject of each run is known to have withdrawn."""
        when = self.when
        if not when:
            return np.zeros(len(runs), bool)
        return np.fromiter((subject_of(run) in when for run in runs), bool, len(runs))

    def explain(self, run: str) -> bool:
        """Whether a run is not there because its subject withdrew; reads the table unless that is known already."""
        with self._lock:  # of several threads that miss runs of one subject, the first one looks
            if subject_of(run) not in self.when:
                self.look_again()
        return subject_of(run) in self.when


def subject_of(run: str) -> str:
    """`dataset/subject` of a run's path, unique over datasets."""
    return "/".join(run.split("/")[1:3])

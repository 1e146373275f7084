"""How often each run of an ingest was begun: an actor of its own, in a module that imports nothing heavy.

The process that counts must not cost a core some seconds of imports while the first runs wait for it.
"""

from collections import Counter

import ray


@ray.remote(num_cpus=0)
class Attempts:
    """Counts the beginnings of each run, by the path of its file."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, path: str) -> int:
        """One more try of a run; the how manieth it is."""
        self._begun[path] += 1
        return self._begun[path]

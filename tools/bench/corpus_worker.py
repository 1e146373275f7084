"""What one training worker holds and asks of storage, for tools/bench/corpus.py: no frames but those of one batch.

    prepare   the run's manifest as a driver keeps it; the shards of the clips of a worker's first step, holes but for
              checksums
    measure   a process of its own: planned() -> first batch, requests counted; every run touched, memory counted

A request is what would be one to an object store: a file of the store or of the run's folder that is opened, asked for
its size, or listed. Memory is that of Python's and NumPy's allocations and of Arrow's buffers that are still held.
"""

import os
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 2**20


class Requests:
    """Counts requests below some folders while it is `counting`; Python can take no audit hook away again."""

    def __init__(self, *folders: Path) -> None:
        self.folders, self.found, self.counts = tuple(map(str, folders)), list[str](), False
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.counts and event in ("open", "os.listdir", "os.scandir"):
            self._note(arguments[0])

    def _note(self, path: Any) -> None:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folders):
            self.found.append(os.fspath(path))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what happens inside."""
        stat = os.stat

        def noted(path: Any, *arguments: Any, **named: Any) -> os.stat_result:
            self._note(path)
            return stat(path, *arguments, **named)

        os.stat, self.counts = noted, True  # which raises no audit event
        try:
            yield
        finally:
            os.stat, self.counts = stat, False


def prepare(store: Path, config: Any) -> dict[str, Any]:
    """Keeps the run's manifest and makes the shards of rank 0's first step; returns the step's plan `rows`."""
    import google_crc32c

    from neurostorm.store.shard import SHARD_FILE
    from neurostorm.train.records import pinned_manifest

    corpus = pinned_manifest.choose(config)
    config.run.folder.mkdir(parents=True, exist_ok=True)
    pinned_manifest.keep(config, corpus)
    rows = corpus.plan.step_rows(0, 0, config.scale.workers)
    for run in {corpus.runs[number] for number in rows["run"]}:
        layout = corpus.runs.layout(corpus.runs.find(run), corpus.store.voxel_count)
        crc = int(google_crc32c.value(bytes(layout.chunk_bytes))).to_bytes(4, "little")
        (store / run).mkdir(parents=True)
        with (store / run / SHARD_FILE).open("wb") as file:
            for number in range(layout.chunks):
                file.seek(layout.chunk_offset(number) + layout.chunk_bytes)
                file.write(crc)
            file.truncate(layout.shard_bytes)
    return {"rows": rows}


def measure(store: Path, config: Any, rows: Any) -> dict[str, Any]:
    """`worker_index_mib`, and `requests_before_first_clip` with the names of all `requests` up to the first batch.

    Of a batch's clips only one counts as the first.
    """
    import pyarrow as pa

    import neurostorm.train.worker  # noqa: F401  all that a worker has loaded
    from neurostorm.store import FrameStore
    from neurostorm.train.records import pinned_manifest

    FrameStore.open(store)  # what reading a mask loads is loaded
    requests = Requests(store, config.run.folder)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes()
    with requests.counting():
        corpus = pinned_manifest.planned(config)
        columns = corpus.reader.read(rows)
    if columns["bad"].any():
        raise RuntimeError("a clip of the first step could not be read")
    del columns
    corpus.plan.total_steps(config.train.epochs, None)
    for run in corpus.runs:
        corpus.store.frame_count(run)
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    clips = [name for name in requests.found if name.endswith("/0.0")]
    return {
        "worker_index_mib": held / MIB,
        "requests_before_first_clip": len(requests.found) - len(clips) + 1,
        "requests": [name.removeprefix(f"{store.parent}/") for name in requests.found],
    }

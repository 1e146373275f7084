"""The ranks of a run as processes, without Ray.

a server, started once:  loads torch, DeepSpeed, the programs --fork--> rank 0: main(0, workers, meeting, ...)
                                                              '-------> rank 1: main(1, workers, meeting, ...)

Loading takes longer than most of what they do. The ranks meet through the file MEETING, which is not there yet: a port
could be taken by others before rank 0 listens to it.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LIMIT_S = 600  # of a rank, on a machine that has other work
Main = Callable[..., None]
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([f"tests.train.{name}_program" for name in ("rank", "load", "gradient")])


class Ranks:
    """So many processes of `main`, given its rank, their number, the meeting's file and `words`."""

    def __init__(self, main: Main, workers: int, *words: Any) -> None:
        self._folder = TemporaryDirectory()
        folder = Path(self._folder.name)
        self._logs = [folder / f"rank-{rank}.log" for rank in range(workers)]
        self._processes = [
            _PROCESSES.Process(target=_run, args=(main, (rank, workers, folder / "meeting", *words), log, _settings()))
            for rank, log in enumerate(self._logs)
        ]
        for process in self._processes:
            process.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def ended(self) -> bool:
        """Whether one of them has."""
        return not all(process.is_alive() for process in self._processes)

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self._logs if log.exists())

    def finish(self) -> None:
        """Waits for a good end of all; AssertionError with their output when one fails, which ends the others."""
        end_s, running = time.monotonic() + LIMIT_S, list(self._processes)
        while running:
            wait([process.sentinel for process in running], max(0, end_s - time.monotonic()))
            late = time.monotonic() > end_s
            if late or any(process.exitcode for process in running):
                self.kill()
                raise AssertionError(f"{self.output()[-4000:]}\n{f'ended after {LIMIT_S} s' if late else ''}")
            running = [process for process in running if process.is_alive()]


def run_together(main: Main, workers: int, *words: Any) -> None:
    """Runs them to their good end."""
    with Ranks(main, workers, *words) as ranks:
        ranks.finish()


def _settings() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}


def _run(main: Main, words: tuple[Any, ...], log: Path, settings: dict[str, str]) -> None:
    os.environ.clear()
    os.environ |= settings
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    main(*words)

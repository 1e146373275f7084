"""Runs several ranks, as threads or as processes of a pretraining run, without Ray, and reads their ledgers."""

import itertools
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from neurostorm.config import Config

PROGRAM = Path(__file__).with_name("rank_program.py")
ROOT = PROGRAM.parents[2]
LIMIT_S = 600  # of a rank, on a machine that has other work


def run_together(program: Path, arguments: Sequence[Sequence[object]]) -> list[tuple[int, str]]:
    """(exit status, output) of a program's ranks, a line of arguments each; when one fails the others are ended.

    They meet through the file MEETING, put in for `None`: a port could be taken by others before rank 0 listens to it.
    """
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with TemporaryDirectory() as folder, ThreadPoolExecutor(len(arguments)) as pool:
        meeting = Path(folder, "meeting")
        processes = [
            subprocess.Popen(
                [sys.executable, str(program), *(str(meeting if word is None else word) for word in words)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
            )
            for words in arguments
        ]  # fmt: skip

        def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
            try:
                output = process.communicate(timeout=LIMIT_S)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                output = f"{process.communicate()[0]}\nended after {LIMIT_S} s"
            if process.returncode:
                for other in processes:
                    other.kill()
            return process.returncode, output

        return list(pool.map(finish, processes))


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """`ranks(2, work)` calls `work(rank, gather)` in a thread per rank; what each returned or raised.

    A rank that fails ends the wait of the others, by BrokenPipeError, as Ray Train ends their processes.
    """

    def run(workers: int, work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
        rounds: dict[int, dict[int, Any]] = defaultdict(dict)
        change, failed = threading.Condition(), []

        def attempt(rank: int) -> Any:
            numbers = itertools.count()

            def gather(value: Any) -> list[Any]:
                values = rounds[next(numbers)]
                with change:
                    values[rank] = value
                    change.notify_all()
                    change.wait_for(lambda: len(values) == workers or failed, timeout=20)
                if len(values) < workers:
                    raise BrokenPipeError("another rank failed")
                return [values[other] for other in range(workers)]

            try:
                return work(rank, gather)
            except Exception as error:
                with change:
                    failed.append(rank)
                    change.notify_all()
                return error

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(attempt, range(workers)))

    return run


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """Runs all ranks of one or more configurations to their end; if one fails its output is the assertion's message.

    `run([config, ...], [poisoned step, ...], last)`: see rank_program.py.
    """

    def run(configs: Sequence[Config], poisoned: Sequence[int], *last: int) -> None:
        for config in configs:
            config.run.folder.mkdir(parents=True, exist_ok=True)
            (config.run.folder / "config.yaml").write_text(config.to_yaml())
        workers = configs[0].scale.workers
        files = ":".join(str(config.run.folder / "config.yaml") for config in configs)
        steps = ":".join(map(str, poisoned))
        results = run_together(PROGRAM, [[files, rank, workers, None, steps, *last] for rank in range(workers)])
        outputs = "\n".join(output for _, output in results)
        assert [status for status, _ in results] == [0] * workers, outputs[-4000:]

    return run


@pytest.fixture(scope="session")
def read_ledger() -> Callable[[Config], dict[int, dict]]:
    """step -> {"loss", "rows" of all ranks in order}; a step that was repeated after a crash counts as it was last."""

    def read(config: Config) -> dict[int, dict]:
        ranks = []
        for rank in range(len(list((config.run.folder / "ledger").iterdir()))):
            lines = (config.run.folder / "ledger" / f"rank-{rank}.jsonl").read_text().splitlines()
            ranks.append({entry["step"]: entry for entry in map(json.loads, lines)})
        steps: dict[int, dict] = {}
        for step, first in ranks[0].items():
            entries = [last[step] for last in ranks[: first["workers"]]]
            assert len({str(entry["loss"]) for entry in entries}) == 1, "ranks disagree on the mean loss"
            steps[step] = {"loss": first["loss"], "rows": [row for entry in entries for row in entry["rows"]]}
        return steps

    return read

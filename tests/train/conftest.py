"""Runs several ranks, as threads or as processes of a pretraining run, without Ray, and reads their ledgers."""

import itertools
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from neurostorm.config import Config
from tests.train.rank_program import main
from tests.train.ranks import run_together


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
        run_together(main, configs[0].scale.workers, configs, poisoned, *last)

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

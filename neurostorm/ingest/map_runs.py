"""Runs over a Ray cluster: one task each, an outcome for every one, whatever happens to the processes.

    sources ─ waves ─> Ray Data, one block per run ─> _task: begin ─> work(source) ─> outcome, as it comes
                                                         └─ a counter on the driver's node: how often was it begun?

Ray starts a task again when its process or its node dies, without end as far as Ray Data goes. A run that kills its
process each time (memory, a defect below Python) is therefore counted where it begins, and answered after a few tries.
"""

import pickle
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from neurostorm.ingest.attempts import Attempts
from neurostorm.ingest.convert import RunOutcome
from neurostorm.ingest.layouts.discover import Source
from neurostorm.runtime.session import ensure_ray

# Runs handed to Ray Data at a time bound what the driver holds for a corpus of 66,000; between two waves cores idle
# until the last run of the first is done, so a wave is long for every core.
WAVE_RUNS, WAVE_RUNS_PER_CORE = 2000, 40
ATTEMPTS = 3  # of a run whose process dies


def map_runs(
    sources: Sequence[Source], work: Callable[[Source], RunOutcome], cpus_per_run: float
) -> Generator[RunOutcome, None, None]:
    """`work` on every source as Ray Data tasks, one each; outcomes as they come, in no order.

    A source whose task died on every try gets a "quarantined" outcome: exactly one outcome comes per source. When the
    iterator is closed early, no further task is begun.
    """
    if not sources:
        return
    ensure_ray()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    tries = Attempts.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # made by ray.remote
    wave_runs = max(WAVE_RUNS, round(WAVE_RUNS_PER_CORE * ray.cluster_resources().get("CPU", 0.0)))
    for first in range(0, len(sources), wave_runs):
        wave = sources[first : first + wave_runs]
        rows = [{"source": pickle.dumps(source)} for source in wave]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        dataset = dataset.map(partial(_task, work=work, tries=tries), num_cpus=cpus_per_run)
        dataset.context.max_errored_blocks = -1
        dataset.context.enable_progress_bars = False
        unanswered = {str(source.path): source for source in wave}
        for row in dataset.iter_rows():
            outcome: RunOutcome = pickle.loads(row["outcome"])
            del unanswered[outcome.source]
            yield outcome
        for source in unanswered.values():
            reason = "its task could not be run on the cluster; Ray's log says why"
            yield RunOutcome(str(source.path), source.run, "quarantined", reason)


def _task(row: dict[str, Any], work: Callable[[Source], RunOutcome], tries: Any) -> dict[str, Any]:
    """One run inside a Ray worker; sources and outcomes travel pickled, as Arrow wants one type for all entities."""
    source: Source = pickle.loads(row["source"])
    if ray.get(tries.begin.remote(str(source.path))) > ATTEMPTS:
        reason = f"its task died {ATTEMPTS} times; if memory ran out, a higher ingest.cpus_per_run helps"
        return {"outcome": pickle.dumps(RunOutcome(str(source.path), source.run, "quarantined", reason))}
    return {"outcome": pickle.dumps(work(source))}

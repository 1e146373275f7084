"""Every run of a store, or of a folder of NIfTI files, as vectors in Parquet.

    model + store | source --check--> embed.json --> runs without a part --Ray Data, actors--> parts --> tables

    OUT/clips.parquet runs.parquet subjects.parquet    embedding list<float32> per clip, and the means
    OUT/failed.parquet                                 what could not be read, if anything
    OUT/embed.json                                     what it was made with; another model or setting is refused
    OUT/parts/                                         one file per run, so that a second start goes on where it was

One run is one task and one part, so a task that dies costs its own run and no other.
"""

import logging
import pickle
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from neurostorm.config import Config, EmbedConfig
from neurostorm.downstream.embed.embed_run import Embedder, EmbedTask
from neurostorm.downstream.embed.inputs import Input, open_input, remember
from neurostorm.downstream.embed.parts import CLIPS, FAILED, RUNS, SUBJECTS, Assembled, RunToEmbed, assemble, unfinished
from neurostorm.io.paths import AnyPath
from neurostorm.runtime.capacity import Demand, room
from neurostorm.runtime.progress import progress
from neurostorm.runtime.resources import require
from neurostorm.runtime.run_folder import require_writable
from neurostorm.runtime.session import ensure_ray

logger = logging.getLogger(__name__)

WAVE_RUNS = 2000  # runs handed to Ray Data at a time: bounds what the driver holds for a corpus of 66,000
CRASH_RETRIES = 2  # of a run whose process died; Ray Data's own default is without end
LISTED_REASONS = 20


@dataclass(frozen=True)
class EmbedReport:
    """What an embedding job did: where, of how many runs, how many were there already, and what the tables hold."""

    out: AnyPath
    runs: int
    already_there: int
    seconds: float
    tables: Assembled

    def lines(self) -> list[str]:
        """The closing words: counts, where the tables are, each reason of what was left out."""
        tables = self.tables
        lines = [
            f"{self.runs - self.already_there} of {self.runs} run(s) worked on in {self.seconds:.0f} s"
            + (f"; {self.already_there} were there already" if self.already_there else ""),
            f"{self.out} holds {tables.clips} clip(s), {tables.runs} run(s), {tables.subjects} subject(s) as vectors "
            f"of {tables.width}: {CLIPS}, {RUNS}, {SUBJECTS}",
        ]
        if tables.failed:
            lines.append(f"failed ({FAILED}); repaired, they are embedded by starting again:")
            for row in tables.failed[:LISTED_REASONS]:
                where = "" if row["start_frame"] is None else f", clip from frame {row['start_frame']}"
                lines.append(f"  {row['source']}{where}: {row['reason']}")
            left = len(tables.failed) - LISTED_REASONS
            lines += [f"  ... and {left} more"] if left > 0 else []
        return lines


def embed(config: Config) -> EmbedReport:
    """Embed the runs of `embed.store` or `embed.source` with `embed.model`, and write the tables to `embed.out`.

    Raises:
        ConfigError: a setting is missing or contradicts another; the folder holds another embedding, or cannot be
            written; the cluster is too small for a worker.
        HubError: the model cannot be read, or does not say how its clips were made.
        DiscoverError: the source holds no run.
        StoreError: the store cannot be read, or its grid, mask or TR is not the model's.
        ObjectStoreError: an object store does not answer.
    """
    started = time.monotonic()
    settings, out = config.embed, config.embed.out
    require_writable(out, f"embed.out={settings.out}")
    _say(f"reading the model {settings.model} and the list of runs of {settings.store or settings.source}")
    given = open_input(settings)
    remember(out, given)
    waiting = unfinished(out, given.runs)
    _say(f"{len(given.runs)} run(s), {len(given.runs) - len(waiting)} embedded before, {len(waiting)} to embed")
    if waiting:
        _require(settings, config.scale.wait_for_nodes_s)
    with progress(len(waiting), "embed", "run") as bar:
        for failed in embed_runs(waiting, task_of(settings, given, out), settings):
            bar.update()
            bar.note(failed=failed)
    missing = f"its process died {CRASH_RETRIES + 1} time(s); if memory ran out, a lower embed.batch_clips helps"
    tables = assemble(out, given.runs, given.tr_s, missing)
    there = len(given.runs) - len(waiting)
    return EmbedReport(out, len(given.runs), there, time.monotonic() - started, tables)


def embed_runs(runs: Sequence[RunToEmbed], task: EmbedTask, settings: EmbedConfig) -> Iterator[int]:
    """Embed `runs` on a pool of actors, each of which holds the model; yields as they come how many failed so far.

    A run whose process dies on every try leaves no part.
    """
    if not runs:
        return
    ensure_ray()
    failed = 0
    for first in range(0, len(runs), WAVE_RUNS):
        wave = runs[first : first + WAVE_RUNS]
        rows = [{"run": pickle.dumps(run)} for run in wave]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        with warnings.catch_warnings():
            # Ray 2.60 wants named parameters, and has none for max_task_retries.
            warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
            dataset = dataset.map_batches(
                _Worker,
                fn_constructor_args=(task,),
                batch_size=1,
                # One at a time, or the runs that wait at a worker die with the one that kills it.
                compute=ray.data.ActorPoolStrategy(
                    size=min(settings.workers, len(wave)), max_tasks_in_flight_per_actor=1
                ),
                num_cpus=settings.cpus_per_worker,
                num_gpus=settings.gpus_per_worker or None,
                max_task_retries=CRASH_RETRIES,
            )
        dataset.context.max_errored_blocks = -1
        dataset.context.enable_progress_bars = False
        for row in dataset.iter_rows():
            failed += row["failed"]
            yield failed


def _say(line: str) -> None:
    print(line, flush=True)


class _Worker:
    """The embedder inside a Ray actor; runs travel pickled."""

    def __init__(self, task: EmbedTask) -> None:
        self._embedder = Embedder(task)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bool]]:
        results = [self._embedder.embed(pickle.loads(run)) for run in batch["run"]]
        return {"failed": [any(clip.reason for clip in clips) for clips in results]}


def task_of(settings: EmbedConfig, given: Input, out: AnyPath) -> EmbedTask:
    """What every worker is told."""
    return EmbedTask(
        model=given.model,
        out=out,
        store=given.store,
        normalise=given.normalise,
        clip_frames=given.clip_frames,
        stride_frames=given.stride_frames,
        batch_clips=settings.batch_clips,
        device="cuda" if settings.gpus_per_worker else "cpu",
        threads=settings.threads_per_worker,
    )


def _require(settings: EmbedConfig, wait_s: int | None) -> None:
    """One worker must fit the cluster, else ConfigError; where fewer fit than were asked for, they do all the work."""
    demand = Demand(
        settings.workers, settings.cpus_per_worker, settings.gpus_per_worker, least=1,
        options={name: f"--embed.{name}_per_worker" for name in ("cpus", "gpus")} | {"workers": "--workers"},
    )  # fmt: skip
    held = room(demand, require(demand, wait_s))
    if held < settings.workers:
        logger.warning("embed.workers=%d, but the cluster holds %d at once: the others wait", settings.workers, held)

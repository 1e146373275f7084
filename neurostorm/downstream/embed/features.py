"""Frozen features: computed once, over Ray Data, and kept by what they follow from.

    backbone, runs, starts of clips --> which parts are missing --embed.spread--> CACHE/tokens/<model>/parts/...
    the same, later ----------------> the parts --> float32 (N, P', C') in the order of the clips

A part is one run's clips; its name holds a hash of the run's content, the store's mask and the starts. So tasks,
methods, seeds and sweeps share what they have in common, and a probe never touches the backbone.
"""

import hashlib
import json
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from neurostorm.config import AdaptConfig, EmbedConfig
from neurostorm.downstream.cohort import Cohort
from neurostorm.downstream.embed.embed_run import EmbedTask
from neurostorm.downstream.embed.job import embed_runs
from neurostorm.downstream.embed.parts import ClipResult, RunToEmbed, read_parts, unfinished
from neurostorm.downstream.methods.backbone import Backbone
from neurostorm.downstream.tasks.examples import Examples
from neurostorm.io.paths import AnyPath
from neurostorm.runtime.progress import progress
from neurostorm.store import FrameStore, StoreError

NAMED = 3


def compute_tokens(
    backbone: Backbone,
    cohort: Cohort,
    examples: Examples,
    cache: AnyPath,
    settings: AdaptConfig,
    *,
    workers: int,
    strict: bool = True,
    title: str = "features",
) -> int:
    """Make the parts that are missing, on `workers` processes of the Ray cluster; how many runs that were.

    A progress bar over these runs has the `title`.

    StoreError naming clips that could not be read. Without `strict` it is raised only if every run has such clips;
    otherwise the trials that need these clips fail, and the others run.
    """
    folder, runs = tokens_folder(backbone, examples.clip_frames, cache), _runs(cohort.store, examples)
    waiting = unfinished(folder, runs)
    task = EmbedTask(
        model=backbone.place,
        out=folder,
        store=cohort.store.path,
        normalise=backbone.normalise,
        clip_frames=examples.clip_frames,
        stride_frames=examples.clip_frames,
        batch_clips=settings.batch_clips,
        device="cuda" if settings.gpus else "cpu",
        threads=settings.threads,
        places=True,
    )
    resources = EmbedConfig(
        workers=workers, cpus_per_worker=settings.cpus, gpus_per_worker=min(1.0, settings.gpus),
        threads_per_worker=settings.threads, batch_clips=settings.batch_clips,
    )  # fmt: skip
    failed = 0
    with progress(len(waiting), title, "run") as bar:
        for failed in embed_runs(waiting, task, resources):
            bar.update()
            bar.note(failed=failed)
    if failed and (strict or failed == len(runs)):
        raise _failed(zip(waiting, read_parts(folder, waiting), strict=True))
    return len(waiting)


def read_tokens(backbone: Backbone, store: FrameStore, examples: Examples, cache: AnyPath) -> NDArray[np.float32]:
    """What `compute_tokens` made of the clips: float32 (N, P', C'), tokens of the last stage averaged over frames.

    StoreError if a part is not there, or holds a clip that could not be read.
    """
    runs, folder = _runs(store, examples), tokens_folder(backbone, examples.clip_frames, cache)
    shape = backbone.encoder().config
    width = shape.width(shape.stages - 1)
    tokens: NDArray[np.float32] | None = None
    for run, (index, starts), part in zip(runs, examples.clips_of_run().items(), read_parts(folder, runs), strict=True):
        if part is not None and any(clip.embedding is None for clip in part):
            raise _failed([(run, part)])
        if part is None:
            raise StoreError(f"{folder} lacks the frozen features of {examples.runs[index].path}: compute them again")
        held = np.stack([clip.embedding for clip in part if clip.embedding is not None])
        held = held.reshape(len(held), -1, width)
        if tokens is None:
            tokens = np.empty((len(examples), *held.shape[1:]), np.float32)
        clips = np.flatnonzero(examples.run == index)
        tokens[clips] = held[np.searchsorted(starts, examples.start[clips])]
    assert tokens is not None
    return tokens


def tokens_folder(backbone: Backbone, clip_frames: int, cache: AnyPath) -> AnyPath:
    """Where the parts of one network lie, of clips of one length."""
    return cache / "tokens" / f"{backbone.key}-{backbone.normalise}-{clip_frames}"


def _runs(store: FrameStore, examples: Examples) -> list[RunToEmbed]:
    """The runs as the embedding takes them, each with its clips."""
    return [_run(store, examples, index, starts) for index, starts in examples.clips_of_run().items()]


def _run(store: FrameStore, examples: Examples, index: int, starts: NDArray[np.int64]) -> RunToEmbed:
    run = examples.runs[index]
    dataset, subject = run.subject.split("/")
    facts = [run.content, store.mask_sha256, store.tr_s, store.recipe, starts.tolist()]
    return RunToEmbed(
        run=run.path,
        dataset=dataset,
        subject=subject,
        session=run.session,
        task=run.task,
        place=str(store.path / run.path),
        content=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        frames=run.frames,
        starts=tuple(starts.tolist()),
    )


def _failed(parts: Iterable[tuple[RunToEmbed, list[ClipResult] | None]]) -> StoreError:
    """The error that names the clips of these runs that could not be read."""
    found = [
        clip.reason if run.run in clip.reason else f"{run.place}, clip from frame {clip.start_frame}: {clip.reason}"
        for run, part in parts
        for clip in part or []
        if clip.reason
    ]
    return StoreError(
        f"{len(found)} clip(s) could not be embedded: {'; '.join(found[:NAMED])}. Look at the store with "
        "tools/store.py verify, and ingest what is damaged anew"
    )

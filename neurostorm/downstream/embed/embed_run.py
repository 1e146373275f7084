"""One run to vectors, on a worker that holds the model.

    store: int8 clips --ClipUnpacker--> patches --.
    file:  NIfTI --read_clips--> volumes --------> patches --NeuroStorm.embed_patches--> float32 (clips, C') --> a part

Knows nothing of Ray: `embed.py` spreads it, a test calls it as it is. Memory holds one run's bytes (of a file) and
`batch_clips` clips of it as floats. What cannot be read is a reason in the part, never a stop.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from neurostorm.data.clips import ClipReader
from neurostorm.data.plan.clip_plan import ROW
from neurostorm.data.unpack import ClipUnpacker, unpacker_for
from neurostorm.downstream.embed.parts import ClipResult, RunToEmbed, write_part
from neurostorm.ingest.nifti import RunError
from neurostorm.ingest.resample.clip import read_clips
from neurostorm.io.local_copies import local_copy
from neurostorm.io.paths import AnyPath
from neurostorm.model.hub.pretrained import NeuroStorm
from neurostorm.store import FrameStore, StoreError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class EmbedTask:
    """What a worker needs to know; paths are absolute.

    Attributes:
        model: place of the model.
        out: place of the result.
        store: where runs without a source are read from.
        normalise: "voxel" or "global".
        clip_frames: of the model's clip; a shorter run is one shorter clip.
        stride_frames: between clip starts.
        batch_clips: clips per forward pass.
        device: "cpu" or "cuda".
        threads: of torch, on the CPU.
        places: keep the vector of each place of the last stage, P' one after the other, instead of their mean.
    """

    model: AnyPath
    out: AnyPath
    store: AnyPath | None
    normalise: str
    clip_frames: int
    stride_frames: int
    batch_clips: int
    device: str = "cpu"
    threads: int = 1
    places: bool = False


@dataclass(frozen=True)
class Batch:
    """Clips of one run: first frames, patches (B, P, K), and why a clip is without data (None: it is not)."""

    starts: list[int]
    patches: Tensor
    reasons: list[str | None]


class Embedder:
    """Holds the model and embeds run after run."""

    def __init__(self, task: EmbedTask) -> None:
        torch.set_num_threads(task.threads)
        self._task = task
        with local_copy(task.model) as folder:
            self._model = NeuroStorm.from_pretrained(folder).to(task.device)
        self._unpackers: dict[int, ClipUnpacker] = {}
        self._store = None if task.store is None else FrameStore.open(task.store)

    def embed(self, run: RunToEmbed) -> list[ClipResult]:
        """Embed a run and keep its part; what was made of it."""
        try:
            clips = [clip for batch in self._batches(run) for clip in self._results(batch)]
        except (RunError, StoreError) as error:
            clips = [ClipResult(None, None, str(error))]
        except Exception as error:  # the border between runs: a defect met by one must not cost the others
            logger.exception("unexpected error in %s", run.place)
            clips = [ClipResult(None, None, f"unexpected {type(error).__name__}: {error}")]
        write_part(self._task.out, run, clips)
        return clips

    def _batches(self, run: RunToEmbed) -> Iterator[Batch]:
        return self._of_store(run) if run.source is None else self._of_file(run)

    def _of_store(self, run: RunToEmbed) -> Iterator[Batch]:
        assert self._store is not None
        task, frames = self._task, min(self._task.clip_frames, run.frames)
        reader = ClipReader(self._store, (run.run,), frames, task.normalise)
        starts = run.starts or range(0, run.frames - frames + 1, task.stride_frames)
        for chosen in _batched(starts, task.batch_clips):
            rows = np.zeros(len(chosen), ROW)
            rows["start"] = chosen
            clips = reader.batch(rows)
            reasons = [
                self._why_unreadable(run, start, frames) if bad else None
                for start, bad in zip(chosen, clips.bad.tolist(), strict=True)
            ]
            yield Batch(chosen, self._unpacker(frames)(clips).values, reasons)

    def _of_file(self, run: RunToEmbed) -> Iterator[Batch]:
        assert run.source is not None
        task, recipe = self._task, self._model.clip_recipe()
        clips = read_clips(run.source, **recipe._asdict(), frames=task.clip_frames, stride=task.stride_frames)
        start = 0
        for chosen in _batched(clips, task.batch_clips):
            starts = [start + number * task.stride_frames for number in range(len(chosen))]
            start = starts[-1] + task.stride_frames
            volume = torch.stack(chosen).unsqueeze(1).to(task.device)  # (B, 1, X, Y, Z, L)
            yield Batch(starts, self._model.to_patches(volume), [None] * len(chosen))

    def _results(self, batch: Batch) -> list[ClipResult]:
        embed = self._model.embed_places if self._task.places else self._model.embed_patches
        vectors = embed(batch.patches).flatten(1).cpu().numpy()
        results = []
        for start, vector, reason in zip(batch.starts, vectors, batch.reasons, strict=True):
            if reason is None and not np.isfinite(vector).all():
                reason = "gives values that are not finite"
            results.append(ClipResult(start, None if reason else vector, reason))
        return results

    def _unpacker(self, frames: int) -> ClipUnpacker:
        if frames not in self._unpackers:
            assert self._store is not None
            geometry, patch = self._model.geometry(frames), self._model.config.patch_size
            self._unpackers[frames] = unpacker_for(self._store, geometry, patch, self._task.device)
        return self._unpackers[frames]

    def _why_unreadable(self, run: RunToEmbed, start: int, frames: int) -> str:
        """The reader only marks a clip as bad; reading it once more says why."""
        assert self._store is not None
        try:
            self._store.frames(run.run, start, frames)
            self._store.moments(run.run)
        except StoreError as error:
            return str(error)
        return "could not be read at first, but then it could: start again"


def _batched(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """Lists of `count` items, the last one of what is left; no more than one list is taken at a time."""
    iterator = iter(items)
    while batch := list(islice(iterator, count)):
        yield batch

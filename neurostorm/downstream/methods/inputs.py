"""What a network is given, clip by clip: frozen tokens, patches of the store, or connectivity; and in which order.

    epoch's draw of views --batches--> indices of clips --Inputs--> a tensor on the device

A view is some clips of one unit, which are pooled. Which an epoch takes is a pure function of (examples, seed, epoch):
as many of each unit, so that long runs do not outweigh short ones. Of identification they come in pairs: two views of
one subject, of two sessions where it has them.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurostorm.data.clips import ClipReader
from neurostorm.data.plan.clip_plan import ROW
from neurostorm.data.unpack import unpacker_for
from neurostorm.downstream.tasks.examples import Examples
from neurostorm.model.encoder import SwinEncoder
from neurostorm.store import FrameStore, StoreError

Index = NDArray[np.int64]


class Inputs(Protocol):
    """Gives clips, by their index in the examples that it was made for."""

    def batch(self, clips: Index) -> Tensor:
        """What the network takes of these clips, first axis B."""


class HeldInputs:
    """Rows of an array that is held in memory: tokens (N, P', C') of each clip, matrices (N, R, R) of each unit."""

    def __init__(self, rows: NDArray[np.float32], device: str) -> None:
        self._rows, self._device = torch.from_numpy(rows), device

    def batch(self, clips: Index) -> Tensor:
        return self._rows[torch.from_numpy(clips)].to(self._device)


class ClipInputs:
    """Patches (B, P, K) of clips, read from the store and unpacked on the device."""

    def __init__(
        self, store: FrameStore, examples: Examples, encoder: SwinEncoder, normalise: str, device: str
    ) -> None:
        paths = tuple(run.path for run in examples.runs)
        self._examples, self._store = examples, store
        self._reader = ClipReader(store, paths, examples.clip_frames, normalise)
        geometry = encoder.geometry(examples.clip_frames)
        self._unpack = unpacker_for(store, geometry, encoder.config.patch_size, device)

    def batch(self, clips: Index) -> Tensor:
        rows = np.zeros(len(clips), ROW)
        rows["run"], rows["start"] = self._examples.run[clips], self._examples.start[clips]
        batch = self._reader.batch(rows)
        if bool(batch.bad.any()):
            bad = rows[int(batch.bad.nonzero()[0])]
            raise StoreError(
                f"{self._store.path / self._examples.runs[bad['run']].path}, clip from frame {bad['start']}, cannot be "
                "read: look at the store with tools/store.py verify, and ingest the file anew"
            )
        return self._unpack(batch).values


def evenly(examples: Examples, most: int) -> Index:
    """Up to `most` clips of each unit, spread evenly over its clips; always the same ones."""
    chosen = []
    for clips in examples.clips_by_unit():
        places = np.linspace(0, len(clips) - 1, min(most, len(clips)))
        chosen.append(clips[np.round(places).astype(int)])
    return np.concatenate(chosen)


def draw(examples: Examples, most: int, *, seed: int, epoch: int) -> list[Index]:
    """An epoch's views in their order: one of each unit, up to `most` of its clips without repeats; units shuffled."""
    rng = np.random.default_rng([seed, epoch])
    drawn = [rng.permutation(clips)[:most] for clips in examples.clips_by_unit()]
    return [drawn[unit] for unit in rng.permutation(len(drawn))]


def draw_pairs(examples: Examples, most: int, *, seed: int, epoch: int) -> list[Index]:
    """As `draw`, for units that are runs: pairs (two views after each other), one of each subject.

    The two are of different sessions, of different runs where a subject has one session, or else share no clip.
    """
    rng = np.random.default_rng([seed, epoch])
    session = np.array([run.session for run in examples.runs])[examples.run]
    subject = np.array(examples.subjects)[examples.unit]
    views = []
    for name in rng.permutation(np.unique(subject)):
        clips = np.flatnonzero(subject == name)
        apart = session if len(np.unique(session[clips])) > 1 else examples.unit
        groups = [rng.permutation(clips[apart[clips] == found]) for found in np.unique(apart[clips])]
        if len(groups) > 1:
            views += [_of_one_unit(examples, groups[which], most) for which in rng.permutation(len(groups))[:2]]
        elif len(clips) > 1:
            views += [half[:most] for half in np.array_split(groups[0], 2)]
    return views


def batches(clips: Index, size: int) -> Iterator[Index]:
    """`clips` in batches of `size`."""
    for first in range(0, len(clips), size):
        yield clips[first : first + size]


def batches_of_views(views: Sequence[Index], size: int, *, pairs: bool = False) -> Iterator[list[Index]]:
    """Views, whole, in batches of up to `size` clips, or of one view that is longer.

    Pairs stay together, two at least, as their loss compares; a last pair that is left alone is left out.
    """
    together, least = (2, 4) if pairs else (1, 1)
    waiting: list[Index] = []
    for first in range(0, len(views), together):
        group = list(views[first : first + together])
        if len(waiting) >= least and sum(map(len, waiting)) + sum(map(len, group)) > size:
            yield waiting
            waiting = []
        waiting += group
    if len(waiting) >= least:
        yield waiting


def _of_one_unit(examples: Examples, clips: Index, most: int) -> Index:
    """Up to `most` of the clips, all of the unit of the first: a session may hold several runs."""
    return clips[examples.unit[clips] == examples.unit[clips[0]]][:most]

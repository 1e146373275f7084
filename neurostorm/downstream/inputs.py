"""What a network is given, clip by clip: frozen tokens, patches of the store, or connectivity; and in which order.

    epoch's draw of clips --batches--> indices --Inputs--> a tensor on the device

Which clips an epoch takes is a pure function of (examples, seed, epoch): some of each unit, so that long runs do not
outweigh short ones. Of identification a batch holds pairs: two clips of one subject, of two sessions where it has them.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurostorm.data.clips import ClipReader
from neurostorm.data.device import ClipUnpacker
from neurostorm.data.plan import ROW
from neurostorm.downstream.examples import Examples
from neurostorm.model.geometry import patch_table
from neurostorm.model.swin4d import SwinEncoder
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
        finest = encoder.geometry(examples.clip_frames).levels[0]
        table = patch_table(torch.from_numpy(store.mask), encoder.config.patch_size)
        self._unpack = ClipUnpacker(table, finest.space_of_token, finest.time_of_token, store.voxel_count).to(device)

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


def draw(examples: Examples, most: int, *, seed: int, epoch: int) -> Index:
    """An epoch's clips in their order: up to `most` of each unit, without repeats, shuffled together."""
    rng = np.random.default_rng([seed, epoch])
    drawn = [rng.permutation(clips)[:most] for clips in examples.clips_by_unit()]
    return rng.permutation(np.concatenate(drawn))


def draw_pairs(examples: Examples, most: int, *, seed: int, epoch: int) -> Index:
    """As `draw`, for units that are runs: pairs (two indices after each other) of one subject, `most` of each subject.

    The two are of different sessions, or of different clips where a subject has one session. Within a round every
    subject comes once, so that a batch holds few pairs of one subject.
    """
    rng = np.random.default_rng([seed, epoch])
    session = np.array([run.session for run in examples.runs])[examples.run]
    subject = np.array(examples.subjects)[examples.unit]
    groups = []
    for name in np.unique(subject):
        clips = np.flatnonzero(subject == name)
        groups.append([clips[session[clips] == found] for found in np.unique(session[clips])])
    pairs = []
    for _ in range(most):
        for number in rng.permutation(len(groups)):
            sessions = groups[number]
            if len(sessions) > 1:
                pairs += [rng.choice(sessions[which]) for which in rng.choice(len(sessions), 2, replace=False)]
            elif len(sessions[0]) > 1:
                pairs += list(rng.choice(sessions[0], 2, replace=False))
    return np.array(pairs, np.int64)


def batches(clips: Index, size: int, *, pairs: bool = False) -> Iterator[Index]:
    """`clips` in batches of `size`; pairs stay together, and a last batch too small for their loss is left out."""
    size = max(4, size - size % 2) if pairs else size
    for first in range(0, len(clips), size):
        part = clips[first : first + size]
        if not pairs or len(part) >= 4:
            yield part

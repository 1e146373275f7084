"""The clips of one dataset as an endless stream of passes, each of which holds every clip exactly once.

    segments -> units of neighbouring clips -> pass p: moved within their segment's slack, in random order
                    (max_clips_per_subject: pass p takes the next clips of each subject's cycle)
    stream:  pass 0 | pass 1 | pass 2 | ...      take(first, count) cuts any part out of it

A unit is what one contiguous read brings in. Where a segment is longer than its clips, the clips move from pass to
pass, so that every frame is used. All of it follows from (seed, dataset's name, pass): another dataset in the store
changes nothing here. Arrays hold an entry per unit, 1.4 million for 28.65 million frames, so there are no loops.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neurostorm.data.plan.split import Segments, clip_counts

Ints = NDArray[np.int32]


def random_bits(count: int, *parts: object) -> NDArray[np.uint64]:
    """`count` random uint64 that follow from `parts` alone.

    Straight from the Philox bit generator: NumPy promises its stream for all versions, but not what
    `Generator.permutation` makes of it, and a plan must be the same after an upgrade.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    bits: NDArray[np.uint64] = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return bits


def shuffled(count: int, *parts: object) -> NDArray[np.int64]:
    """A random order of `count` things that follows from `parts` alone."""
    return np.argsort(random_bits(count, *parts), kind="stable")  # stable: ties fall the same way on every machine


@dataclass(frozen=True)
class Units:
    """Units in order: `run` in the manifest, `start` frame of the first clip, number of `clips`; each int32 (U)."""

    run: Ints
    start: Ints
    clips: Ints

    def __len__(self) -> int:
        return len(self.run)

    def take(self, order: NDArray[np.int64]) -> "Units":
        """The units at the places `order`."""
        return Units(self.run[order], self.start[order], self.clips[order])

    def cut(self, first: int, count: int, stride_frames: int) -> "Units":
        """Clips [first, first + count) of the units one after another; the units at the ends may get shorter."""
        end = np.cumsum(self.clips, dtype=np.int64)
        if first == 0 and count == end[-1]:
            return self
        low, high = np.searchsorted(end, first, side="right"), np.searchsorted(end, first + count, side="left") + 1
        end, clips, start = end[low:high], self.clips[low:high].copy(), self.start[low:high].copy()
        begin = end - clips
        skipped = np.maximum(first - begin, 0)
        clips -= (skipped + np.maximum(end - (first + count), 0)).astype(np.int32)
        return Units(self.run[low:high], start + (skipped * stride_frames).astype(np.int32), clips)

    def rows(self, stride_frames: int) -> tuple[Ints, Ints]:
        """`run` and `start` of each clip, int32 (clips)."""
        offset = np.cumsum(self.clips, dtype=np.int32) - self.clips
        within = np.arange(self.clips.sum(), dtype=np.int32) - np.repeat(offset, self.clips)
        within *= stride_frames
        within += np.repeat(self.start, self.clips)
        return np.repeat(self.run, self.clips), within

    @classmethod
    def join(cls, parts: list["Units"]) -> "Units":
        """The units of all parts, one part after another."""
        run, start, clips = (np.concatenate([getattr(part, name) for part in parts]) for name in cls.__annotations__)
        return cls(run, start, clips)


@dataclass(frozen=True)
class Passes:
    """The stream of one dataset.

    name            of the dataset: with `seed` and the pass it decides the order
    segments        what clips are cut from
    subject         int32 (segments): whose they are
    clip_frames     frames of a clip; stride_frames between the starts of neighbouring clips of a pass
    clips_per_read  clips of a unit
    cap             clips of one subject in a pass, None: all
    """

    name: str
    seed: int
    segments: Segments
    subject: Ints
    clip_frames: int
    stride_frames: int
    clips_per_read: int = 1
    cap: int | None = None

    @cached_property
    def _counts(self) -> Ints:
        return clip_counts(self.segments.frames, self.clip_frames, self.stride_frames).astype(np.int32)

    @cached_property
    def _slack(self) -> NDArray[np.uint64]:
        """Frames of each segment that its clips leave over."""
        spread = np.maximum(self._counts - 1, 0) * self.stride_frames + self.clip_frames
        return np.maximum(self.segments.frames - spread, 0).astype(np.uint64)

    @cached_property
    def _clips_by_subject(self) -> NDArray[np.int64]:
        return np.bincount(self.subject, weights=self._counts).astype(np.int64)

    @cached_property
    def size(self) -> int:
        """Clips of one pass, the same for all passes."""
        clips = self._clips_by_subject
        return int((clips if self.cap is None else np.minimum(clips, self.cap)).sum())

    def take(self, first: int, count: int) -> Units:
        """Clips [first, first + count) of the stream, as units; `count` at least 1."""
        parts = []
        while count > 0:
            number, offset = divmod(first, self.size)
            length = min(count, self.size - offset)
            parts.append(self.draw(number).cut(offset, length, self.stride_frames))
            first, count = first + length, count - length
        return Units.join(parts)

    def draw(self, number: int) -> Units:
        """One whole pass in order."""
        segment, nth, clips = self._units if self.cap is None else self._units_of_turn(number, self.cap)
        slack = self._slack
        shift = random_bits(len(slack), self.seed, "shift", self.name, number) % (slack + np.uint64(1))
        begin = self.segments.first + shift.astype(np.int32)
        order = shuffled(len(segment), self.seed, "pass", self.name, number)
        segment = segment[order]
        start = begin[segment] + nth[order] * np.int32(self.stride_frames)
        return Units(self.segments.run[segment], start, clips[order])

    @cached_property
    def _units(self) -> tuple[Ints, Ints, Ints]:
        """Segment, place of the first clip in it and number of clips of every unit, in the segments' order."""
        units = -(-self._counts // self.clips_per_read)
        segment = np.repeat(np.arange(len(units), dtype=np.int32), units)
        before = (np.cumsum(units) - units).astype(np.int32)
        nth = (np.arange(len(segment), dtype=np.int32) - before[segment]) * np.int32(self.clips_per_read)
        clips = np.minimum(self._counts[segment] - nth, np.int32(self.clips_per_read))
        return segment, nth, clips

    @cached_property
    def _cycle(self) -> Ints:
        """int32 (units): place of each unit's first clip in its subject's cycle, which holds the units in random order.

        Random, so that the few clips of a subject in one pass come from all over its runs.
        """
        segment, _, clips = self._units
        owner = self.subject[segment]
        order = np.lexsort((random_bits(len(segment), self.seed, "cycle", self.name), owner))
        ahead = np.cumsum(clips[order]) - clips[order]
        subjects = np.cumsum(self._clips_by_subject) - self._clips_by_subject  # clips of the subjects before this one
        cycle = np.empty(len(segment), np.int32)
        cycle[order] = ahead - subjects[owner[order]]
        return cycle

    def _units_of_turn(self, number: int, cap: int) -> tuple[Ints, Ints, Ints]:
        """The units of pass `number`: of each subject's cycle of m clips, those from number * cap on, modulo m.

        So each clip is used once before any is used again. A unit that the turn begins or ends in is cut; when the
        turn goes beyond the cycle's end, the unit may appear in it at both of the turn's ends.
        """
        segment, nth, clips = self._units
        owner = self.subject[segment]
        cycle = np.maximum(self._clips_by_subject, 1)
        begin = number * cap % cycle
        begin[cycle <= cap] = 0
        end = begin + np.minimum(cap, cycle)
        beyond = np.maximum(end - cycle, 0)
        first, last = self._cycle, self._cycle + clips
        low = np.concatenate([np.maximum(first, begin[owner]), first])
        high = np.concatenate([np.minimum(last, end[owner]), np.minimum(last, beyond[owner])])
        part = np.flatnonzero(high > low)
        unit = part % len(segment)
        skipped = low[part] - first[unit]
        return segment[unit], (nth[unit] + skipped).astype(np.int32), (high[part] - low[part]).astype(np.int32)

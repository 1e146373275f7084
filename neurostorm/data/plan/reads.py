"""Which ranges to read for a list of clips: neighbours that touch, overlap or repeat become one. Pure.

clips (run, start)   a:0  a:20  a:20  b:7  a:60          L = 20
reads                |-- a: 0-39 --|  b: 7-26  a: 60-79
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Read:
    """One contiguous range of one run, and the clips that are cut from it.

    first, count   clips [first, first + count) of the list
    start, frames  the range, in stored frames
    in_order       the clips follow each other without gap or overlap, so the range is their bytes as they lie
    """

    first: int
    count: int
    start: int
    frames: int
    in_order: bool


def plan_reads(run: NDArray[np.integer], start: NDArray[np.integer], clip_frames: int) -> list[Read]:
    """The reads for clips of `clip_frames` frames from `start` of `run`, (N) each, in the order of the clips."""
    reads: list[Read] = []
    for index, (this_run, this_start) in enumerate(zip(run.tolist(), start.tolist(), strict=True)):
        last = reads[-1] if reads else None
        stop = last.start + last.frames if last else 0
        if last is None or this_run != run[last.first] or not last.start <= this_start <= stop:
            reads.append(Read(index, 1, this_start, clip_frames, True))
            continue
        frames = max(stop, this_start + clip_frames) - last.start
        reads[-1] = Read(last.first, last.count + 1, last.start, frames, last.in_order and this_start == stop)
    return reads

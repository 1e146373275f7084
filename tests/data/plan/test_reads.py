"""Reads for clips: every clip lies in exactly one of them, whole, and none reads what nobody asked for."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.data.plan.reads import Read, plan_reads


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=12), st.integers(1, 6))
def test_reads_cover_each_clip_once_and_nothing_else(clips, length):
    run = np.array([r for r, _ in clips], np.int32)
    start = np.array([s for _, s in clips], np.int32)
    reads = plan_reads(run, start, length)
    assert [i for read in reads for i in range(read.first, read.first + read.count)] == list(range(len(clips)))
    for read in reads:
        mine = range(read.first, read.first + read.count)
        assert len({int(run[i]) for i in mine}) == 1
        asked = {frame for i in mine for frame in range(start[i], start[i] + length)}
        assert asked == set(range(read.start, read.start + read.frames))
        lie_in_order = [int(start[i]) for i in mine] == [read.start + nth * length for nth in range(read.count)]
        assert read.in_order == lie_in_order


def test_neighbours_become_one_read():
    starts = [0, 20, 20, 7, 60]
    assert plan_reads(np.array([0, 0, 0, 1, 0]), np.array(starts), 20) == [
        Read(0, 3, 0, 40, False), Read(3, 1, 7, 20, True), Read(4, 1, 60, 20, True)
    ]  # fmt: skip

"""How held-out clips are shared out: each counts once, and all ranks make as many forward passes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.data.plan.clip_plan import ROW
from neurostorm.train.validation import shares


def numbered(count):
    rows = np.zeros(count, ROW)
    rows["row"] = np.arange(count)
    return rows


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 8))
def test_every_row_counts_on_exactly_one_rank_and_all_ranks_make_as_many_passes(count, workers, size):
    rows = numbered(count)
    parts = [shares(rows, rank=rank, workers=workers, size=size) for rank in range(workers)]
    counted = [row for part in parts for taken, counts in part for row in taken["row"][counts].tolist()]
    assert sorted(counted) == list(range(count))
    passes = math.ceil(math.ceil(count / workers) / size)
    assert {len(part) for part in parts} == {passes}, "as few as the largest share needs"
    for part in parts:
        assert all(len(taken) == len(counts) == size for taken, counts in part)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_first_clip_is_the_first_of_rank_0_whatever_the_number_of_workers(workers):
    taken, counts = shares(numbered(7), rank=0, workers=workers, size=2)[0]
    assert taken["row"][0] == 0 and counts[0], "it is the one on the picture"


def test_clips_that_fill_up_a_share_are_real_ones_that_do_not_count():
    ((taken, counts),) = shares(numbered(3), rank=1, workers=2, size=4)
    assert counts.tolist() == [True, False, False, False]
    assert set(taken["row"].tolist()) <= {0, 1, 2}

"""Shares of the datasets: whole clips, exact sums, natural at temperature 1 and equal at a high one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.data.plan.mixture import Sampling, epoch_counts

sizes = st.lists(st.integers(0, 1_200_000), min_size=1, max_size=8).map(lambda clips: np.array(clips, np.int64))


@settings(deadline=None, max_examples=100)
@given(sizes, st.floats(0.01, 100))
def test_with_equal_weights_an_epoch_is_one_pass_of_each_dataset(clips, weight):
    assert (epoch_counts(clips, np.full(len(clips), weight), 1.0) == clips).all()


@settings(deadline=None, max_examples=150)
@given(sizes, st.data(), st.floats(0.02, 1000))
def test_counts_add_up_to_the_passes_and_are_the_shares_to_the_next_clip(clips, data, temperature):
    weights = np.array(data.draw(st.lists(st.sampled_from([0, 0.3, 1, 7]), min_size=len(clips), max_size=len(clips))))
    counts = epoch_counts(clips, weights, temperature)
    used = (weights > 0) & (clips > 0)
    total = clips[used].sum()
    assert counts.sum() == total
    assert (counts[~used] == 0).all()
    if used.any():
        scaled = weights[used] * (clips[used] / clips[used].max()) ** (1 / temperature)
        assert np.abs(counts[used] - total * scaled / scaled.sum()).max() < 1 + 1e-6


def test_a_high_temperature_makes_datasets_count_by_their_weight_alone():
    clips, weights = np.array([1000, 100, 10]), np.array([1.0, 2.0, 1.0])
    assert epoch_counts(clips, weights, 1e6).tolist() == [278, 555, 277]
    # Square roots: 31.6, 2 x 10 and 3.2 parts of 1,110 clips.
    assert epoch_counts(clips, weights, 2.0).tolist() == [641, 405, 64]
    assert epoch_counts(clips, np.ones(3), 0.05).tolist() == [1110, 0, 0]


def test_the_largest_remainders_get_the_clips_that_are_left():
    # 1.67, 1.67 and 6.67: of equal ones the first
    assert epoch_counts(np.array([3, 3, 4]), np.array([1.0, 1.0, 3.0]), 1.0).tolist() == [2, 2, 6]
    # 3.33 and 6.67
    assert epoch_counts(np.array([5, 5]), np.array([1.0, 2.0]), 1.0).tolist() == [3, 7]


def test_a_weight_for_no_dataset_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"data\.weights: there is no dataset 'hpc'; did you mean hcp\?.*hcp, ukb"):
        Sampling({"hpc": 2.0}).weight_of(["ukb", "hcp"])
    assert Sampling({"hcp": 2.0}).weight_of(["ukb", "hcp"]).tolist() == [1, 2]


def test_leaving_every_dataset_out_is_refused():
    with pytest.raises(ValueError, match="leaves every dataset out"):
        Sampling({"hcp": 0.0, "ukb": 0.0}).weight_of(["ukb", "hcp"])

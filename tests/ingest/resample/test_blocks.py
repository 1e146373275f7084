"""One block from values to bytes: moments and z-scores against float64, also at the ends of float32's range."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.ingest.resample.blocks import finite_series, pack, standard_scores
from neurostorm.store import INT8_16


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 300), st.floats(-30, 36), st.floats(-30, 36), st.integers(0, 2**32 - 1))
def test_moments_and_bytes_equal_those_of_float64(frames: int, level: float, spread: float, seed: int) -> None:
    """Whatever the units: squares that leave float32 in either direction, sums that leave it, a mean far from 0."""
    rng = np.random.default_rng(seed)
    block = (rng.choice([-1, 1]) * 10.0**level + 10.0**spread * rng.normal(size=(frames, 7))).astype(np.float32)
    signal = block.astype(np.float64)
    mean, std, z = standard_scores(block.copy())
    expected = signal.std(axis=0)
    constant = expected <= 1e-6 * np.abs(signal.mean(axis=0))
    np.testing.assert_array_equal(std == 0, constant)
    np.testing.assert_allclose(std[~constant], expected[~constant], rtol=1e-6)
    np.testing.assert_allclose(mean[~constant], signal.mean(axis=0)[~constant], rtol=1e-9, atol=1e-9 * 10.0**spread)
    assert not z[:, constant].any()
    stored = pack(block, None, 1)
    scores = (signal - signal.mean(axis=0))[:, ~constant] / expected[~constant]
    rounded = INT8_16.decode(stored.frames)[:, ~constant] - np.clip(scores, -127 / 16, 127 / 16)
    step = np.spacing(np.abs(block).max(initial=0)) / std[~constant] if (~constant).any() else 0  # of float32 itself
    assert (np.abs(rounded) <= 1 / 32 + 1e-4 + step).all()


def test_a_frame_far_off_does_not_spoil_the_std() -> None:
    """Deviations are taken from the mean, not from a frame that may lie far off."""
    block = np.random.default_rng(0).normal(1e4, 10, (1000, 50)).astype(np.float32)
    block[0] = 1e6
    np.testing.assert_allclose(standard_scores(block)[1], block.std(axis=0, dtype=np.float64), rtol=1e-6)


def test_finite_is_told_from_sums_that_overflow() -> None:
    block = np.full((40, 5), 3e38, np.float32)
    block[3, 1], block[0, 2], block[:2, 4] = np.nan, np.inf, (np.inf, -np.inf)
    np.testing.assert_array_equal(finite_series(block), [True, False, False, True, False])


def test_clipped_values_and_the_figure_of_some_voxels() -> None:
    block = np.random.default_rng(0).normal(0, 1, (400, 12)).astype(np.float32)
    block[7, 3], block[9, 5], block[:, 8] = 60, -60, 4
    packed = pack(block, None, 4)
    assert packed.clipped == 2
    assert (packed.frames[7, 3], packed.frames[9, 5]) == (127, -127)
    assert len(packed.decibels) == 3  # of eleven voxels that have signal

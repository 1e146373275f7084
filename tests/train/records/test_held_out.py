"""The closing words of pretraining name the baseline, say what a bad figure means, and what to type."""

import math

import pytest

from neurostorm.train.records.log_lines import held_out


def test_a_loss_below_the_baseline_says_by_how_much():
    assert held_out(0.75, 1.0, normalise_targets=False) == [
        "Held-out masked loss 0.7500: 25.0 % below the 1.0000 of predicting each voxel's mean over its run."
    ]


def test_normalised_targets_are_compared_with_each_patchs_mean():
    (line,) = held_out(0.9, 1.0, normalise_targets=True)
    assert line.endswith("10.0 % below the 1.0000 of predicting each patch's own mean (model.normalize_targets).")


@pytest.mark.parametrize("loss", [1.0, 1.02])
def test_a_loss_that_is_not_below_says_what_it_means_and_what_to_type(loss):
    first, meaning, fix = held_out(loss, 1.0, normalise_targets=False)
    assert "not below the 1.0000" in first and "NOT" not in first
    assert "cannot fill in what is hidden yet" in meaning
    assert all(option in fix for option in ("--train.epochs", "--train.lr", "--name"))


def test_a_loss_that_is_no_number_is_a_run_that_diverged():
    first, fix = held_out(math.nan, 1.0, normalise_targets=False)
    assert "diverged" in first and "--train.lr" in fix


def test_without_a_baseline_nothing_is_compared():
    (line,) = held_out(0.0, 0.0, normalise_targets=False)
    assert "nothing to compare" in line


def test_a_run_without_held_out_subjects_says_so():
    (line,) = held_out(None, None, normalise_targets=False)
    assert line.startswith("Everybody who was held out withdrew") and "--name" in line

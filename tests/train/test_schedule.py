"""Learning rate, seeds and masks follow from the step and the clip alone, so that a resumed run repeats them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.masking.masks import MaskConfig
from neurostorm.train.schedule import DROPOUT, MASK, VALIDATION, clip_generator, draw_masks, learning_rate, seed_for


def rates(total, **settings):
    return [learning_rate(step, total, **settings) for step in range(total + 1)]


def test_the_rate_rises_in_equal_steps_to_the_peak_and_falls_as_half_a_cosine():
    rate = rates(100, peak=2.0, warmup_fraction=0.2, min_fraction=0.1)
    assert rate[:20] == pytest.approx([2.0 * (step + 1) / 20 for step in range(20)])
    assert rate[20] == pytest.approx(2.0)
    assert rate[60] == pytest.approx((2.0 + 0.2) / 2), "half way down: between peak and end"
    assert rate[40] == pytest.approx(0.2 + 1.8 * (1 + 2**-0.5) / 2)
    assert rate[100] == pytest.approx(0.2)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.floats(0, 0.99), st.floats(0, 1), st.floats(1e-6, 1))
def test_the_rate_never_falls_in_the_warm_up_never_rises_after_it_and_stays_between_end_and_peak(
    total, warmup_fraction, min_fraction, peak
):
    rate = rates(total, peak=peak, warmup_fraction=warmup_fraction, min_fraction=min_fraction)
    warmup = round(warmup_fraction * total)
    slack = 1e-9 * peak
    assert all(b > a for a, b in itertools.pairwise(rate[:warmup]))
    assert all(b <= a + slack for a, b in itertools.pairwise(rate[warmup:]))
    assert all(0 < value <= peak + slack for value in rate[:-1]), "every step learns"
    assert rate[min(warmup, total - 1)] == pytest.approx(peak)
    if warmup < total:
        assert rate[total] == pytest.approx(min_fraction * peak)


def test_without_warm_up_the_first_step_has_the_peak_and_a_minimum_of_one_never_falls():
    assert learning_rate(0, 50, peak=0.3, warmup_fraction=0.0, min_fraction=0.0) == 0.3
    assert set(rates(50, peak=0.3, warmup_fraction=0.0, min_fraction=1.0)) == {0.3}


def test_seeds_of_near_inputs_are_distinct_and_fit_torch():
    places = list(itertools.product((0, 1, 2), (MASK, DROPOUT, VALIDATION), range(300)))
    seeds = [seed_for(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [seed_for(*place) for place in places]
    assert seed_for(1, 2) != seed_for(2, 1)
    bits = [bin(seed_for(0, MASK, row) ^ seed_for(0, MASK, row + 1)).count("1") for row in range(100)]
    assert 28 < sum(bits) / len(bits) < 35, "neighbours differ in half of the 63 bits"


@pytest.fixture(scope="module")
def models():
    """kind -> autoencoder on 4 x 4 x 4 patches x 4 frames, three of four blocks hidden."""
    swin = SwinConfig(img_size=(24, 24, 24, 4), embed_dim=4, depths=(1, 1), heads=(1, 1), window=(2, 2, 2, 4))
    kinds = {"random": None, "window": (2, 2, 2, 2), "tube": None}
    return {
        kind: MaskedAutoencoder(swin, mask=MaskConfig(kind, 0.75, window), loss_on="all")
        for kind, window in kinds.items()
    }


@pytest.mark.parametrize("kind", ["random", "window", "tube"])
def test_a_clips_mask_is_the_same_alone_and_in_any_batch(kind, models, ball_config):
    config, model = ball_config(), models[kind]
    rows = torch.tensor([7, 0, 123456789012, 3])
    together = draw_masks(model, rows, config, MASK)
    torch.manual_seed(99)  # whatever else draws
    for place, row in enumerate(rows):
        assert torch.equal(draw_masks(model, row[None], config, MASK)[0], together[place])
    assert torch.equal(draw_masks(model, rows.flip(0), config, MASK), together.flip(0))


@pytest.mark.parametrize("kind", ["random", "window", "tube"])
def test_every_mask_hides_exactly_its_share(kind, models, ball_config):
    masks = draw_masks(models[kind], torch.arange(20), ball_config(), MASK)
    assert masks.shape == (20, 4 * 4 * 4 * 4)
    assert masks.sum(dim=1).tolist() == [192] * 20


def test_masks_differ_by_clip_seed_and_purpose_and_hide_every_token_in_time(models, ball_config):
    model, rows = models["random"], torch.arange(40)
    masks = draw_masks(model, rows, ball_config(), MASK)
    assert len({tuple(mask.tolist()) for mask in masks}) == 40
    assert (masks != draw_masks(model, rows, ball_config(), VALIDATION)).any(dim=1).all()
    assert (masks != draw_masks(model, rows, ball_config(run={"seed": 1}), MASK)).any(dim=1).all()
    assert masks.any(dim=0).all() and not masks.all(dim=0).any()


def test_drawing_masks_leaves_the_global_generator_alone(models, ball_config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw_masks(models["random"], torch.arange(4), ball_config(), MASK)
    assert torch.equal(torch.rand(3), expected)
    assert clip_generator(0, MASK, 1).initial_seed() != clip_generator(0, MASK, 2).initial_seed()

"""Views of clips against SciPy, one clip at a time, and what they must leave alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial.transform import Rotation

from neurostorm.data.augment import Augment, AugmentConfig, Draws, add_noise, radius_of, resample, rotations, smooth

SIZE = (9, 12, 7)
OFF = {"rotate_rad": 0.0, "scale": 0.0, "noise_probability": 0.0, "smooth_probability": 0.0}
AFFINE = OFF | {"rotate_rad": 0.175, "scale": 0.1}
NOISE = OFF | {"noise_probability": 1.0}
SMOOTH = OFF | {"smooth_probability": 1.0, "smooth_sigma": (0.2, 0.9)}
ALWAYS = AFFINE | {"noise_probability": 1.0, "smooth_probability": 1.0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clips(batch=3, channels=1, frames=4, size=SIZE):
    return torch.randn(batch, channels, *size, frames, generator=seeded(5))


def view(volume, settings, seed=0, brain=None):
    return Augment(AugmentConfig(**settings), brain)(volume, seeded(seed))


def changed(before, after):
    """bool (B,): the clips that differ."""
    return (before != after).flatten(1).any(1)


@pytest.mark.parametrize(
    "off",
    [
        OFF,
        OFF | {"noise_probability": 1.0, "noise_std": 0.0},
        OFF | {"smooth_probability": 1.0, "smooth_sigma": (0.0, 0.0)},
    ],
)
def test_with_everything_off_a_view_is_an_exact_copy(off):
    volume = clips()
    same = view(volume, off)
    assert torch.equal(same, volume)
    assert same.data_ptr() != volume.data_ptr()


@pytest.mark.parametrize("settings", [AFFINE, NOISE, SMOOTH, ALWAYS])
def test_the_input_is_left_alone_and_the_view_differs(settings):
    volume = clips()
    before = volume.clone()
    assert changed(view(volume, settings), before).all()
    assert torch.equal(volume, before)


def test_a_view_follows_from_the_generators_state():
    volume, augment = clips(), Augment(AugmentConfig(**ALWAYS))
    assert torch.equal(augment(volume, seeded(1)), augment(volume, seeded(1)))
    assert not torch.equal(augment(volume, seeded(1)), augment(volume, seeded(2)))
    generator = seeded(1)
    assert not torch.equal(augment(volume, generator), augment(volume, generator)), "the second view is another one"


def test_rotations_turn_about_x_then_y_then_z():
    angles = torch.tensor([[0.1, -0.17, 0.15], [1.2, 0.4, -2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    expected = Rotation.from_euler("XYZ", angles.numpy()).as_matrix()
    np.testing.assert_allclose(rotations(angles).numpy(), expected, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.tuples(*[st.floats(-0.5, 0.5)] * 3), st.tuples(*[st.floats(0.8, 1.2)] * 3))
def test_resampling_equals_scipys_on_every_frame(angles, scales):
    matrix = rotations(torch.tensor([angles])) * torch.tensor([[scales]])
    volume = clips(batch=1, channels=2, frames=2)
    found = resample(volume, matrix).numpy()
    centre, linear = (np.array(SIZE) - 1) / 2, matrix[0].double().numpy()
    for channel in range(2):
        for frame in range(2):
            twin = affine_transform(
                volume[0, channel, ..., frame].double().numpy(),
                linear,
                centre - linear @ centre,
                order=1,
                mode="nearest",
            )
            np.testing.assert_allclose(found[0, channel, ..., frame], twin, atol=1e-4)


def test_all_frames_of_a_clip_share_one_geometry_and_clips_do_not():
    still = clips(frames=1).expand(-1, -1, -1, -1, -1, 5)[:1].repeat(3, 1, 1, 1, 1, 1)
    moved = view(still, AFFINE)
    assert torch.equal(moved, moved[..., :1].expand_as(moved))
    assert not torch.allclose(moved[0], moved[1], atol=1e-2)
    assert not torch.allclose(moved[1], moved[2], atol=1e-2)


def test_angles_and_scales_stay_in_their_ranges_and_fill_them():
    drawn = Augment(AugmentConfig(**AFFINE)).draw(torch.zeros(4000, 1, 1, 1, 1, 1), seeded())
    matrix = drawn.affine.double()
    scales = matrix.square().sum(1).sqrt()
    angles = Rotation.from_matrix((matrix / scales[:, None]).numpy()).as_euler("XYZ")
    for values, middle, reach in ((scales.numpy(), 1.0, 0.1), (angles, 0.0, 0.175)):
        furthest = np.abs(values - middle).max(axis=0)
        assert (furthest <= reach + 1e-5).all() and (furthest > 0.99 * reach).all()
        np.testing.assert_allclose(values.mean(axis=0), middle, atol=0.1 * reach)
    assert abs(np.corrcoef(scales.numpy().T)[0, 1]) < 0.1, "each axis has its own scale"
    assert drawn.noise is None and drawn.noise_std is None and drawn.sigma_voxels is None


def test_noise_is_fresh_in_every_frame_and_has_the_std_asked_for():
    volume = torch.zeros(2, 1, 20, 20, 20, 6)
    noise = view(volume, NOISE | {"noise_std": 0.3})
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert noise.mean().abs().item() < 0.01
    between = torch.corrcoef(torch.cat([clip[0].flatten(0, 2).T for clip in noise]))
    assert between.fill_diagonal_(0).abs().max() < 0.06, "frames and clips share no noise"


def test_noise_stays_inside_the_brain():
    brain = torch.rand(SIZE, generator=seeded(3)) < 0.4
    volume = clips()
    difference = view(volume, NOISE, brain=brain) - volume
    assert (difference[:, :, brain] != 0).float().mean() > 0.99
    assert (difference[:, :, ~brain] == 0).all()


@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_the_probability_is_of_whole_clips(kind):
    only = OFF | {f"{kind}_probability": 0.3, "smooth_sigma": (0.5, 0.5)}
    volume = torch.randn(2000, 1, 3, 3, 3, 2, generator=seeded(1))
    after = view(volume, only)
    touched = changed(volume, after)
    assert touched.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert (volume != after)[touched].float().mean() > 0.99


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0.05, 1.6), min_size=1, max_size=3), st.integers(1, 6))
def test_smoothing_equals_scipys_with_the_same_radius(widths, radius):
    volume = clips(batch=len(widths), channels=2, frames=2).double()
    found = smooth(volume, torch.tensor(widths, dtype=torch.float64), radius).numpy()
    for clip, width in enumerate(widths):
        twin = gaussian_filter(volume[clip].numpy(), width, mode="nearest", radius=radius, axes=(1, 2, 3))
        np.testing.assert_allclose(found[clip], twin, atol=1e-10)


@pytest.mark.parametrize(("sigma", "radius"), [(0.5, 2), (1.0, 4), (0.0, 0), (0.3, 1)])
def test_a_gaussian_reaches_four_standard_deviations(sigma, radius):
    assert radius_of(sigma) == radius


def test_the_drawn_width_is_the_one_that_is_used():
    volume, augment = clips(), Augment(AugmentConfig(**SMOOTH))
    widths = augment.draw(volume, seeded(4)).sigma_voxels
    assert ((widths >= 0.2) & (widths <= 0.9)).all() and len(widths.unique()) == 3
    for clip, found in enumerate(augment(volume, seeded(4))):
        twin = gaussian_filter(volume[clip].numpy(), widths[clip].item(), mode="nearest", radius=4, axes=(1, 2, 3))
        np.testing.assert_allclose(found, twin, atol=1e-5)


def test_a_clip_of_no_width_is_left_exactly_as_it_is():
    volume = clips(batch=2)
    after = smooth(volume, torch.tensor([0.0, 0.5]), 2)
    assert torch.equal(after[0], volume[0]) and changed(after, volume).tolist() == [False, True]


def test_a_batch_is_its_clips_one_by_one_under_their_own_draws():
    brain = torch.rand(SIZE, generator=seeded(3)) < 0.4
    volume, augment = clips(batch=5, channels=2), Augment(AugmentConfig(smooth_probability=0.5), brain)
    draws = augment.draw(volume, seeded(8))
    together = augment.apply_draws(volume, draws)
    assert 0 < (draws.noise_std > 0).sum() < 5 and 0 < (draws.sigma_voxels > 0).sum() < 5, "some are, some are not"
    assert torch.equal(together, augment(volume, seeded(8)))
    for clip in range(5):
        own = Draws(*(values[clip : clip + 1] for values in draws))
        torch.testing.assert_close(augment.apply_draws(volume[clip : clip + 1], own)[0], together[clip])


def test_the_steps_come_in_their_order():
    volume, augment = clips(), Augment(AugmentConfig(**ALWAYS))
    draws = augment.draw(volume, seeded())
    moved = resample(volume, draws.affine)
    noisy = add_noise(moved, draws.noise, draws.noise_std)
    torch.testing.assert_close(augment.apply_draws(volume, draws), smooth(noisy, draws.sigma_voxels, 2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rotate_rad", -0.1),
        ("scale", 1.0),
        ("noise_probability", 1.1),
        ("smooth_probability", -0.1),
        ("noise_std", -1.0),
        ("smooth_sigma", (0.5, 0.1)),
        ("smooth_sigma", (-0.1, 0.1)),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} = "):
        Augment(AugmentConfig(**{field: value}))


def test_what_is_no_batch_of_clips_is_refused():
    augment = Augment(AugmentConfig(), torch.ones(SIZE, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(9, 12, 7, 4\).*\(B, C, X, Y, Z, T\)"):
        augment(clips()[0, 0], seeded())
    for dtype in (torch.int8, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"{dtype}.*in float32"):
            augment(clips().to(dtype), seeded())
    with pytest.raises(ValueError, match=r"brain mask has \(9, 12, 7\)"):
        augment(clips(size=(9, 12, 8)), seeded())


def test_the_mask_is_no_part_of_a_checkpoint():
    assert not Augment(AugmentConfig(), torch.ones(SIZE, dtype=torch.bool)).state_dict()

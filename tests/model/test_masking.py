import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.model.geometry import dense_geometry
from neurostorm.model.masking import MaskConfig, draw_mask, mask_blocks

CPU = torch.device("cpu")
GRID = (4, 6, 5, 7)
LEVEL = dense_geometry(GRID, ((2, 2, 2, 4),), CPU).levels[0]
WINDOW = (2, 3, 2, 4)


def draw(kind, ratio, batch=3, seed=0):
    blocks = mask_blocks(LEVEL, MaskConfig(kind, ratio), WINDOW)
    mask = draw_mask(blocks, ratio, batch, torch.Generator().manual_seed(seed), CPU)
    return LEVEL.to_grid(mask[..., None].float())[:, 0].bool()  # (B, d, h, w, T)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.01, 0.99), st.integers(0, 5))
def test_random_hides_exactly_the_share_of_tokens(ratio, seed):
    assert draw("random", ratio, seed=seed).flatten(1).sum(1).tolist() == [int(840 * ratio)] * 3


@settings(deadline=None, max_examples=40)
@given(st.floats(0.01, 0.99), st.integers(0, 5))
def test_tube_hides_exactly_the_share_of_patches_in_all_frames(ratio, seed):
    mask = draw("tube", ratio, seed=seed)
    assert torch.equal(mask.any(-1), mask.all(-1))
    assert mask.any(-1).flatten(1).sum(1).tolist() == [int(120 * ratio)] * 3


@settings(deadline=None, max_examples=40)
@given(st.floats(0.01, 0.99), st.integers(0, 5))
def test_window_hides_exactly_the_share_of_windows_whole(ratio, seed):
    mask = draw("window", ratio, seed=seed)
    starts = [range(0, size, step) for size, step in zip(GRID, WINDOW, strict=True)]
    hidden = torch.zeros(3, dtype=torch.long)
    for d in starts[0]:
        for h in starts[1]:
            for w in starts[2]:
                for t in starts[3]:
                    window = mask[:, d : d + 2, h : h + 3, w : w + 2, t : t + 4].flatten(1)
                    assert torch.equal(window.any(1), window.all(1))
                    hidden += window.any(1)
    assert hidden.tolist() == [int(2 * 2 * 3 * 2 * ratio)] * 3  # ragged windows at the high end count as windows


def test_every_block_is_hidden_about_as_often():
    mask = draw("tube", 0.25, batch=4000)
    share = mask[..., 0].flatten(1).float().mean(0)
    assert share.min() > 0.2 and share.max() < 0.3


def test_the_generator_alone_decides():
    assert torch.equal(draw("random", 0.5, seed=4), draw("random", 0.5, seed=4))
    assert not torch.equal(draw("random", 0.5, seed=4), draw("random", 0.5, seed=5))
    samples = draw("random", 0.5)
    assert not torch.equal(samples[0], samples[1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MaskConfig("columns"), "mask.kind = 'columns': one of random, window, tube"),
        (MaskConfig(ratio=1.0), "mask.ratio = 1.0"),
        (MaskConfig(ratio=0.0), "mask.ratio = 0.0"),
        (MaskConfig(window=(2, 2, 2)), "mask.window"),
        (MaskConfig(window=(2, 2, 2, 0)), "mask.window"),
    ],
)
def test_impossible_values_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        config.validate()

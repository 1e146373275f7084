import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.model.geometry.tokens import geometry_of, subset_geometry
from neurostorm.model.masking.masks import KINDS, MaskConfig, draw_mask, mask_blocks, mask_from_released

CPU = torch.device("cpu")
GRID = (4, 6, 5, 7)
WINDOW = (2, 3, 2, 4)
BRAIN = np.random.default_rng(0).random(4 * 6 * 5) < 0.4
ATLAS = np.random.default_rng(1).choice([0, 3, 4, 900], size=GRID[:3], p=[0.4, 0.3, 0.2, 0.1])

ratios = st.floats(0.001, 0.999)
seeds = st.integers(0, 5)
fast = settings(deadline=None, max_examples=25)


def level_of(grid=GRID, patches=None):
    return geometry_of(grid, ((2, 2, 2, 4),), CPU, patches=patches).levels[0]


def draw(kind, ratio, batch=3, seed=0, level=None, window=WINDOW, atlas=ATLAS, **keywords):
    """Hidden cells (B, d, h, w, T); cells without a token are False."""
    level = level or level_of()
    blocks = mask_blocks(level, MaskConfig(kind, ratio, **keywords), window, atlas)
    mask = draw_mask(blocks, ratio, batch, torch.Generator().manual_seed(seed), CPU)
    assert mask.sum(1).tolist() == [blocks.budget(ratio)] * batch
    return level.to_grid(mask[..., None].float())[:, 0].bool()


def patches_hidden(mask):
    """(B,) patches hidden, of masks that hide all frames or none."""
    assert torch.equal(mask.any(-1), mask.all(-1))
    return mask.any(-1).flatten(1).sum(1).tolist()


def share(count, ratio):
    return min(max(int(count * ratio), 1), count - 1)


@fast
@given(ratios, seeds)
def test_random_hides_exactly_the_share_of_tokens(ratio, seed):
    assert draw("random", ratio, seed=seed).flatten(1).sum(1).tolist() == [share(840, ratio)] * 3


@fast
@given(ratios, seeds)
def test_tube_hides_exactly_the_share_of_patches_in_all_frames(ratio, seed):
    assert patches_hidden(draw("tube", ratio, seed=seed)) == [share(120, ratio)] * 3


def test_windows_that_divide_the_grid_are_hidden_whole():
    level = level_of((4, 6, 4, 8))
    for ratio in (0.1, 0.5, 0.77):
        mask = draw("window", ratio, level=level, window=(2, 3, 2, 4), atlas=None)
        windows = mask.view(3, 2, 2, 2, 3, 2, 2, 2, 4).movedim((2, 4, 6, 8), (5, 6, 7, 8)).reshape(3, 16, -1)
        assert torch.equal(windows.any(-1), windows.all(-1))
        assert windows.any(-1).sum(1).tolist() == [int(16 * ratio)] * 3


@pytest.mark.parametrize("level", [level_of(), level_of(patches=BRAIN)], ids=["dense", "brain"])
@fast
@given(ratios, seeds)
def test_cut_windows_hide_exactly_the_share_of_tokens_and_all_but_one_whole(level, ratio, seed):
    blocks = mask_blocks(level, MaskConfig("window", ratio), WINDOW)
    mask = draw_mask(blocks, ratio, 3, torch.Generator().manual_seed(seed), CPU)
    assert mask.sum(1).tolist() == [share(len(level), ratio)] * 3
    for sample in mask:
        hidden = torch.bincount(blocks.block_of_token[sample], minlength=blocks.total)
        size = torch.bincount(blocks.block_of_token, minlength=blocks.total)
        cut = ((hidden > 0) & (hidden < size)).nonzero()
        assert len(cut) <= 1
        for block in cut:  # hidden tokens come first in the raster of the block
            places = blocks.position_in_block[blocks.block_of_token == block]
            parts = sample[blocks.block_of_token == block]
            assert places[parts].max() < places[~parts].min()


@pytest.mark.parametrize("kind", ["tube", "window-tube", "atlas"])
@fast
@given(ratios, seeds)
def test_on_brain_tokens_exactly_the_share_of_patches_is_hidden_in_all_frames(kind, ratio, seed):
    mask = draw(kind, ratio, seed=seed, level=level_of(patches=BRAIN))
    assert not mask.flatten(1, 3)[:, ~BRAIN].any()
    maskable = BRAIN if kind != "atlas" else BRAIN & (ATLAS.ravel() > 0)
    assert patches_hidden(mask) == [share(int(maskable.sum()), ratio)] * 3


def test_window_tubes_are_windows_in_all_frames():
    mask = draw("window-tube", 0.5, level=level_of((4, 6, 4, 7)), window=(2, 3, 2, 3), atlas=None)
    windows = mask[..., 0].view(3, 2, 2, 2, 3, 2, 2).movedim((2, 4, 6), (4, 5, 6)).reshape(3, 8, 12)
    assert patches_hidden(mask) == [48] * 3
    assert torch.equal(windows.any(-1), windows.all(-1))


def test_an_atlas_hides_regions_and_never_what_has_no_label():
    labels = torch.from_numpy(ATLAS).flatten()
    mask = draw("atlas", 0.5, batch=50).flatten(1, 3)[..., 0]
    assert not mask[:, labels == 0].any()
    assert (mask.sum(1) == int((labels > 0).sum() * 0.5)).all()
    whole = torch.stack([mask[:, labels == label].all(1) | ~mask[:, labels == label].any(1) for label in (3, 4, 900)])
    assert (whole.sum(0) >= 2).all()
    assert all(mask[:, labels == label].any(1).any() for label in (3, 4, 900))


def test_regions_are_numbered_by_label():
    level = level_of()
    blocks = mask_blocks(level, MaskConfig("atlas"), WINDOW, torch.from_numpy(ATLAS))
    labels = torch.from_numpy(ATLAS).flatten()[level.space_of_token]
    assert torch.equal(torch.tensor([0, 3, 4, 900])[blocks.block_of_token], labels)
    assert blocks.sizes.tolist() == [0, *(7 * np.unique(ATLAS, return_counts=True)[1][1:])]


@pytest.mark.parametrize("frames", [2, 3])
def test_shorter_tubes_cut_a_patch_every_few_frames(frames):
    grid = (2, 2, 2, 6)
    mask = draw("tube", 0.4, level=level_of(grid), atlas=None, tube_frames=frames)
    tubes = mask.unfold(4, frames, frames)
    assert torch.equal(tubes.any(-1), tubes.all(-1))
    assert tubes.any(-1).flatten(1).sum(1).tolist() == [int(8 * 6 // frames * 0.4)] * 3
    assert not torch.equal(mask.any(-1), mask.all(-1))


def test_tubes_of_uneven_length_hide_a_share_of_the_tokens():
    mask = draw("tube", 0.4, level=level_of((2, 2, 2, 6)), atlas=None, tube_frames=4)
    assert mask.flatten(1).sum(1).tolist() == [int(48 * 0.4)] * 3


@pytest.mark.parametrize("kind", ["tube", "window-tube", "atlas"])
def test_patches_that_are_tokens_in_some_frames_only_cannot_be_hidden_in_all(kind):
    level = subset_geometry(GRID, ((2, 2, 2, 4),), torch.arange(839)[None]).levels[0]
    with pytest.raises(ValueError, match="6 to 7 frames"):
        mask_blocks(level, MaskConfig(kind), WINDOW, ATLAS)


@pytest.mark.parametrize("kind", KINDS)
def test_some_token_is_hidden_and_some_stays_at_any_ratio(kind):
    grid = (2, 1, 1, 2)
    for ratio in (1e-9, 1 - 1e-16):
        mask = draw(kind, ratio, level=level_of(grid), window=(8, 8, 8, 8), atlas=np.ones((2, 1, 1), int))
        assert 0 < mask.sum() < mask.numel()


def test_a_block_alone_is_cut_rather_than_hidden_or_left():
    mask = draw("window", 0.5, level=level_of((2, 2, 2, 4)), window=(2, 2, 2, 4), atlas=None)
    assert mask.flatten(1).sum(1).tolist() == [16] * 3


def test_one_patch_cannot_be_masked_as_a_tube():
    blocks = mask_blocks(level_of((1, 1, 1, 5)), MaskConfig("tube"), WINDOW)
    with pytest.raises(ValueError, match="at least two"):
        draw_mask(blocks, 0.5, 1, None, CPU)


@pytest.mark.parametrize(("kind", "slack"), [("tube", 0.03), ("window", 0.1)])  # a cut window is hidden from its front
def test_every_token_is_hidden_about_as_often(kind, slack):
    hidden = draw(kind, 0.25, batch=4000, level=level_of(patches=BRAIN)).float().mean(0).flatten(0, 2)[BRAIN]
    assert hidden.min() > 0.25 - slack and hidden.max() < 0.25 + slack


def test_the_generator_alone_decides():
    assert torch.equal(draw("window", 0.5, seed=4), draw("window", 0.5, seed=4))
    assert not torch.equal(draw("window", 0.5, seed=4), draw("window", 0.5, seed=5))
    samples = draw("random", 0.5)
    assert not torch.equal(samples[0], samples[1])


def test_drawn_blocks_are_the_first_of_a_random_order():
    level = level_of((4, 6, 4, 8))
    blocks = mask_blocks(level, MaskConfig("window"), WINDOW)
    mask = draw_mask(blocks, 0.5, 2, torch.Generator().manual_seed(3), CPU)
    first = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)).argsort(1)[:, :8]
    hidden = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, first, True)
    assert torch.equal(mask, hidden[:, blocks.block_of_token])


def test_places_in_a_window_are_a_raster_of_the_whole_window():
    level = level_of()
    blocks = mask_blocks(level, MaskConfig("window"), WINDOW)
    for cell, block, place in zip(level.coords, blocks.block_of_token, blocks.position_in_block, strict=True):
        d, h, w, t = cell
        assert block == ((d // 2 * 2 + h // 3) * 3 + w // 2) * 2 + t // 4
        assert place == ((d % 2 * 3 + h % 3) * 2 + w % 2) * 4 + t % 4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.int64])
@pytest.mark.parametrize("patches", [None, BRAIN], ids=["dense", "brain"])
def test_released_masks_are_rasters_of_tokens_or_of_blocks(dtype, patches):
    level = level_of(patches=patches)
    tokens = torch.rand(2, 840) < 0.5
    grid = tokens.view(2, *GRID)
    d, h, w, t = level.coords.T
    for kind in KINDS:
        blocks = mask_blocks(level, MaskConfig(kind), WINDOW, ATLAS)
        assert torch.equal(mask_from_released(tokens.to(dtype), blocks, level), grid[:, d, h, w, t])
    blocks = mask_blocks(level, MaskConfig("window"), WINDOW)
    windows = torch.rand(2, 24) < 0.5
    expected = windows.view(2, 2, 2, 3, 2)[:, d // 2, h // 3, w // 2, t // 4]
    assert torch.equal(mask_from_released(windows.to(dtype), blocks, level), expected)


def test_a_released_mask_of_another_shape_is_refused_with_the_shapes_that_fit():
    level = level_of()
    blocks = mask_blocks(level, MaskConfig("window"), WINDOW)
    for shape in ((2, 25), (840,), (1, 840, 1)):
        with pytest.raises(ValueError, match=r"\(B, 840\).*\(4, 6, 5, 7\).*\(B, 24\)"):
            mask_from_released(torch.zeros(shape), blocks, level)


def test_released_atlas_masks_hide_no_unlabelled_token_and_whole_regions(golden):
    case = golden("mae__atlas_random")
    level = level_of((8, 8, 8, 8))
    atlas = case.tensors["atlas_map"]
    blocks = mask_blocks(level, MaskConfig("atlas"), WINDOW, atlas)
    mask = mask_from_released(case.tensors["mask"], blocks, level)
    assert torch.equal(level.to_raster(mask[..., None].float())[..., 0], case.tensors["mask"].float())
    for sample in mask:
        hidden = torch.bincount(blocks.block_of_token[sample], minlength=blocks.total)
        assert hidden[0] == 0 and set(hidden.tolist()) <= {0, *blocks.sizes.tolist()}
    assert draw("atlas", 0.5, level=level, atlas=atlas).sum() == 3 * int((atlas > 0).sum() * 0.5) * 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MaskConfig("columns"), "mask.kind = 'columns': one of random, window, tube, window-tube, atlas"),
        (MaskConfig(ratio=1.0), "mask.ratio = 1.0"),
        (MaskConfig(ratio=0.0), "mask.ratio = 0.0"),
        (MaskConfig(window=(2, 2, 2)), "mask.window"),
        (MaskConfig(window=(2, 2, 2, 0)), "mask.window"),
        (MaskConfig("tube", tube_frames=0), "mask.tube_frames = 0"),
    ],
)
def test_impossible_values_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        config.validate()


@pytest.mark.parametrize(
    ("atlas", "message"),
    [
        (None, "needs the atlas"),
        (ATLAS[:3], "shape \\(3, 6, 5\\)"),
        (ATLAS.astype(float), "float64 labels"),
        (ATLAS - 1, "smallest -1"),
    ],
)
def test_an_impossible_atlas_is_refused(atlas, message):
    with pytest.raises(ValueError, match=message):
        mask_blocks(level_of(), MaskConfig("atlas"), WINDOW, atlas)

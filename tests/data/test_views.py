"""Unpacking through a view against its slow twin: a dense volume, resampled, cut into patches by the model."""

import numpy as np
import pytest
import torch
from einops import rearrange

from neurostorm.data.augment import AugmentConfig, View, draw_view, resample
from neurostorm.data.unpack import ClipUnpacker
from neurostorm.data.views import ViewUnpacker
from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig

FRAMES = 6
PLACES = [(3, 0), (0, 20), (8, 19)]
AS_IT_IS = View(torch.eye(3), 0.0)
TURNED = AugmentConfig(rotate_rad=0.2, scale=0.1, noise_probability=0.0)


@pytest.fixture(scope="module", params=["dense", "brain"])
def model(uneven, request):
    swin = SwinConfig(
        img_size=(*uneven.mask.shape, FRAMES), embed_dim=4, depths=(1, 1), heads=(1, 1), window=(2, 2, 2, 4),
        tokens=request.param,
    )  # fmt: skip
    return MaskedAutoencoder(swin, brain=torch.from_numpy(uneven.mask))


@pytest.fixture(scope="module")
def unpack(model, uneven):
    geometry = model.geometry(FRAMES).levels[0]
    table = model.patch_table(torch.from_numpy(uneven.mask))
    return ClipUnpacker(table, geometry.space_of_token, geometry.time_of_token, int(uneven.mask.sum()))


@pytest.fixture(scope="module")
def unpack_view(unpack, uneven):
    return ViewUnpacker(unpack, torch.from_numpy(uneven.mask), (6, 6, 6, 1))


def views(count, config=TURNED, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [draw_view(config, generator) for _ in range(count)]


def dense(store, values, fill):
    """(B, L, V) -> volume (B, 1, X, Y, Z, L) with `fill` outside the mask."""
    return rearrange(torch.from_numpy(store.unpack(values, fill)).double(), "b t x y z -> b 1 x y z t")


@pytest.mark.parametrize("normalise", ["voxel", "global"])
def test_clips_as_they_are_equal_the_plain_unpacker(unpack, unpack_view, uneven, rows_of, normalise):
    batch = uneven.reader(FRAMES, normalise).batch(rows_of(PLACES))
    plain, seen = unpack(batch), unpack_view(batch, [AS_IT_IS] * 3)
    torch.testing.assert_close(seen.values, plain.values)
    assert (seen.centre is None) == (plain.centre is None)
    if plain.centre is not None:
        torch.testing.assert_close(seen.centre, plain.centre)
    tokens = torch.unique(unpack.space)
    assert torch.equal(seen.inside[:, tokens], plain.inside[:, tokens])


def test_a_turned_clip_equals_the_dense_volume_resampled(model, unpack_view, uneven, rows_of):
    reader = uneven.reader(FRAMES)
    batch, drawn = reader.batch(rows_of(PLACES)), views(3)
    volume = dense(reader.store, batch.frames.numpy().astype(np.float32) / 16, 0.0)
    expected = resample(volume, torch.stack([view.affine for view in drawn]).double())
    found = unpack_view(batch, drawn)
    torch.testing.assert_close(found.values, model.to_patches(expected).float(), rtol=1e-3, atol=2e-4)
    assert (found.values - unpack_view(batch, [AS_IT_IS] * 3).values).abs().max() > 0.5


def test_a_turned_clip_in_units_of_its_run_is_turned_with_its_background(model, unpack_view, uneven, rows_of):
    reader = uneven.reader(FRAMES, "global")
    batch, drawn = reader.batch(rows_of(PLACES)), views(3, seed=1)
    affine = torch.stack([view.affine for view in drawn]).double()
    found = unpack_view(batch, drawn)
    for clip in range(3):
        scale, shift, fill = batch.scale[clip].numpy(), batch.shift[clip].numpy(), float(batch.fill[clip])
        values = batch.frames[clip].numpy() / np.float32(16) * scale + shift
        for result, whole in ((found.values, values), (found.centre, np.broadcast_to(shift, values.shape))):
            volume = dense(reader.store, np.ascontiguousarray(whole[None], np.float32), fill)
            twin = model.to_patches(resample(volume, affine[[clip]]))[0].float()
            torch.testing.assert_close(result[clip], twin, rtol=1e-3, atol=2e-3)


def test_inside_is_where_all_that_a_place_is_made_of_was_measured(unpack, unpack_view, uneven, rows_of):
    reader = uneven.reader(FRAMES)
    batch, drawn = reader.batch(rows_of(PLACES)), views(3, AugmentConfig(rotate_rad=0.02, scale=0.0))
    measured = dense(reader.store, (batch.frames != 0).any(1, keepdim=True).numpy().astype(np.float32), 0.0)
    share = resample(measured, torch.stack([view.affine for view in drawn]).double())[:, 0, ..., 0]
    cut = "b (x p) (y q) (z r) -> b (x y z) (p q r)"
    share = rearrange(share, cut, p=6, q=6, r=6)
    expected = (share > 1 - 1e-3) & (unpack.table < int(uneven.mask.sum()))
    found = unpack_view(batch, drawn).inside
    tokens = torch.unique(unpack.space)
    assert (found[:, tokens] == expected[:, tokens]).float().mean() > 0.999  # but for rounding at the limit
    assert found.any() and found.sum() < unpack(batch).inside.sum()


def test_noise_is_where_the_brain_is_in_the_clips_that_drew_it(unpack, unpack_view, uneven, rows_of):
    batch = uneven.reader(FRAMES).batch(rows_of(PLACES))
    drawn = [AS_IT_IS._replace(noise_std=std) for std in (0.0, 0.5, 0.0)]
    torch.manual_seed(0)
    difference = unpack_view(batch, drawn).values - unpack(batch).values
    assert not difference[[0, 2]].abs().max() > 1e-5
    brain = unpack.table[unpack.space] < int(uneven.mask.sum())
    assert not difference[1][~brain].any()
    assert difference[1][brain].std() == pytest.approx(0.5, rel=0.05)
    frames = [difference[1][unpack.time == frame][brain[unpack.time == frame]] for frame in (0, 1)]
    assert abs(float(torch.corrcoef(torch.stack(frames))[0, 1])) < 0.1, "each frame has its own"


def test_a_clips_view_does_not_depend_on_its_batch(unpack_view, uneven, rows_of):
    batch, drawn = uneven.reader(FRAMES, "global").batch(rows_of(PLACES)), views(3)
    together = unpack_view(batch, drawn)
    for clip in range(3):
        alone = unpack_view(batch.part(clip, 1), drawn[clip : clip + 1])
        torch.testing.assert_close(alone.values[0], together.values[clip])
        torch.testing.assert_close(alone.centre[0], together.centre[clip])
        assert torch.equal(alone.inside[0], together.inside[clip])


def test_the_tables_are_no_part_of_a_checkpoint(unpack_view):
    assert not unpack_view.state_dict()

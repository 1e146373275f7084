"""Unpacking on the device against its slow twin: a dense volume, cut into patches by the model."""

import numpy as np
import pytest
import torch
from einops import rearrange

from neurostorm.data.unpack import ClipUnpacker
from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig

FRAMES = 6
PLACES = [(3, 0), (0, 20), (8, 19)]


@pytest.fixture(scope="module")
def model(uneven):
    """Two stages on 2 x 4 x 6 patches, with windows that make the token order another than the raster's."""
    swin = SwinConfig(
        img_size=(*uneven.mask.shape, FRAMES), embed_dim=4, depths=(1, 1), heads=(1, 1), window=(2, 2, 2, 4)
    )
    return MaskedAutoencoder(swin, brain=torch.from_numpy(uneven.mask))


@pytest.fixture(scope="module")
def unpack(model, uneven):
    geometry = model.geometry(FRAMES).levels[0]
    assert not torch.equal(geometry.order, torch.arange(len(geometry.order)))
    table = model.patch_table(torch.from_numpy(uneven.mask))
    return ClipUnpacker(table, geometry.space_of_token, geometry.time_of_token, int(uneven.mask.sum()))


def dense_patches(model, store, values, fill=0.0):
    """(B, L, V) -> the model's patches (B, P, K), by way of a volume with `fill` outside the mask."""
    volume = torch.from_numpy(store.unpack(values, fill))
    return model.to_patches(rearrange(volume, "b t x y z -> b 1 x y z t"))


def spatial_patches(volume):
    return rearrange(volume, "b (x p) (y q) (z r) -> b (x y z) (p q r)", p=6, q=6, r=6)


def test_voxel_z_equals_the_dense_twin(model, unpack, uneven, rows_of):
    reader = uneven.reader(FRAMES)
    batch = reader.batch(rows_of(PLACES))
    patches = unpack(batch)
    expected = dense_patches(model, reader.store, batch.frames.numpy().astype(np.float32) / 16)
    assert patches.values.dtype == torch.float32
    assert torch.equal(patches.values, expected)
    assert patches.centre is None


def test_inside_is_the_brain_that_the_run_measured(unpack, uneven, rows_of):
    reader = uneven.reader(FRAMES)
    measured = np.stack([uneven.std[uneven.runs[run]] > 0 for run, _ in PLACES])
    expected = spatial_patches(torch.from_numpy(reader.store.unpack(measured, False)))
    inside = unpack(reader.batch(rows_of(PLACES))).inside
    assert torch.equal(inside, expected)
    assert not inside[:, 0].any(), "the patch without any brain"
    assert not torch.equal(inside[0], inside[1]), "each run has its own field of view"


def test_a_clip_without_data_is_inside_nowhere(unpack, uneven, rows_of):
    batch = uneven.reader(FRAMES).batch(rows_of(PLACES))
    batch.frames[1] = 0
    inside = unpack(batch).inside
    assert not inside[1].any()
    assert inside[0].any() and inside[2].any()


def test_global_z_equals_the_dense_twin_and_its_centre_is_each_voxels_mean(model, unpack, uneven, rows_of):
    reader = uneven.reader(FRAMES, "global")
    patches = unpack(reader.batch(rows_of(PLACES)))
    for clip, (number, start) in enumerate(PLACES):
        run = uneven.runs[number]
        centre, spread = uneven.overall[run]
        z = uneven.frames[run][start : start + FRAMES] / np.float64(16)
        for found, intensity in (
            (patches.values, uneven.mean[run] + z * uneven.std[run]),
            (patches.centre, np.broadcast_to(uneven.mean[run].astype(float), z.shape)),
        ):
            twin = dense_patches(model, reader.store, (intensity[None] - centre) / spread, fill=-centre / spread)
            torch.testing.assert_close(found[clip], twin[0].float(), rtol=1e-5, atol=1e-5)


def test_the_unpacker_takes_any_batch_size_and_keeps_clips_apart(unpack, uneven, rows_of):
    batch = uneven.reader(FRAMES, "global").batch(rows_of(PLACES))
    together = unpack(batch)
    for clip in range(len(PLACES)):
        alone = unpack(batch.part(clip, 1))
        assert torch.equal(alone.values[0], together.values[clip])
        assert torch.equal(alone.centre[0], together.centre[clip])
        assert torch.equal(alone.inside[0], together.inside[clip])


def test_the_tables_are_no_part_of_a_checkpoint(unpack):
    assert not unpack.state_dict()

import dataclasses

import pytest
import torch
from einops import rearrange

from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.decoders.paper import PatchExpanding
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.masking.masks import MaskConfig
from neurostorm.model.strd.dropout import StrdConfig

TINY = SwinConfig((12, 12, 12, 6), (3, 3, 3, 1), embed_dim=16, depths=(2, 1), heads=(1, 2), window=(2, 2, 2, 3))


def ball(size=12):
    axis = torch.linspace(-1, 1, size)
    return sum(a**2 for a in torch.meshgrid(axis, axis, axis, indexing="ij")) < 0.8


def tiny(**keywords):
    return MaskedAutoencoder(TINY, **{"mask": MaskConfig("random", 0.5), "brain": ball(), **keywords})


def smooth_clips(count, size=12, frames=6):
    """Clips of three smooth maps with slow time courses, unit variance: (count, 1, X, Y, Z, T)."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.linspace(0, torch.pi, size)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    maps = torch.stack([x.cos(), y.cos(), (x + z).sin()])
    phase = 6 * torch.rand(count, 3, 1, generator=generator) + torch.linspace(0, 3, frames)
    clips = torch.einsum("bkt,kxyz->bxyzt", phase.sin(), maps)
    return (clips / clips.std()).unsqueeze(1)


def test_patch_expanding_equals_the_released_one(golden):
    case = golden("modules")
    config = SwinConfig((4, 4, 12, 4), (1, 1, 2, 1), embed_dim=6, depths=(1, 1), heads=(1, 1))
    expanding = PatchExpanding(config, 1)
    expanding.load_state_dict(case.group("pexp.sd."))
    geometry = MaskedAutoencoder(config, loss_on="all").geometry(4)
    x = geometry.levels[1].from_raster(case.tensors["pexp_in"].flatten(1, 4))
    out = geometry.levels[0].to_grid(expanding(x, geometry.merges[0]))
    case.close(out.movedim(1, -1), "pexp_out")


@pytest.mark.parametrize(("kind", "strd"), [("random", False), ("window", True), ("tube", False)])
def test_it_learns_clips_by_heart(kind, strd):
    torch.manual_seed(0)
    model = tiny(mask=MaskConfig(kind, 0.5), strd=StrdConfig(strd))
    clips, generator = smooth_clips(4), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 4e-3)
    for _ in range(60):
        out = model.train()(clips, generator=generator)
        out.loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        out = model.eval()(clips, generator=generator)
    assert out.loss < 0.5 * out.baseline


def test_the_loss_counts_hidden_brain_voxels_inside_the_field_of_view():
    model = tiny().eval()
    clips, centre = smooth_clips(2), torch.randn(2, 1, 12, 12, 12, 1).expand(-1, -1, -1, -1, -1, 6)
    inside = torch.ones(2, 12, 12, 12, dtype=torch.bool)
    inside[1, :, :, 8:] = False
    out = model(clips, inside=inside, centre=centre, generator=torch.Generator().manual_seed(0))
    hidden = rearrange(out.mask, "b (d h w t) -> b 1 d h w t", d=4, h=4, w=4)
    hidden = hidden.repeat_interleave(3, 2).repeat_interleave(3, 3).repeat_interleave(3, 4)
    counted = hidden & ball()[None, None, ..., None] & inside[:, None, ..., None]
    prediction = out.prediction
    for sample, where in enumerate(counted):
        error = (prediction - clips)[sample][where].square().mean()
        deviation = (clips - centre)[sample][where].square().mean()
        assert torch.allclose(out.clip_loss[sample], error, rtol=1e-5)
        assert torch.allclose(out.clip_baseline[sample], deviation, rtol=1e-5)
    assert torch.allclose(out.loss, out.clip_loss.mean()) and torch.allclose(out.baseline, out.clip_baseline.mean())
    assert out.masked_fraction == 0.5 and out.loss.requires_grad and not out.baseline.requires_grad


def test_without_a_centre_the_baseline_predicts_zero():
    model = tiny(loss_on="all", brain=None)
    target = model.to_patches(smooth_clips(2))
    out = model(target)
    hidden = out.mask[..., None].expand_as(out.prediction)
    assert torch.allclose(out.baseline, target[hidden].square().mean(), rtol=1e-5)
    assert torch.allclose(out.loss, (out.prediction - target)[hidden].square().mean(), rtol=1e-5)


def test_only_counted_voxels_receive_a_gradient():
    model = tiny()
    out = model(model.to_patches(smooth_clips(2)))
    (grad,) = torch.autograd.grad(out.loss, out.prediction)
    brain = model.brain_patches[model.geometry(6).levels[0].space_of_token]
    assert torch.equal(grad != 0, out.mask[..., None] & brain & (grad != 0))
    assert (grad != 0)[out.mask[..., None] & brain].float().mean() > 0.99


def test_with_loss_on_all_the_field_of_view_does_not_matter_but_an_empty_clip_does():
    model, clips = tiny(loss_on="all").eval(), smooth_clips(2)
    mask, inside = torch.rand(2, 384) > 0.5, torch.rand(2, 12, 12, 12) > 0.5
    whole = model(clips, mask)
    assert torch.equal(model(clips, mask, inside=inside).loss, whole.loss)
    inside[0] = False
    out = model(clips, mask, inside=inside)
    assert out.clip_loss[0] == 0 and torch.allclose(out.loss, whole.clip_loss[1])


def test_all_hidden_tokens_of_a_batch_weigh_the_same_where_every_voxel_counts():
    model, clips = tiny(loss_on="all").eval(), smooth_clips(2)
    mask = torch.zeros(2, 384, dtype=torch.bool)
    mask[0, :10] = mask[1, :300] = True
    out = model(clips, mask)
    assert out.loss.item() == pytest.approx(((10 * out.clip_loss[0] + 300 * out.clip_loss[1]) / 310).item(), rel=1e-5)


@pytest.mark.parametrize("loss_on", ["brain", "all"])
def test_normalised_targets_have_mean_zero_and_variance_one_in_each_patch(loss_on):
    model = tiny(loss_on=loss_on, normalise_targets=True).eval()
    plain = tiny(loss_on=loss_on).eval()
    plain.load_state_dict(model.state_dict())
    patches = 5 + 3 * torch.randn(2, 384, 27)
    patches[:, 7] = 2.0  # nothing to normalise: its variance is left
    mask = torch.rand(2, 384) > 0.5
    mask[:, 7] = True
    valid = model.brain_patches[model.geometry(6).levels[0].space_of_token].expand(2, -1, -1)
    valid = valid if loss_on == "brain" else torch.ones_like(valid)
    target = torch.zeros_like(patches)
    raw = plain(patches, mask).prediction
    expected = raw.clone()
    for sample, token in valid.any(-1).nonzero().tolist():
        voxels = patches[sample, token][valid[sample, token]]
        std = voxels.std(unbiased=False) if voxels.std(unbiased=False) > 1e-3 else torch.tensor(1.0)
        target[sample, token] = (patches[sample, token] - voxels.mean()) / std
        expected[sample, token] = raw[sample, token] * std + voxels.mean()
    out, counted = model(patches, mask), valid & mask[..., None]
    for sample in range(2):
        error = (raw - target)[sample][counted[sample]].square().mean()
        assert torch.allclose(out.clip_loss[sample], error, rtol=1e-4)
    assert torch.allclose(out.prediction[counted], expected[counted], atol=1e-4)


@pytest.mark.parametrize("decoder", ["paper", "light"])
@pytest.mark.parametrize("loss_on", ["brain", "all"])
def test_predicting_the_mean_of_normalised_targets_costs_one(decoder, loss_on):
    """Each patch's mean is taken off, however far it is from the voxels' means over the run (`centre`)."""
    model = tiny(loss_on=loss_on, normalise_targets=True, decoder=decoder, brain=torch.ones(12, 12, 12) > 0).eval()
    generator = torch.Generator().manual_seed(0)
    flat = (5 + 3 * torch.randn(2, 384, 1, generator=generator)).expand(2, 384, 27)
    patches, mask = flat + torch.randn(2, 384, 27, generator=generator), model.draw_mask(2, 6, generator)
    for centre in (None, torch.zeros_like(patches)):
        assert model(patches, mask, centre=centre).clip_baseline.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert model(flat, mask).baseline.item() == pytest.approx(0.0, abs=1e-6), "flat patches have nothing to normalise"


def test_predictions_do_not_depend_on_what_is_hidden():
    model = tiny().eval()
    patches = model.to_patches(smooth_clips(2))
    mask = model.draw_mask(2, 6, torch.Generator().manual_seed(0))
    elsewhere = torch.where(mask[..., None], torch.randn_like(patches), patches)
    prediction = model(patches, mask).prediction
    assert torch.equal(model(elsewhere, mask).prediction, prediction)
    assert not torch.equal(model(torch.where(mask[..., None], patches, elsewhere + 1), mask).prediction, prediction)


def test_values_that_are_not_counted_do_not_matter():
    model = tiny().eval()
    patches = model.to_patches(smooth_clips(1))
    mask = model.draw_mask(1, 6, torch.Generator().manual_seed(0))
    brain = model.brain_patches[model.geometry(6).levels[0].space_of_token]
    odd = torch.where(mask[..., None] & ~brain, 1e6, patches)  # hidden, so only the loss could see it
    assert torch.equal(model(odd, mask).loss, model(patches, mask).loss)


def test_a_clip_without_counted_voxels_costs_nothing_and_still_has_a_graph():
    model = tiny()
    inside = torch.zeros(2, 12, 12, 12, dtype=torch.bool)
    out = model(smooth_clips(2), inside=inside)
    out.loss.backward()
    assert out.loss == 0 and out.baseline == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.requires_grad)
    inside[1] = True
    out = model(smooth_clips(2), inside=inside)
    assert out.clip_loss[0] == 0 and out.clip_loss[1] > 0


def test_the_loss_does_not_depend_on_how_clips_are_batched():
    model, clips = tiny().eval(), smooth_clips(3)
    mask = torch.rand(3, 384) > 0.5
    inside = torch.rand(3, 12, 12, 12) > 0.3
    whole = model(clips, mask, inside=inside)
    parts = torch.cat([model(clips[s], mask[s], inside=inside[s]).clip_loss for s in (slice(0, 1), slice(1, 3))])
    assert torch.allclose(parts, whole.clip_loss, rtol=1e-5) and torch.allclose(parts.mean(), whole.loss, rtol=1e-5)


def test_volume_and_patches_are_two_views_of_one_clip():
    model = tiny()
    volume = torch.randn(2, 1, 12, 12, 12, 6)
    patches = model.to_patches(volume)
    assert torch.equal(model.to_volume(patches), volume)
    mask, levels = model.draw_mask(2, 6), model.geometry(6).levels
    raster = levels[0].to_raster(mask[..., None])[..., 0]
    ours, theirs = model(patches, mask), model(volume, raster)
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(theirs.mask, raster)
    assert torch.equal(model.to_volume(ours.prediction), theirs.prediction)
    assert torch.equal(levels[-1].to_grid(ours.latent), theirs.latent)


def test_the_patch_table_gathers_the_patches_of_packed_voxels():
    model, brain, volume = tiny(), ball(), torch.randn(2, 1, 12, 12, 12, 6)
    volume[:, :, ~brain] = 0
    packed = rearrange(volume[:, 0][:, brain], "b v t -> b t v")  # what a frame store holds
    padded = torch.cat([packed, packed.new_zeros(2, 6, 1)], -1)
    finest, table = model.geometry(6).levels[0], model.patch_table(brain)
    space, time = finest.space_of_token, finest.time_of_token
    assert torch.equal(padded[:, time[:, None], table[space]], model.to_patches(volume))


def test_strd_rates_are_reported_in_training_only():
    model = tiny(strd=StrdConfig(True))
    assert (model.train()(smooth_clips(1)).strd_rates > 0).all()
    assert not model.eval()(smooth_clips(1)).strd_rates.any()


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
@pytest.mark.parametrize("kind", ["random", "window", "tube", "window-tube", "atlas"])
def test_no_trainable_parameter_is_left_without_a_gradient(kind, mixer):
    swin, atlas = dataclasses.replace(TINY, mixer=mixer), torch.arange(64).view(4, 4, 4) % 9
    model = MaskedAutoencoder(swin, MaskConfig(kind, 0.5), brain=ball(), atlas=atlas if kind == "atlas" else None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model(smooth_clips(2)).loss.backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    used = {"window": "window_mask_token", "atlas": "atlas_mask_token"}.get(kind, "mask_token")
    assert idle == {"mask_token", "window_mask_token", "atlas_mask_token"} - {used}
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in idle)


def test_parameters_in_bfloat16_and_autocast_give_a_float32_loss():
    model = tiny(strd=StrdConfig(True))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(smooth_clips(1))
    out.loss.backward()
    half = model.bfloat16()(smooth_clips(1).bfloat16())
    half.loss.backward()
    for result in (out, half):
        assert result.loss.dtype == torch.float32 and result.loss.isfinite()


def test_the_decoder_keeps_the_window_where_the_encoder_has_others():
    swin = dataclasses.replace(TINY, first_window=(4, 4, 4, 1), full_last=True)
    model, tokens = MaskedAutoencoder(dataclasses.replace(swin, layout="paper"), loss_on="all").eval(), []
    for stack in (*model.layers, *model.layers_up):
        stack.blocks[0].attn.register_forward_hook(lambda _module, inputs, _out: tokens.append(inputs[0].shape[1]))
    model(torch.randn(1, 1, 12, 12, 12, 6))
    assert tokens == [4 * 4 * 4, 2 * 2 * 2 * 3, 2 * 2 * 2 * 3]


def test_three_stages_and_shorter_clips_work():
    swin = dataclasses.replace(TINY, img_size=(24, 24, 24, 6), depths=(1, 1, 1), heads=(1, 1, 1))
    model = MaskedAutoencoder(swin, MaskConfig("window", 0.5), loss_on="all")
    out = model(torch.randn(1, 1, 24, 24, 24, 4))
    assert out.prediction.shape == (1, 1, 24, 24, 24, 4) and out.latent.shape == (1, 64, 2, 2, 2, 4)
    assert out.loss.isfinite()


def test_the_encoder_alone_shares_the_parameters():
    model = tiny().eval()
    encoder = model.encoder()
    clip = smooth_clips(1)
    assert type(encoder) is SwinEncoder and torch.equal(encoder(clip), model.features(clip))
    assert encoder.patch_embed.fc.weight is model.patch_embed.fc.weight and not encoder.training
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in encoder.named_parameters()} == {
        n for n in names if n.startswith(("patch", "pos", "layers."))
    }


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"brain": None}, "brain = None: loss_on='brain' needs the mask"),
        ({"brain": torch.zeros(12, 12, 12, dtype=torch.bool)}, "non-empty mask"),
        ({"brain": torch.ones(12, 12, 13, dtype=torch.bool)}, r"brain of shape \(12, 12, 13\)"),
        ({"loss_on": "skull"}, "loss_on = 'skull'"),
        ({"mask": MaskConfig("columns")}, "mask.kind"),
        ({"mask": MaskConfig("atlas")}, "atlas = None"),
        ({"mask": MaskConfig("atlas"), "atlas": torch.zeros(4, 4, 4, dtype=torch.int32)}, "with a positive one"),
        ({"mask": MaskConfig("atlas"), "atlas": torch.ones(4, 4, 5, dtype=torch.int32)}, r"atlas of shape \(4, 4, 5\)"),
        ({"strd": StrdConfig(True, 0)}, "strd.space"),
    ],
)
def test_impossible_values_are_refused_by_name(keywords, message):
    with pytest.raises(ValueError, match=message):
        tiny(**keywords)


def test_networks_without_a_decoder_are_refused():
    with pytest.raises(ValueError, match="depths"):
        MaskedAutoencoder(dataclasses.replace(TINY, depths=(2,), heads=(1,)), loss_on="all")
    with pytest.raises(ValueError, match="in_chans"):
        MaskedAutoencoder(dataclasses.replace(TINY, in_chans=2), loss_on="all")


def test_patches_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"patches of shape \(1, 100, 27\): expected \(B, 64 x frames, 27\)"):
        tiny()(torch.zeros(1, 100, 27))

"""The light decoder: visible tokens are encoded alone, hidden ones are predicted from them and from nothing else."""

import dataclasses

import numpy as np
import pytest
import torch
from einops import rearrange

from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.cost import clip_cost
from neurostorm.model.decoders import DECODERS
from neurostorm.model.encoder import SwinEncoder, compile_blocks
from neurostorm.model.geometry.tokens import numbers_of, put_tokens, subset_geometry
from neurostorm.model.losses import chunked
from neurostorm.model.masking.masks import KINDS, MaskConfig
from neurostorm.model.ops.blocks import Block
from neurostorm.model.strd.dropout import StrdConfig
from tests.model.test_autoencoder import smooth_clips

FRAMES = 3
SHAPE = SwinConfig(
    (8, 16, 8, FRAMES), (2, 2, 2, 1), embed_dim=6, depths=(2, 2, 1), heads=(1, 2, 2), window=(2, 4, 2, 2),
    tokens="brain",
)  # fmt: skip
MIXERS = ("attention", "mamba")
NO_STRD = StrdConfig()


def brain_of(seed=0):
    """A mask of (8, 16, 8) voxels that leaves patches and windows without brain, and patches with little."""
    generator = np.random.default_rng(seed)
    patches = generator.random((4, 8, 4)) < 0.8
    patches[:2, :4, :2] = False
    voxels = patches.repeat(2, 0).repeat(2, 1).repeat(2, 2) & (generator.random((8, 16, 8)) < 0.7)
    return torch.from_numpy(voxels)


def build(mixer="attention", kind="window", ratio=0.5, *, strd=NO_STRD, shape=SHAPE, **keywords):
    torch.manual_seed(0)
    atlas = torch.arange(128).view(4, 8, 4) % 5 if kind == "atlas" else None
    return MaskedAutoencoder(
        dataclasses.replace(shape, mixer=mixer), MaskConfig(kind, ratio, (2, 2, 2, 2)), strd, brain=brain_of(),
        atlas=atlas, **{"decoder": "light", **keywords},
    )  # fmt: skip


def patches_of(model, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = model.tokens_per_frame * FRAMES
    return torch.randn(batch, tokens, 8, generator=generator, dtype=model.patch_embed.fc.weight.dtype)


def mask_of_a_corner(model):
    """Bool (2, P): hides all of one token of the coarsest level in the first sample, of another in the second."""
    first = model.geometry(FRAMES).levels[0].coords
    corners = [(first[:, 1] < 4) & (first[:, 3] == frame) for frame in (0, 1)]
    rest = [np.flatnonzero(~corner)[: 40 - corner.sum()] for corner in corners]
    mask = torch.zeros(2, len(first), dtype=torch.bool)
    for sample in range(2):
        mask[sample, corners[sample]] = True
        mask[sample, rest[sample]] = True
    return mask


def take_tokens(x, numbers):
    """(B, P, C), (B, H) -> (B, H, C)."""
    return torch.stack([values[chosen] for values, chosen in zip(x, numbers, strict=True)])


def predicted(model, patches, mask):
    """Predictions (B, P, p^3) in eval mode."""
    with torch.no_grad():
        return model.eval()(patches, mask).prediction


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_encoder_sees_what_a_dense_network_with_hidden_tokens_absent_sees(mixer):
    """Forward and gradients, sample by sample; that a subset equals a masked dense twin is test_token_sets.py's."""
    model = build(mixer).double()
    patches, mask = patches_of(model), mask_of_a_corner(model)
    whole = model.geometry(FRAMES)
    visible = model.visible_geometry(mask, whole)
    latent, _ = model.encode(model.patch_embed(rows_of(patches, visible, whole))[None], visible)
    weight = torch.randn(2, len(whole.levels[-1]), latent.shape[-1], dtype=torch.float64)
    place = visible.levels[-1].places_in(whole.levels[-1])
    assert (place == len(visible.levels[-1])).sum(1).tolist() == [1, 1], "one mask token in each sample"

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together = gradients((model.light.fill(latent, place) * weight).sum())
    apart = dict.fromkeys(together, 0.0)
    for sample in range(2):
        alone = subset_geometry((4, 8, 4, FRAMES), SHAPE.windows, whole.levels[0].order[numbers_of(~mask[[sample]])])
        rows = patches[sample, alone.levels[0].numbers_in(whole.levels[0])]
        single, _ = model.encode(model.patch_embed(rows)[None], alone)
        filled = model.light.fill(single, alone.levels[-1].places_in(whole.levels[-1]))
        torch.testing.assert_close(filled[0], model.light.fill(latent, place)[sample])
        for name, grad in gradients((filled * weight[[sample]]).sum()).items():
            apart[name] = apart[name] + grad
    for name, grad in together.items():
        torch.testing.assert_close(grad, apart[name], msg=name)


def rows_of(patches, visible, whole):
    return patches.flatten(0, 1)[visible.levels[0].numbers_in(whole.levels[0])]


def test_numbers_and_places_are_those_of_the_shared_set():
    model = build()
    mask, whole = model.draw_mask(3, FRAMES), model.geometry(FRAMES)
    visible = model.visible_geometry(mask, whole)
    for level, shared in zip(visible.levels, whole.levels, strict=True):
        number = level.numbers_in(shared)
        sample, place = number // len(shared), number % len(shared)
        assert np.array_equal(shared.coords[place], level.coords) and np.array_equal(sample, level.cells[:, 0])
        back = level.places_in(shared)
        assert torch.equal(back.flatten()[number], torch.arange(len(level)))
        assert int((back == len(level)).sum()) == back.numel() - len(level)
    number = visible.levels[0].numbers_in(whole.levels[0])
    assert not mask.flatten()[number].any() and len(number) == int((~mask).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_predictions_follow_from_visible_tokens_alone(mixer, kind):
    model = build(mixer, kind)
    patches, mask = patches_of(model), model.draw_mask(2, FRAMES)
    first = predicted(model, patches, mask)
    assert first[mask].abs().sum(-1).min() > 0 and not first[~mask].any()
    elsewhere = patches_of(model, seed=1)
    torch.testing.assert_close(predicted(model, torch.where(mask[..., None], elsewhere, patches), mask), first)
    changed = predicted(model, torch.where(mask[..., None], patches, elsewhere), mask)
    assert not torch.allclose(changed[mask], first[mask], atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_batch_is_its_clips_one_by_one(mixer):
    model = build(mixer).double().eval()
    patches, mask = patches_of(model, 3), model.draw_mask(3, FRAMES)
    together = model(patches, mask)
    for sample in range(3):
        alone = model(patches[[sample]], mask[[sample]])
        torch.testing.assert_close(alone.prediction[0], together.prediction[sample])
        torch.testing.assert_close(alone.clip_loss[0], together.clip_loss[sample])
        torch.testing.assert_close(alone.latent[0], together.latent[sample])


@pytest.mark.parametrize("loss_on", ["brain", "all"])
@pytest.mark.parametrize("targets", ["plain", "normalised", "centred"])
def test_the_loss_is_that_of_the_hidden_voxels_that_count(loss_on, targets):
    model = build(loss_on=loss_on, normalise_targets=targets == "normalised").eval()
    patches, mask = patches_of(model), model.draw_mask(2, FRAMES)
    generator = torch.Generator().manual_seed(3)
    inside = torch.rand(2, 128, 8, generator=generator) < 0.8
    centre = torch.randn(patches.shape, generator=generator) if targets == "centred" else None
    out = model(patches, mask, inside=inside, centre=centre)
    space = model.geometry(FRAMES).levels[0].space_of_token
    counts = (model.brain_patches[space] & inside[:, space]) if loss_on == "brain" else torch.ones_like(patches).bool()
    counts = counts & mask[..., None]
    error, baseline = out.prediction - patches, patches if centre is None else patches - centre
    if targets == "normalised":
        valid = (model.brain_patches[space] & inside[:, space]) if loss_on == "brain" else torch.ones_like(counts)
        weight = valid.float()
        voxels = weight.sum(-1, keepdim=True).clamp(min=1)
        mean = (patches * weight).sum(-1, keepdim=True) / voxels
        variance = ((patches - mean).square() * weight).sum(-1, keepdim=True) / voxels
        std = torch.where(variance > 1e-6, variance, 1.0).sqrt()
        error, baseline = error / std, (patches - mean) / std
    for found, values in ((out.clip_loss, error), (out.clip_baseline, baseline)):
        for sample in range(2):
            torch.testing.assert_close(found[sample], values[sample][counts[sample]].square().mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(out.loss, out.clip_loss.mean(), rtol=1e-4, atol=0)


def test_a_share_of_the_hidden_tokens_is_predicted_in_training_and_all_of_them_otherwise():
    model = build(predicted=0.5)
    patches, mask = patches_of(model), model.draw_mask(2, FRAMES)
    first, second = (DECODERS["light"].asked(model, mask, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert first.shape == (2, int(mask.sum(1)[0]) // 2) and not torch.equal(first, second)
    assert take_tokens(mask[..., None], first).all() and all(len(set(row.tolist())) == len(row) for row in first)
    out = model.train()(patches, mask, torch.Generator().manual_seed(0))
    assert out.prediction.shape == (2, 0, 8)
    whole = predicted(model, patches, mask)
    assert (whole.abs().sum(-1) > 0).sum() == mask.sum()
    error = take_tokens(whole - patches, first)
    counted = model.brain_patches[model.geometry(FRAMES).levels[0].space_of_token[first]]
    expected = torch.stack([error[sample][counted[sample]].square().mean() for sample in range(2)])
    torch.testing.assert_close(out.clip_loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_learns_with_dropout_of_redundancy_and_with_blocks_made_again(mixer):
    losses = []
    for recompute in (False, True):
        model = build(mixer, strd=StrdConfig(True, 3, 3, rate=0.1)).train()
        model.activation_checkpointing = recompute
        torch.manual_seed(1)
        out = model(patches_of(model), mask_of_a_corner(model))
        out.loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        assert bool((out.strd_rates > 0.02).all())
        losses.append(out.loss.detach())
    torch.testing.assert_close(*losses)


def test_compiled_blocks_compute_the_same_under_the_same_names():
    two_blocks = dataclasses.replace(SHAPE, depths=(1, 1), heads=(1, 2))  # each takes ten seconds to be traced
    plain, compiled = build(shape=two_blocks), build(shape=two_blocks)
    patches, mask = patches_of(plain), plain.draw_mask(2, FRAMES)
    compile_blocks(compiled, backend="eager")
    blocks = [module for module in compiled.modules() if isinstance(module, Block)]
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for model in (plain, compiled):
        model(patches, mask).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)


def test_it_learns_clips_by_heart():
    torch.manual_seed(0)
    swin = SwinConfig((12, 12, 12, 6), (3, 3, 3, 1), embed_dim=16, depths=(2, 1), heads=(1, 2), window=(2, 2, 2, 3))
    model = MaskedAutoencoder(swin, MaskConfig("random", 0.5), loss_on="all", decoder="light")
    clips, generator = smooth_clips(4), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        out = model(clips, generator=generator)
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert np.mean(losses[-5:]) < 0.3 * float(out.baseline)


def test_a_volume_gives_grids():
    model = build().eval()
    volume = torch.randn(2, 1, 8, 16, 8, FRAMES)
    out = model(volume, generator=torch.Generator().manual_seed(0))
    assert out.prediction.shape == volume.shape and out.mask.shape == (2, 128 * FRAMES)
    hidden = rearrange(out.mask, "b (d h w t) -> b 1 d h w t", d=4, h=8, w=4).float()
    hidden = hidden.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4).bool()
    assert not out.prediction[~hidden].any() and out.prediction[hidden].any()


def test_downstream_takes_the_same_encoder():
    model = build()
    encoder = model.encoder()
    assert type(encoder) is SwinEncoder
    volume = torch.randn(1, 1, 8, 16, 8, FRAMES)
    torch.testing.assert_close(encoder.eval()(volume), model.eval().features(volume))
    assert not any(name.startswith("light.") for name in encoder.state_dict())


def test_its_cost_is_that_of_the_tokens_it_computes():
    dense, light = build(decoder="paper"), build()
    full, sparse = clip_cost(dense, FRAMES), clip_cost(light, FRAMES)
    assert sparse.tokens == full.tokens and sparse.parameters == sum(p.numel() for p in light.parameters())
    fewer = clip_cost(build(ratio=0.75), FRAMES)
    assert fewer.train_flops < sparse.train_flops < 0.7 * full.train_flops
    assert fewer.kept_values < sparse.kept_values < 0.7 * full.kept_values
    half = clip_cost(build(predicted=0.5), FRAMES)
    hidden = int(light.draw_mask(1, FRAMES).sum())
    assert sparse.forward.linear - half.forward.linear == 2 * (hidden - hidden // 2) * 6 * 8  # the last map alone


def test_what_is_taken_is_put_back():
    x, numbers = torch.randn(2, 7, 3), torch.tensor([[0, 4], [6, 2]])
    taken = take_tokens(x, numbers)
    put = put_tokens(taken.flatten(0, 1), numbers, 7)
    assert torch.equal(take_tokens(put, numbers), taken) and int((put != 0).any(-1).sum()) == 4


@pytest.mark.parametrize("normalise", [False, True])
def test_scores_in_blocks_have_the_values_and_gradients_of_the_plain_formula(monkeypatch, normalise):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    monkeypatch.setitem(chunked._CACHED_VALUES, "cpu", 3 * 8)  # three rows a block, of ten
    h, weight, bias = (t.requires_grad_() for t in (randn(10, 5), randn(8, 5), randn(8)))
    sample, space = torch.arange(10) // 5, torch.arange(10) % 4
    brain, inside = torch.rand(4, 8, generator=generator) < 0.7, torch.rand(2, 4, 8, generator=generator) < 0.7
    targets = chunked.Targets(
        randn(20, 8), torch.randperm(20, generator=generator)[:10], sample, 2, space, randn(20, 8), brain, inside,
        normalise,
    )  # fmt: skip
    counted = (brain[space] & inside[sample, space]).double()
    target, away = targets.patches[targets.row], (targets.patches - targets.centre)[targets.row]
    if normalise:
        voxels = counted.sum(1, keepdim=True).clamp(min=1)
        mean = (target * counted).sum(1, keepdim=True) / voxels
        variance = ((target - mean).square() * counted).sum(1, keepdim=True) / voxels
        std = torch.where(variance > 1e-6, variance, 1.0).sqrt()
        target = away = (target - mean) / std
    squares = ((h @ weight.T + bias - target).square() * counted).view(2, 5, 8).sum((1, 2))
    found = chunked.score_rows(h, weight, bias, targets)
    torch.testing.assert_close(found.squares, squares)
    torch.testing.assert_close(found.baseline, (away.square() * counted).view(2, 5, 8).sum((1, 2)))
    assert found.voxels.tolist() == counted.view(2, 40).sum(1).tolist()
    wanted = torch.tensor([0.3, -1.0], dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(found.squares @ wanted, (h, weight, bias)),
        torch.autograd.grad(squares @ wanted, (h, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"decoder": "heavy"}, "decoder = 'heavy': one of paper, light"),
        ({"predicted": 0.0}, "predicted = 0.0: above 0, up to 1"),
        ({"decoder": "paper", "predicted": 0.5}, "the paper's decoder predicts everything"),
        ({"decoder_depth": 0}, "depth = 0: at least two stages and one block"),
    ],
)
def test_impossible_settings_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        build(**keywords)


def test_the_papers_layout_has_the_papers_decoder():
    with pytest.raises(ValueError, match="the paper's layout has the paper's decoder"):
        MaskedAutoencoder(dataclasses.replace(SHAPE, layout="paper"), brain=brain_of(), decoder="light")


def test_a_mask_that_hides_unequally_is_refused():
    model = build()
    mask = model.draw_mask(2, FRAMES)
    mask[0, int(mask[0].nonzero()[0])] = False
    for wrong in (mask, torch.zeros_like(mask), torch.ones_like(mask)):
        with pytest.raises(ValueError, match="equally many are needed"):
            model(patches_of(model), wrong)


def test_a_mask_of_any_number_type_hides_what_is_not_zero():
    model = build()
    patches, mask = patches_of(model), model.draw_mask(2, FRAMES)
    assert torch.equal(predicted(model, patches, 3 * mask.to(torch.uint8)), predicted(model, patches, mask))


@pytest.mark.parametrize("frames", [1, 2])
def test_a_shorter_clip_works(frames):
    model = build(kind="random").eval()
    patches = torch.randn(2, model.tokens_per_frame * frames, 8)
    out = model(patches, generator=torch.Generator().manual_seed(0))
    assert out.prediction.shape == patches.shape and bool(torch.isfinite(out.loss))


def test_half_precision_is_close():
    model = build().eval()
    patches, mask = patches_of(model), model.draw_mask(2, FRAMES)
    exact = model(patches, mask)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(patches, mask)
    assert half.prediction.dtype == torch.float32
    torch.testing.assert_close(half.loss, exact.loss, rtol=0.02, atol=0)

import dataclasses

import pytest
import torch

from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.geometry.windows import Bucket, table_of
from neurostorm.model.mixers import scan_kernel
from neurostorm.model.ops import blocks as blocks_module
from neurostorm.model.ops.blocks import DropPath, PatchMerging
from neurostorm.model.strd.dropout import StrdConfig

TINY = SwinConfig((12, 12, 12, 6), (3, 3, 3, 1), embed_dim=8, depths=(2, 2), heads=(2, 2), window=(2, 2, 2, 4))
PAPER = SwinConfig((96, 96, 96, 20), full_last=True)


def test_paper_shape_has_the_released_parameters():
    with torch.device("meta"):
        encoder = SwinEncoder(PAPER)
    assert sum(p.numel() for p in encoder.parameters()) == 4_314_636
    assert len(encoder.state_dict()) == 163


def test_patch_merging_equals_the_released_one(golden):
    case = golden("modules")
    merging = PatchMerging(SwinConfig((4, 4, 6, 4), (1, 1, 1, 1), embed_dim=6, depths=(1, 1), heads=(1, 1)), 0)
    merging.load_state_dict(case.group("pm.sd."))
    encoder = SwinEncoder(SwinConfig((4, 4, 12, 4), (1, 1, 2, 1), embed_dim=6, depths=(1, 1), heads=(1, 1)))
    geometry = encoder.geometry(4)
    packed = geometry.levels[0].from_raster(case.tensors["pm_in"].flatten(1, 4))
    merged = geometry.levels[1].to_grid(merging(packed, geometry.merges[0]))
    case.close(merged.movedim(1, -1), "pm_out")


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_frames_and_samples_of_a_batch_are_independent(mixer):
    encoder = SwinEncoder(dataclasses.replace(TINY, mixer=mixer)).eval()
    volume = torch.randn(3, 1, 12, 12, 12, 6)
    assert torch.allclose(encoder(volume)[1:2], encoder(volume[1:2]), atol=1e-5)


@pytest.mark.parametrize("frames", [1, 3, 5, 6])
def test_shorter_clips_work(frames):
    assert SwinEncoder(TINY).eval()(torch.randn(1, 1, 12, 12, 12, frames)).shape == (1, 16, 2, 2, 2, frames)


def test_a_longer_clip_or_another_volume_is_refused():
    encoder = SwinEncoder(TINY)
    with pytest.raises(ValueError, match="a clip of 7 frames: this model takes 1 to 6"):
        encoder(torch.randn(1, 1, 12, 12, 12, 7))
    with pytest.raises(ValueError, match="volume of shape"):
        encoder(torch.randn(1, 1, 12, 12, 15, 6))


def test_strd_acts_in_training_only_and_reports_a_rate_per_stage():
    encoder = SwinEncoder(TINY, StrdConfig(True))
    plain = SwinEncoder(TINY)
    plain.load_state_dict(encoder.state_dict())
    volume = torch.randn(2, 1, 12, 12, 12, 6)
    assert torch.equal(encoder.eval()(volume), plain.eval()(volume))
    assert torch.equal(plain.train()(volume), plain.eval()(volume))
    encoder.train()
    tokens = encoder.patch_embed(encoder.to_patches(volume))
    dropped, rates = encoder.encode(tokens, encoder.geometry(6))
    assert rates.shape == (2,) and (rates > 0).all() and not rates.requires_grad
    assert not torch.allclose(dropped, plain.encode(tokens, plain.geometry(6))[0], atol=1e-4)


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_activation_checkpointing_keeps_less_and_changes_no_gradient(mixer, monkeypatch):
    monkeypatch.setattr(scan_kernel, "applies_to", lambda *_: False)  # the kernel keeps no states that could be saved
    encoder = SwinEncoder(dataclasses.replace(TINY, drop_path=0.5, mixer=mixer), StrdConfig(True)).train()
    volume, grads, kept = torch.randn(2, 1, 12, 12, 12, 6), [], []
    for recompute in (False, True):
        encoder.activation_checkpointing = recompute
        saved = []
        torch.manual_seed(3)
        encoder.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = encoder(volume).square().sum()
        loss.backward()
        grads.append([p.grad.clone() for p in encoder.parameters()])
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 3
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean():
    layer, x = DropPath(0.25), torch.ones(4000, 2, 3)
    table = table_of([Bucket(torch.arange(2)[None])], 2)
    torch.manual_seed(0)
    out = layer.train()(x, table)
    assert torch.equal(out.amin((1, 2)), out.amax((1, 2)))
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(layer.eval()(x, table), x)


def test_drop_path_finds_the_samples_in_one_packed_list():
    layer, sample = DropPath(0.25).train(), torch.arange(12000) % 4000
    table = dataclasses.replace(table_of([Bucket(torch.arange(12000)[None])], 12000), sample=sample, samples=4000)
    torch.manual_seed(0)
    out = layer(torch.ones(1, 12000, 3), table).view(3, 4000, 3)
    assert torch.equal(out.amin((0, 2)), out.amax((0, 2)))
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)


def test_a_block_whose_branches_are_dropped_passes_its_input_on():
    encoder = SwinEncoder(TINY).train()
    block, level, x = encoder.layers[0].blocks[0], encoder.geometry(6).levels[0], torch.randn(2, 384, 8)
    block.drop_path.rate = 1 - 1e-12
    assert torch.equal(block(x, level.windows(TINY.window, False)), x)
    block.drop_path.rate = 0.0
    assert not torch.equal(block(x, level.windows(TINY.window, False)), x)


def test_drop_path_rates_rise_over_all_blocks():
    config = dataclasses.replace(TINY, drop_path=0.3)
    assert config.drop_path_rates(0) + config.drop_path_rates(1) == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_bfloat16_autocast_stays_near_float32(mixer):
    encoder = SwinEncoder(dataclasses.replace(TINY, mixer=mixer)).eval()
    volume = torch.randn(1, 1, 12, 12, 12, 6)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(volume)
    full = encoder(volume)
    assert (half - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_under_autocast_windows_are_formed_in_its_dtype_and_nothing_else_changes(mixer, monkeypatch):
    config = dataclasses.replace(TINY, mixer=mixer)
    encoder, volume = SwinEncoder(config).train(), torch.randn(1, 1, 12, 12, 12, 6)
    gather, seen = blocks_module.gather_rows, []
    monkeypatch.setattr(blocks_module, "gather_rows", lambda x, table: seen.append(x.dtype) or gather(x, table))

    def outcome():
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(volume)
        out.float().square().sum().backward()
        return [out, *(parameter.grad for parameter in encoder.parameters())]

    narrow = outcome()
    assert set(seen) == {torch.bfloat16}
    monkeypatch.setattr(blocks_module, "product_dtype", lambda x: x.dtype)
    assert all(torch.equal(one, other) for one, other in zip(narrow, outcome(), strict=True))
    assert torch.float32 in seen


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_parameters_in_bfloat16_run(mixer):
    encoder = SwinEncoder(dataclasses.replace(TINY, mixer=mixer), StrdConfig(True)).bfloat16().train()
    out = encoder(torch.randn(1, 1, 12, 12, 12, 6))
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": (12, 12, 9, 6)}, "img_size"),
        ({"patch_size": (3, 3, 3, 2)}, "patch_size"),
        ({"window": (2, 2, 2)}, "window"),
        ({"first_window": (2, 2, 2, 0)}, "first_window"),
        ({"depths": (2, 0)}, "depths"),
        ({"heads": (2,)}, "heads"),
        ({"heads": (2, 3)}, r"heads\[1\] must divide the stage's width 16"),
        ({"embed_dim": 0}, "embed_dim"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"mixer": "fourier"}, "mixer = 'fourier': one of attention, mamba"),
        ({"layout": "rolled"}, "layout = 'rolled': one of clean, paper"),
        ({"tokens": "skull"}, "tokens = 'skull': one of dense, brain"),
        ({"prompts": -1}, "prompts = -1"),
    ],
)
def test_impossible_values_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        SwinEncoder(dataclasses.replace(TINY, **change))


def test_a_full_last_stage_shifts_over_the_frames_in_the_clean_layout_only():
    reach = {}
    for layout in ("clean", "paper"):
        config = dataclasses.replace(TINY, depths=(1, 2), full_last=True, layout=layout, window=(2, 2, 2, 3))
        encoder = SwinEncoder(config).eval()
        volume = torch.randn(1, 1, 12, 12, 12, 6)
        other = volume.clone()
        other[..., 0] += 1
        moved = (encoder(volume) != encoder(other)).any(4).any(3).any(2).any(1)[0]
        reach[layout] = moved.tolist()
    assert reach["paper"] == [True] * 3 + [False] * 3
    assert reach["clean"] != reach["paper"]


def test_prompts_change_what_windows_say_and_can_be_removed():
    encoder, volume = SwinEncoder(TINY).eval(), torch.randn(1, 1, 12, 12, 12, 6)
    plain = encoder(volume)
    encoder.set_prompts(3)
    assert {p.shape for n, p in encoder.named_parameters() if n.endswith(".prompt")} == {(1, 3, 8), (1, 3, 16)}
    assert encoder.config.prompts == 3 and not torch.allclose(encoder(volume), plain, atol=1e-4)
    encoder.set_prompts(0)
    assert torch.equal(encoder(volume), plain) and encoder.config.prompts == 0
    with pytest.raises(ValueError, match=r"strd\.enabled"):
        SwinEncoder(TINY, StrdConfig(True)).set_prompts(3)

"""Fewer tokens against a slow dense network in which the other tokens are keys for nobody and read as zero."""

import numpy as np
import pytest
import torch
from einops import rearrange
from torch.nn.functional import linear, silu, softplus

from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.geometry.tokens import Geometry, subset_geometry
from neurostorm.model.geometry.windows import Layout, effective_window, raster_coords
from neurostorm.model.masking.masks import MaskConfig
from neurostorm.model.strd.dropout import StrdConfig

SHAPE = SwinConfig(
    (8, 12, 8, 3), (2, 2, 2, 1), embed_dim=6, depths=(2, 2), heads=(1, 2), window=(2, 4, 2, 2), tokens="brain"
)


def config(mixer, **changes):
    return SwinConfig(**{**vars(SHAPE), "mixer": mixer, **changes})


def brain_of(seed=0):
    """A mask of (8, 12, 8) voxels that leaves 19 of 96 patches and some windows without brain."""
    generator = np.random.default_rng(seed)
    patches = generator.random((4, 6, 4)) < 0.8
    patches[:2, :4, :2] = False
    voxels = patches.repeat(2, 0).repeat(2, 1).repeat(2, 2) & (generator.random((8, 12, 8)) < 0.7)
    return torch.from_numpy(voxels)


def attend(mixer, x, present):
    """One window, (N, C) -> (N, C): every token asks, only present ones answer."""
    q, k, v = rearrange(linear(x, mixer.qkv.weight, mixer.qkv.bias), "n (t h c) -> t h n c", t=3, h=mixer.heads)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~present, -torch.inf)
    return linear(rearrange(scores.softmax(-1) @ v, "h n c -> n (h c)"), mixer.proj.weight, mixer.proj.bias)


def scan(mixer, x, present):
    """One window, (N, C) -> (N, C), token by token: an absent one changes neither the state nor what came before."""
    inner, rank = mixer.D.shape[0], mixer.dt_proj.weight.shape[1]
    state, recent, out = x.new_zeros(inner, 16), [x.new_zeros(inner)] * 3, []
    for token, exists in zip(x, present.tolist(), strict=True):
        if not exists:
            out.append(torch.zeros_like(token))
            continue
        u, gate = linear(token, mixer.in_proj.weight).chunk(2)
        recent = [*recent[-3:], u]
        u = silu((torch.stack(recent, -1) * mixer.conv1d.weight[:, 0]).sum(-1) + mixer.conv1d.bias)
        step, b, c = linear(u, mixer.x_proj.weight).split([rank, 16, 16])
        delta = softplus(linear(step, mixer.dt_proj.weight, mixer.dt_proj.bias))[:, None]
        state = state * torch.exp(delta * -torch.exp(mixer.A_log)) + delta * u[:, None] * b
        out.append(linear((state @ c + mixer.D * u) * silu(gate), mixer.out_proj.weight))
    return torch.stack(out)


def dense_twin(encoder, tokens, present):
    """Embedded tokens on the grid (d, h, w, T, C) and which exist (d, h, w, T) -> the last stage's, on its grid."""
    for number, (positions, stage) in enumerate(zip(encoder.pos_embeds, encoder.layers, strict=True)):
        where = rearrange(positions.pos_embed, "1 c d h w 1 -> d h w 1 c") + rearrange(
            positions.time_embed, "1 c 1 1 1 t -> t c"
        )
        tokens = tokens + where[..., : tokens.shape[3], :]
        for odd, block in enumerate(stage.blocks):
            window, shift = effective_window(tokens.shape[:4], encoder.config.windows[number], odd % 2 == 1)
            cells = raster_coords(tokens.shape[:4])
            groups = {}
            for cell in cells.tolist():
                key = tuple((c - s) // w for c, s, w in zip(cell, shift, window, strict=True))
                groups.setdefault(key, []).append(cell)
            x, mixed = block.norm1(tokens), torch.zeros_like(tokens)
            for group in groups.values():
                at = tuple(np.array(group).T)
                if present[at].any():
                    mixer = block.attn if encoder.config.mixer == "attention" else block.mamba
                    mix = attend if encoder.config.mixer == "attention" else scan
                    mixed = mixed.index_put(tuple(map(torch.as_tensor, at)), mix(mixer, x[at], present[at]))
            tokens = tokens + mixed
            tokens = tokens + block.mlp(block.norm2(tokens))
        if stage.downsample is not None:
            tokens = torch.where(present[..., None], tokens, 0.0)
            children = rearrange(tokens, "(d i) (h j) (w k) t c -> d h w t (i j k c)", i=2, j=2, k=2)
            tokens = stage.downsample.reduction(stage.downsample.norm(children))
            present = rearrange(present, "(d i) (h j) (w k) t -> d h w t (i j k)", i=2, j=2, k=2).any(-1)
    return torch.where(present[..., None], tokens, 0.0)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_brain_tokens_alone_equal_the_dense_network_with_the_others_masked(mixer):
    torch.manual_seed(0)
    brain = brain_of()
    encoder = SwinEncoder(config(mixer), brain=brain).double()
    volume = torch.randn(1, 1, 8, 12, 8, 3, dtype=torch.float64)
    assert 50 * 3 < len(encoder.geometry(3).levels[0]) < 80 * 3
    everything = SwinEncoder(config(mixer, tokens="dense")).double()
    embedded = encoder.patch_embed(everything.to_patches(volume))
    grid = rearrange(everything.geometry(3).levels[0].to_grid(embedded), "1 c d h w t -> d h w t c")
    present = brain.view(4, 2, 6, 2, 4, 2).any(5).any(3).any(1)[..., None].expand(4, 6, 4, 3)
    expected = dense_twin(encoder, grid, present)
    ours = rearrange(encoder(volume), "1 c d h w t -> d h w t c")
    assert torch.allclose(ours, expected, atol=1e-12)
    weight = torch.randn_like(ours)
    slow, fast = (
        gradients(encoder, (expected * weight).sum()),
        gradients(encoder, (encoder(volume).movedim(1, -1)[0] * weight).sum()),
    )
    assert slow.keys() == fast.keys() and len(fast) == len(list(encoder.parameters()))
    for name, grad in fast.items():
        assert torch.allclose(grad, slow[name], atol=1e-11), name


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_a_subset_of_its_own_per_sample_equals_the_same_subset_alone(mixer):
    torch.manual_seed(1)
    encoder = SwinEncoder(config(mixer, tokens="dense")).double()
    cells = torch.stack([torch.randperm(96 * 3)[:100] for _ in range(3)])
    raster = torch.randn(3, 96 * 3, 8, dtype=torch.float64)
    grid, windows = (4, 6, 4, 3), encoder.config.windows
    together = subset_geometry(grid, windows, cells)
    patches = together.levels[0].from_raster(raster)
    out, _ = encoder.encode(encoder.patch_embed(patches), together)
    maps, weight = together.levels[-1].to_grid(out), torch.randn(3, 12, 2, 3, 2, 3, dtype=torch.float64)
    fast = gradients(encoder, (maps * weight).sum())
    slow = dict.fromkeys(fast, 0.0)
    for number, mine in enumerate(cells):
        coords = np.concatenate([np.zeros((100, 1), int), raster_coords(grid)[mine.numpy()]], 1)
        alone = Geometry(coords, 1, grid, windows, Layout(), torch.device("cpu"))
        part, _ = encoder.encode(encoder.patch_embed(alone.levels[0].from_raster(raster[number : number + 1])), alone)
        single = alone.levels[-1].to_grid(part)
        assert torch.allclose(maps[number], single[0], atol=1e-12)
        for name, grad in gradients(encoder, (single[0] * weight[number]).sum()).items():
            slow[name] = slow[name] + grad
    for name, grad in fast.items():
        assert torch.allclose(grad, slow[name], atol=1e-10), name


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_few_coarse_buckets_equal_exact_ones(mixer):
    torch.manual_seed(2)
    encoder = SwinEncoder(config(mixer, tokens="dense")).double()
    coords = raster_coords((1, 4, 6, 4, 3))[torch.randperm(288)[:130].sort().values.numpy()]
    shape = (coords, 1, (4, 6, 4, 3), encoder.config.windows)
    exact, coarse = (Geometry(*shape, Layout(round_to=n), torch.device("cpu")) for n in (1, 8))
    tables = [g.levels[0].windows(SHAPE.window, True) for g in (exact, coarse)]
    assert len(tables[1].buckets) < len(tables[0].buckets) and tables[1].buckets[-1].present is not None
    x = torch.randn(2, 130, 6, dtype=torch.float64)
    assert torch.allclose(encoder.encode(x, exact)[0], encoder.encode(x, coarse)[0], atol=1e-12)


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_the_autoencoder_works_on_brain_tokens(mixer):
    torch.manual_seed(3)
    mask = MaskConfig("window", 0.5, (2, 2, 2, 2))
    model = MaskedAutoencoder(config(mixer), mask, StrdConfig(True), brain=brain_of())
    clip, twin = torch.randn(2, 1, 8, 12, 8, 3), torch.randn(2, 1, 8, 12, 8, 3)
    hidden, packed = model.draw_mask(2, 3), model.to_patches(clip)
    out = model(packed, mask=hidden)
    assert hidden.sum(1).tolist() == [int(hidden.shape[1] * 0.5)] * 2 and out.prediction.shape == packed.shape
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    background = model.to_volume(torch.ones_like(packed)) == 0  # patches without brain
    assert background.any()
    assert torch.equal(model.features(torch.where(background, twin, clip)), model.features(clip))


def test_brain_tokens_need_the_mask():
    with pytest.raises(ValueError, match="tokens='brain' needs the mask"):
        SwinEncoder(SHAPE)

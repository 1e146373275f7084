"""On a CUDA device the sparse autoencoder computes what it does on a CPU, and the host never waits inside a step."""

import pytest
import torch
from torch.optim import AdamW

from neurostorm.model.encoder import compile_blocks
from neurostorm.model.geometry.windows import Bucket, take_rows
from neurostorm.model.mixers import scan
from neurostorm.model.mixers.scan import CHUNK_TOKENS, ScanInputs
from neurostorm.model.strd import dropout
from neurostorm.model.strd.dropout import StageDropout, StrdConfig, drop_probability, fused_attention
from tests.model.decoders.test_light import FRAMES, MIXERS, build, patches_of
from tests.model.mixers.test_scan import problem
from tests.model.mixers.test_scan import scan as outcome_of_scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def outcome(model, device, mask, dtype=None):
    """Loss, predictions and all gradients of a step, on the CPU."""
    model = model.to(device)
    model.zero_grad()
    patches = torch.randn(2, 1000, 8, generator=torch.Generator().manual_seed(0))[:, : model.tokens_per_frame * FRAMES]
    patches = patches.to(device, model.patch_embed.fc.weight.dtype)
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
        loss = model.train()(patches, mask).loss
    loss.backward()
    with torch.no_grad():
        prediction = model.eval()(patches, mask).prediction
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [t.detach().cpu().double().clone() for t in (loss, prediction, *gradients)]


def distance(found, expected):
    """The largest of the relative differences of two lists; what should be nearly 0 is held to the others' size."""
    least = 1e-3 * max(b.norm() for b in expected[2:])
    return max(((a - b).norm() / b.norm().clamp(min=least)).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("decoder", ["light", "paper"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_cuda_computes_what_a_cpu_does(mixer, decoder):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = build(mixer, decoder=decoder)
    mask = model.draw_mask(2, FRAMES, torch.Generator().manual_seed(0))
    expected = outcome(model.double(), "cpu", mask)
    assert distance(outcome(model.double(), "cuda", mask), expected) < 1e-9
    assert distance(outcome(model.float(), "cuda", mask), expected) < 1e-3
    rough = outcome(model.float(), "cuda", mask, torch.bfloat16)
    assert all(t.isfinite().all() for t in rough)
    assert (rough[0] - expected[0]).abs() < 0.02 * expected[0]


@pytest.mark.parametrize(("tokens", "windows", "channels"), [(256, 5, 96), (37, 3, 72), (16, 1, 384), (3, 2, 7)])
def test_the_scan_in_triton_equals_the_one_in_torch(tokens, windows, channels):
    inputs, dy = problem(tokens, windows, channels, 16)
    expected = outcome_of_scan(inputs, dy, CHUNK_TOKENS)
    narrow = ScanInputs(*(tensor.float().cuda() for tensor in inputs))
    assert scan.triton_applies_to(narrow.u, 16)
    found = outcome_of_scan(narrow, dy.float().cuda(), CHUNK_TOKENS)
    for one, other in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        assert (one.cpu() - other).abs().max() < 1e-5 * other.abs().max()


def attention_problem(tokens, width, absent, dtype=torch.float32, windows=6, batch=2, heads=3):
    """q, k, v as views of one projection, and a bucket of windows with some of the cells of a box (8, 8, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    place = [torch.randperm(600, generator=generator)[:tokens].sort().values for _ in range(windows)]
    cells = torch.stack(torch.unravel_index(torch.stack(place), (3, 5, 5, 8)), -1).short().cuda()
    present = None
    if absent:
        count = torch.randint(0, tokens + 1, (windows, 1), generator=generator)
        count[0] = 0
        present = (torch.arange(tokens) < count).cuda()
    qkv = 1.5 * torch.randn(batch * windows, tokens, 3, heads, width, generator=generator)
    q, k, v = qkv.cuda().to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    index = torch.zeros(windows, tokens, dtype=torch.long, device="cuda")
    return q, k, v, Bucket(index, cells, present, may_be_empty=absent)


def drawn_elements(q, k, bucket, reach, seed):
    """A * keep of the kernel (windows, heads, N, N): what it makes of the columns of the identity."""
    parts = []
    for columns in torch.eye(q.shape[2], device="cuda").split(q.shape[3], 1):
        v = torch.zeros_like(q)
        v[..., : columns.shape[1]] = columns
        torch.manual_seed(seed)
        parts.append(fused_attention(q, k, v, bucket.places(), reach, bucket.present)[0][..., : columns.shape[1]])
    return torch.cat(parts, -1)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(256, 12), (256, 32), (100, 16), (37, 12), (16, 32), (5, 4)])
def test_fused_redundancy_attention_equals_the_formula_with_the_same_drops(tokens, width, absent):
    torch.backends.cuda.matmul.allow_tf32 = False
    q, k, v, bucket = attention_problem(tokens, width, absent)
    assert dropout.triton_applies_to(q, k, v)
    everywhere = torch.ones(len(q), tokens, dtype=torch.bool, device="cuda")
    present = everywhere if bucket.present is None else bucket.present.repeat(2, 1)
    some = present.any(1)[:, None, None, None]
    for reach in ((0, 0), (2, 2)):
        near = bucket.neighbours(2 * reach[0] + 1, 2 * reach[1] + 1)
        space, time = (table.unsqueeze(1) for table in dropout._patterns(near, near.pattern.repeat(2), present))
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        affinity = dropout._affinity(*wide[:2], present[:, None]) * some
        chance = drop_probability(affinity.detach(), space, time)
        live = affinity > 1e-30
        keep = (drawn_elements(q, k, bucket, reach, 1) > 0) | ~live
        count, expected = (~keep).sum(), chance[live].sum()
        assert (count - expected).abs() <= 5 * (chance * (1 - chance))[live].sum().sqrt()
        assert (chance[~keep] > 0).all()

        narrow = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(1)
        out, dropped = fused_attention(*narrow, bucket.places(), reach, bucket.present)
        weight = torch.randn_like(out) * present[:, None, :, None]
        grads = torch.autograd.grad((out * weight).sum(), narrow)
        plain = (affinity * keep) @ wide[2]
        expected = torch.autograd.grad((plain * weight).sum(), wide)
        assert dropped == count and out.isfinite().all()
        for ours, theirs in zip((out, *grads), (plain, *expected), strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_seed_decides_what_fused_redundancy_attention_drops():
    q, k, _, bucket = attention_problem(64, 12, True)
    one, same, other = (drawn_elements(q, k, bucket, (2, 2), seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_fused_redundancy_attention_in_bfloat16_follows_float32():
    q, k, v, bucket = attention_problem(256, 12, True, torch.bfloat16)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        stage = StageDropout(StrdConfig(True))
        torch.manual_seed(1)
        out = stage.attend(*inputs, bucket)
        out.float().square().sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs), stage.rate()])
    for exact, rough in zip(*results, strict=True):
        assert (rough - exact).norm() < 0.02 * exact.norm()
    assert 0 < results[0][-1] < 0.2


@pytest.mark.parametrize("rows", [5, 500])
def test_rows_taken_many_times_get_the_sum_of_the_gradients(rows):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(rows, 3, generator=generator, dtype=torch.double).cuda().requires_grad_()
    index = torch.randint(0, rows, (2000,), generator=generator).cuda()
    weight = torch.randn(2000, 3, generator=generator, dtype=torch.double).cuda()
    (take_rows(table, index) * weight).sum().backward()
    expected = torch.zeros_like(table).index_add(0, index, weight)
    torch.testing.assert_close(table.grad, expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_compiled_blocks_compute_the_same(mixer):
    model = build(mixer).cuda()
    masks = [model.draw_mask(2, FRAMES, torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = [outcome(model, "cuda", mask) for mask in masks]
    compile_blocks(model)
    for mask, before in zip(masks, expected, strict=True):
        assert distance(outcome(model, "cuda", mask), before) < 1e-3


@pytest.mark.parametrize(("drops", "rate"), [(False, None), (True, 0.1), (True, None)])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_host_waits_for_nothing_in_a_step(mixer, drops, rate):
    model = build(mixer, strd=StrdConfig(drops, 3, 3, rate=rate)).cuda().train()
    optimizer = AdamW(model.parameters(), fused=True)
    patches = patches_of(model).cuda()

    def step(seed):
        model(patches, generator=torch.Generator().manual_seed(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)  # makes what is kept
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
        with pytest.raises(RuntimeError, match="synchroniz"):
            patches.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""On a CUDA device the sparse autoencoder computes what it does on a CPU, and the host never waits inside a step."""

import pytest
import torch
from torch.optim import AdamW

from neurostorm.model.scan import CHUNK_TOKENS, ScanInputs, triton_applies_to
from neurostorm.model.strd import StrdConfig
from neurostorm.model.swin4d import compile_blocks
from neurostorm.model.windows import take_rows
from tests.model.test_light import FRAMES, MIXERS, build, patches_of
from tests.model.test_scan import problem, scan

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
    expected = scan(inputs, dy, CHUNK_TOKENS)
    narrow = ScanInputs(*(tensor.float().cuda() for tensor in inputs))
    assert triton_applies_to(narrow.u, 16)
    found = scan(narrow, dy.float().cuda(), CHUNK_TOKENS)
    for one, other in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        assert (one.cpu() - other).abs().max() < 1e-5 * other.abs().max()


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


@pytest.mark.parametrize("strd", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_host_waits_for_nothing_in_a_step(mixer, strd):
    model = build(mixer, strd=StrdConfig(strd, 3, 3, rate=0.1)).cuda().train()
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

"""On a CUDA device the sparse autoencoder computes what it does on a CPU, and the host never waits inside a step."""

import pytest
import torch
from torch.optim import AdamW

from neurostorm.model.strd import StrdConfig
from neurostorm.model.swin4d import compile_blocks
from tests.model.test_light import FRAMES, MIXERS, build, patches_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def outcome(model, device, mask, dtype=None):
    """Loss, predictions and all gradients of a step, on the CPU."""
    model = model.to(device)
    model.zero_grad()
    patches = patches_of(model).to(device)
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
        loss = model.train()(patches, mask).loss
    loss.backward()
    with torch.no_grad():
        prediction = model.eval()(patches, mask).prediction
    return [t.detach().cpu().double() for t in (loss, prediction, *(p.grad for p in model.parameters()))]


def distance(found, expected):
    """The largest of the relative differences of two lists of tensors."""
    return max(((a - b).norm() / b.norm().clamp(min=1e-6)).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("decoder", ["light", "paper"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_cuda_computes_what_a_cpu_does(mixer, decoder):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = build(mixer, decoder=decoder)
    mask = model.draw_mask(2, FRAMES, torch.Generator().manual_seed(0))
    expected = outcome(model.double(), "cpu", mask)
    assert distance(outcome(model.double(), "cuda", mask), expected) < 1e-9
    assert distance(outcome(model.float(), "cuda", mask), expected) < 1e-3
    assert distance(outcome(model.float(), "cuda", mask, torch.bfloat16)[:2], expected[:2]) < 0.05


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

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.model.scan import CHUNK_TOKENS, ScanInputs, empty_states, scan_backward, scan_forward

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_scan.py"


def problem(tokens: int, windows: int, channels: int, states: int, seed: int = 0) -> tuple[ScanInputs, torch.Tensor]:
    """Random inputs in float64 and a gradient of y."""
    draw = torch.Generator().manual_seed(seed)
    u, delta, dy = (torch.randn(tokens, windows, channels, dtype=torch.float64, generator=draw) for _ in range(3))
    A = -torch.rand(channels, states, dtype=torch.float64, generator=draw) * 4
    B, C = (torch.randn(tokens, windows, states, dtype=torch.float64, generator=draw) for _ in range(2))
    return ScanInputs(u, delta.exp(), A, B, C), dy


def recurrence(inputs: ScanInputs) -> torch.Tensor:
    """The definition, one scalar state at a time in all windows."""
    u, delta, A, B, C = inputs
    y = []
    h = torch.zeros(*u.shape[1:], A.shape[1], dtype=u.dtype)
    for t in range(len(u)):
        h = torch.exp(torch.einsum("wd,dn->wdn", delta[t], A)) * h + torch.einsum("wd,wn->wdn", delta[t] * u[t], B[t])
        y.append(torch.einsum("wdn,wn->wd", h, C[t]))
    return torch.stack(y)


def scan(inputs: ScanInputs, dy: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor, ScanInputs]:
    states = empty_states(*inputs.u.shape[:2], inputs.A, chunk).fill_(torch.nan)
    y = scan_forward(inputs, states, chunk)
    return y, *scan_backward(inputs, states, dy, chunk)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(1, 17))
def test_equals_the_recurrence_and_its_gradients(tokens, windows, channels, states, chunk):
    inputs, dy = problem(tokens, windows, channels, states, seed=tokens)
    leaves = ScanInputs(*(tensor.clone().requires_grad_() for tensor in inputs))
    expected = recurrence(leaves)
    gradients = torch.autograd.grad(expected, leaves, dy)
    y, again, found = scan(inputs, dy, chunk)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-9, atol=1e-9)
    assert torch.equal(again, y)
    for name, one, other in zip(ScanInputs._fields, found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=f"gradient of {name}")


def test_without_states_the_result_is_the_same():
    inputs, dy = problem(37, 2, 3, 4)
    assert torch.equal(scan_forward(inputs), scan(inputs, dy, CHUNK_TOKENS)[0])


def test_float32_stays_close_to_float64_over_a_long_sequence():
    inputs, dy = problem(1000, 1, 4, 16)
    y, _, gradients = scan(inputs, dy, CHUNK_TOKENS)
    narrow, _, narrow_gradients = scan(ScanInputs(*(t.float() for t in inputs)), dy.float(), CHUNK_TOKENS)
    for one, other in zip((narrow, *narrow_gradients), (y, *gradients), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize("step", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("decay", [1e-4, 1.0, 1e3])
def test_extreme_steps_and_decays_stay_finite(step, decay):
    """Cumulative sums of delta A reach 1e9 here, whose exponential no float holds."""
    inputs, dy = problem(600, 1, 3, 16)
    inputs = inputs._replace(delta=torch.full_like(inputs.delta, step), A=inputs.A.sign() * decay)
    narrow = ScanInputs(*(t.float() for t in inputs))
    y, _, gradients = scan(narrow, dy.float(), CHUNK_TOKENS)
    for tensor in (y, *gradients):
        assert tensor.isfinite().all()
    expected = recurrence(inputs)
    assert (y - expected).abs().max() < 1e-4 * expected.abs().max()


def test_bench_scan_compares_both_sides(tmp_path):
    result = tmp_path / "scan.json"
    command = [sys.executable, TOOL, "--shapes", "6x24x16", "--rounds", "1", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    subprocess.run([*command, "--json", result], check=True, env=environment, capture_output=True, timeout=120)
    found = json.loads(result.read_text())
    (first,) = found["shapes"]
    assert (first["windows"], first["tokens"], first["channels"]) == (6, 24, 16)
    assert found["speedup_vs_loop"] == first["loop_s"] / first["mixer_s"] > 0
    assert found["memory_vs_loop"] == first["mixer_mib"] / first["loop_mib"] > 0
    assert found["machine"]["threads"] == 1

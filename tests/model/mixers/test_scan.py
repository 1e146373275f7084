import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.model.mixers import scan_kernel
from neurostorm.model.mixers.scan import CHUNK_TOKENS, ScanInputs, empty_states, scan_backward, scan_forward
from neurostorm.model.ops.dispatch import SCAN

TOOL = Path(__file__).resolve().parents[3] / "tools" / "bench" / "scan.py"


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


@pytest.fixture
def kernel(monkeypatch):
    """The kernel as a new process finds it: each test's environment decides, and nothing is kept after it."""
    monkeypatch.delenv(SCAN, raising=False)
    scan_kernel._library.cache_clear()
    yield scan_kernel
    scan_kernel._library.cache_clear()


def narrow_problem(tokens: int, windows: int, channels: int) -> tuple[ScanInputs, torch.Tensor]:
    inputs, dy = problem(tokens, windows, channels, scan_kernel.STATES, seed=channels)
    return ScanInputs(*(tensor.float() for tensor in inputs)), dy.float()


@pytest.mark.parametrize(
    ("tokens", "windows", "channels"), [(1, 1, 1), (37, 3, 7), (64, 2, 8), (20, 5, 29), (3, 1, 72)]
)
def test_the_kernel_equals_the_scan_in_float64(kernel, tokens, windows, channels):
    inputs, dy = problem(tokens, windows, channels, kernel.STATES)
    expected = scan(inputs, dy, CHUNK_TOKENS)
    narrow = ScanInputs(*(tensor.float() for tensor in inputs))
    assert kernel.applies_to(narrow.u, kernel.STATES), "this machine has a compiler"
    assert not empty_states(tokens, windows, narrow.A).numel()
    y, again, gradients = scan(narrow, dy.float(), CHUNK_TOKENS)
    assert torch.equal(y, again)
    for one, other in zip((y, *gradients), (expected[0], *expected[2]), strict=True):
        assert (one - other).abs().max() <= 2e-6 * other.abs().max()


def test_the_kernel_gives_the_same_bits_for_any_number_of_threads(kernel):
    inputs, dy = narrow_problem(30, 7, 12)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            y, gradients = scan_backward(inputs, empty_states(30, 7, inputs.A), dy)
            found.append([y, *gradients])
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_the_kernel_takes_tensors_as_they_lie(kernel):
    inputs, dy = narrow_problem(10, 4, 9)
    strided = ScanInputs(*(tensor.mT.contiguous().mT for tensor in inputs))
    expected, found = (scan_backward(given, empty_states(10, 4, given.A), dy) for given in (inputs, strided))
    assert torch.equal(expected[0], found[0])
    assert all(torch.equal(one, other) for one, other in zip(expected[1], found[1], strict=True))


@pytest.mark.parametrize("name", ScanInputs._fields)
def test_a_diverged_value_shows_in_what_the_kernel_makes_of_it(kernel, name):
    inputs, _ = narrow_problem(6, 2, 8)
    getattr(inputs, name).view(-1)[0] = torch.nan
    assert scan_forward(inputs).isnan().any()


def test_torch_scans_where_the_kernel_is_switched_off(kernel, monkeypatch):
    inputs, _ = narrow_problem(20, 2, 8)
    fast = scan_forward(inputs)
    monkeypatch.setenv(SCAN, "torch")
    kernel._library.cache_clear()
    assert not kernel.applies_to(inputs.u, kernel.STATES)
    torch.testing.assert_close(scan_forward(inputs), fast, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("compiler", "said"), [("no-such-compiler", "no C compiler"), ("false", "could not compile")])
def test_torch_scans_where_nothing_compiles(kernel, monkeypatch, caplog, tmp_path, compiler, said):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    which = kernel.shutil.which
    monkeypatch.setattr(kernel.shutil, "which", lambda name: which(name) if name == compiler else None)
    caplog.set_level("INFO")
    for _ in range(2):
        assert not kernel.applies_to(torch.zeros(1), kernel.STATES)
    assert [said in record.message for record in caplog.records] == [True]


def test_a_compiled_kernel_is_kept_and_a_cache_that_cannot_be_written_is_done_without(kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel.applies_to(torch.zeros(1), kernel.STATES)
    (library,) = (tmp_path / "neurostorm").iterdir()
    assert (tmp_path / "neurostorm").stat().st_mode & 0o077 == 0
    monkeypatch.setattr(kernel.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    kernel._library.cache_clear()
    assert kernel.applies_to(torch.zeros(1), kernel.STATES) and library.exists()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    kernel._library.cache_clear()
    assert kernel.applies_to(torch.zeros(1), kernel.STATES)


def test_bench_scan_compares_both_sides(tmp_path):
    result = tmp_path / "scan.json"
    command = [sys.executable, TOOL, "--shapes", "60x48x32", "--rounds", "1", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[2])}
    subprocess.run([*command, "--json", result], check=True, env=environment, capture_output=True, timeout=120)
    found = json.loads(result.read_text())
    (first,) = found["shapes"]
    assert (first["windows"], first["tokens"], first["channels"]) == (60, 48, 32)
    assert found["speedup_vs_loop"] == first["loop_s"] / first["mixer_s"] > 0
    assert found["memory_vs_loop"] == first["mixer_mib"] / first["loop_mib"] > 0
    assert found["machine"]["threads"] == 1

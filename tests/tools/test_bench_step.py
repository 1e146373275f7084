"""`tools/bench/step.py`: its baseline computes what the encoder computes, and its figures hang together."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder

THREADS = str(torch.get_num_threads())  # as they are: the models run in this process
TOOLS = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.fixture
def tool(monkeypatch):
    """Loader of a tool's module, as from its own folder."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module


@pytest.fixture
def bench(tool, monkeypatch):
    """The tool with its models in this process: starting three takes longer than this module."""
    bench = tool("step")

    class Here:
        def __init__(self, build, *arguments):
            self.work = build(*arguments)

        def ask(self, question):
            if question == "step_mib":  # a process's peak never falls, and here all models share one
                return 1.0
            return getattr(self.work, question)()

        def close(self):
            pass

    monkeypatch.setattr(bench, "Worker", Here)
    monkeypatch.setattr(bench.sparse, "Worker", Here)
    for name in bench.WAITING:
        monkeypatch.setenv(name, "")  # so that what the tool sets ends with the test
    return bench


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"img_size": (12, 8, 8, 5)},  # pads d and the frames
        {"full_last": True, "first_window": (2, 2, 4, 3)},
        {"in_chans": 2, "qkv_bias": False},
    ],
)
def test_the_baseline_is_the_released_layout(tool, changes):
    shape = {"img_size": (8, 8, 16, 6), "patch_size": (2, 2, 2, 1), "embed_dim": 8, "depths": (2, 2), "heads": (2, 4)}
    config = SwinConfig(**{**shape, "window": (2, 4, 2, 4), "layout": "paper", **changes})
    torch.manual_seed(0)
    ours, baseline = SwinEncoder(config), tool("baseline_swin").BaselineEncoder(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    baseline.load_state_dict(ours.state_dict())
    volume = torch.randn(2, config.in_chans, *config.img_size)
    expected, actual = ours(volume), baseline(volume)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(expected)
    for features in (expected, actual):
        (features * weight).sum().backward()
    gradients = dict(baseline.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_the_comparison_writes_its_ratios(bench, tmp_path, capsys):
    file = tmp_path / "compare.json"
    assert (
        bench.main(["--preset", "tiny", "--compare", "--rounds", "1", "--threads", THREADS, "--json", str(file)]) == 0
    )
    result = json.loads(file.read_text())
    seconds = result["seconds"]
    assert result["dense_vs_baseline"] == pytest.approx(seconds["baseline"] / seconds["dense"])
    assert result["brain_vs_dense"] == pytest.approx(seconds["dense"] / seconds["brain"])
    assert result["peak_mib"] > 100 and 0 <= result["largest_relative_difference"] < 1e-5
    for ratio in ("50", "75"):
        sides = [result["step_faster"][mixer][f"sparse_{ratio}"] for mixer in ("attention", "mamba")]
        assert result[f"sparse_vs_dense_{ratio}"] == pytest.approx(sum(sides) / 2)
    seconds = result["step_seconds"]["mamba"]
    assert result["step_faster"]["mamba"]["sparse_75"] == pytest.approx(seconds["dense"] / seconds["sparse_75"])
    shown = capsys.readouterr().out
    assert f"dense is {result['dense_vs_baseline']:.2f} times as fast as the baseline" in shown
    assert f"75 % hidden: {result['sparse_vs_dense_75']:.2f} times as fast" in shown


def test_different_results_end_the_comparison(bench, monkeypatch, capsys):
    wrong = bench.Side.outcome

    def outcome(side):
        found = wrong(side)
        return found if "Baseline" in type(side.model).__name__ else {**found, "features": found["features"] + 1e-2}

    monkeypatch.setattr(bench.Side, "outcome", outcome)
    assert bench.main(["--preset", "tiny", "--compare", "--rounds", "1", "--threads", THREADS]) == 1
    assert "the baseline differ by" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["mae", "encoder"])
def test_a_steps_figures_hang_together(bench, tmp_path, capsys, model):
    file = tmp_path / "step.json"
    options = ["--preset", "tiny", "--model", model, "--mixer", "mamba", "--geometry", "sparse", "--batch", "2"]
    assert bench.main([*options, "--rounds", "1", "--threads", THREADS, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert (result["mixer"], result["tokens"], result["layout"]) == ("mamba", "brain", "clean")
    assert result["decoder"] == ("light" if model == "mae" else "no")
    assert result["tokens_per_clip"] == 8 * 226  # frames x patches of the 4 mm grid that hold brain
    assert result["clips_per_s"] == pytest.approx(2 / result["step_s"])
    parts = sum(result[f"{part}_s"] for part in ("forward", "backward", "optimizer"))
    assert parts == pytest.approx(result["step_s"])
    assert result["flops_per_s"] == pytest.approx(2 * result["train_flops_per_clip"] / result["step_s"])
    assert 0 < result["matmul_share"] < 1 and 0 < result["copy_share"] < 1
    assert "tokens        1,808 per clip, 2 clips per step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--batch", "0"], "--batch 0: at least 1"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_reason(bench, capsys, options, reason):
    with pytest.raises(SystemExit) as end:
        bench.main(options)
    assert end.value.code == 2 and reason in capsys.readouterr().err


def test_a_process_answers_until_it_fails(tool, capfd):
    worker = tool("bench_models").Worker(dict)
    assert worker.ask("copy") == {}
    with pytest.raises(RuntimeError, match="process ended with status 1"):
        worker.ask("no_such_question")
    worker.close()
    assert "no_such_question" in capfd.readouterr().err

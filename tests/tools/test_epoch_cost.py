"""`tools/bench/epoch_cost.py`: hours from the model's own count; the README's table is what it prints."""

import argparse
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neurostorm.config import Config
from neurostorm.config.presets import PRESETS
from neurostorm.ingest.resample.template import brain_mask
from neurostorm.model.cost import clip_cost
from neurostorm.store import GRIDS
from neurostorm.train.build import build_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool's module."""
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    return importlib.import_module("epoch_cost")


def options(tool: Any, *words: str) -> argparse.Namespace:
    parsed: argparse.Namespace = tool.parse(["--presets", "tiny", *words])[0]
    return parsed


def test_hours_are_those_of_the_model_on_a_real_device(tool: Any) -> None:
    config, grid = Config.model_validate(PRESETS["tiny"]), GRIDS["4mm"]
    mask = brain_mask(grid)
    real = clip_cost(build_model(config, SimpleNamespace(grid=grid, mask=mask)), config.data.clip_frames)
    cost = tool.epoch_cost("tiny", config, options(tool, "--frames", "8003", "--share", ".5", "--peak", "1e9"))
    assert (cost.parameters, cost.clip_flops, cost.clips) == (real.parameters, real.train_flops, 1000)
    assert cost.compute_hours == pytest.approx(1000 * real.train_flops / 5e8 / 3600)
    assert cost.read_hours == pytest.approx(8000 * mask.sum() / 1e9 / 3600)


def test_the_longer_of_computing_and_reading_is_paid_for(tool: Any) -> None:
    config = Config.model_validate(PRESETS["tiny"])
    computing = tool.epoch_cost("tiny", config, options(tool, "--share", "1e-4", "--gb-per-s", "100", "--price", "3"))
    reading = tool.epoch_cost("tiny", config, options(tool, "--share", "1", "--gb-per-s", "0.01", "--price", "3"))
    assert computing.gpu_hours == computing.compute_hours > computing.read_hours
    assert reading.gpu_hours == reading.read_hours > reading.compute_hours
    for cost in (computing, reading):
        assert cost.cost == pytest.approx(3 * cost.gpu_hours)
        assert cost.wall_hours * config.scale.workers == pytest.approx(cost.gpu_hours)


def test_settings_after_the_dashes_change_the_model(tool: Any, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "costs.json"
    flops = []
    for settings in ([], ["--", "--model.embed_dim", "64"]):
        assert tool.main(["--presets", "tiny", "--json", str(file), *settings]) == 0
        (row,) = json.loads(file.read_text())["epochs"]
        flops.append(row["clip_flops"])
    assert flops[0] < flops[1]
    assert "assumed, not measured" in capsys.readouterr().out
    assert tool.main(["--presets", "tiny", "--", "--mask.ration", "0.75"]) == 1
    assert "--mask.ratio" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--share", "0"), ("--share", "1.1"), ("--gb-per-s", "0"), ("--price", "-1")])
def test_an_impossible_assumption_is_refused(tool: Any, words: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        options(tool, *words)


def test_the_table_of_the_readme_is_what_its_command_prints(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "cluster" / "README.md").read_text()
    (command,) = [line for line in text.splitlines() if line.startswith("python tools/bench/epoch_cost.py")]
    assert tool.main(command.split()[2:]) == 0
    sentence, table = capsys.readouterr().out.strip().split("\n", 1)
    assert table in text
    assert "assumed, not measured" in sentence

"""The ingest benchmark on tiny runs: its figures hang together, and its baseline computes what it says."""

import importlib
import json
import time
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import ray
import torch

from neurostorm.ingest import job
from neurostorm.ingest.layouts import LAYOUTS

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The tool with three small kinds of run and a small ball of brain, on the 4 mm grid."""
    monkeypatch.syspath_prepend(TOOLS)
    bench, runs = importlib.import_module("ingest"), importlib.import_module("ingest_runs")
    kinds = {
        "copied": runs.Kind((20, 20, 20), 4.0, (-38, -54, -36), 0.8),
        "finer": runs.Kind((30, 30, 30), 3.0, (-45, -60, -42), 0.72),
        "coarser": runs.Kind((16, 16, 16), 6.0, (45, -60, -42), 2.0, right_to_left=True),
    }
    grid = bench.GRIDS["4mm"]
    centre = np.argwhere(np.ones(grid.shape, bool)) * grid.voxel_mm + grid.origin_mm
    ball = ((centre - (0, -18, 0)) ** 2).sum(axis=1).reshape(grid.shape) < 30**2
    monkeypatch.setattr(bench, "GRID", "4mm")
    monkeypatch.setattr(bench, "KINDS", kinds)
    monkeypatch.setattr(bench, "target_mask", lambda: ball)
    return bench


def test_figures_hang_together(bench, tmp_path, capsys):
    file = tmp_path / "ingest.json"
    options = ["--frames", "9", "12", "8", "--rounds", "2", "--spread-runs", "0", "--folder", str(tmp_path)]
    before = [getattr(owner, name) for owner, name, _ in bench.CLOCKED]
    assert bench.main([*options, "--json", str(file)]) == 0
    assert [getattr(owner, name) for owner, name, _ in bench.CLOCKED] == before
    result = json.loads(file.read_text())
    ratios = [kind["ratio_to_baseline"] for kind in result["kinds"].values()]
    assert result["ratio_to_baseline"] == sorted(ratios)[1] > 0
    assert [kind["stored_frames"] for kind in result["kinds"].values()] == [9, 10, 18]
    for kind in result["kinds"].values():
        assert sum(kind["shares"].values()) == pytest.approx(1)
        assert kind["frames_per_s_per_core"] == pytest.approx(kind["stored_frames"] / kind["ours_s"])
        assert kind["corpus_core_hours"] == pytest.approx(28.65e6 / kind["frames_per_s_per_core"] / 3600)
        assert all(kind["shares"][step] > 0 for step in bench.STEPS if step not in ("space", "time"))
    shares = {name: kind["shares"] for name, kind in result["kinds"].items()}
    assert shares["copied"]["space"] == 0 < min(shares["finer"]["space"], shares["coarser"]["space"])
    assert "times as fast as the released steps" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["ingest.json"]


def test_a_failed_run_leaves_no_clock_behind(bench):
    before = bench.target.read_stored
    with pytest.raises(RuntimeError, match="broken"), bench.clocks(dict.fromkeys(bench.STEPS, 0.0)):
        assert bench.target.read_stored is not before
        raise RuntimeError("broken")
    assert bench.target.read_stored is before


def test_two_cores_are_watched(bench, tmp_path, monkeypatch):
    """Only the spreading counts, and of it the second ingest's."""
    (tmp_path / "run.nii.gz").write_bytes(b"x")
    seen, used_s = [], [5.0]

    def spread(sources):
        time.sleep(0.2)
        used_s[0] += len(sources)  # CPU seconds, by a clock of our own: others use this machine too
        yield from sources

    def ingest(config):
        used_s[0] += 100  # before it spreads anything
        files = sorted(config.ingest.source.iterdir())
        seen.append([LAYOUTS["bids"].parse(PurePosixPath(file.name)).subject for file in files])
        outcomes = [SimpleNamespace(seconds=1.0) for _ in job.map_runs(files)]
        return SimpleNamespace(in_store=len(files), outcomes=outcomes)

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(job, "map_runs", spread)
    monkeypatch.setattr(job, "ingest", ingest)
    monkeypatch.setattr(bench, "_cpu_seconds", lambda: used_s[0])
    found = bench.measure_spread(tmp_path / "run.nii.gz", tmp_path, 3)
    assert [len(subjects) for subjects in seen] == [2, 3] and len(set(seen[1])) == 3
    assert job.map_runs is spread
    assert found["cpu_utilisation"] == pytest.approx(3 / (2 * found["spread_s"]))
    assert found["slot_utilisation"] == pytest.approx(3 / (2 * found["spread_s"]))


def test_the_baseline_resamples_and_rounds(bench, tmp_path):
    """Linear signal on 4 mm comes to twice the voxels and frames, with the released steps' one scale."""
    data = (np.indices((5, 4, 4, 6)).sum(axis=0) * 100 + 100).astype(np.int16)
    image = nibabel.Nifti1Image(data, np.diag([4.0, 4, 4, 1]))
    image.header.set_zooms((4, 4, 4, 1.6))
    nibabel.save(image, tmp_path / "run.nii")
    bench.released_steps(tmp_path / "run.nii", tmp_path / "data.pt")
    saved = torch.load(tmp_path / "data.pt", weights_only=True)
    frames = saved["frames"]
    assert frames.shape == (12, 10, 8, 8) and frames.dtype == torch.int8
    assert frames.abs().max() == 127
    values = frames.float() * saved["scale"]
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    steps = values[3, 1:-1, 3, 3].diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), atol=float(saved["scale"]) * 1.01, rtol=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--frames", "9", "9"], "one number or 3"),
        (["--frames", "1"], "at least 2"),
        (["--rounds", "0"], "at least 1"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_reason(bench, capsys, options, reason):
    with pytest.raises(SystemExit) as end:
        bench.main(options)
    assert end.value.code == 2 and reason in capsys.readouterr().err

"""`tools/bench/corpus.py`: its corpus is the one asked for, its figures hang together, the feed model adds up."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "bench"
SMALL = ["--runs", "120", "--frames", "9000", "--grid", "4mm", "--workers", "2", "--clips-per-worker", "3"]


@pytest.fixture
def tool(monkeypatch):
    """Loader of a tool's module, as from its own folder."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module


@pytest.fixture
def simulate(tool, monkeypatch):
    """The tool, measuring in this process and without the template's mask: both take longer than this module."""
    simulate = tool("corpus")
    monkeypatch.setattr(
        "neurostorm.ingest.resample.template.brain_mask", lambda grid: np.arange(48**3).reshape(grid.shape) % 4
    )
    monkeypatch.setattr(simulate, "in_new_process", lambda function, *arguments: function(*arguments))
    return simulate


def test_the_figures_are_those_of_the_corpus_that_was_asked_for(simulate, tmp_path, capsys):
    file, feed = tmp_path / "simulated.json", tmp_path / "feed.json"
    feed.write_text(json.dumps({"pipeline_clips_per_s": 300, "cores": 2}))
    assert simulate.main([*SMALL, "--slices", "5", "--json", str(file), "--feed", str(feed)]) == 0
    result = json.loads(file.read_text())
    assert (result["runs"], result["frames"]) == (120, 9000)
    assert result["plan_s"] == max(one["plan_s"] for one in result["settings"].values()) > 0
    assert result["slice_s"] == max(one["slowest_slice_s"] for one in result["settings"].values()) > 0
    assert 0 < result["worker_index_mib"] < 10, "mostly the mask, of so few runs"
    assert result["requests_before_first_clip"] < 10, result["requests"]
    assert sum(name.endswith("zarr.json") for name in result["requests"]) == 2, "the store's and its mask's, no run's"
    assert result["driver_mib"] >= result["driver_mib_before"] > 50
    # Two files for a run, a folder's metadata for subjects, five datasets, `runs` and the store, mask and tables.
    assert 240 + result["subjects"] + 6 < result["files"] < 240 + result["subjects"] + 20
    assert result["bytes"] > 9000 * result["voxels"]
    assert result["state_bytes"] < 2000
    plain, mixed = (result["settings"][name]["shares"] for name in ("plain", "mixture"))
    assert list(plain) == [cohort.name for cohort in simulate.COHORTS]
    assert sum(plain.values()) == sum(mixed.values()) == result["settings"]["plain"]["clips"]
    assert mixed["hcp-ya"] > plain["hcp-ya"] and mixed["ukb"] < plain["ukb"]
    shown = capsys.readouterr().out
    assert "120 runs, 9,000 frames" in shown and "8 GPUs at 500 clips/s each need 4,000 clips/s" in shown


def test_the_manifest_is_one_that_the_store_reads_back(simulate):
    table = simulate.manifest(300, 50_000)
    assert sum(table["frames"].to_pylist()) == 50_000 and min(table["frames"].to_pylist()) > 0
    runs = table["run"].to_pylist()
    assert runs == sorted(set(runs)) and len(runs) == 300
    people = set(zip(table["dataset"].to_pylist(), table["subject"].to_pylist(), strict=True))
    assert 230 < len(people) < 250  # 52,874 of 66,000
    assert table.equals(simulate.manifest(300, 50_000))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--runs", "10"], "at least 50 runs"),
        (["--frames", "-1"], "--frames -1: must be above 0"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
        (["--feed", "missing.json"], "missing.json: no `pipeline_clips_per_s`"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_reason(simulate, capsys, options, reason):
    with pytest.raises(SystemExit) as end:
        simulate.main(options)
    assert end.value.code == 2 and reason in capsys.readouterr().err


def test_the_slowest_part_binds_the_feed(tool):
    model = tool("feed_model")
    feed = model.Feed(clip_bytes=5_000_000, clips_per_s_per_core=100, cores=8, network_gb_s=10, storage_gb_s=6)
    assert feed.rate(1) == (800, "cores")
    many = model.Feed(5_000_000, 100, 64, network_gb_s=10, storage_gb_s=6)
    assert many.rate(1) == (1200, "storage")
    assert many.rate(4) == (4 * 10e9 / (1.75 * 5e6), "network")  # each clip comes in 1 + 3/4 times
    assert many.nodes_for(1200) == 1 and many.nodes_for(1201) == 2
    shared = model.Feed(5_000_000, 100, 64, 10, 6, shared_gb_s=20)
    assert shared.rate(100) == (4000, "shared store")
    assert shared.nodes_for(4001) is None
    assert "no number of nodes: shared store" in model.lines(shared, gpus=8, clips_per_s_per_gpu=501)[-1]

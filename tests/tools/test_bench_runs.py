"""The tools that time and compare whole runs: what they ask of the jobs, and what they make of the answers."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from neurostorm.config import Config
from neurostorm.config.presets import PRESETS

THREADS = str(torch.get_num_threads())  # as they are: the model runs in this process
TOOLS = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.fixture
def tool(monkeypatch):
    """Loader of a tool's module, as from its own folder."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module


class Jobs:
    """In place of the jobs: notes what was started, and leaves behind what the real ones leave."""

    def __init__(self, waits):
        self.started, self.waits = [], list(waits)

    def __call__(self, script, *parts):
        flags = [str(part) for part in parts]
        settings = dict(zip(flags[::2], flags[1::2], strict=False))
        self.started.append((Path(script).name, settings))
        if Path(script).name == "pretrain.py":
            self.pretrain(settings)
        if Path(script).name == "sweep.py":
            self.sweep(settings)

    def pretrain(self, settings):
        output, name = Path(settings["--run.output"]), settings["--run.name"]
        (output / name).mkdir(parents=True)
        loss = {"loss/validation": 0.5 if name == "dense" else 0.505, "loss/validation_predicting_mean": 1.0}
        (output / name / "summary.json").write_text(json.dumps(loss))
        client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
        found = client.get_experiment_by_name("neurostorm")
        run = client.create_run(found.experiment_id if found else client.create_experiment("neurostorm"), run_name=name)
        wait = self.waits.pop(0) if self.waits else 0.0
        for step in range(1, int(settings["--train.max_steps"]) + 1):
            slow = 10.0 if step <= 2 else 1.0  # what warms up
            rates = {"speed/clips_per_s": (8 if name == "dense" else 24) / slow, "speed/step_s": slow, "speed/mfu": 0.1}
            for metric, value in {**rates, "data/wait_fraction": wait}.items():
                client.log_metric(run.info.run_id, metric, value, step=step)

    def sweep(self, settings):
        trials = Path(settings["--output"]) / settings["--name"] / "trials"
        for task, metric in (("age", "r"), ("sex", "balanced_accuracy"), ("reid", "map")):
            for fold, value in enumerate((0.4, 0.5, 0.6)):
                folder = trials / f"{task}_linear_1_s{fold}_0"
                folder.mkdir(parents=True)
                (folder / "test.json").write_text(json.dumps({metric: value}))


def flags_are_settings(settings):
    """Every flag of a pretraining is a field of the configuration, with a value that it takes."""
    tree = {name: dict(fields) for name, fields in PRESETS["tiny"].items()}
    for flag, value in settings.items():
        if "." in flag:
            section, field = flag.removeprefix("--").split(".")
            tree.setdefault(section, {})[field] = value.split(",") if "," in value else value
    return Config.model_validate(tree)


def test_the_end_to_end_figures_are_medians_of_warm_steps(tool, monkeypatch, tmp_path, capsys):
    bench, jobs = tool("end_to_end"), Jobs([0.02, 0.05])
    monkeypatch.setattr(bench, "command", jobs)
    file = tmp_path / "figures.json"
    options = ["--store", str(tmp_path / "store"), "--steps", "5", "--warm", "2", "--mixer", "mamba"]
    monkeypatch.setattr("sys.argv", ["end_to_end", *options, "--json", str(file)])
    assert bench.main() == 0
    result = json.loads(file.read_text())
    assert result["dense"]["clips_per_s"] == 8 and result["sparse"]["clips_per_s"] == 24
    assert result["sparse_vs_dense"] == 3 and result["wait_fraction"] == 0.05
    assert "sparse is 3.00 times as fast as dense" in capsys.readouterr().out
    dense, sparse = (flags_are_settings(settings) for name, settings in jobs.started if name == "pretrain.py")
    assert dense.model.mixer == sparse.model.mixer == "mamba"
    assert (dense.model.tokens, dense.model.decoder) == ("dense", "paper")
    assert (sparse.model.tokens, sparse.model.decoder) == ("brain", "light")


def test_steps_that_do_not_suffice_are_refused(tool, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["end_to_end", "--steps", "5", "--warm", "5"])
    with pytest.raises(SystemExit):
        tool("end_to_end").main()
    assert "--warm 5: fewer than --steps 5" in capsys.readouterr().err


def test_learning_is_compared_side_by_side(tool, monkeypatch, tmp_path, capsys):
    compare, jobs = tool("compare_learning"), Jobs([])
    monkeypatch.setattr(compare, "command", jobs)
    file = tmp_path / "figures.json"
    options = ["--store", str(tmp_path / "store"), "--steps", "3", "--output", str(tmp_path / "out"), "--lr", "0.003"]
    monkeypatch.setattr("sys.argv", ["compare_learning", *options, "--json", str(file)])
    assert compare.main() == 0
    result = json.loads(file.read_text())
    assert result["loss_over_dense"] == {"dense": 1, "brain": pytest.approx(1.01), "sparse": pytest.approx(1.01)}
    assert result["sparse"]["age"]["mean"] == pytest.approx(0.5)
    assert result["sparse"]["age"]["standard_error"] == pytest.approx(0.1 / 3**0.5)
    assert "0.500 +- 0.058" in capsys.readouterr().out
    sides = [flags_are_settings(settings) for name, settings in jobs.started if name == "pretrain.py"]
    assert [(side.model.tokens, side.model.decoder) for side in sides] == [
        ("dense", "paper"), ("brain", "paper"), ("brain", "light"),
    ]  # fmt: skip
    settings = {(side.mask.kind, side.mask.ratio, side.train.max_steps, side.train.lr) for side in sides}
    assert settings == {("window-tube", 0.75, 3, 0.003)}


def test_a_trace_and_a_table_show_where_the_time_goes(tool, monkeypatch, tmp_path, capsys):
    out = tmp_path / "trace.json"
    options = ["--preset", "tiny", "--geometry", "sparse", "--threads", THREADS, "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["profile_step", *options])
    profiler = tool("profile_step")
    assert profiler.main() == 0
    assert len(json.loads(out.read_text())["traceEvents"]) > 100
    assert "aten::" in capsys.readouterr().out


def test_attention_is_timed_by_every_way_that_there_is(tool, monkeypatch, tmp_path, capsys):
    file = tmp_path / "attention.json"
    options = ["--shapes", "3x16x2x8", "--rounds", "1", "--threads", THREADS, "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["attention", *options])
    bench = tool("attention")
    assert bench.main() == 0
    (measured,) = json.loads(file.read_text())["shapes"]
    assert measured["shape"] == [3, 16, 2, 8] and list(measured["sides"]) == list(bench.SIDES)
    assert all(measured["sides"][side]["ms"] > 0 for side in ("auto", "math"))
    assert "no backward pass on a CPU" in measured["sides"]["flex"]["reason"]
    assert "math" in capsys.readouterr().out


def test_a_way_that_computes_something_else_is_not_timed(tool, monkeypatch):
    bench = tool("attention")
    plain = bench.scaled_dot_product_attention
    monkeypatch.setattr(bench, "SIDES", ("auto",))
    monkeypatch.setattr(bench, "way_of", lambda side, qkv, present: lambda: plain(*qkv))  # without the key mask
    options = bench.argparse.Namespace(device="cpu", dtype="fp32", rounds=1)
    assert "differs from the others" in bench.measure((3, 16, 2, 8), options)["auto"]["reason"]


def test_tables_of_masked_clips_are_timed_both_ways(tool, monkeypatch, tmp_path):
    file = tmp_path / "tables.json"
    options = ["--preset", "tiny", "--batches", "1", "2", "--masks", "6", "--threads", THREADS, "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["tables", *options])
    assert tool("tables").main() == 0
    rows = json.loads(file.read_text())["batches"]
    assert [row["clips"] for row in rows] == [1, 2]
    for row in rows:
        assert min(row["host_ms"], row["device_ms"], row["count_ms"]) > 0
        assert all(share >= 1 for share in row["slots"]) and 1 <= row["shapes"] <= 6

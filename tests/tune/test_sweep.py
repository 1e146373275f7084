"""The sweep's decisions without Ray: who is selected of a cell, and which folder it may go on in."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.config import Config, ConfigError
from neurostorm.downstream.labels import LabelError
from neurostorm.downstream.splits import Split
from neurostorm.downstream.tasks.task import Age, Task
from neurostorm.downstream.trial import RESULT, TEST, Trial
from neurostorm.io.object_store import ObjectStoreError
from neurostorm.runtime.run_folder import keep_config
from neurostorm.store import StoreError
from neurostorm.tune import sweep as module
from neurostorm.tune.logbook import Logbook
from neurostorm.tune.sweep import select

SPLIT = Split(("d/a",), ("d/b",), ("d/c",), {})


class ByError(Age):
    """Age, selected by what is better when it is smaller."""

    metric = "mae"


def trial_of(folder: Path, task: Task, *, lr: float = 1e-3, seed: int = 0, method: str = "attention") -> Trial:
    config = Config.model_validate(
        {"run": {"output": folder, "name": "s", "seed": seed}, "adapt": {"method": method, "lr": lr}}
    )
    return Trial(config, task, SPLIT, None, folder / "cache", folder / "s" / "trials", "data")


def keep(trial: Trial, value: float | None, *, done: bool = True, tested: bool = False) -> None:
    """What a training leaves, with this value of the task's metric; None leaves nothing."""
    if value is None:
        return
    trial.folder.mkdir(parents=True, exist_ok=True)
    outcome = {"validation": {trial.task.metric: value}, "chosen": {"epoch": 1.0}, "parameters": 1, "seconds": 1.0}
    (trial.folder / RESULT).write_text(json.dumps(outcome | {"done": done}))
    if tested:
        (trial.folder / TEST).write_text("{}")


@pytest.mark.parametrize(("task", "best"), [(Age(), 1), (ByError(), 2)])
def test_of_each_cell_the_best_on_validation_is_selected(tmp_path: Path, task: Task, best: int) -> None:
    first = [trial_of(tmp_path, task, lr=lr) for lr in (0.1, 0.2, 0.3, 0.4, 0.5)]
    second = [trial_of(tmp_path, task, lr=lr, seed=1) for lr in (0.1, 0.2)]
    third = [trial_of(tmp_path, task, seed=2)]
    for trial, value in zip(first, (0.5, 0.9, 0.1, float("nan"), None), strict=True):
        keep(trial, value)
    for trial in second:
        keep(trial, 0.3)  # a tie
    keep(third[0], 0.9, done=False)  # it failed after its first epoch
    assert select([*first, *second, *third]) == [best, 5]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.none() | st.floats(-1, 1)), min_size=1, max_size=8))
def test_selection_agrees_with_brute_force(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, float | None]]
) -> None:
    folder = tmp_path_factory.mktemp("sweep")
    trials = [trial_of(folder, Age(), seed=seed, lr=(n + 1) / 100) for n, (seed, _) in enumerate(drawn)]
    for trial, (_, value) in zip(trials, drawn, strict=True):
        keep(trial, value)
    expected = []
    for seed in dict.fromkeys(seed for seed, _ in drawn):
        known = [(value, -n) for n, (own, value) in enumerate(drawn) if own == seed and value is not None]
        expected += [-max(known)[1]] if known else []
    assert select(trials) == expected


def test_one_that_an_earlier_start_selected_gives_way_to_a_better_one(tmp_path: Path) -> None:
    """It had failed then. Two of a cell must not be selected, or there is no report."""
    trials = [trial_of(tmp_path, Age(), lr=lr) for lr in (0.1, 0.2)]
    keep(trials[0], 0.5, tested=True)
    keep(trials[1], 0.9)
    tags: list[tuple[int, str, str]] = []

    class Book(Logbook):
        def tracker(self, index: int) -> Any:
            return type("Tracker", (), {"tag": lambda self, name, value: tags.append((index, name, value))})()

    book = Book(trials, "parent", tmp_path)
    module._unselect(trials, select(trials), book)
    assert tags == [(0, "neurostorm.selected", "false")]
    module._unselect(trials, [0], book)
    assert len(tags) == 1


def test_trials_of_other_data_or_weights_are_not_mixed_into_a_cell(tmp_path: Path) -> None:
    trial = trial_of(tmp_path, Age())
    module._refuse_changed([trial])
    keep(trial, 0.5)
    keep(trial_of(tmp_path, Age(), seed=7), 0.5)  # of a cell that this start does not have
    module._refuse_changed([trial])
    with pytest.raises(
        ConfigError, match=r"1 trial\(s\) of the same cells, for example age_attention_1_s0_.*run\.name"
    ):
        module._refuse_changed([replace(trial, data="the store was made anew")])


def test_a_folder_holds_one_sweep(tmp_path: Path) -> None:
    def config(**sections: dict[str, Any]) -> Config:
        tree: dict[str, dict[str, Any]] = {"run": {"output": tmp_path, "name": "s"}, "sweep": {"tasks": ("age",)}}
        for section, fields in sections.items():
            tree.setdefault(section, {}).update(fields)
        return Config.model_validate(tree)

    def start(**sections: dict[str, Any]) -> None:
        module._refuse_other(config(**sections))
        keep_config(config(**sections), "sweep")

    start()
    start()
    start(sweep={"tasks": ("age", "sex"), "replicates": 9}, adapt={"cpus": 2.0})
    with pytest.raises(ConfigError, match=r"holds a sweep with other settings: split\.test: 0\.2 -> 0\.3; choose"):
        start(split={"test": 0.3})
    with pytest.raises(ConfigError, match=r"sweep\.resume=false: .* already holds a sweep"):
        start(sweep={"resume": False})
    (tmp_path / "s" / "config.yaml").write_text("# written by jobs/sweep.py\nadapt: {nonsense: 1}")
    with pytest.raises(ConfigError, match=r"config\.yaml is of another version or damaged"):
        start()


@pytest.mark.parametrize(
    ("error", "tried_again"),
    [
        (LabelError("no such column"), False),
        (ConfigError("no"), False),
        (StoreError("damaged"), False),
        (ObjectStoreError("no answer"), True),
        (ValueError("x"), True),
    ],
)
def test_an_error_that_a_second_try_meets_again_is_not_raised_to_tune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, tried_again: bool
) -> None:
    """What a trial raises Tune tries again; what it reports Tune takes for its end."""

    def train(trial: Trial, tell: Any) -> None:
        raise error

    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "train_trial", train)
    monkeypatch.setattr(module.tune, "report", reported.append)
    trials = [trial_of(tmp_path, Age())]
    if tried_again:
        with pytest.raises(type(error)):
            module._trainable({"index": 0}, trials)
        assert not reported
    else:
        module._trainable({"index": 0}, trials)
        assert reported[0]["reason"] == str(error) and "Traceback" in reported[0]["refused"]

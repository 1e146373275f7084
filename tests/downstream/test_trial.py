"""Trials: every method runs, what was planted is found, the same again is the same, and test data stay unread."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neurostorm.config import ConfigError
from neurostorm.downstream import trial as trial_module
from neurostorm.downstream.embed.parts import PARTS
from neurostorm.downstream.methods import fitting
from neurostorm.downstream.methods.method import METHODS
from neurostorm.downstream.statistics.reid import ReidError
from neurostorm.downstream.trial import (
    PREDICTIONS,
    RESULT,
    SPLIT,
    TEST,
    TRAINED,
    Trial,
    read_outcome,
    settle_trial,
    train_trial,
)
from neurostorm.downstream.trial import test_trial as run_test  # its own name would be taken for a test
from neurostorm.store import StoreError, read_manifest
from tests.people_store import CLIP_FRAMES, age_of, sex_of, write_model
from tests.people_trials import make_trial, people_config

METRICS = {
    "age": {"mae", "rmse", "r", "r2", "chance"},
    "sex": {"balanced_accuracy", "accuracy", "macro_f1", "auroc", "chance"},
    "state": {"balanced_accuracy", "accuracy", "macro_f1", "auroc", "chance"},
    "reid": {"rank1", "map", "gallery", "chance"},
}
Make = Callable[..., Trial]


@pytest.fixture(scope="module")
def trial_in(tmp_path_factory: pytest.TempPathFactory, people_store: Path) -> Make:
    """`trial_in(output, task, method, **settings)`: a trial of the people store; models and features are shared."""
    model = write_model(tmp_path_factory.mktemp("model"), people_store)
    cache = tmp_path_factory.mktemp("cache")

    def make(output: Path, task: str, method: str, *, store: Path = people_store, seed: int = 0, **adapt: Any) -> Trial:
        (output / "cache").parent.mkdir(parents=True, exist_ok=True)
        if store == people_store and not (output / "cache").exists():
            (output / "cache").symlink_to(cache)
        config = people_config(
            store,
            output,
            model,
            run={"seed": seed},
            task={"name": task, "clip_frames": CLIP_FRAMES},
            adapt={"method": method, **adapt},
        )
        return make_trial(config)

    return make


def rows(trial: Trial) -> pa.Table:
    return pq.read_table(trial.folder / PREDICTIONS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_metrics_of_the_task(tmp_path: Path, trial_in: Make, method: str) -> None:
    """Tasks of all kinds in turn; trained on 8 people, chosen on 4, tested on the 4 others."""
    task = ("age", "sex", "state")[list(METHODS).index(method) % 3]
    trial = trial_in(tmp_path, task, method)
    outcome, measured = train_trial(trial), run_test(trial)
    assert set(measured) == METRICS[task] == set(outcome.validation)
    assert all(np.isfinite(value) for value in (*measured.values(), *outcome.validation.values()))
    assert list(outcome.chosen) == ["epoch" if trial.method.by_gradient else "strength"]
    assert (outcome.parameters > 0) == (method != "constant")
    assert (trial.folder / TRAINED).is_file() == trial.method.by_gradient
    tested = rows(trial)
    assert set(tested["subject"].to_pylist()) == set(trial.split.test)
    assert len(tested) == (16 if task == "state" else 4)  # each of the four events of a run, or people
    assert json.loads((trial.folder / SPLIT).read_text())["sha256"] == trial.split.sha256


@pytest.mark.parametrize("method", ["fc", "linear", "attention", "full", "bnt"])
def test_people_are_identified_by_every_kind_of_method(tmp_path: Path, trial_in: Make, method: str) -> None:
    trial = trial_in(tmp_path, "reid", method)
    outcome, measured = train_trial(trial), run_test(trial)
    released = {"same_scan_released_rank1", "same_scan_released_map"}
    sees_clips = trial.method.sees in ("tokens", "clips")
    assert set(measured) == METRICS["reid"] | (released if sees_clips else set())
    assert set(outcome.validation) == METRICS["reid"]
    assert measured["gallery"] == 4 and measured["chance"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    tested = rows(trial)
    assert tested.column_names == ["run", "subject", "session", "embedding"]
    assert sorted(tested["session"].to_pylist()) == ["1"] * 4 + ["2"] * 4
    assert np.isfinite(np.array(tested["embedding"].to_pylist())).all()


@pytest.mark.parametrize(
    ("task", "method", "metric", "least"),
    [
        ("sex", "fc", "balanced_accuracy", 1.0),
        ("sex", "linear", "balanced_accuracy", 1.0),
        ("state", "roi", "balanced_accuracy", 1.0),
        ("state", "linear", "balanced_accuracy", 1.0),
        ("age", "fc", "r", 0.7),
        ("reid", "fc", "rank1", 0.99),
        ("reid", "linear", "map", 0.8),
    ],
)
def test_what_was_planted_is_found(
    tmp_path: Path, trial_in: Make, task: str, method: str, metric: str, least: float
) -> None:
    trial = trial_in(tmp_path, task, method)
    train_trial(trial)
    assert run_test(trial)[metric] >= least


def test_what_was_not_planted_is_not_found(tmp_path: Path, trial_in: Make) -> None:
    """Head motion tells the diagnosis, of which connectivity knows nothing."""
    found = {}
    for task, method in (("diagnosis", "motion"), ("diagnosis", "fc"), ("sex", "motion")):
        trial = trial_in(tmp_path, task, method)
        train_trial(trial)
        found[task, method] = run_test(trial)["balanced_accuracy"]
    assert found["diagnosis", "motion"] == 1
    assert max(found["diagnosis", "fc"], found["sex", "motion"]) < 1


def test_predictions_say_what_was_predicted_of_whom(tmp_path: Path, trial_in: Make) -> None:
    age = trial_in(tmp_path, "age", "fc")
    train_trial(age)
    measured, table = run_test(age), rows(age)
    assert table.column_names == ["unit", "subject", "target", "prediction", "scores"]
    assert table["unit"] == table["subject"] and table["scores"].null_count == 4
    numbers = [int(subject[-3:]) for subject in table["subject"].to_pylist()]
    assert table["target"].to_pylist() == [age_of(number) for number in numbers]
    error = np.abs(table["target"].to_numpy() - table["prediction"].to_numpy()).mean()
    assert measured["mae"] == pytest.approx(error)
    sex = trial_in(tmp_path, "sex", "fc")
    train_trial(sex)
    measured, table = run_test(sex), rows(sex)
    assert sex.classes == ("F", "M")
    numbers = [int(subject[-3:]) for subject in table["subject"].to_pylist()]
    assert table["target"].to_pylist() == [sex_of(number) for number in numbers]
    scores = np.array(table["scores"].to_pylist())
    np.testing.assert_allclose(scores.sum(1), 1)
    assert table["prediction"].to_pylist() == [sex.classes[number] for number in scores.argmax(1)]
    assert measured["accuracy"] == np.mean(table["target"].to_numpy() == table["prediction"].to_numpy())


def predicted(trial: Trial) -> tuple[list[str], np.ndarray]:
    """The test units and what is predicted of them: targets, or scores of the classes."""
    table = rows(trial)
    return table["unit"].to_pylist(), np.array(table["scores" if trial.classes else "prediction"].to_pylist())


EPOCH_ZERO = {"lr": 1e-9, "epochs": 1, "clips_per_unit": 99}  # nothing moves, and all clips of a unit validate


@pytest.mark.parametrize(
    ("task", "pool", "method"),
    [
        ("age", "mean", "full"),
        ("age", "coupling", "full"),
        ("age", "covariance", "random_full"),
        ("sex", "places", "full"),
        ("sex", "coupling", "random_full"),
        ("sex", "covariance", "full"),
        ("state", "auto", "full"),
        ("state", "mean", "random_full"),
    ],
)
def test_a_method_on_clips_begins_where_the_linear_probe_of_its_network_ends(
    tmp_path: Path, trial_in: Make, task: str, pool: str, method: str
) -> None:
    probe = trial_in(tmp_path, task, method.replace("full", "linear"), pool=pool)
    begun = trial_in(tmp_path, task, method, pool=pool, **EPOCH_ZERO)
    expected, found = train_trial(probe).validation, train_trial(begun).validation
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    expected, found = run_test(probe), run_test(begun)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    (units, of_probe), (same_units, of_begun) = predicted(probe), predicted(begun)
    assert units == same_units and np.ptp(of_probe, 0).min() > 0.01, "it tells people apart"
    np.testing.assert_allclose(of_begun, of_probe, rtol=1e-3, atol=1e-4)


def test_an_epoch_that_harms_is_not_kept(tmp_path: Path, trial_in: Make) -> None:
    probe = trial_in(tmp_path, "age", "linear")
    harmed = trial_in(
        tmp_path, "age", "full", lr=0.5, backbone_lr_fraction=1.0, epochs=3, clips_per_unit=99, batch_clips=32
    )
    told: dict[int, dict[str, float]] = {}
    outcome = train_trial(harmed, lambda epoch, measured, _: told.update({epoch: measured}))
    assert list(told) == [0, 1, 2, 3] and "loss" not in told[0]
    assert max(told[epoch]["r"] for epoch in (1, 2, 3)) < told[0]["r"] - 0.1, "they do harm"
    assert outcome.chosen == {"epoch": 0}
    train_trial(probe)
    assert run_test(harmed) == pytest.approx(run_test(probe), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("method", ["full", "tpt"])
@pytest.mark.parametrize("pool", ["auto", "coupling"])
def test_identification_too_begins_with_an_epoch_zero(tmp_path: Path, trial_in: Make, method: str, pool: str) -> None:
    trial = trial_in(tmp_path, "reid", method, pool=pool, **EPOCH_ZERO)
    told: dict[int, dict[str, float]] = {}
    outcome = train_trial(trial, lambda epoch, measured, _: told.update({epoch: measured}))
    assert list(told) == [0, 1] and "loss" not in told[0] and np.isfinite(told[1]["loss"])
    best = 0 if told[0]["map"] >= told[1]["map"] else 1
    assert outcome.chosen == {"epoch": best} and outcome.validation["map"] == told[best]["map"]
    assert set(run_test(trial)) >= METRICS["reid"]


def test_where_training_people_are_of_one_class_it_begins_from_nothing_and_says_so(
    tmp_path: Path, trial_in: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trial = trial_in(tmp_path, "sex", "full", **EPOCH_ZERO)
    women = tuple(subject for subject in trial.split.train if sex_of(int(subject[-3:])) == "F")
    trial = replace(trial, split=trial.split.with_train(women))
    train_trial(trial), run_test(trial)
    assert "full starts from nothing: training units of one class" in caplog.text
    np.testing.assert_allclose(predicted(trial)[1], 0.5, atol=1e-3)


def test_a_validation_of_few_clips_does_not_change_where_it_begins(tmp_path: Path, trial_in: Make) -> None:
    """The probe is fitted to all clips, and all of them test, however many an epoch looks at."""
    probe = trial_in(tmp_path, "sex", "linear", pool="places")
    begun = trial_in(tmp_path, "sex", "full", pool="places", **(EPOCH_ZERO | {"clips_per_unit": 1}))
    train_trial(probe), train_trial(begun), run_test(probe), run_test(begun)
    np.testing.assert_allclose(predicted(begun)[1], predicted(probe)[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["linear", "attention", "full", "tpt", "bnt"])
def test_the_same_trial_gives_the_same_bits(tmp_path: Path, trial_in: Make, method: str) -> None:
    found = []
    for name in ("one", "two"):
        trial = trial_in(tmp_path / name, "sex", method)
        outcome, measured = train_trial(trial), run_test(trial)
        files = [
            (trial.folder / file).read_bytes() for file in (PREDICTIONS, TRAINED) if (trial.folder / file).exists()
        ]
        found.append((trial.key, replace(outcome, seconds=0), measured, files))
    assert found[0] == found[1]


def test_what_is_done_is_not_done_again(tmp_path: Path, trial_in: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = trial_in(tmp_path, "sex", "attention")
    assert read_outcome(trial) is None and settle_trial(trial) is None
    with pytest.raises(FileNotFoundError, match=r"result\.json is not there: train the trial first"):
        run_test(trial)
    outcome, measured = train_trial(trial), run_test(trial)
    before = {name: (trial.folder / name).stat().st_mtime_ns for name in (RESULT, TEST, PREDICTIONS, TRAINED)}
    monkeypatch.setattr(fitting, "fit", None)
    monkeypatch.setattr(fitting, "predict", None)
    assert train_trial(trial) == outcome and run_test(trial) == measured
    assert before == {name: (trial.folder / name).stat().st_mtime_ns for name in before}


def test_a_stopped_training_keeps_its_best_epoch_once_it_is_settled(tmp_path: Path, trial_in: Make) -> None:
    """Stopped after its second epoch: unfinished, until somebody says that this is its result."""
    trial = trial_in(tmp_path, "sex", "attention", epochs=5)
    seen = []

    class StopHere(Exception):
        pass

    def stop(epoch: int, measured: dict[str, float], state: Any) -> None:
        seen.append(measured["balanced_accuracy"])
        if epoch == 2:
            raise StopHere

    with pytest.raises(StopHere):
        train_trial(trial, stop)
    assert read_outcome(trial) is None
    with pytest.raises(FileNotFoundError):
        run_test(trial)
    settled = settle_trial(trial)
    assert settled is not None and settled == read_outcome(trial) == train_trial(trial)
    assert settled.validation["balanced_accuracy"] == max(seen) and set(settled.validation) == METRICS["sex"]
    assert settled.chosen["epoch"] == 1 + seen.index(max(seen))
    assert set(run_test(trial)) == METRICS["sex"]


def test_the_key_names_what_a_result_follows_from(tmp_path: Path, trial_in: Make) -> None:
    trial = trial_in(tmp_path, "sex", "full")

    def key(**adapt: Any) -> str:
        config = trial.config.model_copy(update={"adapt": trial.config.adapt.model_copy(update=adapt)})
        return replace(trial, config=config).key

    assert trial.key.startswith("sex_full_1_s0_") and trial.folder.name == trial.key
    for free in ({"cpus": 2.0}, {"threads": 2}, {"gpus": 0.5}, {"cache": tmp_path}, {"prompts": 7}, {"parcels": 9}):
        assert key(**free) == trial.key, free
    changed = [key(pool="mean"), key(directions=3), key(strengths=(1.0,)), key(clips_per_unit=1)]
    changed += [key(lr=0.1), key(weight_decay=0.5), key(epochs=3), key(backbone_lr_fraction=1.0), key(fraction=0.5)]
    backbone = trial.backbone
    assert backbone is not None
    smaller = trial.split.with_train(trial.split.train[1:])
    later = trial.config.model_copy(update={"run": trial.config.run.model_copy(update={"seed": 1})})
    changed += [
        replace(trial, split=smaller).key,
        replace(trial, data="other labels or runs").key,
        replace(trial, backbone=replace(backbone, key="other weights")).key,
        replace(trial, config=later).key,
    ]
    assert len({trial.key, *changed}) == 1 + len(changed)
    column = trial_in(tmp_path, "phenotype:age", "motion")
    assert column.key.startswith("phenotype-age_motion_1_s0_")


@pytest.mark.parametrize("method", ["fc", "bnt", "motion", "linear", "attention", "full"])
def test_training_does_without_the_data_of_test_subjects(
    tmp_path: Path, people_store: Path, trial_in: Make, method: str
) -> None:
    """Their runs, and what was computed of them, are gone while it trains: it does not notice. The test does."""
    store = tmp_path / "store"
    shutil.copytree(people_store, store)
    trial = trial_in(tmp_path / "out", "sex", method, store=store)
    for subject in trial.split.test:
        shutil.rmtree(store / "runs" / subject)
        for parts in (tmp_path / "out" / "cache").glob(f"tokens/*/{PARTS}/{subject}"):
            shutil.rmtree(parts)
    outcome = train_trial(trial)
    assert outcome == read_outcome(trial)
    with pytest.raises((StoreError, OSError)):
        run_test(trial)
    assert not (trial.folder / TEST).exists()


def test_a_run_that_stands_in_two_sessions_identifies_nobody(
    tmp_path: Path, people_store: Path, trial_in: Make
) -> None:
    store = tmp_path / "store"
    shutil.copytree(people_store, store)
    manifest = read_manifest(store)
    hashes = [value[:32] + "1" + value[33:] for value in manifest["source_sha256"].to_pylist()]
    column = manifest.column_names.index("source_sha256")
    pq.write_table(manifest.set_column(column, "source_sha256", pa.array(hashes)), store / "manifest.parquet")
    with pytest.raises(ReidError, match=r"runs runs/people/\S+ and runs/people/\S+ have equal source_sha256"):
        train_trial(trial_in(tmp_path / "out", "reid", "fc", store=store))


def test_a_store_that_changed_since_it_was_prepared_is_refused(tmp_path: Path, trial_in: Make) -> None:
    trial = replace(trial_in(tmp_path, "sex", "fc"), data="of other runs")
    with pytest.raises(ConfigError, match=r"runs, labels or clips of sex are not those.*another run\.name"):
        train_trial(trial)


@pytest.mark.parametrize("pool", ["mean", "places", "coupling", "covariance"])
def test_the_numbers_that_are_trained_are_counted(tmp_path: Path, trial_in: Make, pool: str) -> None:
    trial = trial_in(tmp_path, "sex", "tpt", pool=pool, epochs=1)
    problem, train, _, _ = trial_module._problem(trial, with_test=False)
    network = fitting._trainer(problem, train).network
    assert train_trial(trial).parameters == network.trainable_count

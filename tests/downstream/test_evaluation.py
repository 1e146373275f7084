"""An evaluation on a store: labels that match, clips as asked for, and splits that part no subject and no family."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from neurostorm.config import ConfigError, SplitConfig, TaskConfig
from neurostorm.downstream.cohort import open_cohort
from neurostorm.downstream.evaluation import Evaluation, open_evaluation, split_of, task_of
from neurostorm.downstream.splits import PARTS, Split, SplitError, save_split
from neurostorm.downstream.tasks.find import find_task
from neurostorm.downstream.tasks.task import REGISTRY
from neurostorm.store import Grid, create_store, run_path, write_manifest, write_participants, write_run

PEOPLE = tuple(f"sub-{number:02d}" for number in range(24))
FAMILY = {f"d/{name}": str(number // 3) for number, name in enumerate(PEOPLE[:12])}  # four of three, the rest alone
SITE = {f"d/{name}": "ABC"[number % 3] for number, name in enumerate(PEOPLE)}
SEX = {f"d/{name}": "FM"[number % 2] for number, name in enumerate(PEOPLE)}
SCHEMES: list[dict[str, Any]] = [{"scheme": "holdout"}, {"scheme": "kfold", "folds": 4}, {"scheme": "site"}]


def add_run(store: Path, name: str, frames: int, task: str, events: list[list[Any]]) -> None:
    values = np.random.default_rng(len(name)).integers(-9, 9, (frames, 8), np.int8)
    write_run(
        store, run_path("d", name, f"task-{task}"), frames=values, mean=np.ones(8, np.float32),
        std=np.ones(8, np.float32),
        attributes={
            "session": "", "task": task, "run_label": "", "entities": {"task": task}, "source": f"{name}.nii",
            "source_sha256": f"{name}{task}", "source_tr_s": 0.8, "source_frames": frames, "tsnr_median": 50.0,
            "clipped_fraction": 0.0, "coverage": 1.0, "global_mean": 100.0, "global_std": 1.0, "events": events,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 subjects at rest (25 frames) with age, sex, site and family; every other one has a run with events too."""
    path = tmp_path_factory.mktemp("evaluation") / "store.zarr"
    grid = Grid("box", (2, 2, 2), 4.0, (0.0, 0.0, 0.0))
    create_store(path, grid=grid, mask=np.ones(grid.shape, bool), tr_s=0.8, recipe="test")
    for name in PEOPLE:
        add_run(path, name, 25, "rest", [])
    for name in PEOPLE[::2]:
        add_run(path, name, 60, "tapping", [[1.0, 8.0, "tap"], [12.0, 8.0, "still"]])
    write_manifest(path)
    of_all = [f"d/{name}" for name in PEOPLE]
    table = {
        "dataset": ["d"] * 24, "participant_id": list(PEOPLE), "age": [20.0 + n for n in range(24)],
        "sex": [SEX[name] for name in of_all], "site": [SITE[name] for name in of_all],
        "family_id": [FAMILY.get(name) for name in of_all], "nobody": ["x", *[None] * 23],
    }  # fmt: skip
    write_participants(path, pa.table(table))
    return path


def opened(store: Path, name: str = "age", split: dict[str, Any] | None = None, **task: Any) -> Evaluation:
    settings = TaskConfig.model_validate({"store": store, "name": name, **task})
    return open_evaluation(
        find_task(name, settings.target_column), settings, SplitConfig.model_validate(split or {}), None
    )


def parts_of(split: Split) -> list[set[str]]:
    return [set(getattr(split, part)) for part in PARTS]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme["scheme"])
@pytest.mark.parametrize("name", ["age", "sex", "state"])
def test_no_subject_and_no_family_is_in_two_parts(store: Path, scheme: dict[str, Any], name: str) -> None:
    chosen = {**scheme, "group_column": "family_id"}
    evaluation, settings = opened(store, name, chosen), SplitConfig(**chosen)
    seen = set()
    for seed in range(4):
        split = split_of(evaluation, settings, seed=seed)
        parts = parts_of(split)
        families = [{FAMILY.get(subject, f"alone {subject}") for subject in part} for part in parts]
        for one, two in itertools.combinations(range(3), 2):
            assert not parts[one] & parts[two] and not families[one] & families[two]
        assert all(parts) and set().union(*parts) <= set(evaluation.subjects)
        assert split.facts["group_column"] == "family_id"
        seen.add(split.sha256)
    assert len(seen) > 1


def test_folds_of_successive_seeds_part_the_subjects(store: Path) -> None:
    evaluation, settings = opened(store), SplitConfig(scheme="kfold", folds=4, group_column=None)
    for first in (0, 4):
        tested = [split_of(evaluation, settings, seed=seed).test for seed in range(first, first + 4)]
        assert sorted(subject for test in tested for subject in test) == list(evaluation.subjects)
    assert split_of(evaluation, settings, seed=4).test != split_of(evaluation, settings, seed=0).test


def test_the_whole_site_tests_and_each_in_its_turn(store: Path) -> None:
    chosen = {"scheme": "site"}
    evaluation, settings = opened(store, split=chosen), SplitConfig(**chosen)
    for seed, site in enumerate("ABCA"):
        split = split_of(evaluation, settings, seed=seed)
        assert set(split.test) == {subject for subject in SITE if SITE[subject] == site}
        assert {*split.train, *split.validation} == {subject for subject in SITE if SITE[subject] != site}


def test_only_sites_with_a_labelled_subject_take_a_turn(store: Path, tmp_path: Path) -> None:
    chosen = {"scheme": "site", "site_column": "place"}
    rows = ["participant_id,age,place", *[f"{name},{n},{'QRS'[n % 3]}" for n, name in enumerate(PEOPLE)]]
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(row.replace(row.split(",")[1], "n/a") if row.endswith("Q") else row for row in rows))
    evaluation = opened(store, split=chosen, labels=file)
    tested = [split_of(evaluation, SplitConfig(**chosen), seed=seed).test for seed in range(3)]
    assert tested[0] == tested[2] != tested[1] and len(tested[0]) == 8


def test_a_site_column_without_a_value_is_refused(store: Path, tmp_path: Path) -> None:
    chosen = {"scheme": "site", "site_column": "nobody"}
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(["participant_id,age", *[f"{name},{n}" for n, name in enumerate(PEOPLE) if n]]))
    evaluation = opened(store, split=chosen, labels=file)
    with pytest.raises(ConfigError, match=r"split.site_column=nobody: no subject of the task has a value"):
        split_of(evaluation, SplitConfig(**chosen), seed=0)


def test_smaller_shares_of_the_training_subjects_lie_inside_larger_ones(store: Path) -> None:
    evaluation, settings = opened(store, "sex"), SplitConfig()
    whole = split_of(evaluation, settings, seed=3)
    inside = set(whole.train)
    for fraction in (0.75, 0.5, 0.25):
        split = split_of(evaluation, settings, seed=3, fraction=fraction)
        assert (split.validation, split.test) == (whole.validation, whole.test)
        assert set(split.train) < inside and split.facts["fraction"] == fraction
        assert len(split.train) == round(fraction * len(whole.train))
        assert {SEX[subject] for subject in split.train} == {"F", "M"}
        inside = set(split.train)


def test_parts_are_balanced_by_the_label_and_by_further_columns(store: Path) -> None:
    chosen = {"test": 0.25, "validation": 0.25, "strata_columns": ("site",)}
    evaluation = opened(store, "sex", chosen)
    for seed in range(3):
        split = split_of(evaluation, SplitConfig(**chosen), seed=seed)
        assert sorted((SEX[subject], SITE[subject]) for subject in split.test) == sorted(
            (sex, site) for sex in "FM" for site in "ABC"
        )


def test_a_split_is_a_function_of_the_seed_unless_the_settings_give_one(store: Path) -> None:
    evaluation = opened(store)
    free = [split_of(evaluation, SplitConfig(), seed=seed).sha256 for seed in (0, 1, 0)]
    assert free[0] == free[2] != free[1]
    fixed = [split_of(evaluation, SplitConfig(seed=1), seed=seed).sha256 for seed in (0, 1)]
    assert fixed == [free[1], free[1]]


def test_a_split_that_was_kept_is_used_as_it_is_and_an_edited_one_refused(store: Path, tmp_path: Path) -> None:
    names = [f"d/{name}" for name in PEOPLE]
    kept = Split(tuple(names[:3]), tuple(names[3:5]), tuple(names[5:8]), {"scheme": "by hand"})
    file = tmp_path / "split.json"
    save_split(file, kept)
    evaluation = opened(store)
    for seed in (0, 1):
        split = split_of(evaluation, SplitConfig(file=file), seed=seed)
        assert (split.sha256, split.facts["scheme"]) == (kept.sha256, "by hand")
    of_events = split_of(opened(store, "state"), SplitConfig(file=file), seed=0)
    assert of_events.test == ("d/sub-06",), "of the kept test subjects one has events"
    family = {"file": file, "group_column": "family_id"}
    with pytest.raises(SplitError, match="group 1 is in validation and its d/sub-05 in test"):
        split_of(opened(store, split=family), SplitConfig(**family), seed=0)
    text = json.loads(file.read_text())
    text["test"].append(text["train"].pop())
    file.write_text(json.dumps(text))
    with pytest.raises(SplitError, match="was edited"):
        split_of(evaluation, SplitConfig(file=file), seed=0)


def test_what_did_not_match_is_said(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.tsv"
    rows = [f"{name}\t{30 + n}" for n, name in enumerate(PEOPLE[:20])]
    file.write_text("\n".join(["participant_id\tage", *rows, "sub-99\t31", "sub-20\tn/a"]) + "\n")
    evaluation = opened(store, labels=file)
    assert evaluation.subjects == tuple(f"d/{name}" for name in PEOPLE[:20])
    assert evaluation.examples.targets.tolist() == [30.0 + n for n in range(20)]
    assert evaluation.lines[0] == "20 of 24 subject(s) of the store have a value"
    said = "\n".join(evaluation.lines)
    assert "3 subject(s) of the store have no row in the table: d/sub-21, d/sub-22, d/sub-23" in said
    assert "1 subject(s) have a row without a value: d/sub-20" in said
    assert "1 id(s) of the table are no subject of the store: sub-99" in said


def test_clips_are_as_long_as_asked_for_or_as_the_model_takes_them(store: Path) -> None:
    assert opened(store).examples.clip_frames == 20
    asked = opened(store, clip_frames=5, clip_stride_frames=4).examples
    assert asked.clip_frames == 5 and asked.start[asked.unit == 0].tolist() == [0, 4, 8, 12, 16, 20]
    task, split = find_task("age"), SplitConfig()
    of_model = open_evaluation(task, TaskConfig(store=store), split, 12).examples
    assert of_model.clip_frames == 12 and of_model.start[of_model.unit == 0].tolist() == [0, 12]
    with pytest.raises(ConfigError, match=r"task.clip_frames=13: the model takes clips of up to 12 frames"):
        open_evaluation(task, TaskConfig(store=store, clip_frames=13), split, 12)


def test_a_task_sees_the_runs_with_its_label(store: Path) -> None:
    assert {run.task for run in opened(store).examples.runs} == {"rest"}
    assert len(opened(store, runs="all").examples.runs) == 36
    assert opened(store, runs="tapping").subjects == tuple(f"d/{name}" for name in PEOPLE[::2])
    states = opened(store, "state", clip_frames=5)
    assert states.examples.classes == ("still", "tap") and len(states.examples.units) == 24
    with pytest.raises(ConfigError, match=r"label 'walk' .*task.runs.*rest 24, tapping 12"):
        opened(store, runs="walk")


def test_a_task_of_ones_own_selects_its_runs_and_the_user_overrides_it(store: Path, tmp_path: Path) -> None:
    """A subclass of State has the runs with events, whatever it is called."""
    file = tmp_path / "hands.py"
    file.write_text("from neurostorm.downstream.tasks.task import State\nclass Hands(State):\n    name = 'hands'\n")
    before = dict(REGISTRY)
    try:
        examples = opened(store, str(file), clip_frames=5).examples
        assert examples.classes == ("still", "tap") and len(examples.units) == 24
        with pytest.raises(
            ConfigError, match=r"task\.name=hands: the 24 selected runs .* have 0 kinds .*--task\.runs all"
        ):
            opened(store, str(file), runs="rest")
        file.write_text(file.read_text() + "    runs = 'rest'\n")
        with pytest.raises(ConfigError, match=r"task\.name=hands: the 24 selected runs"):
            opened(store, str(file))
        assert len(opened(store, str(file), runs="tapping", clip_frames=5).examples.units) == 24
    finally:
        REGISTRY.clear()
        REGISTRY.update(before)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("iq", "no task 'iq'; {table} has a column of that name: use --task phenotype:iq"),
        ("IQ", "no task 'IQ'; {table} has a column 'iq': use --task phenotype:iq"),
        ("heigth", "no task 'heigth'; {table} has a column 'height': use --task phenotype:height"),
        ("handedness", "no task 'handedness'; {table} has a column of that name: use --task diagnosis:handedness"),
        ("ages", "did you mean age?"),
        ("qqq", "tasks are age"),
    ],
)
def test_the_name_of_a_column_is_answered_with_the_task_that_predicts_it(
    store: Path, tmp_path: Path, asked: str, message: str
) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("participant_id,age,iq,height,handedness\nsub-00,20,100,1.8,left\nsub-01,21,n/a,1.7,right\n")
    with pytest.raises(ConfigError) as refused:
        task_of(asked, TaskConfig(store=store, labels=table))
    assert message.format(table=table) in str(refused.value)


def test_columns_of_the_stores_own_table_are_known_and_a_missing_store_hides_no_error(store: Path) -> None:
    with pytest.raises(
        ConfigError, match="the participants table has a column of that name: use --tasks diagnosis:site"
    ):
        task_of("site", TaskConfig(store=store), option="--tasks")
    with pytest.raises(ConfigError, match=r"task\.name=site: no such task"):
        task_of("site", TaskConfig(store=store / "nowhere"))


def test_the_column_is_the_tasks_own_or_the_one_asked_for(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(["participant_id,age,iq", *[f"{name},{n},{100 + n}" for n, name in enumerate(PEOPLE)]]))
    assert opened(store, "phenotype:iq", labels=file).examples.targets[0] == 100
    assert opened(store, "age", labels=file, target_column="iq").examples.targets[0] == 100
    assert opened(store, "phenotype:iq", labels=file, target_column="age").examples.targets[0] == 100
    with pytest.raises(ConfigError, match="--task phenotype:COLUMN"):
        opened(store, "phenotype", labels=file)


def test_a_store_without_runs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.zarr"
    create_store(path, grid=Grid("box", (2, 2, 2), 4.0, (0.0, 0.0, 0.0)), mask=np.ones((2, 2, 2), bool), tr_s=0.8,
                 recipe="test")  # fmt: skip
    write_manifest(path)
    with pytest.raises(ConfigError, match="holds no run: ingest some first"):
        open_cohort(path)

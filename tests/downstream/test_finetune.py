"""`jobs/finetune.py`: a task of one's own from the command line to MLflow, and one clear line for wrong input."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from neurostorm.downstream.finetune import Finetuned
from neurostorm.downstream.tasks.task import REGISTRY
from neurostorm.downstream.trial import Outcome
from tests.people_store import write_model

ROOT = Path(__file__).resolve().parents[2]
MY_TASK = """
from neurostorm.downstream.tasks.task import Classification


class MyTask(Classification):
    name, column = "my_task", "sex"

    def target(self, label, classes):
        return super().target(label, classes)
"""


@pytest.fixture(scope="module")
def job() -> ModuleType:
    """jobs/finetune.py as a module."""
    spec = importlib.util.spec_from_file_location("finetune_job", ROOT / "jobs" / "finetune.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.integration
@pytest.mark.usefixtures("local_ray")
def test_a_task_of_ones_own_goes_from_the_command_line_to_mlflow(
    tmp_path: Path,
    people_store: Path,
    job: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Frozen features over Ray Data, a training on them; started again it only says what it knows."""
    from mlflow import MlflowClient

    (tmp_path / "my_task.py").write_text(MY_TASK)
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "model", people_store)
    arguments = ["--task", "my_task", "--method", "attention", "--model", str(model), "--store", str(people_store)]
    arguments += ["--output", "out", "--name", "mine", "--split.test", "0.25", "--adapt.epochs", "2"]
    summaries = []
    for _ in range(2):
        assert job.main(arguments) == 0
        summaries.append(json.loads(Path("out/mine/summary.json").read_text()))
    assert job.main([*arguments, "--adapt.epochs", "3"]) == 2, "it would overwrite the first"
    REGISTRY.pop("my_task")
    said, complained = capsys.readouterr()
    assert "out/mine holds a finetune with other settings: adapt.epochs: 2 -> 3; choose another --name" in complained
    assert summaries[0] == json.loads(Path("out/mine/summary.json").read_text())
    assert "my_task: 16 units of 16 subjects, 192 clips" in said
    assert said.count("frozen features of 32 runs by attention's network") == 1
    assert said.count("trained on 9 subjects, chosen on 3 (epoch ") == 2 and "tested on 4: balanced_accuracy" in said
    assert summaries[0] == summaries[1]
    assert set(summaries[0]["test"]) == {"balanced_accuracy", "accuracy", "macro_f1", "auroc", "chance"}
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("neurostorm")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "mine"
    assert experiment.artifact_location == (tmp_path / "out" / "artifacts").as_uri()
    assert run.info.status == "FINISHED" and run.info.run_id == summaries[0]["mlflow_run_id"]
    assert run.data.metrics["test/balanced_accuracy"] == summaries[0]["test"]["balanced_accuracy"]
    assert {"validation/balanced_accuracy", "loss/train", "cost/seconds"} <= set(run.data.metrics)
    tags = {name.removeprefix("neurostorm."): value for name, value in run.data.tags.items()}
    assert (tags["kind"], tags["task"], tags["method"], tags["selected"]) == (
        "finetune",
        "my_task",
        "attention",
        "true",
    )
    assert run.data.params["subjects_train"] == "9" and run.data.params["task.clip_frames"] == "4"
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"predictions.parquet", "split.json"} <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "ages"], "no such task"),
        (["--method", "liner"], "did you mean linear?"),
        (["--method", "linear"], "adapt.model is not set: give the folder of a model, --model DIR"),
        (["--method", "linear", "--model", "nowhere"], "adapt.model: there is no folder"),
        (["--method", "fc", "--task", "phenotype:iq"], "iq"),
        (["--method", "fc", "--labels", "nowhere.tsv"], "nowhere.tsv"),
        (["--method", "fc", "--store", "nowhere"], "nowhere"),
        (["--method", "fc", "--task", "phenotype"], "phenotype:COLUMN"),
        (["--method", "fc", "--task.runs", "motr"], "'motr'"),
        (["--method", "fc", "--split.file", "nowhere.json"], "nowhere.json"),
        (["--method", "fc", "--split.group_column", "clan"], "clan"),
        (["--method", "fc", "--name", "pretrained"], "holds a run of jobs/pretrain.py; choose another --name"),
        (
            ["--method", "fc", "--adapt.atlas", "nowhere.nii.gz"],
            "nowhere.nii.gz: cannot be read",
        ),
        (["--method", "bnt", "--adapt.atlas", "notes.txt"], "adapt.atlas="),
        (["--method", "fc", "--adapt.parcels", "9999999"], "adapt.parcels=9999999: 9999999 regions of a mask of"),
        (
            ["--method", "constant", "--task", "reid"],
            "adapt.method=constant cannot do reid: it gives every run the same",
        ),
        (["--method", "fc", "--output", "notes.txt/out"], "notes.txt/out: cannot be written"),
        (["--method", "fc", "--adapt.cache", "notes.txt/c"], "notes.txt/c: cannot be written"),
        (["--task", "family_id"], "no task 'family_id'; the participants table has a column of that name: use --task"),
    ],
)
def test_wrong_input_is_one_line_and_no_traceback(
    tmp_path: Path,
    people_store: Path,
    job: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """Before a Ray is started: this one would refuse to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "pretrained" / "checkpoints").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("no image")
    monkeypatch.setattr("neurostorm.downstream.prepare.require", None)
    assert job.main(["--store", str(people_store), "--output", str(tmp_path / "out"), *arguments]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("jobs/finetune.py: ") and message in said and said.count("\n") == 1, said


def test_the_closing_words_say_what_a_chance_of_nought_means() -> None:
    outcome = Outcome({"r": 0.25}, {"strength": 1.0}, 3, 1.0)
    done = Finetuned(Path("t"), "r", "years", outcome, {"r": 0.5, "mae": 3.0, "chance": 0.0}, (9, 3, 4), "uri", "id")
    assert done.lines()[0].endswith("tested on 4: r 0.5, mae 3 years, chance 0: no correlation")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapt.lrate", "1"], "adapt.lr"),
        (["--adapt.lr", "-1"], "adapt.lr"),
        (["--split.scheme", "random"], "holdout"),
        (["--adapt.strengths", "0"], "strengths"),
    ],
)
def test_a_wrong_option_leaves_with_the_reason(
    job: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert job.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and "jobs/finetune.py" in said

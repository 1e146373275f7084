"""Command lines: precedence of preset, file and option; wrong names and values are answered with the right ones."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

from neurostorm.commands.command import Job
from neurostorm.commands.options import build, field_of
from neurostorm.config import Config, ConfigError
from neurostorm.config.presets import PRESETS
from neurostorm.config.renamed import RENAMED
from neurostorm.runtime.run_folder import differing_keys
from neurostorm.store import StoreError

JOB = Job(
    "pretrain", "Test.", tuple(Config.model_fields), {"--store": "data.store", "--workers": "scale.workers"}, True
)
JOBS = Path(__file__).resolve().parents[2] / "jobs"


def job_of(name: str) -> Job:
    """The JOB of jobs/NAME.py."""
    spec = spec_from_file_location(name, JOBS / f"{name}.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.JOB


def test_options_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {lr: 0.001, global_batch: 16}\nrun: {name: from-file}\n")
    config = JOB.load(["--preset", "tiny", "--config", str(file), "--train.lr", "5e-4", "--store", "somewhere"])
    assert config.train.lr == 5e-4
    assert config.train.global_batch == 16
    assert config.run.name == "from-file"
    assert config.data.clip_frames == PRESETS["tiny"]["data"]["clip_frames"]
    assert config.data.store == Path.cwd() / "somewhere"


def test_tuples_booleans_and_none_are_read_from_text():
    config = JOB.load(
        ["--model.depths", "2,2", "--model.heads", "3 6", "--strd.enabled", "true", "--train.max_steps", "none"]
    )
    assert config.model.depths == (2, 2)
    assert config.model.heads == (3, 6)
    assert config.strd.enabled is True
    assert config.train.max_steps is None


@pytest.mark.parametrize("text", ["{hcp: 2, ukb: .5}", "hcp: 2, ukb: 0.5"])
def test_names_with_values_are_read_as_yaml(text):
    assert JOB.load(["--data.weights", text]).data.weights == {"hcp": 2.0, "ukb": 0.5}
    assert JOB.load(["--data.weights", "{}"]).data.weights == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trian.lr", "1"], ["--trian.lr", "did you mean --train.lr"]),
        (["--lr", "1"], ["did you mean --train.lr"]),
        (["--lerning_rate", "1"], ["unknown option --lerning_rate; did you mean --train.lr?"]),
        (["--num_workers", "8"], ["did you mean --workers"]),
        (["--wd=0.1"], ["unknown option --wd; did you mean --train.weight_decay"]),
        (["--stochastic_depth", "0.1"], ["did you mean --model.drop_path"]),
        (["--preset", "tny"], ["tny", "tiny", "paper"]),
        (["--train.lr", "7"], ["train.lr=7", "> 0 and <= 1"]),
        (["--data.normalize", "z"], ["data.normalize=z", "voxel or global"]),
        (["--data.clip_stride_frames", "0"], ["data.clip_stride_frames=0", ">= 1"]),
        (["--train.global_batch", "7", "--workers", "2"], ["train.global_batch=7", "scale.workers=2"]),
        (["--train.micro_batch", "5"], ["train.micro_batch=5", "32"]),
        (["--workers", "4", "--scale.min_workers", "3"], ["train.global_batch=32", "3 workers", "a multiple of 12"]),
        (["--workers", "2", "--scale.min_workers", "4"], ["scale.min_workers=4", "scale.workers=2"]),
        (["--model.heads", "5,6,12,24"], ["heads[0]=5", "36"]),
        (["--model.patch", "6,6,6,2"], ["patch[3]=2"]),
        (["--data.weights", "{hcp: -1}"], ["data.weights.hcp=-1", ">= 0"]),
        (["--data.weights", "hcp=2"], ["--data.weights", "hcp=2", "{hcp: 2, ukb: 1}"]),
        (["--data.weights", "{hcp:2}"], ["--data.weights", "a space after"]),
        (["--data.weights", "{hcp: 2"], ["--data.weights", "{hcp: 2, ukb: 1}"]),
        (["--data.temperature", "0"], ["data.temperature=0", "> 0"]),
        (["--config", "missing.yaml"], ["missing.yaml", "cannot be read"]),
        (["--mask.atlas", "atlas.nii"], ["atlas.nii is not used with kind=window", "--mask.kind atlas"]),
        (["--train.global_batch", "8", "--train.micro_batch", "1", "--workers", "64"], ["use --workers 8, or", "64"]),
    ],
)
def test_a_wrong_argument_is_refused_with_what_is_right(arguments, words):
    with pytest.raises(ConfigError) as refused:
        JOB.load(arguments)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {lrr: 1}", ["train.lrr", "did you mean train.lr"]),
        ("train: {learning_rate: 1}", ["train.learning_rate", "did you mean train.lr"]),
        ("trian: {lr: 1}", ["trian", "did you mean train"]),
        ("train: 3", ["expected"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_right(tmp_path, text, words):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        JOB.load(["--config", str(file)])
    for word in words:
        assert word in str(refused.value)


def test_what_is_printed_is_read_back_as_the_same_configuration(tmp_path):
    config = JOB.load(["--preset", "base", "--run.seed", "3"])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert JOB.load(["--config", str(file)]) == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_reserves_the_cores_that_its_workers_use(name):
    scale = build(PRESETS[name]).scale
    assert scale.cpus_per_worker >= scale.threads_per_worker


def test_the_papers_preset_is_the_papers():
    config = build(PRESETS["paper"])
    assert (config.model.embed_dim, config.model.depths, config.model.heads) == (36, (2, 2, 6, 2), (3, 6, 12, 24))
    assert config.model.window == config.model.first_window == config.mask.window == (4, 4, 4, 4)
    assert config.model.patch == (6, 6, 6, 1)
    assert (config.ingest.grid, config.data.clip_frames) == ("2mm", 20)
    assert (config.mask.kind, config.mask.ratio, config.train.lr) == ("window", 0.5, 5e-5)


@pytest.mark.parametrize("name", ["base", "large"])
def test_our_presets_have_head_widths_that_fused_kernels_like(name):
    model = build(PRESETS[name]).model
    assert {model.embed_dim * 2**i // heads for i, heads in enumerate(model.heads)} <= {16, 32}
    assert build(PRESETS[name]).data.normalize == "voxel"


@pytest.mark.parametrize("name", ["ingest", "pretrain", "embed", "finetune", "sweep", "report"])
def test_help_explains_what_the_job_uses_with_its_default(name, capsys):
    job = job_of(name)
    with pytest.raises(SystemExit) as left:
        job.load(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    for target in job.targets:
        assert f"--{target}" in shown
    assert shown.count("(default:") == len(job.targets)


def test_help_lists_nothing_that_the_job_does_not_use():
    assert not {"tracking.pictures", "tracking.clip_ledger", "train.lr"} & set(job_of("finetune").targets)
    assert [target for target in job_of("ingest").targets if target.startswith("data.")] == ["data.store"]
    assert "report.run_id" not in job_of("sweep").targets
    assert job_of("sweep").load([]).run.name == "sweep" and job_of("pretrain").load([]).run.name == "pretrain"


def test_a_wrong_command_line_ends_with_status_2_and_the_reason(capsys):
    assert JOB.run(lambda config: pytest.fail("started"), ["--train.lr", "x"]) == 2
    assert "train.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    "field", ["data.store", "run.output", "mask.atlas", "adapt.atlas", "task.labels", "split.file"]
)
def test_a_relative_path_is_one_in_the_directory_where_it_was_typed(field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section, name = field.split(".")
    kind = ["--mask.kind", "atlas"] if section == "mask" else []
    config = JOB.load([f"--{field}", "some/where", *kind])
    monkeypatch.chdir("/")
    assert getattr(getattr(config, section), name) == tmp_path / "some" / "where"
    again = Config.model_validate(config.model_dump(mode="json"))  # as a worker in another directory does
    assert again == config


def test_steps_up_are_taken_out_of_a_path_where_they_mean_the_same(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path / "a")
    assert JOB.load(["--store", "../stores/x"]).data.store == tmp_path / "stores" / "x"
    assert JOB.load(["--store", "../link/../x"]).data.store == tmp_path / "a" / ".." / "link" / ".." / "x"


def test_the_next_command_can_be_typed_from_where_this_one_was(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", [str(JOBS / "ingest.py")])
    assert JOB.command("pretrain") == f"python {JOBS / 'pretrain.py'}"
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert JOB.command("pretrain") == "python jobs/pretrain.py"


def test_defaults_and_the_file_of_mlflow_are_absolute_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = JOB.load(["--tracking.uri", "sqlite:///mine.db"])
    assert config.run.folder == tmp_path / "outputs" / "pretrain"
    assert config.tracking.uri == f"sqlite:///{tmp_path}/mine.db"
    for uri in ("sqlite:////elsewhere/mine.db", "http://mlflow:5000"):
        assert JOB.load(["--tracking.uri", uri]).tracking.uri == uri


def test_under_ray_job_submit_relative_paths_are_refused_with_what_to_type(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    job = job_of("pretrain")
    with pytest.raises(ConfigError) as refused:
        job.load(["--store", "stores/mine", "--tracking.uri", "sqlite:///m.db"])
    for words in (
        "--store stores/mine", "--output (default outputs)", "ray job submit",
        "--store /SHARED/stores/mine", "--output /SHARED/outputs", "--tracking.uri sqlite:////SHARED/m.db",
    ):  # fmt: skip
        assert words in str(refused.value)
    assert job.load(["--store", "/data/store", "--output", "s3://bucket/runs"]).scale.workers == 1


@pytest.mark.parametrize(
    ("job", "word", "option"),
    [
        ("pretrain", "--batch-size", "--train.global_batch"), ("finetune", "--batch-size", "--adapt.batch_clips"),
        ("sweep", "--learning-rate", "--adapt.lr"), ("embed", "--gpus", "--embed.gpus_per_worker"),
        ("ingest", "--tr", "--ingest.tr_s"), ("report", "--mlflow", "--uri"),
    ],
)  # fmt: skip
def test_the_nearest_option_is_one_that_the_job_has(job, word, option):
    with pytest.raises(ConfigError, match=f"did you mean {option}\\?"):
        job_of(job).load([word, "1"])


def test_the_configuration_is_printed_on_demand(capsys, tmp_path):
    assert JOB.run(lambda config: pytest.fail("started"), ["--train.lr", "0.01", "--print-config"]) == 0
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert JOB.load(["--config", str(file)]) == JOB.load(["--train.lr", "0.01"])


@pytest.mark.parametrize("name", ["ingest", "pretrain", "embed", "finetune", "sweep", "report"])
def test_a_job_begins_with_a_short_summary(name):
    job = job_of(name)
    lines = job.summary(job.load([]))
    assert len(lines) <= 10 and max(map(len, lines)) <= 120
    assert "--print-config" in lines[-1]


def test_the_summary_says_what_was_changed_and_where_things_lie(capsys):
    seen = []
    assert JOB.run(lambda config: seen.append(config) or 0, ["--preset", "tiny", "--train.lr", "0.01"]) == 0
    shown = capsys.readouterr().out
    assert "train.lr 0.01" in shown and "tiny" in shown and str(seen[0].run.folder) in shown
    assert "global_batch" not in shown, "it is the preset's"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("run.name is taken"), 2, "jobs/pretrain.py: run.name is taken\n"),
        (StoreError("there is no store"), 1, "jobs/pretrain.py: there is no store\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, status, line, capsys):
    def work(config):
        raise error

    assert JOB.run(work, []) == status
    assert capsys.readouterr().err == line


def test_any_other_error_is_one_line_that_names_the_file_with_the_traceback(capsys, tmp_path):
    (tmp_path / "pretrain").mkdir()

    def work(config):
        raise ZeroDivisionError("nothing\nto divide")

    assert JOB.run(work, ["--run.output", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    (file,) = (tmp_path / "pretrain").glob("error-pretrain-*.log")
    assert said == f"jobs/pretrain.py: ZeroDivisionError: nothing to divide\nThe traceback is in {file}\n"
    assert "in work" in file.read_text()


def test_only_settings_that_change_the_result_hinder_resuming():
    config = build(PRESETS["tiny"])
    tree = yaml.safe_load(config.to_yaml())
    tree["train"]["log_every"] = 7
    tree["run"]["output"] = "elsewhere"
    tree["train"]["lr"] = 1e-5
    tree["data"]["weights"] = {"hcp": 2.0}
    assert differing_keys(config.model_dump(mode="json"), Config.model_validate(tree)) == [
        "data.weights: {} -> {'hcp': 2.0}",
        "train.lr: 0.002 -> 1e-05",
    ]


def test_for_another_number_of_workers_the_global_batch_stays_and_micro_batches_divide_a_share():
    config = build({"train": {"global_batch": 12, "micro_batch": 6}, "scale": {"workers": 2, "min_workers": 1}})
    for workers, micro in ((1, 6), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)):
        other = config.for_workers(workers)
        assert (other.scale.workers, other.scale.min_workers, other.train.micro_batch) == (workers, None, micro)
        assert other.clips_per_worker * workers == 12 and not differing_keys(config.model_dump(mode="json"), other)
    assert config.scale.workers == 2, "it is a copy"


def test_a_run_that_was_kept_before_there_was_a_light_decoder_or_a_view_goes_on():
    config = build(PRESETS["tiny"])
    saved = config.model_dump(mode="json")
    for name in ("decoder", "decoder_depth", "predicted"):
        del saved["model"][name]
    del saved["train"]["compile"], saved["augment"]
    assert differing_keys(saved, config) == []
    views = Config.model_validate({**saved, "augment": {"enabled": True}})
    assert differing_keys(saved, views) == ["augment.enabled: False -> True"]
    light = Config.model_validate({**saved, "model": {**saved["model"], "decoder": "light"}})
    assert differing_keys(saved, light) == ["model.decoder: paper -> light"]


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_of_a_setting_is_taken_with_a_word_on_the_new_one(old, new, tmp_path, caplog):
    job = Job("pretrain", "Test.", tuple(Config.model_fields))
    section, field = new.split(".")
    kind = field_of(new).annotation
    special = {"normalize": "global", "compression": "zstd", "allow_removed": "sub-1"}
    value = special.get(field, "true" if kind is bool else "7")
    expected = getattr(getattr(job.load([f"--{new}", value]), section), field)
    assert caplog.messages == []
    assert getattr(getattr(job.load([f"--{old}", value]), section), field) == expected
    assert caplog.messages == [f"--{old} is called --{new} now; the old name is accepted for one more version"]
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({section: {old.split(".")[1]: [value] if field == "allow_removed" else value}}))
    assert getattr(getattr(job.load(["--config", str(file)]), section), field) == expected
    assert len(caplog.messages) == 2
    assert f"--{old}" not in job.parser().format_help()

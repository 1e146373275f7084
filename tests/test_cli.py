"""Command lines: precedence of preset, file and option; wrong names and values are answered with the right ones."""

import pytest
import yaml

from neurostorm.cli import Job, build, option_names
from neurostorm.config import Config, ConfigError, differing_keys
from neurostorm.presets import PRESETS

JOB = Job("pretrain", "Test.", tuple(Config.model_fields), {"--store": "data.store", "--workers": "scale.workers"})


def test_options_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {lr: 0.001, global_batch: 16}\nrun: {name: from-file}\n")
    config = JOB.load(["--preset", "tiny", "--config", str(file), "--train.lr", "5e-4", "--store", "somewhere"])
    assert config.train.lr == 5e-4
    assert config.train.global_batch == 16
    assert config.run.name == "from-file"
    assert config.data.clip_frames == PRESETS["tiny"]["data"]["clip_frames"]
    assert str(config.data.store) == "somewhere"


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
        (["--preset", "tny"], ["tny", "tiny", "paper"]),
        (["--train.lr", "7"], ["train.lr=7", "> 0 and <= 1"]),
        (["--data.normalise", "z"], ["data.normalise=z", "voxel or global"]),
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
    assert build(PRESETS[name]).data.normalise == "voxel"


def test_help_explains_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit):
        JOB.parse(["--help"])
    shown = capsys.readouterr().out
    for option in option_names(JOB.sections):
        assert option in shown
    assert shown.count("default:") >= len(option_names(JOB.sections))


def test_parse_leaves_with_the_reason(capsys):
    with pytest.raises(SystemExit) as left:
        JOB.parse(["--train.lr", "x"])
    assert "train.lr" in str(left.value.code)


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

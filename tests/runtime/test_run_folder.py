"""A run's folder: one job with one set of settings, and a folder that can be written."""

import os
from pathlib import Path
from typing import Any

import pytest

from neurostorm.config import Config, ConfigError
from neurostorm.runtime.run_folder import keep_config, refuse_other, require_writable

SECTIONS = ("run", "task", "split", "adapt")


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    return Config.model_validate({"run": {"output": folder, "name": "mine"}, **sections})


def start(config: Config, job: str = "finetune") -> None:
    refuse_other(config, job, SECTIONS)
    keep_config(config, job)


def test_the_same_settings_resume_and_others_are_refused_with_what_differs(tmp_path: Path) -> None:
    start(config_of(tmp_path))
    start(config_of(tmp_path, adapt={"cpus": 2.0, "cache": tmp_path / "cache"}))
    with pytest.raises(ConfigError, match=r"holds a finetune with other settings: task\.name: age -> sex; .*--name"):
        start(config_of(tmp_path, task={"name": "sex"}))
    with pytest.raises(ConfigError, match=r"adapt\.method: linear -> fc; adapt\.epochs: 20 -> 3"):
        start(config_of(tmp_path, adapt={"method": "fc", "epochs": 3}))


def test_the_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    start(config_of(tmp_path))
    with pytest.raises(ConfigError, match=r"holds a run of jobs/finetune\.py; choose another --name"):
        start(config_of(tmp_path), "sweep")
    (tmp_path / "mine" / "config.yaml").write_text(config_of(tmp_path).to_yaml())  # of a version without a header
    start(config_of(tmp_path))
    (tmp_path / "mine" / "config.yaml").write_text(config_of(tmp_path).to_yaml())
    (tmp_path / "mine" / "mlflow.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a run of jobs/sweep\.py"):
        start(config_of(tmp_path))
    (tmp_path / "mine" / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"holds a run of jobs/pretrain\.py"):
        start(config_of(tmp_path), "sweep")


def test_a_folder_that_cannot_be_written_names_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.output=there: cannot be written \(.*/file: Not a directory\)"):
        require_writable(tmp_path / "file" / "runs", "run.output=there")
    require_writable(tmp_path / "new" / "runs", "run.output")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_missing_permission_is_the_reason(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match=r"adapt\.cache=.*Permission denied"):
            require_writable(tmp_path / "cache", "adapt.cache")
    finally:
        tmp_path.chmod(0o700)

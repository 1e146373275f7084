"""Credentials come from the environment alone: an address that holds some is refused unseen, none is ever logged."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from neurostorm.commands.options import build
from neurostorm.config import Config, ConfigError
from neurostorm.data.corpus import open_corpus
from neurostorm.io.paths import to_path, without_credentials
from neurostorm.tracking.tracker import tracking_uri
from neurostorm.train import launch, worker
from neurostorm.train.controller import trainer

SECRET = "hunter2-8f31"
HOLDING = [
    f"http://user:{SECRET}@host:5000",
    f"https://{SECRET}@host",
    f"postgresql+psycopg2://user:{SECRET}@db/mlflow",
    f"http://host:5000/?token={SECRET}",
    f"http://host/api?a=1&MLFLOW_PASSWORD={SECRET}",
]
BUCKETS = [
    f"s3://AKIA:{SECRET}@bucket/key",
    f"s3://bucket/key?X-Amz-Signature={SECRET}",
    f"gs://b/k?access_key={SECRET}",
]
# What the machine of a run may hold; a run has no business with the names or with the values.
ENVIRONMENT = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN",
)  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("tracking.uri", value) for value in HOLDING),
        *((field, value) for field in ("run.output", "data.store", "ingest.source", "embed.out") for value in BUCKETS),
    ],
)
def test_an_address_with_credentials_is_refused_and_not_repeated(field: str, value: str) -> None:
    section, name = field.split(".")
    with pytest.raises(ConfigError, match=rf"^{field}: .*holds credentials \(not shown\).*environment") as refused:
        build({section: {name: value}})
    assert SECRET not in str(refused.value)
    with pytest.raises(ValueError) as raised:
        Config.model_validate({section: {name: value}})
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("value", HOLDING)
def test_whoever_asks_for_the_server_is_refused_too(value: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tracking\.uri: .*not shown") as refused:
        tracking_uri(value, tmp_path)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "value",
    [
        "http://tracking:5000",
        "https://[::1]:5000/mlflow",
        "sqlite:////a@b/mlflow.db",
        "s3://bucket/sub@home?v=2",
        "a:b@c/d",
    ],
)
def test_other_addresses_stay_as_they_are(value: str) -> None:
    assert without_credentials(value) == value
    if value.startswith("s3"):
        assert str(to_path(value)) == value


def test_nothing_of_the_environment_reaches_mlflow_the_run_folder_or_the_log(
    ball_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, SECRET)
    config = ball_config()
    corpus = open_corpus(config)
    folder = config.run.folder
    folder.mkdir(parents=True)
    with caplog.at_level(logging.DEBUG):
        launch.check(config, corpus)
        (folder / "config.yaml").write_text(config.to_yaml())
        tracker = worker.open_tracker(config, corpus)
        tracker.metrics({"loss/train": 1.0}, 0)
        tracker.close()
    assert SECRET not in str(trainer.worker_environment(config))
    written = [path for path in config.run.output.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in written)
    assert sum(path.name == "config.yaml" for path in written) == 2, "the run's own, and MLflow's"
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in caplog.text
    assert b"train.lr" in (config.run.output / "mlflow.db").read_bytes(), "a search for what is there finds it"

"""Embedding with model, data and result in an object store: the tables are those of the disk, bit for bit."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from neurostorm.config import ConfigError, EmbedConfig
from neurostorm.downstream.embed.inputs import open_input
from neurostorm.downstream.embed.parts import unfinished
from neurostorm.io.paths import AnyPath, copy_files, list_files, to_path

TABLES = ("clips.parquet", "runs.parquet", "subjects.parquet")


def upload(folder: Path, target: AnyPath) -> AnyPath:
    copy_files(folder, target, [name for name, _ in list_files(folder)])
    return target


def content(out: AnyPath) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


def test_model_store_and_result_in_an_object_store(
    tmp_path: Path, ball_store: Path, model: Path, here: Any, make_bucket: Any
) -> None:
    bucket = to_path(make_bucket())
    remote = {"model": upload(model, bucket / "model"), "store": upload(ball_store, bucket / "store")}
    twin = here(tmp_path / "twin", model=model, store=ball_store)
    done = here(bucket / "out", **remote)
    assert done == twin and content(bucket / "out") == content(tmp_path / "twin")
    settings = EmbedConfig(**remote)
    assert unfinished(bucket / "out", open_input(settings).runs) == []
    assert json.loads((bucket / "out" / "embed.json").read_text())["model"]["path"] == f"{bucket}/model"
    with pytest.raises(ConfigError, match=r"another embedding: clip_stride_frames: 10 -> 5"):
        here(bucket / "out", **remote, clip_stride_frames=5)


def test_what_failed_is_listed_tried_again_and_gone(
    tmp_path: Path, ball_store: Path, model: Path, here: Any, make_bucket: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = to_path(make_bucket())
    store, out = upload(ball_store, bucket / "store"), bucket / "out"
    shard = store / "runs/balls/sub-1/task-rest/0.0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + b"\x55" * 10 + whole[110:])
    with caplog.at_level(logging.ERROR):
        done = here(out, model=model, store=store)
    assert [row["start_frame"] for row in done.failed] == [0, 10, 20]
    assert (out / "failed.parquet").is_file()
    shard.write_bytes(whole)
    assert here(out, model=model, store=store).failed == ()
    assert not [name for name, _ in list_files(out) if "failed" in name]
    here(tmp_path / "twin", model=model, store=ball_store)
    assert content(out) == content(tmp_path / "twin")


def test_files_in_an_object_store(
    tmp_path: Path, files: tuple[Path, Path], make_model: Any, here: Any, make_bucket: Any
) -> None:
    root, store = files
    folder = make_model(tmp_path / "model", store)
    bucket = to_path(make_bucket())
    source = upload(root, bucket / "bids")
    here(tmp_path / "twin", model=folder, source=root)
    assert here(bucket / "out", model=folder, source=source).runs == 2
    assert content(bucket / "out") == content(tmp_path / "twin")

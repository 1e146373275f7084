"""What an embedding job refuses before it starts, and what it takes for the same embedding."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neurostorm.config import ConfigError, EmbedConfig
from neurostorm.downstream.embed.inputs import open_input, remember
from neurostorm.downstream.embed.parts import unfinished
from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.hub.pretrained import HubError, save_pretrained
from neurostorm.store import FrameStore, StoreError, create_store, write_manifest

FRAMES = 10  # of the model's clip


def test_a_folder_of_another_embedding_is_refused(
    tmp_path: Path, ball_store: Path, model: Path, make_model: Any
) -> None:
    """Another model, stride or data; a moved store, a grown one and other resources are the same embedding."""
    out = tmp_path / "out"
    same = {"model": model, "store": ball_store}

    def start(**settings: Any) -> None:
        remember(out, open_input(EmbedConfig(out=out, **settings)))

    start(**same)
    facts = json.loads((out / "embed.json").read_text())
    assert len(facts["model"]["sha256"]) == 64 and facts["data"]["sha256"] == FrameStore.open(ball_store).content_hash()
    assert facts["clip_stride_frames"] == FRAMES and facts["model"]["config"]["class"] == "MaskedAutoencoder"
    start(**same, batch_clips=3, workers=4, clip_stride_frames=FRAMES)
    with pytest.raises(ConfigError, match=r"embed\.json .*clip_stride_frames: 10 -> 5; take"):
        start(**same, clip_stride_frames=5)
    other = make_model(tmp_path / "other", ball_store, seed=1)
    with pytest.raises(ConfigError, match=r"another embedding: model.sha256: \w{64} -> \w{64}; take"):
        start(model=other, store=ball_store)
    with pytest.raises(ConfigError, match=r"another embedding: data: .*ball\.zarr -> .*/files; take"):
        copy_runs_as_file(tmp_path / "files")
        start(model=model, source=tmp_path / "files")
    moved = tmp_path / "moved"
    shutil.copytree(ball_store, moved)
    start(model=model, store=moved)
    shutil.rmtree(moved / "runs/balls/sub-3")
    write_manifest(moved)
    start(model=model, store=moved)
    with pytest.raises(ConfigError, match=r"data.path: .*/moved -> .*ball\.zarr"):
        start(**same)
    (out / "embed.json").write_text("{")
    with pytest.raises(ConfigError, match=r"embed\.json: cannot be read as JSON"):
        start(**same)


def copy_runs_as_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.nii.gz").write_bytes(b"")


def test_runs_that_are_added_are_embedded_and_changed_ones_anew(
    tmp_path: Path, ball_store: Path, model: Path, here: Any
) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    shutil.copytree(ball_store, store)
    shutil.move(store / "runs/balls/sub-5", tmp_path / "aside")
    write_manifest(store)
    assert here(out, model=model, store=store).runs == 5
    shutil.move(tmp_path / "aside", store / "runs/balls/sub-5")
    header = store / "runs/balls/sub-2/task-rest/zarr.json"
    header.write_text(header.read_text().replace(f"{2:064x}", f"{7:064x}"))
    write_manifest(store)
    waiting = unfinished(out, open_input(EmbedConfig(model=model, store=store)).runs)
    assert [run.subject for run in waiting] == ["sub-2", "sub-5"]
    assert here(out, model=model, store=store).runs == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (24, 24, 36)}, r"its grid has \(24, 24, 36\) voxels, not \(24, 24, 24\)"),
        ({"origin_mm": (0.0, 0.0, 0.0)}, "its grid 'ball' lies elsewhere than 'ball'"),
        ({"mask": True}, "its brain mask is another one"),
        ({"tr_s": 1.5}, "its TR is 1.5 s, not 0.8 s"),
    ],
)
def test_a_store_that_is_not_the_models_is_refused(
    tmp_path: Path, ball_store: Path, model: Path, change: dict[str, Any], words: str
) -> None:
    opened = FrameStore.open(ball_store)
    grid = replace(opened.grid, **{name: change[name] for name in ("shape", "origin_mm") if name in change})
    mask = np.resize(opened.mask, grid.shape)
    mask[12, 12, 12] = "mask" not in change
    create_store(tmp_path / "s", grid=grid, mask=mask, tr_s=change.get("tr_s", 0.8), recipe="test")
    write_manifest(tmp_path / "s")
    with pytest.raises(StoreError, match=f"s is not what the model was trained on: {words}.*jobs/ingest.py"):
        open_input(EmbedConfig(model=model, store=tmp_path / "s"))


def test_settings_that_are_missing_or_contradict_are_refused(tmp_path: Path, ball_store: Path, model: Path) -> None:
    for settings, words in (
        ({}, "embed.model is not set"),
        ({"model": model}, "give either the store to embed"),
        ({"model": model, "store": ball_store, "source": tmp_path}, "give either the store to embed"),
        ({"model": tmp_path / "none", "store": ball_store}, r"embed\.model: there is no folder .*none"),
        ({"model": model, "store": ball_store, "normalize": "global"}, "the model was trained on voxel"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_input(EmbedConfig(**settings))


def test_a_model_of_unknown_clips_embeds_a_store_when_told_the_normalisation(
    tmp_path: Path, ball_store: Path, here: Any
) -> None:
    swin = SwinConfig((24, 24, 24, 6), embed_dim=8, depths=(1, 1), heads=(1, 2), layout="paper")
    save_pretrained(SwinEncoder(swin), tmp_path / "released")
    with pytest.raises(ConfigError, match=r"how its clips were normalised: give --embed\.normalize global"):
        open_input(EmbedConfig(model=tmp_path / "released", store=ball_store))
    with pytest.raises(HubError, match=r"extra\.grid\.affine"):
        open_input(EmbedConfig(model=tmp_path / "released", source=tmp_path, normalize="global"))
    done = here(tmp_path / "out", model=tmp_path / "released", store=ball_store, normalize="global")
    assert (done.runs, done.clips) == (6, 48)

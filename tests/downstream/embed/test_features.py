"""Frozen features: what is kept equals the encoder on the clips, is computed once, and follows from what it should."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neurostorm.config import Config
from neurostorm.downstream.embed.features import read_tokens, tokens_folder
from neurostorm.downstream.embed.pretrained import open_pretrained
from neurostorm.downstream.evaluation import Evaluation
from neurostorm.downstream.methods.backbone import Backbone, pretrained_backbone
from neurostorm.model.hub.pretrained import NeuroStorm
from neurostorm.store import FrameStore, StoreError
from neurostorm.store.shard import SHARD_FILE
from tests.people_store import CLIP_FRAMES, write_model, write_people
from tests.people_trials import compute_here, open_config, people_config


def setting(
    tmp_path: Path, store: Path, *, task: dict[str, Any] | None = None, model: dict[str, Any] | None = None
) -> tuple[Backbone, Evaluation, Config]:
    folder = write_model(tmp_path / f"model{len(list(tmp_path.glob('model*')))}", store, **(model or {}))
    config = people_config(store, tmp_path / "outputs", folder, task={"store": store, "name": "sex", **(task or {})})
    backbone = pretrained_backbone(open_pretrained(folder, None, section="adapt"))
    return backbone, open_config(config, CLIP_FRAMES), config


def tokens_of(backbone: Backbone, evaluation: Evaluation, config: Config) -> np.ndarray:
    return read_tokens(backbone, evaluation.cohort.store, evaluation.examples, config.run.output / "cache")


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ({}, {}),
        ({"clip_stride_frames": 3}, {"normalise": "global"}),
        ({"clip_frames": 2, "clip_stride_frames": 7}, {}),
        ({"name": "state"}, {}),
    ],
)
def test_kept_tokens_are_those_of_the_encoder_on_each_clip(
    tmp_path: Path, people_store: Path, task: dict[str, Any], model: dict[str, Any]
) -> None:
    """Clips that overlap, that are shorter than the model's, and those of events, from the store's own bytes."""
    backbone, evaluation, config = setting(tmp_path, people_store, task=task, model=model)
    compute_here(backbone, evaluation, config)
    tokens, examples, store = tokens_of(backbone, evaluation, config), evaluation.examples, evaluation.cohort.store
    assert tokens.shape == (len(examples), 8, 16) and tokens.dtype == np.float32
    network = NeuroStorm.from_pretrained(backbone.place)
    for clip in range(0, len(examples), len(examples) // 5):
        run, start, frames = examples.runs[examples.run[clip]].path, int(examples.start[clip]), examples.clip_frames
        packed, outside = store.frames(run, start, frames).astype(np.float32) / 16, 0.0
        if backbone.normalise == "global":
            mean, std = store.moments(run)
            attributes = store.run_attributes(run)
            packed = (mean + std * packed - attributes["global_mean"]) / attributes["global_std"]
            outside = -attributes["global_mean"] / attributes["global_std"]  # no intensity
        volume = torch.full((*store.mask.shape, frames), outside)
        volume[torch.from_numpy(store.mask)] = torch.from_numpy(packed.T.copy())
        with torch.no_grad():
            grid = network.network.features(volume[None, None]).mean(-1)[0]
        np.testing.assert_allclose(tokens[clip], grid.flatten(1).T.numpy(), rtol=2e-4, atol=2e-4)


def test_they_are_computed_once_and_shared_by_tasks_of_the_same_clips(tmp_path: Path, people_store: Path) -> None:
    backbone, evaluation, config = setting(tmp_path, people_store)
    assert compute_here(backbone, evaluation, config) == 32
    assert compute_here(backbone, evaluation, config) == 0
    for name, waiting in (("age", 0), ("reid", 0), ("state", 16)):
        other = people_config(people_store, tmp_path / "outputs", backbone.place, task={"name": name})
        assert compute_here(backbone, open_config(other, CLIP_FRAMES), other) == waiting, name
    few = replace(evaluation, examples=evaluation.examples.of(evaluation.subjects[:2]))
    assert compute_here(backbone, few, config) == 0
    np.testing.assert_array_equal(
        tokens_of(backbone, few, config), tokens_of(backbone, evaluation, config)[: len(few.examples)]
    )


def test_another_model_normalisation_length_or_cut_has_features_of_its_own(tmp_path: Path, people_store: Path) -> None:
    backbone, evaluation, config = setting(tmp_path, people_store)
    few = replace(evaluation, examples=evaluation.examples.of(evaluation.subjects[:2]))
    assert compute_here(backbone, few, config) == 4
    other, _, _ = setting(tmp_path, people_store, model={"seed": 1})
    assert compute_here(other, few, config) == 4
    assert compute_here(replace(backbone, normalise="global"), few, config) == 4
    before = tokens_of(backbone, few, config)
    for fields in ({"clip_stride_frames": 2}, {"clip_frames": 2, "clip_stride_frames": CLIP_FRAMES}):
        cut = people_config(people_store, tmp_path / "outputs", backbone.place, task={"name": "sex", **fields})
        wanted = open_config(cut, CLIP_FRAMES)
        cut_few = replace(wanted, examples=wanted.examples.of(wanted.subjects[:2]))
        assert compute_here(backbone, cut_few, cut) == 4, fields
        assert tokens_of(backbone, cut_few, cut).shape[0] == len(cut_few.examples)
    np.testing.assert_array_equal(tokens_of(backbone, few, config), before)
    assert (tokens_of(other, few, config) != before).any()
    folders = {tokens_folder(b, n, tmp_path) for b in (backbone, other) for n in (2, CLIP_FRAMES)}
    assert len(folders) == 4


def test_other_content_of_a_run_or_another_mask_makes_other_parts(tmp_path: Path, people_store: Path) -> None:
    backbone, evaluation, config = setting(tmp_path, people_store)
    few = replace(evaluation, examples=evaluation.examples.of(evaluation.subjects[:1]))
    assert compute_here(backbone, few, config) == 2
    runs = tuple(replace(run, source_sha256="f" * 64) for run in few.examples.runs)
    assert compute_here(backbone, replace(few, examples=replace(few.examples, runs=runs)), config) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrameStore, "mask_sha256", "0" * 64)
        with pytest.raises(StoreError, match=r"lacks the frozen features of runs/people/sub-000/.*compute them again"):
            tokens_of(backbone, few, config)


def test_a_damaged_run_is_named_and_read_again_once_it_is_whole(tmp_path: Path) -> None:
    store = write_people(tmp_path / "store", 4)
    backbone, evaluation, config = setting(tmp_path, store)
    shard = store / "runs/people/sub-002/ses-2_task-rest" / SHARD_FILE
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + b"\x55" * 20 + whole[220:])
    with pytest.raises(
        StoreError, match=r"6 clip\(s\).*sub-002/ses-2_task-rest, clip from frame 0: .*store\.py verify"
    ):
        compute_here(backbone, evaluation, config)
    with pytest.raises(StoreError, match=r"6 clip\(s\).*sub-002/ses-2_task-rest.*store\.py verify"):
        tokens_of(backbone, evaluation, config)
    shard.write_bytes(whole)
    assert compute_here(backbone, evaluation, config) == 1
    assert np.isfinite(tokens_of(backbone, evaluation, config)).all()

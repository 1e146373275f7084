"""Trials on the people store without Ray: what `prepare` shares is made in this process."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from neurostorm.config import Config, EmbedConfig
from neurostorm.downstream.embed import features
from neurostorm.downstream.embed.embed_run import Embedder, EmbedTask
from neurostorm.downstream.embed.features import compute_tokens
from neurostorm.downstream.embed.parts import RunToEmbed
from neurostorm.downstream.embed.pretrained import open_pretrained
from neurostorm.downstream.evaluation import Evaluation, open_evaluation, split_of
from neurostorm.downstream.methods.backbone import Backbone, backbone_of
from neurostorm.downstream.tasks.find import find_task
from neurostorm.downstream.trial import Trial
from neurostorm.train.contrastive import ContrastiveRecipe

SMALL: dict[str, dict[str, Any]] = {
    "split": {"test": 0.25, "validation": 0.25},
    "adapt": {
        "epochs": 2, "clips_per_unit": 2, "parcels": 8, "swift_steps": 2, "prompts": 2, "embedding": 8, "directions": 8,
        "strengths": (1.0, 100.0),
    },
}  # fmt: skip


def people_config(store: Path, output: Path, model: Path | None = None, **sections: dict[str, Any]) -> Config:
    """Small settings; sections are overridden by keyword, `adapt={"method": "fc"}`."""
    tree: dict[str, dict[str, Any]] = {"run": {"output": output, "name": "test"}, "task": {"store": store}}
    tree |= {name: dict(fields) for name, fields in SMALL.items()}
    tree["adapt"]["model"] = model
    for section, fields in sections.items():
        tree.setdefault(section, {}).update(fields)
    return Config.model_validate(tree)


def open_config(config: Config, clip_frames: int | None) -> Evaluation:
    """The evaluation of a configuration."""
    task = find_task(config.task.name, config.task.target_column)
    return open_evaluation(task, config.task, config.split, clip_frames)


def make_trial(config: Config) -> Trial:
    """The trial of a configuration, with frozen features where it needs them."""
    cache, task = config.run.output / "cache", find_task(config.task.name, config.task.target_column)
    plain = Trial(config, task, split_of(open_config(config, None), config.split, seed=0), None, cache, cache, "")
    method, backbone, frames = plain.method, None, None
    if method.needs_model:
        found = open_pretrained(config.adapt.model, config.adapt.normalize, section="adapt")
        frames = found.model.config.frames
    evaluation = open_config(config, frames)
    if method.needs_model:
        steps = config.adapt.swift_steps
        recipe = ContrastiveRecipe(kind="both", steps=steps, batch=4, lr=1e-3, temperature=0.1, seed=0)
        backbone = backbone_of(method, found, evaluation.cohort, cache / "models", seed=0, recipe=recipe)
        if method.sees in ("tokens", "clips"):
            compute_here(backbone, evaluation, config)
    split = split_of(evaluation, config.split, seed=config.run.seed, fraction=config.adapt.fraction)
    classes = evaluation.examples.classes if task.kind == "classification" else ()
    home, data = config.run.folder / "trials", evaluation.examples.sha256
    return Trial(config, task, split, backbone, cache, home, data, classes)


def compute_here(backbone: Backbone, evaluation: Evaluation, config: Config) -> int:
    """`compute_tokens` in this process; how many runs had to be embedded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "embed_runs", _spread_here)
        cache = config.run.output / "cache"
        return compute_tokens(backbone, evaluation.cohort, evaluation.examples, cache, config.adapt, workers=1)


def _spread_here(runs: Sequence[RunToEmbed], task: EmbedTask, settings: EmbedConfig) -> Iterator[int]:
    failed = 0
    for run in runs:
        failed += any(clip.reason for clip in _embedder(task).embed(run))
        yield failed


@lru_cache(maxsize=4)
def _embedder(task: EmbedTask) -> Embedder:
    return Embedder(task)

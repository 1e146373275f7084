"""The typed configuration tree of every job: one place for each setting, its unit, default and allowed range.

    preset (presets.py)  ->  --config FILE.yaml  ->  --section.field VALUE  ->  validated, frozen Config
                                                                                  |
                                              printed first, kept as config.yaml with the run, logged to MLflow

Sections are frozen pydantic models that refuse unknown keys (`base.py`), one module for each part of the way. Names
carry units (`tr_s`, `collective_timeout_s`). `commands/` turns a command line into a Config; nothing here reads one.
"""

import math
from typing import Any

import yaml
from pydantic import Field, model_validator

from neurostorm.config.base import ConfigError, Section
from neurostorm.config.data import DataConfig, EmbedConfig, IngestConfig
from neurostorm.config.evaluation import AdaptConfig, ReportConfig, SplitConfig, SweepConfig, TaskConfig
from neurostorm.config.model import AugmentConfig, MaskConfig, ModelConfig, StrdConfig
from neurostorm.config.renamed import with_new_names
from neurostorm.config.training import CheckpointConfig, RunConfig, ScaleConfig, TrackingConfig, TrainConfig

__all__ = [
    "AdaptConfig", "AugmentConfig", "CheckpointConfig", "Config", "ConfigError", "DataConfig", "EmbedConfig",
    "IngestConfig", "MaskConfig", "ModelConfig", "ReportConfig", "RunConfig", "ScaleConfig", "Section", "SplitConfig",
    "StrdConfig", "SweepConfig", "TaskConfig", "TrackingConfig", "TrainConfig",
]  # fmt: skip


class Config(Section):
    """Everything a job can be told."""

    run: RunConfig = Field(default_factory=RunConfig)
    ingest: IngestConfig = Field(default_factory=IngestConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    mask: MaskConfig = Field(default_factory=MaskConfig)
    strd: StrdConfig = Field(default_factory=StrdConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    scale: ScaleConfig = Field(default_factory=ScaleConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    split: SplitConfig = Field(default_factory=SplitConfig)
    adapt: AdaptConfig = Field(default_factory=AdaptConfig)
    sweep: SweepConfig = Field(default_factory=SweepConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    @model_validator(mode="before")
    @classmethod
    def _takes_old_names(cls, tree: Any) -> Any:
        return with_new_names(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _batches_divide(self) -> "Config":
        batch, workers, micro = self.train.global_batch, self.scale.workers, self.train.micro_batch
        if batch % workers:
            fits = max(count for count in range(1, workers) if batch % count == 0)
            raise ValueError(
                f"train.global_batch={batch} is not a multiple of scale.workers={workers}: use --workers {fits}, or "
                f"--train.global_batch {workers * max(1, round(batch / workers))}"
            )
        fewest = self.scale.min_workers or workers
        if fewest > workers:
            raise ValueError(f"scale.min_workers={fewest} is more than scale.workers={workers}")
        unequal = [number for number in range(fewest, workers) if batch % number]
        if unequal:
            raise ValueError(
                f"train.global_batch={batch} cannot be shared by {unequal[0]} workers, as scale.min_workers={fewest} "
                f"allows: use a multiple of {math.lcm(*range(fewest, workers + 1))}, or a higher scale.min_workers"
            )
        if (batch // workers) % micro:
            raise ValueError(
                f"train.micro_batch={micro} does not divide the {batch // workers} clips of one worker's step "
                f"(train.global_batch / scale.workers): use a divisor of {batch // workers}"
            )
        return self

    @property
    def clips_per_worker(self) -> int:
        """Clips that one worker takes in one optimiser step."""
        return self.train.global_batch // self.scale.workers

    def for_workers(self, workers: int) -> "Config":
        """The same run with as many workers: the global batch stays, micro-batches shrink to what divides a share."""
        share = self.train.global_batch // workers
        micro = next(size for size in range(min(self.train.micro_batch, share), 0, -1) if share % size == 0)
        scale = self.scale.model_copy(update={"workers": workers, "min_workers": None})
        return self.model_copy(
            update={"scale": scale, "train": self.train.model_copy(update={"micro_batch": micro})}, deep=True
        )

    def to_yaml(self, *sections: str) -> str:
        """The tree, or only `sections` of it, as YAML that `--config` reads back."""
        tree = self.model_dump(mode="json", include=set(sections) or None)
        return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)

    def flat(self, *sections: str) -> dict[str, Any]:
        """`section.field -> plain value`, as MLflow parameters; only `sections` when given."""
        tree = self.model_dump(mode="json")
        return {
            f"{section}.{field}": value
            for section, fields in tree.items()
            if not sections or section in sections
            for field, value in fields.items()
        }

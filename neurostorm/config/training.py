"""Settings of a run: where it lives, optimization, checkpoints, workers, MLflow."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from neurostorm.config.base import (
    Address,
    Location,
    Name,
    Positive,
    Section,
)
from neurostorm.io.paths import AnyPath


class RunConfig(Section):
    """Where a run lives and what it is called."""

    name: Name = Field("pretrain", description="name of the run in MLflow and of its folder", min_length=1)
    output: Location = Field(
        Path("outputs"),
        description="place of runs; each gets OUTPUT/NAME; a folder shared by all nodes, or s3:// gs://",
    )
    seed: int = Field(0, ge=0, description="seed of weights, clip order and masks")

    @property
    def folder(self) -> AnyPath:
        """The run's own folder, OUTPUT/NAME."""
        return self.output / self.name


class TrainConfig(Section):
    """The optimisation."""

    epochs: float = Field(30.0, gt=0, description="passes over the training clips")
    max_steps: Positive | None = Field(None, description="stop after this many steps, whatever epochs says")
    global_batch: Positive = Field(32, description="clips per optimiser step, over all workers")
    micro_batch: Positive = Field(8, description="clips per forward pass of one worker; the rest is accumulated")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw, or muon for the matrices of hidden layers and adamw for the rest (with train.zero_stage=0)",
    )
    lr: float = Field(5e-5, gt=0, le=1, description="peak learning rate")
    min_lr_fraction: float = Field(0.01, ge=0, le=1, description="final learning rate as a share of the peak")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="share of the steps with rising learning rate")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay, on matrices only")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW betas")
    clip_norm: float = Field(1.0, ge=0, description="gradient norm is clipped to this; 0 = never")
    zero_stage: int = Field(1, ge=0, le=3, description="DeepSpeed ZeRO stage; may change when a run resumes")
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="arithmetic of the forward and backward pass; weights, their updates and the sums of gradients "
        "over micro-batches and workers are always fp32",
    )
    compile: bool = Field(False, description="torch.compile each block; some minutes at the first step, for GPUs")
    max_skipped_steps: Positive = Field(10, description="stop after this many non-finite steps in a row")
    log_every: Positive = Field(10, description="steps between logged metrics")
    validate_every: Positive = Field(500, description="steps between validations")

    @model_validator(mode="after")
    def _muon_has_whole_matrices(self) -> "TrainConfig":
        if self.optimizer == "muon" and self.zero_stage > 0:
            raise ValueError(
                f"optimizer=muon works on whole matrices, and zero_stage={self.zero_stage} gives each worker a part of "
                "each: add --train.zero_stage 0"
            )
        return self


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: Positive = Field(500, description="steps between checkpoints")
    keep: Positive = Field(3, description="newest checkpoints that stay; the newest has a copy")
    preemption_check_every: Positive = Field(
        10, description="steps between checks for a preemption notice: that a node will be taken away"
    )
    resume: Literal["auto", "never", "must"] = Field(
        "auto", description="auto: go on from the newest checkpoint if any; never: refuse a used folder; must: need one"
    )


class ScaleConfig(Section):
    """Workers and what each may use."""

    workers: Positive = Field(1, description="training workers, one per GPU (or per core group)")
    min_workers: Positive | None = Field(
        None, description="go on with as few as this while others are lost, and grow again; default: scale.workers"
    )
    resize_every_s: Positive = Field(
        60, description="seconds between looks for room to grow in, with scale.min_workers"
    )
    gpus_per_worker: int = Field(0, ge=0, le=1, description="GPUs per worker; 0 trains on the CPU")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPU cores that Ray reserves for a worker")
    threads_per_worker: Positive = Field(1, description="torch threads of a worker on the CPU")
    wait_for_nodes_s: int | None = Field(
        None,
        ge=0,
        description="longest wait for nodes, or for cores and GPUs in use by other jobs, seconds; default: 600, or 0 "
        "if the cluster is too small and has no autoscaler",
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description="failures in a row, without a new checkpoint between them, after which the run ends; -1: never. "
        "What would only repeat itself (settings, damaged clips, losses that are not finite) ends it at once",
    )
    collective_timeout_s: Positive = Field(
        1800, description="seconds before a collective counts as hung, until steps were measured, and at most"
    )
    min_collective_timeout_s: Positive = Field(
        60,
        description="lower bound on the collective timeout, seconds; between the bounds it is 20 times what recent "
        "steps (their 0.9 quantile) or checkpoints took",
    )


class TrackingConfig(Section):
    """MLflow and pictures."""

    uri: Address | None = Field(
        None, description="MLflow server, http://... or sqlite:///...; default: OUTPUT/mlflow.db, if that is a folder"
    )
    experiment: str = Field("neurostorm", description="MLflow experiment", min_length=1)
    pictures: bool = Field(True, description="log reconstruction pictures at each validation")
    clip_ledger: bool = Field(False, description="write the clips of every step to RUN/ledger, for audits")

"""The typed configuration tree of every job: one place for each setting, its unit, default and allowed range.

    preset (presets.py)  ->  --config FILE.yaml  ->  --section.field VALUE  ->  validated, frozen Config
                                                                                  |
                                              printed first, kept as config.yaml with the run, logged to MLflow

Sections are frozen pydantic models that refuse unknown keys (`config_base.py`); those of the evaluation stand in
`config_evaluation.py`. Names carry units (`tr_s`, `collective_timeout_s`).
`cli.py` turns a command line into a Config; nothing here reads the command line.
"""

import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from neurostorm.config.base import (
    Address,
    ConfigError,
    Four,
    LocalPath,
    Location,
    Name,
    Positive,
    Section,
    Share,
    Weight,
)
from neurostorm.config.evaluation import AdaptConfig, ReportConfig, SplitConfig, SweepConfig, TaskConfig
from neurostorm.io.paths import AnyPath

__all__ = ["Config", "ConfigError", "Section"]


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


class IngestConfig(Section):
    """From NIfTI files to the frame store."""

    source: Location | None = Field(
        None, description="place of NIfTI files: BIDS derivatives, HCP or plain names; a folder, or s3:// gs://"
    )
    dataset: Name | None = Field(
        None, description="dataset name in the store; default: dataset_description.json's Name"
    )
    grid: Literal["2mm", "4mm", "reference"] = Field("2mm", description="the store's grid: 96^3 at 2 mm, 48^3 at 4 mm")
    tr_s: float = Field(0.8, gt=0, le=10, description="repetition time that every run is resampled to, seconds")
    mask: Location | None = Field(
        None, description="whole-brain mask NIfTI for the store; default: the ICBM template's"
    )
    chunk_frames: Positive | None = Field(
        None, description="frames under one checksum; default: as many as come nearest to 128 kB"
    )
    codec: Literal["none", "zstd"] = Field("none", description="compression of frames; zstd pays on a slow network")
    cpus_per_run: float = Field(1.0, gt=0, description="CPU cores that Ray reserves while one run is ingested")
    dry_run: bool = Field(False, description="only say what would be done, with bytes and time; write nothing")
    readmit: tuple[str, ...] = Field(
        (), description="participants who withdrew and may come back: DATASET/sub-ID, or sub-ID in any dataset"
    )


class DataConfig(Section):
    """From the frame store to clips."""

    store: Location = Field(
        Path("stores/neurostorm"), description="the frame store; a folder shared by all nodes, or s3:// gs://"
    )
    clip_frames: Positive = Field(20, description="frames per clip")
    clip_stride_frames: Positive | None = Field(None, description="frames between clip starts; default: clip_frames")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of subjects kept for validation")
    weights: dict[str, Weight] = Field(
        {}, description="relative weight by dataset, as '{hcp: 2, ukb: 0.5}'; 1 if not named, 0 leaves a dataset out"
    )
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="a dataset's share is weight * clips^(1/temperature); high: equal"
    )
    max_clips_per_subject: Positive | None = Field(
        None, description="clips of one subject per pass over its dataset, others in the next; default: all"
    )
    clips_per_read: Positive = Field(1, description="neighbouring clips kept together in the order: one read for all")
    masks_per_clip: Positive = Field(1, description="times that a clip stands in a row in the order, each a new mask")
    read_in: Literal["worker", "tasks"] = Field(
        "worker", description="where clips are read: in the training worker, ahead of it, or in Ray tasks on all nodes"
    )
    read_threads: Positive = Field(2, description="reads at a time in a worker; an object store wants 16 or more")
    steps_ahead: Positive = Field(2, description="steps read ahead of training: bounds the feed's memory")
    batch_timeout_s: Positive = Field(
        1800,
        description="longest wait of a worker for the clips of one step, seconds; then it says what is missing; above "
        "data.unavailable_s",
    )
    unavailable_s: Positive = Field(
        600, description="longest wait for the store's storage to answer, seconds; then the run ends with an error"
    )
    verify: Literal["first", "always"] = Field(
        "first", description="which reads compare checksums: a process's first of each frame, or all"
    )
    normalise: Literal["voxel", "global"] = Field(
        "voxel", description="signal the model sees: z of each voxel over time, or z over all brain voxels and frames"
    )
    max_bad_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="stop when more than this share of the last 10,000 clips, over all workers, is damaged or missing",
    )
    val_clips: Positive = Field(64, description="held-out clips per validation (fewer if the store has fewer)")

    @model_validator(mode="after")
    def _batches_outlast_storage(self) -> "DataConfig":
        if self.batch_timeout_s <= self.unavailable_s:
            shorter_s = max(1, self.batch_timeout_s // 2)
            raise ValueError(
                f"batch_timeout_s={self.batch_timeout_s} must exceed unavailable_s={self.unavailable_s}, as no worker "
                f"can wait longer for storage than for its clips: add --data.unavailable_s {shorter_s}"
            )
        return self


class ModelConfig(Section):
    """The 4D Swin encoder and its decoder."""

    mixer: Literal["attention", "mamba"] = Field("attention", description="what mixes the tokens of a window")
    layout: Literal["clean", "paper"] = Field(
        "clean", description="how windows are cut; paper: as released, padded with zero tokens, Mamba wraps round"
    )
    tokens: Literal["dense", "brain"] = Field(
        "dense", description="patches that are computed: all, or those with brain"
    )
    embed_dim: Positive = Field(36, description="channels of the first stage; doubles at each stage")
    depths: tuple[Positive, ...] = Field((2, 2, 6, 2), description="blocks per stage")
    heads: tuple[Positive, ...] = Field((3, 6, 12, 24), description="attention heads per stage")
    patch: Four = Field((6, 6, 6, 1), description="voxels x voxels x voxels x frames per token")
    window: Four = Field((4, 4, 4, 4), description="tokens per window along x, y, z and time")
    first_window: Four = Field((4, 4, 4, 4), description="the window of the first stage")
    full_last: bool = Field(False, description="the last stage's window spans all of space")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth at the deepest block")
    loss_on: Literal["brain", "all"] = Field("brain", description="voxels of masked patches that the loss counts")
    normalise_targets: bool = Field(False, description="the loss sees each patch with mean 0 and variance 1")
    decoder: Literal["paper", "light"] = Field(
        "paper",
        description="paper: all tokens pass through encoder and decoder, as released; light: the encoder sees visible "
        "tokens alone, a small decoder predicts hidden ones alone",
    )
    decoder_depth: Positive = Field(2, description="blocks of the light decoder")
    predicted: Share = Field(1.0, description="share of hidden tokens that the light decoder predicts in training")

    @model_validator(mode="after")
    def _stages_agree(self) -> "ModelConfig":
        if len(self.depths) != len(self.heads):
            raise ValueError(
                f"depths has {len(self.depths)} stages but heads has {len(self.heads)}: give one per stage"
            )
        for stage, heads in enumerate(self.heads):
            width = self.embed_dim * 2**stage
            if width % heads:
                raise ValueError(f"heads[{stage}]={heads} does not divide the stage's {width} channels")
        if self.decoder == "light" and self.layout == "paper":
            raise ValueError("decoder=light goes with layout=clean; the paper's layout has the paper's decoder")
        if self.decoder == "paper" and self.predicted < 1:
            raise ValueError(f"predicted={self.predicted}: the paper's decoder predicts every hidden token")
        if self.patch[3] != 1:
            raise ValueError(f"patch[3]={self.patch[3]}: time is never patched, use 1")
        return self


class MaskConfig(Section):
    """Which tokens the model does not see."""

    kind: Literal["random", "window", "tube", "window-tube", "atlas"] = Field(
        "window", description="single tokens, windows, patches or windows over all frames, or atlas regions"
    )
    ratio: float = Field(0.5, gt=0, lt=1, description="share masked, exact for every clip")
    window: Four = Field((4, 4, 4, 4), description="tokens per masked window (kind=window, window-tube)")
    tube_frames: Positive | None = Field(None, description="frames of a masked tube (kind=tube); default: all")
    atlas: LocalPath | None = Field(None, description="label NIfTI, on any grid, with the regions to mask (kind=atlas)")

    @model_validator(mode="after")
    def _atlas_is_given(self) -> "MaskConfig":
        if self.kind == "atlas" and self.atlas is None:
            raise ValueError("atlas: kind=atlas needs a label NIfTI, --mask.atlas FILE.nii.gz")
        if self.kind != "atlas" and self.atlas is not None:
            raise ValueError(f"atlas={self.atlas} is not used with kind={self.kind}: add --mask.kind atlas")
        return self


class StrdConfig(Section):
    """Spatiotemporal Redundancy Dropout, in training only."""

    enabled: bool = Field(False, description="drop attention elements (or, with mamba, tokens) by their redundancy")
    space: Positive = Field(5, description="extent of the spatial neighbourhood, tokens")
    time: Positive = Field(5, description="extent of the temporal neighbourhood, frames")
    rate: float | None = Field(None, gt=0, lt=1, description="mean drop rate to scale to; default: as released")


class AugmentConfig(Section):
    """Views of training clips: each turned, stretched and made noisy a little, as its row in the plan says."""

    enabled: bool = Field(False, description="train on views; validation always sees clips as they are")
    rotate_rad: float = Field(0.1, ge=0, description="each of three angles lies within +- this, radians")
    scale: float = Field(0.05, ge=0, lt=1, description="each axis is stretched by a factor within 1 +- this")
    noise_probability: float = Field(0.3, ge=0, le=1, description="share of the clips that get noise")
    noise_std: float = Field(0.1, ge=0, description="its standard deviation, in the units of the clips (z-scores)")


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
    notice_every: Positive = Field(10, description="steps between looks for the notice that a node will be taken away")
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


class EmbedConfig(Section):
    """From a model and runs to vectors."""

    model: Location | None = Field(
        None, description="place of the model, with model.safetensors and config.json; a folder, or s3:// gs://"
    )
    store: Location | None = Field(None, description="frame store whose runs are embedded; or give a source")
    source: Location | None = Field(
        None, description="folder of NIfTI files, as jobs/ingest.py takes it; or give a store"
    )
    dataset: Name | None = Field(None, description="dataset name of the source's runs; default: as jobs/ingest.py does")
    out: Location = Field(
        Path("outputs/embeddings"), description="place of the result; a folder shared by all nodes, or s3:// gs://"
    )
    normalise: Literal["voxel", "global"] | None = Field(
        None, description="for a model that does not say what it was trained on (released weights: global)"
    )
    clip_stride_frames: Positive | None = Field(None, description="frames between clip starts; default: a clip's")
    batch_clips: Positive = Field(8, description="clips of one run per forward pass")
    workers: Positive = Field(1, description="processes that hold the model, spread over the cluster")
    gpus_per_worker: float = Field(0.0, ge=0, le=1, description="share of a GPU per worker; 0 embeds on the CPU")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPU cores that Ray reserves for a worker")
    threads_per_worker: Positive = Field(1, description="torch threads of a worker on the CPU")


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

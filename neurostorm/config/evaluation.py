"""The settings of the evaluation: what is predicted, on whom, by which method, in which sweep.

task (labels, clips) -> split (who trains, validates, tests) -> adapt (one method) -> sweep (many) -> report
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from neurostorm.config.base import LocalPath, Location, Positive, Section, Share


class TaskConfig(Section):
    """What is predicted, and from which runs."""

    store: Location = Field(
        Path("stores/neurostorm"), description="the frame store; a folder shared by all nodes, or s3:// gs://"
    )
    name: str = Field(
        "age",
        min_length=1,
        description="age, sex, diagnosis, phenotype:COLUMN, reid, state, a class of your own, or its file",
    )
    labels: Location | None = Field(
        None, description="table of labels (.tsv, .csv, .parquet); default: the store's participants table"
    )
    id_column: str = Field("participant_id", min_length=1, description="column of the table that names the subject")
    target_column: str | None = Field(None, description="column with the label; default: the task's own")
    runs: str = Field(
        "auto",
        description="runs by their BIDS task label; all: every run; auto: the task's own choice, which is rest if "
        "there are any and all if not, and every run for state",
    )
    clip_frames: Positive | None = Field(None, description="frames per clip; default: the model's, 20 without one")
    clip_stride_frames: Positive | None = Field(None, description="frames between clip starts; default: a clip's")
    delay_s: float = Field(
        5.0, ge=0, le=20, description="seconds from an event to the blood response that a state's clips begin with"
    )
    overlap: Literal["refuse", "first", "drop"] = Field(
        "refuse",
        description="What to do with task events of different types that overlap in time: refuse (an error that names "
        "them), first (the earlier event keeps its time, the later one is cut), drop (leave out frames of more than "
        "one event)",
    )
    states: tuple[str, ...] = Field((), description="trial types that the state task tells apart; default: all")
    gallery: int = Field(100, ge=2, description="subjects in a gallery of re-identification (fewer if there are fewer)")
    gallery_repeats: Positive = Field(20, description="galleries drawn; the mean over them counts")


class SplitConfig(Section):
    """Who trains, who validates, who tests; subjects are never parted."""

    scheme: Literal["holdout", "kfold", "site"] = Field(
        "holdout", description="a share of the subjects, one of k folds, or all of one site test"
    )
    test: float = Field(0.2, gt=0, lt=1, description="share of subjects that test (scheme=holdout)")
    validation: float = Field(
        0.2, gt=0, lt=1, description="share that validates: of all (holdout), of those who do not test (kfold, site)"
    )
    folds: int = Field(5, ge=2, description="folds; replicate s tests on fold s modulo folds (scheme=kfold)")
    group_column: str | None = Field(None, description="column whose subjects stay together, as family_id or site")
    site_column: str = Field("site", description="column of the site that tests, the s-th by name (scheme=site)")
    strata_columns: tuple[str, ...] = Field((), description="columns balanced over the parts, beside the label")
    seed: int | None = Field(None, ge=0, description="seed of the split; default: each replicate's own")
    file: Location | None = Field(None, description="a split kept earlier (split.json), used as it is")


class AdaptConfig(Section):
    """One method of adapting a model to the task, or one baseline."""

    method: str = Field(
        "linear",
        description="linear, attention, tpt, full; random_ before them for random weights; fc, roi, motion, constant, "
        "brainnetcnn, bnt, swift, swift_scratch",
    )
    model: Location | None = Field(
        None, description="a model (model.safetensors, config.json), a run that made one, or a released .ckpt"
    )
    normalize: Literal["voxel", "global"] | None = Field(
        None, description="for a model that does not say what it was trained on (released weights: global)"
    )
    fraction: Share = Field(1.0, description="share of the training subjects whose labels are used; nested")
    strengths: tuple[float, ...] = Field(
        (1.0, 10.0, 100.0, 1e3, 1e4),
        description="ridge penalties of linear, where tpt and full start, of fc, roi, motion; validation chooses",
    )
    lr: float = Field(
        1e-3, gt=0, le=1, description="peak learning rate of prompts, pools, new heads and a random backbone"
    )
    backbone_lr_fraction: float = Field(
        0.1, gt=0, le=1, description="learning rate, over lr, of a pretrained backbone and a head started from a probe"
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay, on matrices only")
    epochs: Positive = Field(20, description="passes over the training units")
    patience: Positive = Field(5, description="epochs without a better validation before a training ends")
    batch_clips: Positive = Field(16, description="clips per step")
    clips_per_unit: Positive = Field(
        8, description="clips of one unit (subject, event, run) per epoch and in validation; all of them test"
    )
    prompts: Positive = Field(50, description="prompts per block (tpt)")
    pool: Literal["auto", "mean", "places", "coupling", "covariance"] = Field(
        "auto",
        description="a unit's vector for linear, tpt and full: mean of all tokens; of each place; correlation of "
        "places over clips; covariance of the leading directions; auto: coupling of subjects, places of events, "
        "covariance of runs",
    )
    directions: Positive = Field(50, description="leading directions of the tokens (pool=covariance)")
    embedding: Positive = Field(128, description="size of a learned embedding (reid)")
    temperature: float = Field(0.1, gt=0, description="temperature of contrastive losses")
    atlas: LocalPath | None = Field(
        None, description="label NIfTI for connectivity; default: parcels of the store's mask"
    )
    parcels: int = Field(100, ge=2, description="parcels made from the mask when no atlas is given")
    connectivity: Literal["correlation", "partial correlation", "tangent"] = Field(
        "correlation", description="connectivity of fc, brainnetcnn and bnt"
    )
    swift_steps: Positive = Field(200, description="steps of SwiFT's contrastive pretraining")
    cache: Location | None = Field(
        None, description="place of frozen features and region series, shared by runs; default: OUTPUT/cache"
    )
    gpus: float = Field(0.0, ge=0, description="GPUs of one trial, a share of one or whole ones; 0 uses the CPU")
    cpus: float = Field(1.0, gt=0, description="CPU cores that Ray reserves for one trial")
    threads: Positive = Field(1, description="torch threads of a trial on the CPU")

    @model_validator(mode="after")
    def _strengths_are_positive(self) -> "AdaptConfig":
        if not self.strengths or min(self.strengths) <= 0:
            raise ValueError(f"strengths={self.strengths}: give at least one number above 0")
        return self


class SweepConfig(Section):
    """Many trials: every task with every method, label fraction, replicate and hyperparameter."""

    tasks: tuple[str, ...] = Field(("age", "sex", "diagnosis", "reid", "state"), description="tasks, as task.name")
    methods: tuple[str, ...] = Field(
        ("linear", "tpt", "full", "random_linear", "random_full", "fc", "motion", "constant"),
        description="methods, as adapt.method",
    )
    fractions: tuple[Share, ...] = Field((1.0,), description="label fractions, as 0.1,0.25,0.5,1")
    replicates: Positive = Field(5, description="replicates: seeds run.seed, run.seed + 1, ... of split and weights")
    lr: tuple[float, ...] = Field((), description="learning rates tried; default: adapt.lr")
    weight_decay: tuple[float, ...] = Field((), description="weight decays tried; default: adapt.weight_decay")
    prompts: tuple[int, ...] = Field((), description="numbers of prompts tried (tpt); default: adapt.prompts")
    trials_at_once: Positive | None = Field(None, description="trials at a time; default: as many as fit")
    early_stopping: bool = Field(True, description="ASHA stops trials that are worse than others of their cell")
    grace_epochs: Positive = Field(2, description="epochs before a trial may be stopped")
    retries: int = Field(
        1, ge=0, description="further tries of a trial that fails for a reason that may pass, as a process that died"
    )
    stop_after_failures: int = Field(
        3,
        ge=0,
        description="end the sweep when its first N trials, and no other, have ended and all failed for one reason; 0: "
        "never",
    )
    resume: bool = Field(True, description="go on with what an earlier start left; false refuses a used folder")
    report: bool = Field(True, description="write the report at the end")


class ReportConfig(Section):
    """The report of a sweep, from MLflow alone."""

    run_id: str | None = Field(None, description="MLflow run of the sweep; default: that of OUTPUT/NAME")
    out: Location | None = Field(None, description="place of the report; default: OUTPUT/NAME/report")

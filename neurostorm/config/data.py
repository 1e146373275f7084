"""Settings from NIfTI files to clips, and from a model and runs to vectors."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from neurostorm.config.base import (
    Location,
    Name,
    Positive,
    Section,
    Weight,
)


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
    compression: Literal["none", "zstd"] = Field(
        "none", description="compression of frames; zstd pays on a slow network"
    )
    cpus_per_run: float = Field(1.0, gt=0, description="CPU cores that Ray reserves while one run is ingested")
    dry_run: bool = Field(False, description="only say what would be done, with bytes and time; write nothing")
    allow_removed: tuple[str, ...] = Field(
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
    prefetch_steps: Positive = Field(2, description="steps read ahead of training: bounds the loader's memory")
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
    normalize: Literal["voxel", "global"] = Field(
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
    normalize: Literal["voxel", "global"] | None = Field(
        None, description="for a model that does not say what it was trained on (released weights: global)"
    )
    clip_stride_frames: Positive | None = Field(None, description="frames between clip starts; default: a clip's")
    batch_clips: Positive = Field(8, description="clips of one run per forward pass")
    workers: Positive = Field(1, description="processes that hold the model, spread over the cluster")
    gpus_per_worker: float = Field(0.0, ge=0, le=1, description="share of a GPU per worker; 0 embeds on the CPU")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPU cores that Ray reserves for a worker")
    threads_per_worker: Positive = Field(1, description="torch threads of a worker on the CPU")

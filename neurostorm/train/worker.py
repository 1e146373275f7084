"""What runs on every Ray Train worker: assemble one rank's parts, resume, train, export.

    config -> corpus, model, engine -> newest checkpoint -> Loop.run -> export -> summary.json (rank 0)

This module and `launch` are the only ones of training that know Ray.
"""

import json
import logging
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from neurostorm.config import Config
from neurostorm.data.corpus import Corpus, open_corpus
from neurostorm.data.pipeline import batches
from neurostorm.tracking import Tracker, code_revision, open_run, tracking_uri
from neurostorm.train import checkpoint
from neurostorm.train.build import build_model, build_unpacker, export
from neurostorm.train.engine import Engine
from neurostorm.train.loop import Loop
from neurostorm.train.validate import Validation

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"


def train_worker(settings: dict[str, Any]) -> None:
    """One worker's part of a pretraining run; `settings` holds the configuration tree under `config`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = Config.model_validate(settings["config"])
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(config.scale.threads_per_worker)
    corpus = open_corpus(config)
    tracker = open_tracker(config, corpus) if rank == 0 else Tracker()
    try:
        loop = assemble(config, corpus, tracker, rank=rank, workers=workers, device=device)
        final = loop.run()
        export(loop.engine, config, corpus.store, config.run.folder / "model", rank=rank, step=loop.total_steps)
        if rank == 0:
            finish(config, tracker, final, loop.total_steps)
    except BaseException:
        tracker.close("FAILED")
        raise


def assemble(
    config: Config, corpus: Corpus, tracker: Tracker, *, rank: int, workers: int, device: torch.device
) -> Loop:
    """The loop of one rank, at the step that the newest checkpoint reached."""
    model = build_model(config, corpus.store)
    unpack = build_unpacker(model, corpus.store, config.data.clip_frames, device)
    engine = Engine(model, config.train, config.clips_per_worker, device)
    first_step = resume(config, engine, rank)
    share = ray.train.get_dataset_shard("train")
    return Loop(
        config=config,
        engine=engine,
        model=model,
        unpack=unpack,
        batches=batches(share, rank=rank, first_step=first_step, clips=config.clips_per_worker),
        validation=Validation(config, engine, model, unpack, corpus.reader, corpus.validation, tracker, rank),
        tracker=tracker,
        runs=corpus.runs,
        trainer={
            "config": config.model_dump(mode="json"),
            "workers": workers,
            "mlflow_run_id": tracker.run_id,
            "code_revision": code_revision(),
            "store_sha256": corpus.store.content_hash(),
        },
        rank=rank,
        first_step=first_step,
        total_steps=corpus.plan.total_steps(config.train.epochs, config.train.max_steps),
        clips_per_epoch=corpus.plan.clips_per_epoch,
    )


def resume(config: Config, engine: Engine, rank: int) -> int:
    """Loads the newest checkpoint, which rank 0 chooses for all, and returns its number of finished steps."""
    found: list[Any] = [None]
    if rank == 0:
        newest = checkpoint.newest(config.run.folder / "checkpoints")
        found = [(str(newest.path), newest.step)] if newest else [None]
    dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return 0
    path, step = found[0]
    engine.load(Path(path))
    if rank == 0:
        logger.info("resuming after step %d from %s", step, path)
    return int(step)


def open_tracker(config: Config, corpus: Corpus) -> Tracker:
    """The run's MLflow run with its parameters, tags and resolved configuration."""
    folder = config.run.folder
    tracker = open_run(
        folder,
        uri=tracking_uri(config.tracking.uri, config.run.output),
        experiment=config.tracking.experiment,
        name=config.run.name,
        parameters=config.flat("run", "data", "model", "mask", "strd", "train", "scale"),
        tags={"code_revision": code_revision(), "store_sha256": corpus.store.content_hash(), "split": corpus.split},
    )
    tracker.artifact(folder / "config.yaml")
    return tracker


def finish(config: Config, tracker: Tracker, final: dict[str, float], steps: int) -> None:
    """Stores the exported model and the last checkpoint with the MLflow run, and writes the summary."""
    folder = config.run.folder
    tracker.artifact(folder / "model", "model")
    newest = checkpoint.newest(folder / "checkpoints")
    if newest is not None:
        tracker.artifact(newest.path, f"checkpoints/{newest.path.name}")
    summary = {"steps": steps, **final, "mlflow_run_id": tracker.run_id, "model": str(folder / "model")}
    temporary = folder / f"{SUMMARY}.partial"
    temporary.write_text(json.dumps(summary, indent=1))
    temporary.replace(folder / SUMMARY)
    tracker.artifact(folder / SUMMARY)
    tracker.close()

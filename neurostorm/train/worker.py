"""What runs on every Ray Train worker: assemble one rank's parts, resume, train, export.

    config -> corpus, model, engine -> newest checkpoint -> Loop.run -> export -> summary.json (rank 0)

Of training, only this module, `launch` and `gauges` know Ray; `build.assemble` is the same for all callers.
"""

import json
import logging
import warnings
from datetime import datetime
from functools import partial
from typing import Any

import ray.train
import torch

from neurostorm.config import Config
from neurostorm.data.corpus import Corpus
from neurostorm.data.loader import batches
from neurostorm.data.pinned import Cuda, DeviceCopies
from neurostorm.io.atomic import atomic_write
from neurostorm.tracking.tracker import Tracker, code_revision, open_run, tracking_uri
from neurostorm.train.build import assemble, export
from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.health.stop import StopWatch
from neurostorm.train.records.gauges import Gauges
from neurostorm.train.records.pinned_manifest import planned
from neurostorm.train.records.time_account import TimeAccount
from neurostorm.train.validation import CLIPS

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
WITHDRAWN = "withdrawn_subjects"  # of the plan, in the summary and among MLflow's tags


def train_worker(settings: dict[str, Any]) -> None:
    """One worker's part of a pretraining run.

    settings  `config`: the configuration tree; `started_ns`: when the driver started, in Unix time
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("neurostorm").setLevel(logging.INFO)  # and not matplotlib's, or torch's
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated", category=FutureWarning)  # DeepSpeed's
    context = ray.train.get_context()
    config = Config.model_validate(settings["config"]).for_workers(context.get_world_size())
    rank, device = context.get_world_rank(), ray.train.torch.get_device()
    account = TimeAccount(config.run.folder if rank == 0 else None, settings["started_ns"])
    torch.set_num_threads(config.scale.threads_per_worker)
    corpus = planned(config)
    tracker = open_tracker(config, corpus) if rank == 0 else Tracker()
    try:
        feed = partial(
            batches, ray.train.get_dataset_shard("train"), corpus.reader, rank=rank, clips=config.clips_per_worker,
            threads=config.data.read_threads, prefetch_steps=config.data.prefetch_steps,
            timeout_s=config.data.batch_timeout_s,
            copies=DeviceCopies(Cuda(device)) if device.type == "cuda" else None,
        )  # fmt: skip
        if rank == 0:
            logger.info("building the model, then waiting for the first clips")
        stop = StopWatch(config.run.folder) if rank == 0 else never
        loop = assemble(
            config, corpus, tracker, account, feed, rank=rank, device=device, notice=will_be_taken, stop=stop
        )
        final = loop.run()
        if final is None:
            tracker.close("KILLED")
            return
        export(loop, corpus, config.run.folder / "model")
        if rank == 0:
            finish(config, corpus, tracker, account, final, loop.total_steps)
    except BaseException:
        tracker.close("FAILED")
        raise


def never() -> bool:
    """Whether this rank was asked to stop the run: rank 0 is asked."""
    return False


def will_be_taken() -> bool:
    """Whether a node with a worker of this run is about to be taken away; all workers wait for each other here."""
    return ray.train.get_preemption_info() is not None


def open_tracker(config: Config, corpus: Corpus) -> Tracker:
    """The run's MLflow run with its parameters, tags and resolved configuration; Prometheus sees its metrics too."""
    folder = config.run.folder
    tracker = open_run(
        folder,
        uri=tracking_uri(config.tracking.uri, config.run.output),
        experiment=config.tracking.experiment,
        name=config.run.name,
        parameters=config.flat("run", "data", "model", "mask", "strd", "augment", "train", "scale"),
        tags={
            "code_revision": code_revision(), "store_sha256": corpus.content_sha256, "split": corpus.split,
            WITHDRAWN: str(len(corpus.withdrawn)),
        },
        artifacts=config.run.output / "artifacts",
    )  # fmt: skip
    tracker.artifact(folder / "config.yaml")
    tracker.observe(Gauges(config.run.name))
    return tracker


def finish(
    config: Config, corpus: Corpus, tracker: Tracker, account: TimeAccount, final: dict[str, float], steps: int
) -> None:
    """Stores the exported model and the last checkpoint with the MLflow run, closes the account, writes the summary.

    Without a server they wait in RUN/unsent, and the summary has the command that sends them.
    """
    folder = config.run.folder
    logger.info("storing the model and the last checkpoint with the MLflow run %s", tracker.run_id or "(not open yet)")
    tracker.artifact(folder / "model", "model")
    newest = checkpoints.newest(folder / "checkpoints")
    if newest is not None:
        tracker.artifact(newest.path, f"checkpoints/{newest.path.name}")
    account.keep("checkpoint")
    tracker.metrics(account.metrics(), steps)
    tracker.tag(WITHDRAWN, str(len(corpus.withdrawn)))
    tracker.flush()
    account.flush()
    summary = {
        "steps": steps,
        **{name: value if final[CLIPS] else None for name, value in final.items()},
        WITHDRAWN: len(corpus.withdrawn),
        **account.metrics(),
        "finished": datetime.now().astimezone().isoformat(" ", "seconds"),
        "model": str(folder / "model"),
    }
    logged = tracker.facts()
    atomic_write(folder / SUMMARY, json.dumps(summary | logged, indent=1).encode())
    tracker.artifact(folder / SUMMARY)
    tracker.close()
    if tracker.facts() != logged:
        atomic_write(folder / SUMMARY, json.dumps(summary | tracker.facts(), indent=1).encode())

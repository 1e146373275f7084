"""Pretrain on a frame store: `python jobs/pretrain.py --preset tiny --store STORE`, or the same by `ray job submit`."""

import shlex
import sys
from collections.abc import Mapping, Sequence

from neurostorm.commands.command import Job
from neurostorm.config import Config


def facts(config: Config) -> Mapping[str, str]:
    """What the summary says of a run."""
    model, train, scale = config.model, config.train, config.scale
    device = f"{scale.gpus_per_worker} GPU, " if scale.gpus_per_worker else ""
    length = f"{train.max_steps} steps at most" if train.max_steps else f"{train.epochs:g} epochs"
    return {
        "model": f"{model.mixer} mixer, {len(model.depths)} stages from {model.embed_dim} channels, {model.tokens} "
        f"tokens, {model.decoder} decoder; mask {config.mask.kind} {config.mask.ratio:g}",
        "train": f"{scale.workers} worker(s) x ({device}{scale.cpus_per_worker:g} CPU), {train.dtype}; "
        f"{train.global_batch} clips a step, {length}, learning rate {train.lr:g}",
    }


def resume(config: Config) -> str:
    """What a run that is interrupted says."""
    from neurostorm.train.launch import how_to_resume

    return how_to_resume(config)


JOB = Job(
    "pretrain",
    "Pretrain the 4D Swin masked autoencoder on a frame store that jobs/ingest.py made.",
    settings=("run", "data", "model", "mask", "strd", "augment", "train", "checkpoint", "scale", "tracking"),
    aliases={
        "--store": "data.store",
        "--output": "run.output",
        "--name": "run.name",
        "--workers": "scale.workers",
        "--resume": "checkpoint.resume",
    },
    presets=True,
    facts=facts,
    resume=resume,
)


def work(config: Config) -> int:
    """Trains to the end, or says that the run is complete, or that it was stopped."""
    from neurostorm.tracking.tracker import closing_words
    from neurostorm.train.health.stop import STOPPED_STATUS, RunStopped
    from neurostorm.train.launch import pretrain
    from neurostorm.train.records.log_lines import held_out
    from neurostorm.train.records.time_account import in_words

    try:
        done = pretrain(config)
    except RunStopped as stopped:
        print(f"{JOB.program}: {stopped}", file=sys.stderr, flush=True)
        return STOPPED_STATUS
    if done["trained_steps"]:
        loss = held_out(
            done["loss/validation"],
            done["loss/validation_predicting_mean"],
            normalise_targets=config.model.normalize_targets,
            longer="--train.max_steps" if config.train.max_steps else "--train.epochs",
        )
        print(f"\n{config.run.name}: {done['steps']} steps done.", *loss, sep="\n")
    print(
        f"  model   {done['model']} (model.safetensors, config.json)\n"
        f"  time    {in_words(done)}\n"
        f"  MLflow  {done['mlflow_uri']}, run {done['mlflow_run_id'] or '(not open)'}",
        *closing_words(done),
        f"next: mlflow server --backend-store-uri {shlex.quote(done['mlflow_uri'])} --host 127.0.0.1 --port 5000",
        sep="\n",
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit status."""
    return JOB.run(work, argv)

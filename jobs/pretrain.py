"""Pretrain on a frame store: `python jobs/pretrain.py --preset tiny --store STORE`, or the same by `ray job submit`."""

import sys
from collections.abc import Mapping, Sequence

from neurostorm.cli import Job
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
)


def work(config: Config) -> int:
    """Trains to the end, or says that the run is complete."""
    from neurostorm.train.goodput import in_words
    from neurostorm.train.launch import pretrain

    summary = pretrain(config)
    better = "below" if summary["loss/validation"] < summary["loss/validation_predicting_mean"] else "NOT below"
    print(
        f"\n{config.run.name}: {summary['steps']} steps done. Held-out masked loss {summary['loss/validation']:.4f}, "
        f"{better} the {summary['loss/validation_predicting_mean']:.4f} of predicting each voxel's mean.\n"
        f"  model   {summary['model']} (model.safetensors, config.json)\n"
        f"  time    {in_words(summary)}\n"
        f"  MLflow  {summary['mlflow_uri']}, run {summary['mlflow_run_id']}\n"
        f"Next: mlflow server --backend-store-uri {summary['mlflow_uri']} --host 127.0.0.1"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit status."""
    return JOB.run(work, argv)


if __name__ == "__main__":
    sys.exit(main())

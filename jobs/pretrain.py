"""Pretrain on a frame store: `ray job submit -- python jobs/pretrain.py --preset tiny --store DIR`."""

import logging
import sys
from collections.abc import Sequence

from neurostorm.cli import Job
from neurostorm.config import ConfigError
from neurostorm.object_store import PlaceError
from neurostorm.store.layout import StoreError

JOB = Job(
    name="pretrain",
    purpose="Pretrain the 4D Swin masked autoencoder on a frame store that jobs/ingest.py made.",
    sections=("run", "data", "model", "mask", "strd", "augment", "train", "checkpoint", "scale", "tracking"),
    aliases={
        "--store": "data.store",
        "--output": "run.output",
        "--name": "run.name",
        "--workers": "scale.workers",
        "--resume": "checkpoint.resume",
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; 0 when the run is complete, 1 when it cannot start (training errors propagate)."""
    config = JOB.parse(argv)
    print(config.to_yaml(*JOB.sections), flush=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from neurostorm.train.goodput import in_words
    from neurostorm.train.launch import pretrain

    try:
        summary = pretrain(config)
    except (ConfigError, PlaceError, StoreError) as error:
        print(f"jobs/pretrain.py: {error}", file=sys.stderr)
        return 1
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


if __name__ == "__main__":
    sys.exit(main())

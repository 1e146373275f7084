"""One method on one task: `python jobs/finetune.py --task age --method linear --model DIR --store STORE --name N`."""

from collections.abc import Sequence

from neurostorm.commands.command import Job
from neurostorm.config import Config

JOB = Job(
    "finetune",
    "Adapt a pretrained model to a task, or run a baseline on it; choose on validation, test once.",
    settings=("run", "task", "split", "adapt", "tracking.uri", "tracking.experiment", "scale.wait_for_nodes_s"),
    aliases={
        "--task": "task.name",
        "--store": "task.store",
        "--labels": "task.labels",
        "--id-column": "task.id_column",
        "--target-column": "task.target_column",
        "--method": "adapt.method",
        "--model": "adapt.model",
        "--output": "run.output",
        "--name": "run.name",
    },
    defaults={"run": {"name": "finetune"}},
    facts=lambda config: {"task": f"{config.task.name} by {config.adapt.method}, seed {config.run.seed}"},
)


def work(config: Config) -> int:
    """Trains, chooses, tests."""
    from neurostorm.downstream.finetune import finetune

    print("\n".join(finetune(config).lines()))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit status."""
    return JOB.run(work, argv)

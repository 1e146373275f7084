"""One method on one task: `python jobs/finetune.py --task age --method linear --model DIR --store STORE`."""

import logging
import sys
from collections.abc import Sequence

from neurostorm.cli import Job
from neurostorm.config import ConfigError

JOB = Job(
    "finetune",
    "Adapt a pretrained model to a task, or run a baseline on it; choose on validation, test once.",
    sections=("run", "task", "split", "adapt", "tracking"),
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
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; 0 when it was tested, 1 when it cannot be done (errors of the trial itself propagate)."""
    config = JOB.parse(argv)
    print(config.to_yaml(*JOB.sections), flush=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from neurostorm.downstream.errors import REFUSALS
    from neurostorm.downstream.finetune import finetune

    try:
        done = finetune(config)
    except (ConfigError, *REFUSALS) as error:
        print(f"jobs/finetune.py: {error}", file=sys.stderr)
        return 1
    print("\n".join(done.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

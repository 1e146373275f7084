"""Many methods on many tasks: `python jobs/sweep.py --tasks age,sex --methods linear,fc --model DIR --store STORE`."""

import logging
import sys
from collections.abc import Sequence

from neurostorm.cli import Job
from neurostorm.config import ConfigError

JOB = Job(
    "sweep",
    "Tasks x methods x fractions x replicates x hyperparameters on Ray Tune; selected on validation, tested once.",
    sections=("run", "task", "split", "adapt", "sweep", "report", "tracking"),
    aliases={
        "--tasks": "sweep.tasks",
        "--methods": "sweep.methods",
        "--fractions": "sweep.fractions",
        "--replicates": "sweep.replicates",
        "--resume": "sweep.resume",
        "--store": "task.store",
        "--labels": "task.labels",
        "--id-column": "task.id_column",
        "--target-column": "task.target_column",
        "--model": "adapt.model",
        "--output": "run.output",
        "--name": "run.name",
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; 0 when every cell was tested, 1 when one has no result or the sweep cannot start."""
    config = JOB.parse(argv)
    print(config.to_yaml(*JOB.sections), flush=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from neurostorm.downstream.errors import REFUSALS
    from neurostorm.report.job import report_of
    from neurostorm.report.results import ReportError
    from neurostorm.tune.sweep import sweep

    try:
        swept = sweep(config)
        print("\n".join(swept.lines()), flush=True)
        if config.sweep.report:
            print("\n".join(report_of(config, swept.mlflow_run_id).lines()))
    except (ConfigError, ReportError, *REFUSALS) as error:
        print(f"jobs/sweep.py: {error}", file=sys.stderr)
        return 1
    return 1 if swept.missing else 0


if __name__ == "__main__":
    sys.exit(main())

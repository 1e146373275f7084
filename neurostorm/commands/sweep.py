"""Many methods on many tasks: `python jobs/sweep.py --tasks age,sex --methods linear,fc --model DIR --store STORE`."""

from collections.abc import Sequence

from neurostorm.commands.command import Job
from neurostorm.config import Config

JOB = Job(
    "sweep",
    "Tasks x methods x fractions x replicates x hyperparameters on Ray Tune; selected on validation, tested once.",
    settings=(
        "run",
        "task",
        "split",
        "adapt",
        "sweep",
        "report.out",
        "tracking.uri",
        "tracking.experiment",
        "scale.wait_for_nodes_s",
    ),
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
    defaults={"run": {"name": "sweep"}},
    facts=lambda config: {
        "trials": f"{','.join(config.sweep.tasks)} by {','.join(config.sweep.methods)}, "
        f"{config.sweep.replicates} replicate(s)"
    },
)


def work(config: Config) -> int:
    """Runs the trials that are left, then writes the report; 1 when a cell has no result."""
    from neurostorm.report.job import report_of
    from neurostorm.tune.sweep import sweep

    swept = sweep(config)
    print("\n".join(swept.lines()), flush=True)
    if config.sweep.report and swept.mlflow_unsent:
        print(
            "no report yet, which is made of what is in MLflow: send the rest to it as above, then start jobs/report.py"
        )
    elif config.sweep.report:
        print("\n".join(report_of(config, swept.mlflow_run_id).lines()))
    return 1 if swept.missing else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit status."""
    return JOB.run(work, argv)

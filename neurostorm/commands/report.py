"""The report of a sweep, from MLflow alone: `python jobs/report.py --output outputs --name sweep`."""

from collections.abc import Sequence

from neurostorm.commands.command import Job
from neurostorm.config import Config

JOB = Job(
    "report",
    "Tables, figures and one HTML page of a sweep, made from MLflow alone and logged back to the sweep's run.",
    settings=("run.output", "run.name", "report", "tracking.uri"),
    aliases={
        "--output": "run.output",
        "--name": "run.name",
        "--run": "report.run_id",
        "--uri": "tracking.uri",
        "--out": "report.out",
    },
    defaults={"run": {"name": "sweep"}},
)


def work(config: Config) -> int:
    """Writes the report."""
    from neurostorm.report.job import report_of

    print("\n".join(report_of(config, config.report.run_id).lines()))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit status."""
    return JOB.run(work, argv)

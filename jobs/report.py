"""The report of a sweep, from MLflow alone: `python jobs/report.py --output outputs --name sweep`."""

import logging
import sys
from collections.abc import Sequence

from neurostorm.cli import Job
from neurostorm.config import ConfigError

JOB = Job(
    "report",
    "Tables, figures and one HTML page of a sweep, made from MLflow alone and logged back to the sweep's run.",
    sections=("run", "report", "tracking"),
    aliases={
        "--output": "run.output",
        "--name": "run.name",
        "--run": "report.run_id",
        "--uri": "tracking.uri",
        "--out": "report.out",
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; 0 when the report was written, 1 with the reason when it was not."""
    config = JOB.parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from neurostorm.object_store import PlaceError
    from neurostorm.report.job import report_of
    from neurostorm.report.results import ReportError

    try:
        print("\n".join(report_of(config, config.report.run_id).lines()))
    except (ConfigError, PlaceError, ReportError) as error:
        print(f"jobs/report.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A report as a job asks for it: which sweep of which MLflow, and where to."""

import json

from neurostorm.config import Config, ConfigError
from neurostorm.report.summary import ReportResult, write_report
from neurostorm.tracking.tracker import RUN_FILE, tracking_uri


def report_of(config: Config, run_id: str | None = None) -> ReportResult:
    """The report of the sweep with this MLflow run id, or of the one in OUTPUT/NAME, into report.out.

    Raises:
        ConfigError: no id is given and the folder holds no sweep; or no MLflow is named for an output in an object
            store.
        ReportError: as `write_report`.
    """
    folder = config.run.folder
    try:
        uri = tracking_uri(config.tracking.uri, config.run.output)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if run_id is None:
        kept = folder / RUN_FILE
        if not kept.is_file():
            raise ConfigError(
                f"{folder} holds no sweep ({RUN_FILE} is missing): give its --output and --name, or --run and --uri"
            )
        known = json.loads(kept.read_text())
        run_id, uri = known["run_id"], config.tracking.uri or known["uri"]
    return write_report(uri, run_id, config.report.out or folder / "report")

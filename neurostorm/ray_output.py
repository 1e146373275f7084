"""What people see of Ray: its workers' lines without prefix and color, and without notes that nobody can act upon.

Ray reads these settings when it is imported, so a job calls `configure` before. A setting that the environment already
has stays: RAY_DISABLE_WORKER_LOG_PREFIX=0 shows process ids, RAY_DEDUP_LOGS_SKIP_REGEX= (empty) shows every line.
"""

import os

# Lines of Ray and MLflow that say what always happens, matched from the start of the line (Ray's C++ lines have a time
# stamp and a source position before). No pattern may match a message of a user's code or of this package.
NOTES = (
    # Ray's own actors, which it can restart without their arguments or does not need to: ray-project/ray issue 53727
    r"\[.* E \d+ \d+\] core_worker\.cc:\d+: Actor with class name: '(PreemptionWatcher|MapWorker.*)' and ID: .* has "
    r"constructor arguments in the object store and max_restarts > 0",
    r"Requesting resources: ",
    r"Setting up process group for: ",
    r"Starting execution of Dataset ",
    r"Execution plan of Dataset ",
    r"Progress bars disabled\. To enable, set ",
    r"\S+ +Dataset \S+ execution finished in ",
    r"Registered dataset logger for dataset ",
)
SETTINGS = {
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": f"^({'|'.join(NOTES)})",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # interrupts.py handles Ctrl-C
}


def configure() -> None:
    """Sets the environment for a Ray that this process imports later; what is set already stays."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)

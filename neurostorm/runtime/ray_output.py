"""What people see of Ray: its workers' lines without prefix and color, and without notes that nobody can act upon.

Ray reads these settings when it is imported, so a job calls `configure` before. A setting that the environment already
has stays: RAY_DISABLE_WORKER_LOG_PREFIX=0 shows process ids, RAY_DEDUP_LOGS_SKIP_REGEX= (empty) shows every line.
"""

import os
import shutil
import subprocess
import sys

# Of C++ code, which may run in the driver: for Python and for grep -E.
OWN_ACTORS = (
    r"\[.* E [0-9]+ [0-9]+\] core_worker\.cc:[0-9]+: Actor with class name: '(PreemptionWatcher|MapWorker.*)' and ID: "
    r".* has constructor arguments in the object store and max_restarts > 0"
)
# Lines of Ray and MLflow that say what always happens, matched from the start of the line (Ray's C++ lines have a time
# stamp and a source position before). No pattern may match a message of a user's code or of this package.
NOTES = (
    # Ray's own actors, which it can restart without their arguments or does not need to: ray-project/ray issue 53727
    OWN_ACTORS,
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


def filter_stderr() -> None:
    """Hides the notes that Ray's C++ code in this process writes to standard error, whose level cannot be set alone.

    What is written to file descriptor 2 goes through grep, a process of its own, so that the last words of a process
    that crashes are shown, too. `sys.stderr` does not, so progress bars stay as they are. Does nothing where
    `sys.stderr` is not the process's own (a notebook, a test) or there is no grep.
    """
    grep, stream = shutil.which("grep"), sys.__stderr__
    if grep is None or stream is None or sys.stderr is not stream or stream.fileno() != 2:
        return
    stream.flush()
    shown = os.dup(2)
    command = [grep, "--line-buffered", "--text", "-v", "-E", f"^{OWN_ACTORS}"]
    # A session of its own: Ctrl-C must not end it before this process.
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=shown, stderr=shown, start_new_session=True, env={"LC_ALL": "C"}
    )
    assert child.stdin is not None
    os.dup2(child.stdin.fileno(), 2)
    child.stdin.close()
    child.returncode = 0  # it ends after this process: nobody waits for it
    sys.stderr = open(shown, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115

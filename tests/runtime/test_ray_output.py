"""Ray's notes on itself are hidden, what people must see is not; Ray really takes the settings."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from neurostorm.runtime import ray_output

HIDDEN = (
    "[2026-12-01 03:02:11,021 E 7904 8002] core_worker.cc:2465: Actor with class name: 'PreemptionWatcher' and ID: "
    "'b871' has constructor arguments in the object store and max_restarts > 0. If the arguments in the object store",
    "Requesting resources: {'CPU': 0.5} * 2",
    "Setting up process group for: env:// [rank=0, world_size=2]",
    "Starting execution of Dataset train_0356trsD1fZPk1j2H4VGNW_0. Full logs are in /tmp/ray/session/logs/ray-data",
    "Execution plan of Dataset train_03: InputDataBuffer[Input] -> OutputSplitter[split(2, equal=True)]",
    "Progress bars disabled. To enable, set `ray.data.DataContext.get_current().enable_progress_bars = True`.",
    "✔️  Dataset train_0356trsD1fZPk1j2H4VGNW_0 execution finished in 4.95 seconds",
)
SHOWN = (
    "step 120/5000 loss=0.4123 clips_per_s=31.52 wait=0.2%",
    "StoreError: Requesting resources: of this name there is no store",
    "[2026-12-01 03:02:11,021 E 7904 8002] core_worker.cc:2465: Actor with class name: 'Mine' and ID: 'b871' died",
    "[2026-12-01 03:02:11,021 E 7904 8002] node_manager.cc:3: 2 Workers killed due to memory pressure (OOM)",
    "Started training worker group of size 2: ",
    "❌  Dataset train_03 execution failed",
    "",
)
PRINTS = """
import json, sys
from neurostorm.runtime import ray_output
ray_output.configure()
from ray._private import ray_logging, worker
lines = json.load(sys.stdin)
data = {"pid": 7, "actor_name": "RayTrainWorker", "ip": "1", "is_err": False, "lines": lines}
worker.print_to_stdstream(data, worker._should_ignore_worker_log_prefix(worker.global_worker))
"""


def test_settings_that_are_there_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ray_output.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_DISABLE_WORKER_LOG_PREFIX", "0")
    ray_output.configure()
    assert os.environ["RAY_DISABLE_WORKER_LOG_PREFIX"] == "0"
    assert os.environ["RAY_COLOR_PREFIX"] == "0"


@pytest.mark.parametrize("line", HIDDEN)
def test_each_note_is_of_a_line_that_ray_writes(line: str) -> None:
    assert re.search(ray_output.SETTINGS["RAY_DEDUP_LOGS_SKIP_REGEX"], line)


def test_ray_prints_what_is_left_without_prefix_and_color() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], input=json.dumps([*HIDDEN, *SHOWN]), capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name not in ray_output.SETTINGS},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:-1] == list(SHOWN)


WRITES = """
import os, sys
from neurostorm.runtime import ray_output
ray_output.filter_stderr()
print("first", file=sys.stderr)
os.write(2, sys.argv[1].encode())
print("bar 1", end="\\rbar 2", file=sys.stderr, flush=True)
os.write(2, b"last words \\xff")
os.abort()
"""


def test_of_this_process_notes_alone_are_hidden_and_the_last_words_of_a_crash_are_not() -> None:
    lines = "\n".join([HIDDEN[0], *SHOWN[:4], ""])
    with subprocess.Popen([sys.executable, "-c", WRITES, lines], stderr=subprocess.PIPE) as program:
        assert program.stderr is not None
        shown = program.stderr.read()
    assert program.returncode == -signal.SIGABRT
    assert HIDDEN[0].encode() not in shown
    for part in (b"first\n", b"bar 1\rbar 2", b"last words \xff", *(line.encode() + b"\n" for line in SHOWN[:4])):
        assert part in shown

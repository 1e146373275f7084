"""Runs of `jobs/pretrain.py` to be killed: a tiny store, a tiny configuration, a start in a process of its own.

    make_store(FOLDER) --> make_config(...) --> Job --ledger--> Job.steps: every step as it was done, repeats too
                                                 |--> Job.workers(), kill_all(): whom to kill
                                                 '--> last_words(config): what counts of the ledger, all ranks

A Job has a Ray of its own, with its files in a folder beside the run's; nothing else on this machine is touched.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scipy.ndimage import gaussian_filter

from neurostorm.config import Config
from neurostorm.io.paths import AnyPath, list_files
from neurostorm.store import INT8_16, Grid, create_store, run_path, write_manifest, write_run

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (24, 24, 24)
# A token for every Ray that is started here: without one Ray would make it in the home folder.
TOKEN = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
Ledger = dict[int, tuple[float, list[int]]]  # step -> (mean loss, rows of all ranks, sorted)


class JobError(RuntimeError):
    """A job did not do what was waited for; the message holds the end of its log."""


def make_store(path: Path, frames: int = 48, subjects: int = 6) -> Path:
    """A store of 24^3 voxels (4 x 4 x 4 patches of 6): smooth signal in a ball, one run for each subject."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    mask = sum(axis**2 for axis in axes) < 0.9
    create_store(path, grid=Grid("ball", SHAPE, 8.0, (-92.0, -92.0, -92.0)), mask=mask, tr_s=0.8, recipe="test")
    for subject in range(subjects):
        rng = np.random.default_rng(subject)
        signal = gaussian_filter(rng.standard_normal((frames, *SHAPE)), (2, 3, 3, 3))[:, mask]
        mean, std = signal.mean(0), signal.std(0)
        write_run(
            path,
            run_path("balls", f"sub-{subject}", "task-rest"),
            frames=INT8_16.encode((signal - mean) / std),
            mean=(100 + mean).astype(np.float32),
            std=std.astype(np.float32),
            attributes={
                "session": "", "task": "rest", "run_label": "", "entities": {"task": "rest"},
                "source": f"sub-{subject}.nii", "source_sha256": f"{subject:064x}", "source_tr_s": 0.8,
                "source_frames": frames, "tsnr_median": 50.0, "clipped_fraction": 0.0, "coverage": 1.0,
                "global_mean": 100.0, "global_std": float(signal.std()),
            },
        )  # fmt: skip
    write_manifest(path)
    return path


def make_config(store: Path, output: Path, **overrides: dict[str, Any]) -> Config:
    """A tiny run with two workers on `make_store`'s store; sections are overridden by keyword, `train={"lr": 1}`."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"output": output, "name": "test"},
        "data": {"store": store, "clip_frames": 4, "held_out": 0.34, "val_clips": 6},
        "model": {"embed_dim": 8, "depths": (2, 1), "heads": (1, 2)},
        "mask": {"window": (2, 2, 2, 2)},
        "strd": {"enabled": True},
        "train": {"global_batch": 4, "micro_batch": 1, "lr": 3e-3, "epochs": 1, "log_every": 2},
        "scale": {"workers": 2, "cpus_per_worker": 0.5},
        "tracking": {"clip_ledger": True},
    }
    for section, fields in overrides.items():
        tree.setdefault(section, {}).update(fields)
    return Config.model_validate(tree)


class Job:
    """One start of jobs/pretrain.py, with its output appended to a file.

    command      how to start the job, up to its options
    notes        folder of its configuration and log; default: the run's output
    environment  beside this process's own, which leads to no Ray
    """

    def __init__(
        self, config: Config, command: Sequence[str] = (sys.executable,), notes: Path | None = None, **environment: str
    ) -> None:
        notes = Path(str(config.run.output)) if notes is None else notes
        notes.mkdir(parents=True, exist_ok=True)
        file = notes / f"{config.run.name}.yaml"
        file.write_text(config.to_yaml())
        self.config, self.folder, self.log = config, Path(str(config.run.folder)), file.with_suffix(".log")
        self._log_began = self.log.stat().st_size if self.log.exists() else 0
        own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, str(ROOT / "jobs" / "pretrain.py"), "--config", str(file)],
                stdout=log, stderr=subprocess.STDOUT,
                env={
                    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0",
                    "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **own, **environment,
                },
            )  # fmt: skip

    def steps(self) -> list[int]:
        """The steps that rank 0 has written to the ledger, in that order; repeated ones are there again."""
        return [entry["step"] for entry in entries(self.folder / "ledger" / "rank-0.jsonl")]

    def steps_done(self) -> int:
        """How many they are."""
        return len(self.steps())

    def reached(self) -> int:
        """Different steps so far, which is also the next new one."""
        return max(self.steps(), default=-1) + 1

    def output(self) -> str:
        """What this start has printed."""
        with self.log.open() as log:
            log.seek(self._log_began)
            return log.read()

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = 240, pause_s: float = 0.02) -> None:
        """Waits until `condition` holds while the job runs; its log is the message if that fails."""
        end_s = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None:
                raise JobError(f"the job ended before {what}:\n{self.output()[-4000:]}")
            if time.monotonic() > end_s:
                raise JobError(f"no {what} after {timeout_s:g} s:\n{self.output()[-4000:]}")
            time.sleep(pause_s)

    def family(self) -> list[psutil.Process]:
        """All processes below the job's own: its Ray, and Ray's workers."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[psutil.Process]:
        """The training workers of this job."""
        return training_workers(self.family())

    def kill(self) -> None:
        """The driver and its Ray at once, as when their machine fails."""
        family = self.family()
        self.process.kill()
        kill_all(family)
        self.process.wait(30)

    def wait_for_end(self, timeout_s: float = 300) -> int:
        """Waits for any end; returns the exit status."""
        try:
            return self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise JobError(f"the job did not end within {timeout_s:g} s:\n{self.output()[-4000:]}") from None

    def finish(self, timeout_s: float = 300) -> str:
        """Waits for a good end; returns the output."""
        if status := self.wait_for_end(timeout_s):
            raise JobError(f"the job ended with status {status}:\n{self.output()[-4000:]}")
        return self.output()


def training_workers(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are training workers of Ray Train, in order of their start."""
    found = []
    for process in processes:
        try:
            if "RayTrainWorker" in (process.name() + " ".join(process.cmdline())):
                found.append((process.create_time(), process.pid, process))
        except psutil.NoSuchProcess:
            continue
    return [process for _, _, process in sorted(found)]


def kill_all(processes: list[psutil.Process]) -> None:
    """SIGKILL to each, and the wait for their ends."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=30)


def entries(file: AnyPath) -> list[dict[str, Any]]:
    """Whole lines of a rank's ledger; the last one may be in the making."""
    if not file.is_file():
        return []
    lines = file.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def last_words(config: Config) -> Ledger:
    """Every step as it was done last, by as many workers as there were then; those that all of them wrote down.

    A rank's ledger is one file on a disk and several in an object store.
    """
    folder = config.run.folder / "ledger"
    ranks: list[dict[int, dict[str, Any]]] = [{} for _ in range(config.scale.workers)]
    for name, _ in sorted(list_files(folder)):
        rank = int(re.split(r"[-./]", name)[1])
        ranks[rank] |= {entry["step"]: entry for entry in entries(folder / name)}
    words: Ledger = {}
    for step, first in ranks[0].items():
        those = ranks[: first["workers"]]
        if all(step in rank for rank in those):
            words[step] = first["loss"], sorted(row for rank in those for row in rank[step]["rows"])
    return words

"""The sweep: every trial trained, the best of each cell selected on validation, and only these tested.

    config --space, prepare--> trials --not done before--> Ray Tune (fractions of CPUs and GPUs, ASHA, retries)
        --select on validation--> one trial per cell --test_trial, once--> MLflow: a parent run, a child per trial

A trial that is done has its `result.json`; a killed sweep, started again, repeats none of these. A trial whose process
dies, or that fails for a reason that may pass, is tried again; then it is reported, and its cell takes the next best.
When the first trials all fail alike, the sweep ends with that reason.
"""

import dataclasses
import json
import logging
import math
import os
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from neurostorm.config import Config, ConfigError
from neurostorm.downstream.errors import ERRORS, TrialsFailed, alike, count_alike, told_by
from neurostorm.downstream.methods.training import State
from neurostorm.downstream.prepare import prepare
from neurostorm.downstream.record import KIND, SELECTED, record_test, uri_of
from neurostorm.downstream.statistics.metrics import higher_is_better
from neurostorm.downstream.trial import TEST, Trial, read_outcome, test_trial, train_trial
from neurostorm.io.atomic import atomic_write
from neurostorm.io.errors import UserError
from neurostorm.io.paths import AnyPath
from neurostorm.runtime.lease import hold_lease
from neurostorm.runtime.progress import progress
from neurostorm.runtime.run_folder import CONFIG_FILE, PLACED, keep_config, refuse_other
from neurostorm.tracking.tracker import Tracker, closing_words, code_revision, open_run
from neurostorm.tune.logbook import REASON, REFUSED, GiveUp, Logbook, score_of
from neurostorm.tune.scheduler import EPOCH, CellScheduler
from neurostorm.tune.space import by_key, wanted_trials

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
JOB = "sweep"
SECTIONS = ("run", "task", "split", "adapt", "sweep")
# What may differ when a sweep goes on: it grows, or runs elsewhere.
GROWS = PLACED | {
    "sweep.tasks", "sweep.methods", "sweep.fractions", "sweep.replicates", "sweep.trials_at_once", "sweep.retries",
    "sweep.stop_after_failures", "sweep.resume", "sweep.report", "task.name", "adapt.method", "adapt.fraction",
}  # fmt: skip
# Tune prints the traceback of every try, and takes Ctrl-C for the end of the training alone.
_QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1"}


@dataclass(frozen=True)
class Swept:
    """What a sweep did.

    Attributes:
        folder: of the sweep.
        trials, already_there, cells, tested: how many.
        failed: trial -> why, of trials that failed at every try.
        missing: cells of which no trial could be tested.
        mlflow_uri, mlflow_run_id: the parent run.
        mlflow_unsent, mlflow_refused, mlflow_lost, mlflow_upload: as `Tracker.facts`, of the parent and all trials.
    """

    folder: AnyPath
    trials: int
    already_there: int
    cells: int
    tested: int
    failed: dict[str, str]
    missing: tuple[str, ...]
    mlflow_uri: str
    mlflow_run_id: str = ""
    mlflow_unsent: int = 0
    mlflow_refused: int = 0
    mlflow_lost: int = 0
    mlflow_upload: str = ""

    def lines(self) -> list[str]:
        """The closing words."""
        lines = [
            f"{self.trials - self.already_there} of {self.trials} trial(s) run, {self.already_there} were done before; "
            f"{self.tested} of {self.cells} cell(s) selected on validation and tested"
        ]
        lines += reasons(self.failed, self.folder)
        lines += [f"  no result: {cell}" for cell in self.missing]
        return [*lines, *closing_words(vars(self))]


def reasons(failed: Mapping[str, str], folder: AnyPath) -> list[str]:
    """Each distinct reason of `failed` (trial -> reason) once, with how many trials had it and one of their files."""
    lines = []
    for reason, count in count_alike(failed.values()):
        example = next(name for name, why in failed.items() if alike(why) == alike(reason))
        lines.append(f"  {count} trial(s) failed: {reason} (traceback: {folder / ERRORS / example}.txt)")
    return lines


def sweep(config: Config) -> Swept:
    """Run the whole sweep, or what is left of it.

    Raises:
        ConfigError: the settings contradict each other, the folder holds another sweep, or another driver works on it.
        TrialsFailed: no trial gave a result, or the first ones all failed alike; the message has the reasons.
        Others as `prepare.prepare`, before any trial has started. A trial that fails among others raises nothing.
    """
    with hold_lease(config.run.folder):
        return _sweep(config)


def _sweep(config: Config) -> Swept:
    try:
        uri_of(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    wanted = wanted_trials(config)
    _refuse_other(config)
    prepared = prepare(config, wanted, say=_say)
    trials = prepared.trials
    _refuse_changed(trials)
    keep_config(config, JOB)
    done = [index for index, trial in enumerate(trials) if read_outcome(trial) is not None]
    parent = _parent(config, len(trials))
    status = "FAILED"
    try:
        parent.artifact(prepared.labels)
        result = _swept(config, trials, done, parent)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        parent.close(status)
    result = dataclasses.replace(result, **parent.facts())
    _write_summary(result)
    return result


def _swept(config: Config, trials: Sequence[Trial], done: Sequence[int], parent: Tracker) -> Swept:
    """Train what is not `done`, select, test, and write the summary. TrialsFailed as `sweep`."""
    folder, settings = config.run.folder, config.sweep
    logbook = Logbook(trials, parent, folder, give_up_after=settings.stop_after_failures, succeeded=bool(done))
    left = [index for index in range(len(trials)) if index not in set(done)]
    _say(f"{len(trials)} trials, {len(done)} done before, {len(left)} to run")
    _run(config, trials, left, logbook)
    selected: list[int] = []
    if not logbook.gave_up:
        for index in done:
            logbook.finish(index)
        selected = select(trials)
        _unselect(trials, selected, logbook)
        _test(config, trials, selected, logbook)
    parent.flush()
    result = Swept(
        folder=folder,
        trials=len(trials),
        already_there=len(done),
        cells=len({trial.cell for trial in trials}),
        tested=sum((trials[index].folder / TEST).is_file() for index in selected),
        failed={trials[index].key: why for index, why in logbook.errors.items()},
        missing=tuple(_words(cell) for cell in {t.cell: 0 for t in trials} if cell not in _tested(trials, selected)),
        mlflow_uri=uri_of(config),
        **parent.facts(),
    )
    _write_summary(result)
    if not result.tested:
        raise TrialsFailed(_nothing_tested(result, len(left), logbook.gave_up))
    return result


def _write_summary(result: Swept) -> None:
    facts = {name: value for name, value in vars(result).items() if name != "folder"}
    atomic_write(result.folder / SUMMARY, (json.dumps(facts, indent=1) + "\n").encode())


def _nothing_tested(result: Swept, wanted: int, gave_up: bool) -> str:
    """Why a sweep has no result at all, and what to do."""
    why = "\n".join(reasons(result.failed, result.folder)) or "  no trial gave a finite metric on validation"
    if not gave_up:
        return f"none of {result.trials} trial(s) gave a result:\n{why}\ncorrect this and start the same command again"
    return (
        f"the first {len(result.failed)} trial(s) all failed for one reason, so the sweep stopped; {wanted} were to "
        f"run:\n{why}\ncorrect this and start the same command again, or run the others all the same with "
        "--sweep.stop_after_failures 0"
    )


def select(trials: Sequence[Trial]) -> list[int]:
    """Of each cell the trial that was best on validation, by index; cells without any result are left out.

    Only what training kept is looked at. Of equals the first.
    """
    chosen = []
    for indices in by_key(range(len(trials)), [trial.cell for trial in trials]).values():
        scores = {index: _score(trials[index]) for index in indices}
        known = {index: score for index, score in scores.items() if not math.isnan(score)}
        if known:
            chosen.append(max(known, key=lambda index: (known[index], -index)))
    return chosen


def _score(trial: Trial) -> float:
    outcome = read_outcome(trial)
    if outcome is None:
        return math.nan
    value = outcome.validation[trial.task.metric]
    return value if higher_is_better(trial.task.metric) else -value


def _run(config: Config, trials: Sequence[Trial], left: Sequence[int], logbook: Logbook) -> None:
    """Train the trials `left` on Ray Tune. Those that fail are in the logbook."""
    if not left:
        return
    settings, adapt = config.sweep, config.adapt
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # repeats which trials failed; the logbook has said why
    resources = {"cpu": adapt.cpus} | ({"gpu": adapt.gpus} if adapt.gpus else {})
    scheduler = None
    if settings.early_stopping:
        cells = [trial.cell for trial in trials]
        scheduler = CellScheduler(cells, grace_epochs=settings.grace_epochs, max_epochs=adapt.epochs)
    with tempfile.TemporaryDirectory(prefix="neurostorm-tune-") as storage:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trainable, trials=list(trials)), resources),
            param_space={"index": tune.grid_search(list(left))},
            tune_config=tune.TuneConfig(
                scheduler=scheduler, max_concurrent_trials=settings.trials_at_once, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name=config.run.name,
                storage_path=storage,
                failure_config=tune.FailureConfig(max_failures=settings.retries),
                callbacks=[logbook],
                stop=GiveUp(logbook),
                verbose=0,
            ),
        )
        with logbook.watching(len(left)):
            tuner.fit()


def _trainable(config: dict[str, Any], trials: Sequence[Trial]) -> None:
    """One trial, in a process that may have run others."""
    trial = trials[config["index"]]
    metric = trial.task.metric
    high = higher_is_better(metric)

    def tell(epoch: int, measured: dict[str, float], state: State | None) -> None:
        tune.report({EPOCH: epoch, "measured": measured, **score_of(measured, metric, high)})

    try:
        outcome = train_trial(trial, tell)
    except UserError as error:
        if error.retry:
            raise  # Tune tries again what is raised, and not what is reported
        tune.report({EPOCH: 0, REFUSED: traceback.format_exc(), REASON: str(error)})
        return
    last = int(outcome.chosen.get(EPOCH, 0))
    tune.report({EPOCH: last, "measured": {}, **score_of(outcome.validation, metric, high)})


def _test(config: Config, trials: Sequence[Trial], selected: Sequence[int], logbook: Logbook) -> None:
    """Read the test subjects for the selected trials: the one time that anybody does."""
    adapt = config.adapt
    remote = ray.remote(num_cpus=adapt.cpus, num_gpus=adapt.gpus or None, max_retries=1)(test_trial)
    waiting = {remote.remote(trials[index]): index for index in selected}
    failed = 0
    with progress(len(selected), "test", "trial") as bar:
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1)
            for task in ready:
                index = waiting.pop(task)
                try:
                    record_test(logbook.tracker(index), trials[index], ray.get(task))
                except ray.exceptions.RayError as error:
                    logbook.fail(index, str(error), told_by(error))
                    failed += 1
                bar.update()
            bar.note(failed=failed)


def _unselect(trials: Sequence[Trial], selected: Sequence[int], logbook: Logbook) -> None:
    """A trial that an earlier start selected, before one that had failed then came out better, counts no longer."""
    for index, trial in enumerate(trials):
        if index not in selected and (trial.folder / TEST).is_file():
            logger.warning("%s was selected and tested by an earlier start; a better one is now selected", trial.key)
            logbook.tracker(index).tag(SELECTED, "false")


def _refuse_changed(trials: Sequence[Trial]) -> None:
    """ConfigError if a cell has trials that this sweep would not make: its data or its network were others then."""
    keys, home = {trial.key for trial in trials}, trials[0].home
    cells = {key.rpartition("_")[0] for key in keys}
    found = sorted(folder.name for folder in home.iterdir()) if home.is_dir() else []
    stale = [name for name in found if name not in keys and name.rpartition("_")[0] in cells]
    if stale:
        raise ConfigError(
            f"{home} holds {len(stale)} trial(s) of the same cells, for example {stale[0]}, that were made of other "
            "data or another model, though at the same place: choose another run.name"
        )


def _refuse_other(config: Config) -> None:
    """ConfigError if the folder holds another run, or may not hold one yet.

    A sweep may grow (tasks, methods, fractions, replicates) and be placed otherwise; any other setting would put trials
    that cannot be compared into one report.
    """
    folder = config.run.folder
    if not config.sweep.resume and (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"sweep.resume=false: {folder} already holds a sweep; choose another --name")
    refuse_other(config, JOB, SECTIONS, may_change=GROWS)


def _parent(config: Config, trials: int) -> Tracker:
    return open_run(
        config.run.folder,
        uri=uri_of(config),
        experiment=config.tracking.experiment,
        name=config.run.name,
        parameters={**config.flat(*SECTIONS), "trials": trials},
        tags={KIND: "sweep", "code_revision": code_revision()},
        artifacts=config.run.output / "artifacts",
    )


def _tested(trials: Sequence[Trial], selected: Sequence[int]) -> set[Any]:
    return {trials[index].cell for index in selected if (trials[index].folder / TEST).is_file()}


def _words(cell: tuple[str, str, float, int]) -> str:
    label, method, fraction, seed = cell
    return f"{label} {method}, {fraction:.0%} of the labels, seed {seed}"


def _say(line: str) -> None:
    print(line, flush=True)

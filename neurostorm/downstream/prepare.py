"""From what is wanted to trials that can start: everything that several of them share is made once, here.

Wanted (task, settings, seed) ... --> labels matched, splits, backbones (found, drawn, pretrained by contrast),
                                      frozen tokens and region series, over Ray --> Trial ...
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray

from neurostorm.config import AdaptConfig, Config, ConfigError
from neurostorm.downstream.embed.features import compute_tokens
from neurostorm.downstream.embed.pretrained import Pretrained, check_fits, open_pretrained
from neurostorm.downstream.evaluation import Evaluation, open_evaluation, split_of
from neurostorm.downstream.methods.backbone import Backbone, backbone_of
from neurostorm.downstream.methods.connectivity import build_parcels, series_cached
from neurostorm.downstream.methods.method import Method, find_method
from neurostorm.downstream.methods.parcels import Parcels
from neurostorm.downstream.splits import Split, save_split
from neurostorm.downstream.tasks.task import Task
from neurostorm.downstream.trial import Trial, file_name
from neurostorm.io.atomic import atomic_write
from neurostorm.io.paths import AnyPath
from neurostorm.runtime.capacity import Demand
from neurostorm.runtime.progress import progress
from neurostorm.runtime.resources import require
from neurostorm.runtime.run_folder import require_writable
from neurostorm.train.contrastive import ContrastiveRecipe

logger = logging.getLogger(__name__)

LABELS = "labels.txt"
RUNS_PER_TASK = 64  # most runs for which one Ray task computes region series
TASKS_PER_WORKER = 4  # at least, of a small cohort: a progress bar moves, and workers end together
SWIFT_BATCH, SWIFT_LR = 8, 1e-3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """One trial that is wanted: a task, the settings of its method (with the label fraction), the replicate's seed."""

    task: Task
    adapt: AdaptConfig
    seed: int


@dataclass(frozen=True)
class Prepared:
    """Trials in the order that they were wanted, and the file that says what matched of their labels, for people."""

    trials: list[Trial]
    labels: AnyPath


def prepare(config: Config, wanted: Sequence[Wanted], say: Say = logger.info) -> Prepared:
    """Trials of `wanted`, ready to start.

    Args:
        config: store, labels, split and model of all of them; `run.folder` gets their folders, splits and labels.txt.
        wanted: what is to be tried.
        say: told what goes on.

    Raises:
        ConfigError, LabelError, SplitError, StoreError, HubError, ReferenceMismatch: something does not fit, or a
            folder cannot be written, before a Ray is started.
    """
    cache, home = cache_of(config), config.run.folder
    require_writable(home, f"run.output={config.run.output}")
    require_writable(cache, f"adapt.cache={cache}")
    methods = {want.adapt.method: find_method(want.adapt.method) for want in wanted}
    for want in wanted:
        _require_suitable(methods[want.adapt.method], want.task)
    found = None
    if any(method.needs_model for method in methods.values()):
        settings = config.adapt
        found = open_pretrained(settings.model, settings.normalize, section="adapt", converted=cache / "models")
    evaluations = _evaluations(config, wanted, found)
    labels = _say_labels(home, evaluations, say)
    parcels = _parcels(config.adapt, wanted, methods, evaluations)
    data = {label: evaluation.examples.sha256 for label, evaluation in evaluations.items()}
    splits: dict[tuple[str, int, float], Split] = {}
    for want in wanted:
        where = (want.task.label, want.seed, want.adapt.fraction)
        if where not in splits:
            splits[where] = split_of(
                evaluations[want.task.label], config.split, seed=want.seed, fraction=want.adapt.fraction
            )
            _keep_split(home, where, splits[where])
    options = {"cpus": "--adapt.cpus", "gpus": "--adapt.gpus"}
    demand = Demand(1, config.adapt.cpus, config.adapt.gpus, what="trial", options=options)
    require(demand, config.scale.wait_for_nodes_s)
    backbones: dict[str, Backbone | None] = {}
    trials = []
    for want in wanted:
        method, label = methods[want.adapt.method], want.task.label
        if method.name not in backbones:
            backbones[method.name] = _backbone(config, method, found, evaluations[label], cache, say)
        own = _config_of(config, want, evaluations[label].examples.clip_frames)
        split, classes = splits[label, want.seed, want.adapt.fraction], _classes(evaluations[label])
        trials.append(
            Trial(own, want.task, split, backbones[method.name], cache, home / "trials", data[label], classes)
        )
    _share(config, trials, evaluations, parcels, cache, say)
    return Prepared(trials, labels)


def suits(method: Method, task: Task) -> bool:
    """Whether a method can do a task: one that gives every run the same vector cannot identify anybody."""
    return not (method.adaptation == "constant" and task.kind == "identification")


def _require_suitable(method: Method, task: Task) -> None:
    if not suits(method, task):
        raise ConfigError(
            f"adapt.method={method.name} cannot do {task.label}: it gives every run the same vector. "
            "Use --method linear"
        )


def _parcels(
    settings: AdaptConfig, wanted: Sequence[Wanted], methods: dict[str, Method], evaluations: dict[str, Evaluation]
) -> dict[str, Parcels]:
    """Task label -> the regions of its store, of tasks with a method that sees regions. ConfigError for a bad atlas."""
    made: dict[str, Parcels] = {}
    for want in wanted:
        label = want.task.label
        if label in made or methods[want.adapt.method].sees not in ("regions", "matrices"):
            continue
        setting = f"adapt.parcels={settings.parcels}" if settings.atlas is None else f"adapt.atlas={settings.atlas}"
        try:
            made[label] = build_parcels(settings.atlas or settings.parcels, evaluations[label].cohort.store)
        except ValueError as error:
            raise ConfigError(f"{setting}: {error}") from error
    return made


def _config_of(config: Config, want: Wanted, clip_frames: int) -> Config:
    """What one trial is told. Clips are cut alike for all methods: a baseline does not fall back to its own length."""
    run = config.run.model_copy(update={"seed": want.seed})
    task = config.task.model_copy(update={"clip_frames": clip_frames})
    return config.model_copy(update={"adapt": want.adapt, "run": run, "task": task})


def cache_of(config: Config) -> AnyPath:
    """Where frozen features and series lie: adapt.cache, or OUTPUT/cache, which runs of one output share."""
    return config.adapt.cache or config.run.output / "cache"


def _evaluations(config: Config, wanted: Sequence[Wanted], found: Pretrained | None) -> dict[str, Evaluation]:
    evaluations: dict[str, Evaluation] = {}
    frames = found.model.config.frames if found else None
    for want in wanted:
        if want.task.label not in evaluations:
            evaluation = open_evaluation(want.task, config.task, config.split, frames)
            if found is not None:
                check_fits(found.model, evaluation.cohort.store)
            evaluations[want.task.label] = evaluation
    return evaluations


def _classes(evaluation: Evaluation) -> tuple[str, ...]:
    return evaluation.examples.classes if evaluation.task.kind == "classification" else ()


def _say_labels(home: AnyPath, evaluations: dict[str, Evaluation], say: Say) -> AnyPath:
    """Say, and keep, what each task has to work with and what did not match of its labels."""
    lines = []
    for label, evaluation in evaluations.items():
        examples = evaluation.examples
        lines.append(
            f"{label}: {len(examples.units)} units of {len(evaluation.subjects)} subjects, {len(examples)} clips"
        )
        lines += [f"  {line}" for line in evaluation.lines]
    for line in lines:
        say(line)
    home.mkdir(parents=True, exist_ok=True)
    atomic_write(home / LABELS, ("\n".join(lines) + "\n").encode())
    return home / LABELS


def _keep_split(home: AnyPath, where: tuple[str, int, float], split: Split) -> None:
    label, seed, fraction = where
    folder = home / "splits"
    folder.mkdir(parents=True, exist_ok=True)
    save_split(folder / f"{file_name(label)}_s{seed}_{fraction:g}.json", split)


def _backbone(
    config: Config, method: Method, found: Pretrained | None, evaluation: Evaluation, cache: AnyPath, say: Say
) -> Backbone | None:
    """The network under a method; random weights are drawn from run.seed, once for all replicates, as features are."""
    if not method.needs_model:
        return None
    assert found is not None
    settings, seed = config.adapt, config.run.seed
    recipe = ContrastiveRecipe(
        kind="both", steps=settings.swift_steps, batch=SWIFT_BATCH, lr=SWIFT_LR, temperature=settings.temperature,
        seed=seed,
    )  # fmt: skip
    if method.weights == "contrastive":
        say(f"{method.name}: contrastive pretraining, {recipe.steps} steps, unless it is in {cache}")
    make = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus or None, max_retries=1)(backbone_of)
    device = "cuda" if settings.gpus else "cpu"
    made: Backbone = ray.get(
        make.remote(method, found, evaluation.cohort, cache / "models", seed=seed, recipe=recipe, device=device)
    )
    return made


def _share(
    config: Config,
    trials: Sequence[Trial],
    evaluations: dict[str, Evaluation],
    parcels: dict[str, Parcels],
    cache: AnyPath,
    say: Say,
) -> None:
    """Compute what probes and connectivity read, for all trials at once.

    A clip that cannot be read stops a single trial here; of several it stops those that need it.
    """
    settings = config.adapt
    there = ray.cluster_resources()
    fitting = [there.get("CPU", 1) / settings.cpus] + ([there.get("GPU", 1) / settings.gpus] if settings.gpus else [])
    at_once = max(1, int(min(fitting)))
    done: set[tuple[str, str]] = set()
    for trial in trials:
        evaluation = evaluations[trial.task.label]
        what = (trial.task.label, trial.backbone.key if trial.backbone else trial.method.sees)
        if what in done:
            continue
        if trial.method.sees in ("tokens", "clips") and trial.backbone is not None:
            done.add(what)
            made = compute_tokens(
                trial.backbone, evaluation.cohort, evaluation.examples, cache, settings, workers=at_once,
                strict=len(trials) == 1, title=f"features for {trial.method.name}, {trial.task.label}",
            )  # fmt: skip
            if made:
                say(f"{trial.task.label}: frozen features of {made} runs by {trial.method.name}'s network")
        elif trial.method.sees in ("regions", "matrices"):
            done.add(what)
            _compute_series(evaluation, parcels[trial.task.label], settings, cache, at_once)


def _compute_series(
    evaluation: Evaluation, parcels: Parcels, settings: AdaptConfig, cache: AnyPath, at_once: int
) -> None:
    """Compute the region series that are missing, on `at_once` processes, under a progress bar over runs."""
    store, examples = evaluation.cohort.store, evaluation.examples
    paths = [examples.runs[run].path for run in examples.clips_of_run()]
    size = max(1, min(RUNS_PER_TASK, math.ceil(len(paths) / (TASKS_PER_WORKER * at_once))))
    make, shared = ray.remote(num_cpus=settings.cpus)(_series_there), ray.put(parcels)
    parts = [paths[first : first + size] for first in range(0, len(paths), size)]
    runs = {make.remote(store, part, shared, cache / "series"): len(part) for part in parts}
    with progress(len(paths), f"region series, {evaluation.task.label}", "run") as bar:
        while runs:
            ready, _ = ray.wait(list(runs), num_returns=1, timeout=1)
            for task in ready:
                ray.get(task)
                bar.update(runs.pop(task))
            bar.note()


def _series_there(*arguments: object) -> None:
    """`series_cached` for its files alone: the series stay where they were computed."""
    series_cached(*arguments)  # type: ignore[arg-type]

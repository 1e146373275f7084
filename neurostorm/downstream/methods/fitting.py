"""Fitting a method to a problem and predicting with it: in closed form on vectors, or a network by gradient.

    Problem --vectors--> path of strengths, the best on validation -----> Chosen {"strength"} --.
                            | of frozen tokens: what the head on clips starts from              |
            --network--> epochs (training.py), the best on validation --> Chosen {"epoch"}, state --predict--> units

Fine-tuning and prompts start from the linear probe of the same network (Kumar et al. 2022, "Fine-Tuning can Distort
Pretrained Features"): few subjects are soon fitted by a head with random weights, and what was pretrained is lost. A
closed form is fitted again to predict: it takes a moment, and nothing of it has to be kept.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from neurostorm.config import AdaptConfig, ConfigError
from neurostorm.downstream.cohort import Cohort
from neurostorm.downstream.embed.features import read_tokens
from neurostorm.downstream.methods import vectors
from neurostorm.downstream.methods.backbone import Backbone
from neurostorm.downstream.methods.connectivity import build_parcels, series_cached
from neurostorm.downstream.methods.inputs import ClipInputs, HeldInputs, Index, Inputs, evenly
from neurostorm.downstream.methods.method import Method
from neurostorm.downstream.methods.networks import attention_network, connectome_network, place_head, start_head
from neurostorm.downstream.methods.objective import Objective
from neurostorm.downstream.methods.simple import VectorModel, build_vector_model
from neurostorm.downstream.methods.training import OnEpoch, State, Trainer, better, load_trained
from neurostorm.downstream.methods.vectors import Matcher
from neurostorm.downstream.tasks.examples import Examples
from neurostorm.io.paths import AnyPath
from neurostorm.model.heads.adapt import Adapted, adapt
from neurostorm.model.heads.places import PlaceHead

logger = logging.getLogger(__name__)

SAME_SCAN_CLIPS = 8  # clips of each run that the released protocol of re-identification compares
VERSION = 2  # raise it when a method gives other results for the same settings
Values = NDArray[np.float64]

_CLOSED = ("strengths",)
_GRADIENT = (
    "lr", "weight_decay", "epochs", "patience", "batch_clips", "clips_per_unit", "embedding", "temperature",
)  # fmt: skip
_REGIONS = ("atlas", "parcels")
_BUFFERS = (".running_mean", ".running_var", ".num_batches_tracked", ".centre", ".shift", ".scale")


@dataclass(frozen=True)
class FitData:
    """A method and what it is fitted to.

    Attributes:
        method, settings: which method, and how.
        metric: that selects.
        cohort: the store and its runs.
        examples: all units at hand, of which others are chosen by index.
        objective: what is learned.
        backbone: the network under the method, or None.
        cache: place of frozen features and region series.
        seed: of everything that is drawn.
        device: "cpu" or "cuda".
    """

    method: Method
    settings: AdaptConfig
    metric: str
    cohort: Cohort
    examples: Examples
    objective: Objective
    backbone: Backbone | None
    cache: AnyPath
    seed: int
    device: str


@dataclass(frozen=True)
class Chosen:
    """What validation chose: the setting, its metrics, what was trained (by gradient), and how many numbers that is."""

    setting: dict[str, float]
    validation: dict[str, float]
    state: State = field(default_factory=dict)
    parameters: int = 0


def settings_of(method: Method) -> tuple[str, ...]:
    """The fields of the section adapt that change what a method gives."""
    names: tuple[str, ...] = _GRADIENT if method.by_gradient else _CLOSED if method.adaptation != "constant" else ()
    if method.sees in ("regions", "matrices"):
        names += _REGIONS if method.adaptation == "mean" else (*_REGIONS, "connectivity")
    if method.sees == "clips" or (method.adaptation == "linear" and method.sees == "tokens"):
        names += ("pool", "directions")
    names += ("prompts",) if method.adaptation == "tpt" else ()
    names += ("strengths", "backbone_lr_fraction") if method.sees == "clips" else ()
    return names + (("swift_steps",) if method.weights == "contrastive" else ())


def fit(problem: FitData, train: Index, validation: Index, on_epoch: OnEpoch) -> Chosen:
    """Fit on the units `train`, choose on the units `validation`; `on_epoch` as `Trainer.fit` (by gradient only)."""
    if problem.method.by_gradient:
        trainer = _trainer(problem, train)
        if problem.method.sees == "clips":
            _begin(problem, trainer.network, train, validation)
        found = trainer.fit(train, validation, on_epoch)
        return Chosen({"epoch": float(found.epoch)}, found.validation, found.state, counted(found.state))
    constant = problem.method.adaptation == "constant"
    if constant and problem.objective.kind == "identification":
        raise ConfigError(
            "adapt.method=constant: what is the same for everybody identifies nobody; chance is 1/gallery"
        )
    x = _vectors(problem, train)
    strength, measured = _best_strength(
        problem, x, train, validation, (1.0,) if constant else problem.settings.strengths
    )
    return Chosen({"strength": strength}, measured, {}, 0 if constant else _learned(problem, x.shape[1]))


def predict(problem: FitData, train: Index, units: Index, setting: dict[str, float], state: State) -> Values:
    """Predictions of `units` by what `fit` chose, each from all of its clips."""
    if problem.method.by_gradient:
        trainer = _trainer(problem, train)
        load_trained(trainer.network, state)
        return trainer.predict(units)
    x = _vectors(problem, train)
    return _closed_form(problem, x, train, setting["strength"])(x[units])


def clip_vectors(problem: FitData, train: Index, units: Index, state: State) -> tuple[Index, Values] | None:
    """A vector of each of up to SAME_SCAN_CLIPS clips of `units`: place in `units` (N), (N, D); None without any."""
    if problem.method.by_gradient and problem.method.sees != "matrices":
        trainer = _trainer(problem, train)
        load_trained(trainer.network, state)
        return trainer.clip_features(units, SAME_SCAN_CLIPS)
    if problem.method.sees == "tokens":
        clips = evenly(problem.examples.take(units), SAME_SCAN_CLIPS)
        of_units = problem.examples.clips_of(units)
        return problem.examples.take(units).unit[clips], _tokens(problem)[of_units[clips]].mean(1, dtype=np.float64)
    return None


def counted(state: State) -> int:
    """Numbers that were trained: not the buffers, which are kept with them."""
    return sum(tensor.numel() for name, tensor in state.items() if not name.endswith(_BUFFERS))


def _learned(problem: FitData, features: int) -> int:
    """Numbers of a closed form: weights and biases; of identification the centre, as its map follows from few runs."""
    return features if problem.objective.kind == "identification" else (features + 1) * problem.objective.outputs


def _best_strength(
    problem: FitData, x: Values, train: Index, validation: Index, strengths: Sequence[float]
) -> tuple[float, dict[str, float]]:
    """Of the strengths the best on validation, and its metrics there; of equals the strongest."""
    judged = problem.examples.take(validation)
    best: tuple[float, dict[str, float]] | None = None
    for strength in sorted(strengths, reverse=True):
        measured = problem.objective.measure(judged, _closed_form(problem, x, train, strength)(x[validation]))
        if best is None or better(problem.metric, measured[problem.metric], best[1][problem.metric]):
            best = strength, measured
    assert best is not None
    return best


def _closed_form(problem: FitData, x: Values, train: Index, strength: float) -> Callable[[Values], Values]:
    found = _fitted(problem, x, train, strength)
    return found.transform if isinstance(found, Matcher) else found.predict


def _fitted(problem: FitData, x: Values, train: Index, strength: float) -> Matcher | VectorModel:
    examples, kind = problem.examples.take(train), problem.objective.kind
    if kind == "identification":
        return Matcher(strength).fit(x[train], examples.subjects)
    name: Literal["constant", "linear"] = "constant" if problem.method.adaptation == "constant" else "linear"
    vector_kind: Literal["regression", "classification"] = "regression" if kind == "regression" else "classification"
    model = build_vector_model(vector_kind, strength, name, range(problem.objective.classes))
    return model.fit(x[train], examples.targets)


def _vectors(problem: FitData, train: Index) -> Values:
    """(M, D) of all units; what is learnt for them is learnt from the units `train`."""
    method, examples = problem.method, problem.examples
    if method.sees == "nothing":
        return vectors.nothing(examples)
    if method.sees == "attributes":
        return vectors.attributes(examples, lambda run: problem.cohort.attributes(examples.runs[run]))
    if method.sees == "tokens":
        return _token_vectors(problem, train)[0]
    series = _series(problem)
    if method.adaptation == "mean":
        return vectors.activity(examples, series)
    return vectors.edges(vectors.matrices(examples, series, problem.settings.connectivity, _taught(problem, train)))


def _token_vectors(problem: FitData, train: Index) -> tuple[Values, vectors.Signals | None]:
    """(M, D) of the frozen tokens of all units, and the signals in them, if the pool has any."""
    examples, tokens, settings = problem.examples, _tokens(problem), problem.settings
    pool = vectors.pool_name(settings.pool, problem.objective.kind, examples.take(train))
    signals = None
    if pool in ("coupling", "covariance"):
        signals = vectors.learn_signals(examples, tokens, pool, settings.directions, _taught(problem, train))
    return vectors.of_tokens(examples, tokens, pool, signals), signals


def _trainer(problem: FitData, train: Index) -> Trainer:
    torch.manual_seed(problem.seed)
    examples, settings, method = problem.examples, problem.settings, problem.method
    network: nn.Module
    inputs: Inputs
    if method.sees == "matrices":
        examples = examples.one_clip_each()
        held = vectors.matrices(problem.examples, _series(problem), settings.connectivity, _taught(problem, train))
        inputs = HeldInputs(held, problem.device)
        network = connectome_network(method.adaptation, held.shape[-1], problem.objective)
    elif method.sees == "tokens":
        tokens = _tokens(problem)
        inputs = HeldInputs(tokens, problem.device)
        network = attention_network(_backbone(problem).encoder(), problem.objective)
    else:
        encoder = _backbone(problem).encoder()
        inputs = ClipInputs(problem.cohort.store, examples, encoder, _backbone(problem).normalise, problem.device)
        clips = int(np.isin(examples.unit, train).sum())
        pool = vectors.pool_name(settings.pool, problem.objective.kind, examples.take(train))
        head = place_head(encoder, problem.objective, pool, settings.directions, clips)
        network = adapt(encoder, head, method.adaptation, prompts=settings.prompts)
    slow = settings.lr * settings.backbone_lr_fraction
    trainer = Trainer(
        network=network.to(problem.device).train(),
        inputs=inputs,
        examples=examples,
        objective=problem.objective,
        metric=problem.metric,
        settings=settings,
        seed=problem.seed,
        backbone_lr=settings.lr if method.weights == "random" else slow,
        device=problem.device,
    )
    if not isinstance(network, Adapted):
        return trainer
    assert isinstance(network.head, PlaceHead)
    return replace(trainer, conclude=network.head.conclude, head_lr=slow, begun=True)


def _begin(problem: FitData, network: nn.Module, train: Index, validation: Index) -> None:
    """Start the head of a network on clips as the probe that is best on validation (Kumar et al. 2022, LP-FT).

    The probe is of the network without prompts. New ones are short vectors, which move its tokens a little.
    """
    assert isinstance(network, Adapted) and isinstance(network.head, PlaceHead)
    x, signals = _token_vectors(problem, train)
    strength, _ = _best_strength(problem, x, train, validation, problem.settings.strengths)
    found = _fitted(problem, x, train, strength)
    try:
        outputs = network.head.linear.out_features
        start_head(network.head, found.affine(outputs) if isinstance(found, Matcher) else found.affine(), signals)
    except TypeError as error:
        logger.warning("%s starts from nothing: %s", problem.method.name, error)


def _taught(problem: FitData, train: Index) -> NDArray[np.bool_]:
    return np.isin(np.arange(len(problem.examples.units)), train)


def _backbone(problem: FitData) -> Backbone:
    assert problem.backbone is not None
    return problem.backbone


def _tokens(problem: FitData) -> NDArray[np.float32]:
    return _kept_tokens(_backbone(problem), problem.cache, _Same(problem.cohort, problem.examples))


def _series(problem: FitData) -> dict[int, NDArray[np.float32]]:
    parcels = problem.settings.atlas or problem.settings.parcels
    return _kept_series(parcels, problem.cache, _Same(problem.cohort, problem.examples))


class _Same:
    """Examples that count as equal when they cut the same clips: what was read for one task serves the next."""

    def __init__(self, cohort: Cohort, examples: Examples) -> None:
        self.cohort, self.examples = cohort, examples
        cut = examples.run.tobytes(), examples.start.tobytes(), examples.clip_frames
        self._content = (str(cohort.store.path), examples.runs, *cut)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)


@functools.lru_cache(maxsize=2)
def _kept_tokens(backbone: Backbone, cache: AnyPath, same: _Same) -> NDArray[np.float32]:
    return read_tokens(backbone, same.cohort.store, same.examples, cache)


@functools.lru_cache(maxsize=2)
def _kept_series(parcels: Path | int, cache: AnyPath, same: _Same) -> dict[int, NDArray[np.float32]]:
    store, used = same.cohort.store, sorted(same.examples.clips_of_run())
    paths = [same.examples.runs[run].path for run in used]
    return dict(zip(used, series_cached(store, paths, build_parcels(parcels, store), cache / "series"), strict=True))

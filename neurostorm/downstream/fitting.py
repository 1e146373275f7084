"""Fitting a method to a problem and predicting with it: in closed form on vectors, or a network by gradient.

    Problem --vectors--> path of strengths, the best on validation -----> Chosen {"strength"} --.
            --network--> epochs (training.py), the best on validation --> Chosen {"epoch"}, state --predict--> units

A closed form is fitted again to predict: it takes a moment, and nothing of it has to be kept.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from neurostorm.config import AdaptConfig, ConfigError
from neurostorm.downstream import vectors
from neurostorm.downstream.backbone import Backbone
from neurostorm.downstream.cohort import Cohort
from neurostorm.downstream.connectivity import build_parcels, series_cached
from neurostorm.downstream.examples import Examples
from neurostorm.downstream.features import read_tokens
from neurostorm.downstream.inputs import ClipInputs, HeldInputs, Index, Inputs, evenly
from neurostorm.downstream.methods import Method
from neurostorm.downstream.objective import Objective
from neurostorm.downstream.simple import build_vector_model
from neurostorm.downstream.training import OnEpoch, State, Trainer, load_trained
from neurostorm.model.adapt import AttentionPool, adapt
from neurostorm.model.connectome import BrainNetCNN, BrainNetTransformer
from neurostorm.places import Place

SAME_SCAN_CLIPS = 8  # clips of each run that the released protocol of re-identification compares
VERSION = 1  # raise it when a method gives other results for the same settings
Values = NDArray[np.float64]

_CLOSED = ("strengths",)
_GRADIENT = (
    "lr", "weight_decay", "epochs", "patience", "batch_clips", "clips_per_unit", "embedding", "temperature",
)  # fmt: skip
_REGIONS = ("atlas", "parcels")


@dataclass(frozen=True)
class Problem:
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
    cache: Place
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
    if method.adaptation == "linear" and method.sees == "tokens":
        names += ("pool", "directions")
    names += ("prompts",) if method.adaptation == "tpt" else ()
    names += ("backbone_lr_fraction",) if method.adaptation == "full" and method.weights != "random" else ()
    return names + (("swift_steps",) if method.weights == "contrastive" else ())


def fit(problem: Problem, train: Index, validation: Index, on_epoch: OnEpoch) -> Chosen:
    """Fit on the units `train`, choose on the units `validation`; `on_epoch` as `Trainer.fit` (by gradient only)."""
    if problem.method.by_gradient:
        trainer = _trainer(problem, train)
        found = trainer.fit(train, validation, on_epoch)
        return Chosen({"epoch": float(found.epoch)}, found.validation, found.state, counted(found.state))
    constant = problem.method.adaptation == "constant"
    if constant and problem.objective.kind == "identification":
        raise ConfigError(
            "adapt.method=constant: what is the same for everybody identifies nobody; chance is 1/gallery"
        )
    x, judged = _vectors(problem, train), problem.examples.take(validation)
    best: Chosen | None = None
    for strength in (1.0,) if constant else sorted(problem.settings.strengths, reverse=True):  # of equals the strongest
        measured = problem.objective.measure(judged, _closed_form(problem, x, train, strength)(x[validation]))
        if best is None or measured[problem.metric] > best.validation[problem.metric]:
            learned = 0 if constant else _learned(problem, x.shape[1])
            best = Chosen({"strength": strength}, measured, {}, learned)
    assert best is not None
    return best


def predict(problem: Problem, train: Index, units: Index, setting: dict[str, float], state: State) -> Values:
    """Predictions of `units` by what `fit` chose, each from all of its clips."""
    if problem.method.by_gradient:
        trainer = _trainer(problem, train)
        load_trained(trainer.network, state)
        return trainer.predict(units)
    x = _vectors(problem, train)
    return _closed_form(problem, x, train, setting["strength"])(x[units])


def clip_vectors(problem: Problem, train: Index, units: Index, state: State) -> tuple[Index, Values] | None:
    """A vector of each of up to SAME_SCAN_CLIPS clips of `units`: place in `units` (N), (N, D); None without any."""
    if problem.method.by_gradient and problem.method.sees != "matrices":
        trainer = _trainer(problem, train)
        load_trained(trainer.network, state)
        return trainer.clip_outputs(units, SAME_SCAN_CLIPS)
    if problem.method.sees == "tokens":
        clips = evenly(problem.examples.take(units), SAME_SCAN_CLIPS)
        of_units = problem.examples.clips_of(units)
        return problem.examples.take(units).unit[clips], _tokens(problem)[of_units[clips]].mean(1, dtype=np.float64)
    return None


def counted(state: State) -> int:
    """Numbers that were trained."""
    return sum(tensor.numel() for name, tensor in state.items() if "running_" not in name and "num_batches" not in name)


def _learned(problem: Problem, features: int) -> int:
    """Numbers of a closed form: weights and biases; of identification the centre, as its map follows from few runs."""
    return features if problem.objective.kind == "identification" else (features + 1) * problem.objective.outputs


def _closed_form(problem: Problem, x: Values, train: Index, strength: float) -> Callable[[Values], Values]:
    examples, kind = problem.examples.take(train), problem.objective.kind
    if kind == "identification":
        return vectors.Matcher(strength).fit(x[train], examples.subjects).transform
    name: Literal["constant", "linear"] = "constant" if problem.method.adaptation == "constant" else "linear"
    vector_kind: Literal["regression", "classification"] = "regression" if kind == "regression" else "classification"
    model = build_vector_model(vector_kind, strength, name, range(problem.objective.classes))
    return model.fit(x[train], examples.targets).predict


def _vectors(problem: Problem, train: Index) -> Values:
    """(M, D) of all units; what is learnt for them is learnt from the units `train`."""
    method, examples = problem.method, problem.examples
    taught = np.zeros(len(examples.units), bool)
    taught[train] = True
    if method.sees == "nothing":
        return vectors.nothing(examples)
    if method.sees == "attributes":
        return vectors.attributes(examples, lambda run: problem.cohort.attributes(examples.runs[run]))
    if method.sees == "tokens":
        pool = vectors.pool_name(problem.settings.pool, problem.objective.kind, examples)
        return vectors.of_tokens(examples, _tokens(problem), pool, problem.settings.directions, taught)
    series = _series(problem)
    if method.adaptation == "mean":
        return vectors.activity(examples, series)
    return vectors.edges(vectors.matrices(examples, series, problem.settings.connectivity, taught))


def _trainer(problem: Problem, train: Index) -> Trainer:
    torch.manual_seed(problem.seed)
    examples, settings = problem.examples, problem.settings
    network: nn.Module
    inputs: Inputs
    if problem.method.sees == "matrices":
        examples = examples.one_clip_each()
        taught = np.isin(np.arange(len(examples.units)), train)
        held = vectors.matrices(problem.examples, _series(problem), settings.connectivity, taught)
        network, inputs = _connectome_network(problem, held.shape[-1]), HeldInputs(held, problem.device)
    else:
        assert problem.backbone is not None
        encoder = problem.backbone.encoder()
        shape = encoder.config
        width = shape.width(shape.stages - 1)
        head = problem.objective.head(width)
        if problem.method.sees == "tokens":
            network = nn.Sequential(OrderedDict(pool=AttentionPool(width, shape.heads[-1]), head=head))
            inputs = HeldInputs(_tokens(problem), problem.device)
        else:
            network = adapt(encoder, head, problem.method.adaptation, prompts=settings.prompts)
            normalise = problem.backbone.normalise
            inputs = ClipInputs(problem.cohort.store, examples, encoder, normalise, problem.device)
    from_scratch = problem.method.weights == "random"
    return Trainer(
        network=network.to(problem.device).train(),
        inputs=inputs,
        examples=examples,
        objective=problem.objective,
        metric=problem.metric,
        settings=settings,
        seed=problem.seed,
        backbone_lr=settings.lr * (1.0 if from_scratch else settings.backbone_lr_fraction),
        device=problem.device,
    )


class _Unit(nn.Module):
    """Vectors at unit length, as an identification's loss takes them."""

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, dim=1)


def _connectome_network(problem: Problem, regions: int) -> nn.Module:
    build = BrainNetCNN if problem.method.adaptation == "brainnetcnn" else BrainNetTransformer
    network: nn.Module = build(regions, problem.objective.outputs)
    return nn.Sequential(network, _Unit()) if problem.objective.kind == "identification" else network


def _tokens(problem: Problem) -> NDArray[np.float32]:
    assert problem.backbone is not None
    return _kept_tokens(problem.backbone, problem.cache, _Same(problem.cohort, problem.examples))


def _series(problem: Problem) -> dict[int, NDArray[np.float32]]:
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
def _kept_tokens(backbone: Backbone, cache: Place, same: _Same) -> NDArray[np.float32]:
    return read_tokens(backbone, same.cohort.store, same.examples, cache)


@functools.lru_cache(maxsize=2)
def _kept_series(parcels: Path | int, cache: Place, same: _Same) -> dict[int, NDArray[np.float32]]:
    store, used = same.cohort.store, sorted(same.examples.clips_of_run())
    paths = [same.examples.runs[run].path for run in used]
    return dict(zip(used, series_cached(store, paths, build_parcels(parcels, store), cache / "series"), strict=True))

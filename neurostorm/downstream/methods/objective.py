"""What a kind of task asks of a network: how many outputs, which loss, what a prediction is, which metrics.

    kind             outputs per clip    loss                         pooled over a unit's clips -> prediction
    regression       1, standardised     squared error                mean, back in the target's own unit
    classification   1 | K logits        (binary) cross entropy,      mean logits -> probabilities (K)
                                         classes weighted alike
    identification   unit vector         NT-Xent over pairs           mean vector

The mean and deviation of a target and the weights of classes are those of the training units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, softmax
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from neurostorm.downstream.statistics import metrics
from neurostorm.downstream.statistics.reid import RunEmbeddings, across_sessions
from neurostorm.downstream.tasks.examples import Examples
from neurostorm.downstream.tasks.task import class_weights
from neurostorm.model.heads.pooled import build_head
from neurostorm.model.losses.contrastive import instance_loss

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Objective:
    """What is learned; made by `objective_of`.

    Attributes:
        kind: of the task.
        classes: K of a classification, else 0.
        mean, deviation: of a regression's training targets.
        weights: float32 (K), of the classes.
        embedding: size of an identification's vectors.
        temperature: of NT-Xent.
        gallery, repeats, seed: of the galleries that an identification is measured with.
    """

    kind: str
    classes: int = 0
    mean: float = 0.0
    deviation: float = 1.0
    weights: NDArray[np.float32] = field(default_factory=lambda: np.ones(0, np.float32))
    embedding: int = 128
    temperature: float = 0.1
    gallery: int = 100
    repeats: int = 20
    seed: int = 0

    @property
    def outputs(self) -> int:
        """Numbers that a network gives per clip."""
        if self.kind == "identification":
            return self.embedding
        return 1 if self.kind == "regression" or self.classes == 2 else self.classes

    def head(self, width: int) -> nn.Module:
        """A new head on features of this width."""
        if self.kind == "identification":
            return build_head("embedding", width, self.embedding)
        return build_head(self.kind, width, self.classes if self.kind == "classification" else 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """() of outputs (B, outputs) and targets (B); of identification a batch is pairs, one after the other.

        The weights of classes have mean 1 over the training units, so that a batch's loss is that of all on average,
        however few of a class are in it.
        """
        if self.kind == "regression":
            return mse_loss(outputs[:, 0], (targets - self.mean) / self.deviation)
        if self.kind == "identification":
            return instance_loss(outputs[::2], outputs[1::2], targets[::2], self.temperature)
        weights = torch.from_numpy(self.weights).to(outputs.device)
        if self.classes > 2:
            return cross_entropy(outputs, targets.long(), weights, reduction="sum") / len(targets)
        losses = binary_cross_entropy_with_logits(outputs[:, 0], targets.to(outputs.dtype), reduction="none")
        return (losses * weights[targets.long()]).mean()

    def predictions(self, pooled: Values) -> Values:
        """Mean outputs (M, outputs) -> (M) in the target's unit, probabilities (M, K) or vectors (M, D)."""
        if self.kind == "regression":
            return pooled[:, 0] * self.deviation + self.mean
        if self.kind == "identification":
            return pooled
        if self.classes > 2:
            return np.asarray(softmax(pooled, 1))
        second = expit(pooled[:, 0])
        return np.stack([1 - second, second], 1)

    def measure(self, units: Examples, predictions: Values) -> dict[str, float]:
        """Every metric of the kind, and "chance" of the one that selects."""
        if self.kind == "regression":
            return metrics.regression(units.targets, predictions) | {"chance": 0.0}
        if self.kind == "classification":
            measured = metrics.classification(units.targets, predictions, units.classes)
            return measured | {"chance": metrics.chance_of("balanced_accuracy", classes=self.classes)}
        measured = across_sessions(
            embeddings_of(units, predictions), gallery=self.gallery, repeats=self.repeats, seed=self.seed
        )
        chance = metrics.chance_of("map", gallery=int(measured["gallery"]))
        return {name: measured[name] for name in ("rank1", "map", "gallery")} | {"chance": chance}


def objective_of(
    kind: str, train: Examples, *, embedding: int, temperature: float, gallery: int, repeats: int, seed: int
) -> Objective:
    """The objective of a task of this kind on these training units; a class that none of them has gets no weight.

    Raises:
        ValueError: a regression's training targets are all equal.
    """
    if kind == "regression":
        deviation = float(np.std(train.targets))
        if np.ptp(train.targets) == 0:  # the deviation of equal numbers may be a rounding error
            raise ValueError(f"all {len(train.targets)} training targets are {train.targets[0]:g}: nothing to learn")
        return Objective(kind, mean=float(np.mean(train.targets)), deviation=deviation)
    if kind == "classification":
        weights = class_weights(train.targets, len(train.classes))
        return Objective(kind, classes=len(train.classes), weights=weights)
    return Objective(kind, embedding=embedding, temperature=temperature, gallery=gallery, repeats=repeats, seed=seed)


def embeddings_of(units: Examples, vectors: Values) -> RunEmbeddings:
    """Vectors (M, D) of units that are runs, as re-identification takes them."""
    by_path = {run.path: run for run in units.runs}
    runs: Sequence = [by_path[unit] for unit in units.units]
    return RunEmbeddings(
        run=units.units,
        subject=units.subjects,
        session=tuple(run.session for run in runs),
        source=tuple(run.source_sha256 for run in runs),
        vectors=np.asarray(vectors, np.float64),
    )

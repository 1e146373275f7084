"""Training by gradient: epochs over the training units, the best on validation kept, an early end.

    epoch: draw views -> batches -> network, clip by clip -> pooled per view, concluded -> loss -> AdamW
           -> validate (pooled per unit) -> better? keep -> report -> patience?

A view is some clips of a unit. The loss is that of its pooled output, which is what is predicted: what tells a person
apart may not show in any single clip. A network that starts from a fitted probe is validated before the first step, as
epoch 0. Deterministic on a CPU for a seed. Kept is what was trained: prompts, pool and head of a frozen backbone.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neurostorm.config import AdaptConfig
from neurostorm.downstream.methods.inputs import (
    Index,
    Inputs,
    batches,
    batches_of_views,
    draw,
    draw_pairs,
    evenly,
)
from neurostorm.downstream.methods.objective import Objective
from neurostorm.downstream.statistics.metrics import higher_is_better, pool
from neurostorm.downstream.tasks.examples import Examples
from neurostorm.train.health.limits import NonFiniteError
from neurostorm.train.optimizer import build_optimizer, parameter_groups
from neurostorm.train.schedule import learning_rate

WARMUP_FRACTION, MIN_LR_FRACTION, CLIP_NORM = 0.1, 0.05, 1.0
State = dict[str, Tensor]
OnEpoch = Callable[[int, dict[str, float], State | None], None]


@dataclass(frozen=True)
class Fitted:
    """The best epoch: its number from 1 (0: as it began), its validation metrics, what was trained as it was then."""

    epoch: int
    validation: dict[str, float]
    state: State


@dataclass(frozen=True)
class Trainer:
    """A network, what it is given, and what it is to learn.

    Attributes:
        network: clips as `inputs` gives them -> (B, F), what is pooled.
        inputs: by index into `examples`.
        examples: all units, of which the parts below are taken by index.
        objective: what is learned.
        metric: that selects.
        settings: lr, epochs and so on.
        seed: of the draws.
        backbone_lr: learning rate of parameters below `encoder.` that are no prompts.
        device: where it is trained.
        head_lr: learning rate of parameters below `head.`; None: settings.lr.
        conclude: what is pooled (U, F) -> outputs (U, outputs).
        begun: the network already is what a probe found: it counts as epoch 0.
    """

    network: nn.Module
    inputs: Inputs
    examples: Examples
    objective: Objective
    metric: str
    settings: AdaptConfig
    seed: int
    backbone_lr: float
    device: str
    head_lr: float | None = None
    conclude: Callable[[Tensor], Tensor] = field(default_factory=nn.Identity)
    begun: bool = False

    def fit(self, train: Index, validation: Index, on_epoch: OnEpoch) -> Fitted:
        """Train on the units `train`, choose on the units `validation` (indices into `examples.units`).

        Args:
            train, validation: units.
            on_epoch: told the number of each finished epoch, its metrics ("loss", but of epoch 0, and those of
                validation) and, when it is the best so far, what was trained.

        Raises:
            NonFiniteError: a loss is not finite.
            ValueError: too few units to make a batch.
        """
        learned, judged = self.examples.take(train), self.examples.take(validation)
        place = self.examples.clips_of(train)
        optimizer = self._optimizer()
        batches_per_epoch = len(self._batches(learned, 0))
        if not batches_per_epoch:
            raise ValueError(f"{len(train)} training unit(s) make no batch: an identification takes two people or more")
        total = self.settings.epochs * batches_per_epoch
        best: Fitted | None = None
        step = 0
        for epoch in range(0 if self.begun else 1, self.settings.epochs + 1):
            losses = []
            for views in self._batches(learned, epoch) if epoch else ():
                losses.append(self._step(optimizer, place, learned, views, step / max(1, total)))
                step += 1
            measured = self.objective.measure(judged, self.predict(validation, self.settings.clips_per_unit))
            leads = best is None or better(self.metric, measured[self.metric], best.validation[self.metric])
            if leads:
                best = Fitted(epoch, measured, trained_state(self.network))
            loss = {"loss": float(np.mean(losses))} if losses else {}
            on_epoch(epoch, {**loss, **measured}, best.state if leads and best else None)
            if best is not None and epoch - best.epoch >= self.settings.patience:
                break
        assert best is not None
        load_trained(self.network, best.state)
        return best

    def predict(self, units: Index, most: int | None = None) -> NDArray[np.float64]:
        """Predictions of `units`, each pooled over its clips, or over up to `most` of them, spread evenly."""
        unit, features = self.clip_features(units, most)
        pooled = torch.from_numpy(pool(unit, features)).to(self.device, torch.float32)
        with torch.no_grad():
            outputs = self.conclude(pooled).cpu().numpy()
        return self.objective.predictions(outputs.astype(np.float64))

    @torch.no_grad()
    def clip_features(self, units: Index, most: int | None = None) -> tuple[Index, NDArray[np.float64]]:
        """What the network gives for each clip of `units`, up to `most` of each: place in `units` (N), (N, F)."""
        chosen = self.examples.take(units)
        clips = evenly(chosen, most or len(chosen))
        place = self.examples.clips_of(units)
        self.network.eval()
        features = [
            self.network(self.inputs.batch(place[part])).float().cpu().numpy()
            for part in batches(clips, self.settings.batch_clips)
        ]
        self.network.train()
        return chosen.unit[clips], np.concatenate(features).astype(np.float64)

    @property
    def _pairs(self) -> bool:
        return self.objective.kind == "identification"

    def _batches(self, learned: Examples, epoch: int) -> list[list[Index]]:
        choose = draw_pairs if self._pairs else draw
        views = choose(learned, self.settings.clips_per_unit, seed=self.seed, epoch=epoch)
        return list(batches_of_views(views, self.settings.batch_clips, pairs=self._pairs))

    def _optimizer(self) -> torch.optim.Optimizer:
        part = {id(parameter): _part(name) for name, parameter in self.network.named_parameters()}
        head_lr = self.settings.lr if self.head_lr is None else self.head_lr
        rates = {"backbone": self.backbone_lr, "head": head_lr, "between": self.settings.lr}
        groups = []
        for group in parameter_groups(self.network, self.settings.weight_decay):
            for name, rate in rates.items():
                parameters = [parameter for parameter in group["params"] if part[id(parameter)] == name]
                if parameters:
                    groups.append({**group, "params": parameters, "lr": rate, "peak": rate})
        return build_optimizer("adamw", groups, lr=self.settings.lr, fused=self.device.startswith("cuda"))

    def _step(
        self, optimizer: torch.optim.Optimizer, place: Index, learned: Examples, views: list[Index], progress: float
    ) -> float:
        steps = 10_000  # the schedule is a function of the share that is done
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                int(min(progress, 1) * steps), steps, peak=group["peak"], warmup_fraction=WARMUP_FRACTION,
                min_fraction=MIN_LR_FRACTION,
            )  # fmt: skip
        optimizer.zero_grad()
        features = self.network(self.inputs.batch(place[np.concatenate(views)])).float()
        outputs = self.conclude(pooled(features, [len(view) for view in views]))
        units = learned.unit[[view[0] for view in views]]
        targets = torch.from_numpy(np.asarray(learned.targets[units], np.float32)).to(self.device)
        loss = self.objective.loss(outputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_((p for p in self.network.parameters() if p.requires_grad), CLIP_NORM)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss became {value} with adapt.lr={self.settings.lr:g}: take a lower one")
        optimizer.step()
        return value


def pooled(features: Tensor, clips: Sequence[int]) -> Tensor:
    """Features (B, F) of views that stand side by side, of so many `clips` each -> their means (U, F)."""
    return torch.stack([view.mean(0) for view in features.split(list(clips))])


def trained_state(network: nn.Module) -> State:
    """Copies, on the CPU, of what training changes: parameters with a gradient, and buffers of trained modules."""
    names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    state = network.state_dict()
    buffers = {name for name, _ in network.named_buffers() if name in state and not name.startswith("encoder.")}
    return {name: state[name].detach().cpu().clone().contiguous() for name in sorted(names | buffers)}


def load_trained(network: nn.Module, state: State) -> None:
    """Put back what `trained_state` took. ValueError when it is another network's."""
    own = {name: tensor.shape for name, tensor in trained_state(network).items()}
    given = {name: tensor.shape for name, tensor in state.items()}
    if given != own:
        shapes = sorted(name for name in own.keys() & given.keys() if own[name] != given[name])
        raise ValueError(
            f"kept weights do not fit: missing {sorted(own.keys() - given.keys())[:3]}, too many "
            f"{sorted(given.keys() - own.keys())[:3]}, of another shape {shapes[:3]}"
        )
    network.load_state_dict({**network.state_dict(), **copy.deepcopy(state)})


def _part(name: str) -> str:
    if name.startswith("encoder.") and not name.endswith(".prompt"):
        return "backbone"
    return "head" if name.startswith("head.") else "between"


def better(metric: str, new: float, old: float) -> bool:
    """Whether a validation is better than an earlier one; a number is better than nan."""
    if math.isnan(old):
        return not math.isnan(new)
    return new > old if higher_is_better(metric) else new < old

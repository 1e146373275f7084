"""Training by gradient: epochs over the training units, the best on validation kept, an early end.

    epoch: draw clips -> batches -> loss -> AdamW -> validate (pooled per unit) -> better? keep -> report -> patience?

Deterministic on a CPU for a seed. What is kept is what was trained: prompts, pool and head of a frozen backbone.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neurostorm.config import AdaptConfig
from neurostorm.downstream.examples import Examples
from neurostorm.downstream.inputs import Index, Inputs, batches, draw, draw_pairs, evenly
from neurostorm.downstream.metrics import higher_is_better, pool
from neurostorm.downstream.objective import Objective
from neurostorm.train.engine import parameter_groups
from neurostorm.train.health import NonFiniteError
from neurostorm.train.schedule import learning_rate

WARMUP_FRACTION, MIN_LR_FRACTION, CLIP_NORM = 0.1, 0.05, 1.0
State = dict[str, Tensor]
OnEpoch = Callable[[int, dict[str, float], State | None], None]


@dataclass(frozen=True)
class Fitted:
    """The best epoch of a training: its number from 1, its validation metrics, and what was trained as it was then."""

    epoch: int
    validation: dict[str, float]
    state: State


@dataclass(frozen=True)
class Trainer:
    """A network, what it is given, and what it is to learn.

    Attributes:
        network: clips as `inputs` gives them -> outputs (B, outputs).
        inputs: by index into `examples`.
        examples: all units, of which the parts below are taken by index.
        objective: what is learned.
        metric: that selects.
        settings: lr, epochs and so on.
        seed: of the draws.
        backbone_lr: learning rate of parameters below `encoder.` that are no prompts.
        device: where it is trained.
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

    def fit(self, train: Index, validation: Index, on_epoch: OnEpoch) -> Fitted:
        """Train on the units `train`, choose on the units `validation` (indices into `examples.units`).

        Args:
            train, validation: units.
            on_epoch: told the number of each finished epoch, its metrics ("loss" and those of validation) and, when it
                is the best so far, what was trained.

        Raises:
            NonFiniteError: a loss is not finite.
        """
        learned, judged = self.examples.take(train), self.examples.take(validation)
        place = self.examples.clips_of(train)
        optimizer = self._optimizer()
        total = self.settings.epochs * math.ceil(len(self._draw(learned, 0)) / self.settings.batch_clips)
        best: Fitted | None = None
        step = 0
        for epoch in range(1, self.settings.epochs + 1):
            losses = []
            for batch in batches(self._draw(learned, epoch), self.settings.batch_clips, pairs=self._pairs):
                losses.append(self._step(optimizer, place[batch], learned, batch, step / max(1, total)))
                step += 1
            measured = self.objective.measure(judged, self.predict(validation, self.settings.clips_per_unit))
            better = best is None or _better(self.metric, measured[self.metric], best.validation[self.metric])
            if better:
                best = Fitted(epoch, measured, trained_state(self.network))
            on_epoch(epoch, {"loss": float(np.mean(losses)), **measured}, best.state if better and best else None)
            if best is not None and epoch - best.epoch >= self.settings.patience:
                break
        assert best is not None
        load_trained(self.network, best.state)
        return best

    def predict(self, units: Index, most: int | None = None) -> NDArray[np.float64]:
        """Predictions of `units`, each pooled over its clips, or over up to `most` of them, spread evenly."""
        unit, outputs = self.clip_outputs(units, most)
        return self.objective.predictions(pool(unit, outputs))

    @torch.no_grad()
    def clip_outputs(self, units: Index, most: int | None = None) -> tuple[Index, NDArray[np.float64]]:
        """What the network gives for each clip of `units`, up to `most` of each: place in `units` (N), (N, outputs)."""
        chosen = self.examples.take(units)
        clips = evenly(chosen, most or len(chosen))
        place = self.examples.clips_of(units)
        self.network.eval()
        outputs = [
            self.network(self.inputs.batch(place[part])).float().cpu().numpy()
            for part in batches(clips, self.settings.batch_clips)
        ]
        self.network.train()
        return chosen.unit[clips], np.concatenate(outputs).astype(np.float64)

    @property
    def _pairs(self) -> bool:
        return self.objective.kind == "identification"

    def _draw(self, learned: Examples, epoch: int) -> Index:
        choose = draw_pairs if self._pairs else draw
        return choose(learned, self.settings.clips_per_unit, seed=self.seed, epoch=epoch)

    def _optimizer(self) -> torch.optim.Optimizer:
        backbone = {id(p) for n, p in self.network.named_parameters() if _of_backbone(n)}
        groups = []
        for group in parameter_groups(self.network, self.settings.weight_decay):
            for rate, inside in ((self.settings.lr, False), (self.backbone_lr, True)):
                parameters = [p for p in group["params"] if (id(p) in backbone) == inside]
                if parameters:
                    groups.append({**group, "params": parameters, "lr": rate, "peak": rate})
        return torch.optim.AdamW(groups, lr=self.settings.lr, fused=self.device.startswith("cuda"))

    def _step(
        self, optimizer: torch.optim.Optimizer, clips: Index, learned: Examples, batch: Index, progress: float
    ) -> float:
        steps = 10_000  # the schedule is a function of the share that is done
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                int(progress * steps), steps, peak=group["peak"], warmup_fraction=WARMUP_FRACTION,
                min_fraction=MIN_LR_FRACTION,
            )  # fmt: skip
        targets = torch.from_numpy(np.asarray(learned.targets[learned.unit[batch]], np.float32)).to(self.device)
        optimizer.zero_grad()
        loss = self.objective.loss(self.network(self.inputs.batch(clips)).float(), targets)
        loss.backward()
        nn.utils.clip_grad_norm_((p for p in self.network.parameters() if p.requires_grad), CLIP_NORM)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss became {value} with adapt.lr={self.settings.lr:g}: take a lower one")
        optimizer.step()
        return value


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


def _of_backbone(name: str) -> bool:
    return name.startswith("encoder.") and not name.endswith(".prompt")


def _better(metric: str, new: float, old: float) -> bool:
    if math.isnan(old):
        return not math.isnan(new)
    return new > old if higher_is_better(metric) else new < old

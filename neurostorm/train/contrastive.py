"""SwiFT's contrastive pretraining on a store, in one process and without Ray: the baseline beside masked autoencoding.

    subjects of the runs --PairPlan, step--> two clips of each of B subjects --ClipReader--> int8
        --ClipUnpacker--> volumes --Augment, once or twice--> views --encoder, projection--> unit vectors
        --instance and local-local loss--> AdamW, warm-up and cosine --> SwinEncoder

Recipe: Kim et al. 2023, "SwiFT: Swin 4D fMRI Transformer". Clips, views and dropout of a step follow from (seed, step).
All views of a step pass the network together, so the batch norm of the projection sees them as one batch, where the
released code has a pass for each view. The sum of both losses uses the same views for both.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from torch import Tensor, nn

from neurostorm.data.augment import Augment, AugmentConfig
from neurostorm.data.clips import ClipBatch, ClipReader, as_batch
from neurostorm.data.plan.clip_plan import ROW
from neurostorm.data.unpack import ClipUnpacker
from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.geometry.tokens import patch_table
from neurostorm.model.losses.contrastive import ContrastiveModel, instance_loss, local_local_loss
from neurostorm.store.reader import FrameStore
from neurostorm.train.health.limits import NonFiniteError, UnreadableClipsError, clip_names
from neurostorm.train.optimizer import build_optimizer, parameter_groups
from neurostorm.train.schedule import DROPOUT, learning_rate, seed_for

KINDS = ("instance", "local-local", "both")

_PAIRS, _VIEWS = 101, 102  # what a seed is for, beside the purposes in schedule.py
_NAMED = 3  # subjects that an error names


@dataclass(frozen=True)
class ContrastiveRecipe:
    """How the encoder is pretrained.

    Attributes:
        kind: which loss, one of KINDS; "both" is their sum.
        steps: of the optimiser.
        batch: subjects per step, two clips of each.
        lr: peak learning rate of AdamW.
        warmup_fraction, min_lr_fraction: share of the steps with rising rate; final rate as a share of the peak.
        weight_decay: of AdamW, on matrices only.
        clip_norm: the gradient's norm is clipped to this.
        temperature: of NT-Xent.
        augment: how views are drawn.
        seed: of the first weights and of everything that is drawn.
    """

    kind: str = "instance"
    steps: int = 1000
    batch: int = 8
    lr: float = 5e-5
    warmup_fraction: float = 0.05
    min_lr_fraction: float = 0.01
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    temperature: float = 0.1
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    seed: int = 0

    def validate(self) -> None:
        """Raises ValueError naming the field and what is wrong with it."""
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r}: one of {', '.join(KINDS)}")
        least = 1 if self.kind == "local-local" else 2
        if self.batch < least:
            raise ValueError(f"batch = {self.batch}: for {self.kind} at least {least} subject(s) per step")
        if self.steps < 1 or self.seed < 0:
            raise ValueError(f"steps = {self.steps}, seed = {self.seed}: at least 1, and at least 0")
        for name in ("lr", "clip_norm", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: above 0")
        if not (0 <= self.warmup_fraction < 1 and 0 <= self.min_lr_fraction <= 1 and self.weight_decay >= 0):
            raise ValueError(
                f"warmup_fraction = {self.warmup_fraction}, min_lr_fraction = {self.min_lr_fraction}, weight_decay = "
                f"{self.weight_decay}: in [0, 1), in [0, 1], and at least 0"
            )
        self.augment.validate()


@dataclass(frozen=True)
class ContrastiveRuns:
    """The runs that are trained on: their paths in the store, their subjects ("dataset/sub-001"), their frames."""

    paths: tuple[str, ...]
    subjects: tuple[str, ...]
    frames: tuple[int, ...]


@dataclass(frozen=True)
class PairPlan:
    """Which two clips of which subjects a step trains on: a pure function of (seed, step).

    The subjects of a step are different ones; where a step has more than there are, each comes equally often, give or
    take one. A pair's first run is any of the subject's, its second too, but another one where the first has no room
    for two clips. Within one run all pairs of places that do not overlap are equally likely.

    Args:
        subjects, frames: of each run; runs shorter than a clip are not used.
        clip_frames: frames of a clip.
        batch: subjects per step.
        seed: at least 0.

    Raises:
        ValueError: a subject has no two clips that do not overlap, or there is no run.
    """

    subjects: Sequence[str]
    frames: Sequence[int]
    clip_frames: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        alone = [name for name, runs in self.runs_of.items() if not self._has_pair(runs)]
        if alone or not self.runs_of:
            named = ", ".join(alone[:_NAMED]) + (", ..." if len(alone) > _NAMED else "")
            raise ValueError(
                f"{len(alone)} of {len(self.runs_of)} subject(s) have no two clips of {self.clip_frames} frames that "
                f"do not overlap ({named or 'there is no run'}): leave their runs out or take shorter clips "
                "(the last entry of img_size)"
            )

    @cached_property
    def runs_of(self) -> dict[str, list[int]]:
        """Each subject's runs that are as long as a clip, in the order of the subjects' names."""
        runs: dict[str, list[int]] = {name: [] for name in sorted(set(self.subjects))}
        for run, (name, frames) in enumerate(zip(self.subjects, self.frames, strict=True)):
            if frames >= self.clip_frames:
                runs[name].append(run)
        return runs

    @cached_property
    def subject_of_run(self) -> NDArray[np.int64]:
        """(runs,): the number of each run's subject in the order of their names."""
        return np.unique(np.asarray(self.subjects), return_inverse=True)[1].astype(np.int64)

    def rows(self, step: int) -> NDArray[np.void]:
        """The clips of a step, ROW (batch, 2): one subject's two clips in each row."""
        rng = np.random.default_rng((self.seed, _PAIRS, step))
        people = list(self.runs_of.values())
        rounds, rest = divmod(self.batch, len(people))
        chosen = np.concatenate([np.tile(np.arange(len(people)), rounds), rng.choice(len(people), rest, replace=False)])
        rows = np.zeros((self.batch, 2), ROW)
        rows["row"] = step * rows.size + np.arange(rows.size).reshape(rows.shape)
        for pair, person in zip(rows, chosen.tolist(), strict=True):
            pair["run"], pair["start"] = self._pair(people[person], rng)
        return rows

    def _has_pair(self, runs: Sequence[int]) -> bool:
        return len(runs) > 1 or any(self.frames[run] >= 2 * self.clip_frames for run in runs)

    def _pair(self, runs: Sequence[int], rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Two runs, and the first frame of a clip in each."""
        length = self.clip_frames
        first = int(rng.choice(runs))
        second = int(rng.choice([run for run in runs if run != first or self.frames[run] >= 2 * length]))
        if first != second:
            return [first, second], [int(rng.integers(self.frames[run] - length + 1)) for run in (first, second)]
        # Two of n + 1 places without repetition are two of n with it, each pair as likely as any other.
        spare = self.frames[first] - 2 * length
        low, high = sorted(rng.choice(spare + 2, 2, replace=False).tolist())
        return [first, second], [low, high - 1 + length]


class DenseUnpacker(nn.Module):
    """Turns a ClipBatch into volumes, float32 (B, 1, X, Y, Z, L), on this module's device."""

    def __init__(self, store: FrameStore, frames: int) -> None:
        super().__init__()
        self._size = dict(zip("xyz", store.grid.shape, strict=True))
        table = patch_table(torch.from_numpy(store.mask), (1, 1, 1))  # a patch is a voxel
        space = repeat(torch.arange(len(table)), "s -> (s t)", t=frames)
        time = repeat(torch.arange(frames), "t -> (s t)", s=len(table))
        self._unpack = ClipUnpacker(table, space, time, store.voxel_count, store.codec.scale)

    def forward(self, batch: ClipBatch) -> Tensor:
        """The clips of ``batch``; outside the brain 0, or the z of intensity 0 where the normalisation is global."""
        return rearrange(self._unpack(batch).values, "b (x y z t) 1 -> b 1 x y z t", **self._size)


def contrastive_loss(
    model: ContrastiveModel,
    recipe: ContrastiveRecipe,
    volume: Tensor,
    subject: Tensor,
    augment: Augment,
    generator: torch.Generator,
) -> Tensor:
    """The loss () of one step.

    Args:
        model: encoder and projection.
        recipe: of which the kind and the temperature count.
        volume: (2 S, 1, X, Y, Z, T), the two clips of each of S subjects beside each other.
        subject: long (S,), equal for the rows of one subject.
        augment, generator: draw one view of each clip, or two where the kind has a local-local part.
    """
    views = 1 if recipe.kind == "instance" else 2
    patches = torch.cat([model.encoder.to_patches(augment(volume, generator)) for _ in range(views)])
    z = rearrange(model(patches), "(view s clip) d -> view s clip d", view=views, clip=2)
    loss = z.new_zeros(())
    if recipe.kind != "local-local":
        loss = loss + instance_loss(z[0, :, 0], z[0, :, 1], subject, recipe.temperature)
    if recipe.kind != "instance":
        loss = loss + local_local_loss(z[0], z[1], recipe.temperature)
    return loss


def pretrain_contrastive(
    recipe: ContrastiveRecipe,
    store: FrameStore,
    runs: ContrastiveRuns,
    swin: SwinConfig,
    normalise: str,
    device: torch.device | str,
    threads: int = 1,
    on_step: Callable[[int, float], None] | None = None,
) -> SwinEncoder:
    """Pretrain an encoder; the caller keeps it with :func:`neurostorm.model.hub.pretrained.save_pretrained`.

    On a CPU the result follows from the arguments to the last bit.

    Args:
        recipe: validated here.
        store: where the runs lie.
        runs: to train on; their subjects tell which clips are a pair.
        swin: shape of the encoder on the store's grid, with the attention mixer; ``img_size[3]`` is a clip's frames.
        normalise: "voxel" or "global".
        device: where it is trained.
        threads: of torch, on the CPU.
        on_step: called after each step with its number, from 0, and its loss.

    Returns:
        The encoder on ``device``, in eval mode.

    Raises:
        ValueError: a field is impossible, the encoder does not fit the store or is not SwiFT's, a subject has no pair.
        UnreadableClipsError: a clip could not be read.
        NonFiniteError: loss or gradient became NaN or infinite.
    """
    recipe.validate()
    _check(store, runs, swin)
    plan = PairPlan(runs.subjects, runs.frames, swin.frames, recipe.batch, recipe.seed)
    if recipe.kind != "local-local" and len(plan.runs_of) < 2:
        raise ValueError(f"kind = {recipe.kind!r} tells subjects apart, and there is one only: {runs.subjects[0]}")
    torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    mask = torch.from_numpy(store.mask)
    model = ContrastiveModel(SwinEncoder(swin, brain=mask)).to(device).train()
    unpack, augment = DenseUnpacker(store, swin.frames).to(device), Augment(recipe.augment, mask).to(device)
    optimizer = build_optimizer("adamw", parameter_groups(model, recipe.weight_decay), lr=recipe.lr)
    for step, batch in enumerate(_batches(plan, ClipReader(store, runs.paths, swin.frames, normalise), recipe.steps)):
        names = clip_names(batch, runs.paths)
        _refuse_unreadable(batch, names, step)
        torch.manual_seed(seed_for(recipe.seed, DROPOUT, step))
        generator = torch.Generator(device).manual_seed(seed_for(recipe.seed, _VIEWS, step))
        subject = torch.from_numpy(plan.subject_of_run)[batch.run[::2].long()].to(device)
        loss = contrastive_loss(model, recipe, unpack(batch), subject, augment, generator)
        value = _step(model, optimizer, loss, recipe, step, names)
        if on_step is not None:
            on_step(step, value)
    return model.encoder.eval()


def _batches(plan: PairPlan, reader: ClipReader, steps: int) -> Iterator[ClipBatch]:
    """The clips of each step, those of the next one being read meanwhile."""

    def orders() -> Iterator[tuple[NDArray[Any], list[str]]]:
        for step in range(steps):
            rows = plan.rows(step).ravel()
            yield rows, [reader.runs[run] for run in rows["run"]]

    yield from map(as_batch, reader.read_ahead(orders(), threads=1, ahead=1))


def _step(
    model: ContrastiveModel,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    recipe: ContrastiveRecipe,
    step: int,
    clips: Sequence[str],
) -> float:
    """One step of the optimiser; the loss."""
    rate = learning_rate(
        step, recipe.steps, peak=recipe.lr, warmup_fraction=recipe.warmup_fraction, min_fraction=recipe.min_lr_fraction
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    value, size = torch.stack([loss.detach(), norm]).tolist()
    if not (math.isfinite(value) and math.isfinite(size)):
        raise NonFiniteError(
            f"step {step}: the loss is {value} and the gradient's norm {size}; lower lr = {recipe.lr}, or look at the "
            f"clips: {', '.join(clips)}"
        )
    optimizer.step()
    return float(value)


def _check(store: FrameStore, runs: ContrastiveRuns, swin: SwinConfig) -> None:
    counts = len(runs.paths), len(runs.subjects), len(runs.frames)
    if len(set(counts)) != 1:
        raise ValueError(
            f"runs: {counts[0]} paths, {counts[1]} subjects, {counts[2]} frames; one of each for every run"
        )
    if swin.mixer != "attention":
        raise ValueError(f"mixer = {swin.mixer!r}: SwiFT mixes by 'attention'")
    if tuple(store.grid.shape) != tuple(swin.img_size[:3]):
        raise ValueError(f"img_size = {swin.img_size}: the grid of {store.path} is {tuple(store.grid.shape)}")


def _refuse_unreadable(batch: ClipBatch, names: Sequence[str], step: int) -> None:
    bad = [name for name, is_bad in zip(names, batch.bad.tolist(), strict=True) if is_bad]
    if bad:
        raise UnreadableClipsError(
            f"step {step}: {', '.join(bad)} could not be read; python tools/store.py verify STORE says why. Leave such "
            "runs out, or repair the store"
        )

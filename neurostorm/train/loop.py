"""The training loop. It knows no Ray: whoever calls it brings clip batches, an engine and a process group.

    all ranks have their batch? -> patches -> loss -> backward (per micro-batch) -> finite on all ranks? -> step
                                -> log, validate, save

`Loop.run` starts at the step that the newest checkpoint reached. Masks follow from (seed, clip), dropout from (seed,
step, rank), so a resumed run repeats the uninterrupted one.
"""

import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from neurostorm.config import Config
from neurostorm.data.batch_stream import BatchStream
from neurostorm.data.clips import ClipBatch
from neurostorm.data.unpack import ClipUnpacker, Patches
from neurostorm.data.views import ViewUnpacker
from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.cost import measured_peak
from neurostorm.tracking.tracker import Tracker
from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.engine import Engine, StepOutcome
from neurostorm.train.health.barrier import Barrier, StepClips
from neurostorm.train.health.collectives import gather, mean_over_ranks
from neurostorm.train.health.limits import DamagedClips, SkipGuard, clip_names
from neurostorm.train.health.timeouts import CollectiveTimeouts
from neurostorm.train.records.jsonl import Journal
from neurostorm.train.records.log_lines import TimeLeft, line, percent
from neurostorm.train.records.time_account import TimeAccount
from neurostorm.train.records.withdrawn_clips import LeftOut
from neurostorm.train.schedule import DROPOUT, MASK, draw_masks, draw_views, learning_rate, seed_for
from neurostorm.train.validation import Validation

logger = logging.getLogger(__name__)


class Window:
    """Sums of the steps since the last log line, to be averaged over steps and ranks in one reduction.

    The losses are those of every step, the times those of the steps since `restart` or `restart_clock`.
    """

    def __init__(self, stages: int, device: torch.device) -> None:
        self._zero = torch.zeros(3 + stages, dtype=torch.float64, device=device)
        self.restart()

    def restart(self) -> None:
        """Forgets everything; the clock starts now."""
        self.sums, self.micro_batches, self.storage_wait_s = self._zero.clone(), 0, 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves the steps so far out of the times; their losses still count."""
        self.steps, self.wait_s, self.slowest_wait_s, self.began_s = 0, 0.0, 0.0, time.perf_counter()

    def add(self, sums: torch.Tensor, micro_batches: int, wait_s: float, storage_wait_s: float) -> None:
        """Takes in one step: summed loss, baseline, masked fraction and STRD rates; the waits for batch and storage."""
        self.sums += sums
        self.micro_batches, self.steps = self.micro_batches + micro_batches, self.steps + 1
        self.storage_wait_s += storage_wait_s
        self.wait_s, self.slowest_wait_s = self.wait_s + wait_s, max(self.slowest_wait_s, wait_s)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside is not the steps' time."""
        paused_s = time.perf_counter()
        yield
        self.began_s += time.perf_counter() - paused_s

    def means(self) -> list[float]:
        """Loss, baseline, masked fraction and STRD rates, averaged over steps and ranks; a collective call.

        NaN when no step counted, which is so on all ranks or none.
        """
        return mean_over_ranks(self.sums / self.micro_batches)

    def speed(self, global_batch: int) -> dict[str, float]:
        """Metrics of time, none without a step that counts for it; the wait is this rank's."""
        if not self.steps:
            return {}
        elapsed_s = max(time.perf_counter() - self.began_s, 1e-9)
        return {
            "speed/clips_per_s": global_batch * self.steps / elapsed_s,
            "speed/step_s": elapsed_s / self.steps,
            "data/wait_fraction": self.wait_s / elapsed_s,
            "data/slowest_wait_s": self.slowest_wait_s,
        }


@dataclass
class Loop:
    """One worker's part of a pretraining run; `run()` does it.

    batches      this worker's ClipBatch of each step from `first_step` on
    barrier      where all ranks meet before a step
    timeouts     of collectives
    unpack_view  unpacks training clips through a view of their own; None trains on clips as they are
    runs         the manifest's run paths, for naming clips
    account      where the time goes; the loop charges every part of a step to it
    notice       whether a node of this run will be taken away; every rank asks after the same steps and hears the same
    trainer      what every checkpoint keeps beside the step
    clip_flops   operations of one clip's forward and backward pass (model/cost.py)
    """

    config: Config
    engine: Engine
    model: MaskedAutoencoder
    unpack: ClipUnpacker
    unpack_view: ViewUnpacker | None
    batches: BatchStream
    barrier: Barrier
    timeouts: CollectiveTimeouts
    validation: Validation
    tracker: Tracker
    account: TimeAccount
    notice: Callable[[], bool]
    runs: Sequence[str]
    trainer: dict[str, Any]
    rank: int
    first_step: int
    total_steps: int
    clips_per_epoch: int
    clip_flops: int

    def __post_init__(self) -> None:
        train = self.config.train
        self.folder = self.config.run.folder
        self.device = self.unpack.table.device
        dtype = torch.bfloat16 if train.dtype == "bf16" else torch.float32
        self.peak_flops_per_s = self.config.scale.workers * measured_peak(self.device, dtype)
        self.guard = SkipGuard(train.max_skipped_steps)
        self.damaged = DamagedClips(self.folder, self.rank, self.config.data.max_bad_fraction)
        self.left_out = LeftOut(self.folder, self.rank)
        self.ledger = Journal(self.folder / "ledger", f"rank-{self.rank}")
        self.window = Window(len(self.config.model.depths), self.device)
        self.time_left = TimeLeft(
            self.total_steps, {"validation": train.validate_every, "checkpoint": self.config.checkpoint.every}
        )

    def run(self) -> dict[str, float] | None:
        """Trains to the last step; returns the final validation's metrics, or None when it was asked to stop.

        Then the checkpoint of the steps so far is committed.
        """
        result: dict[str, float] = {}
        told = False
        self.account.charge("startup")
        for step in range(self.first_step, self.total_steps):
            # The first step of a process also starts the data loader, allocates and compiles: it is start-up.
            first = step == self.first_step
            waiting_s = time.perf_counter()
            batch, clips = self.next_batch(step)
            wait_s = time.perf_counter() - waiting_s
            self.account.charge("startup" if first else "wait")
            self.damaged.note(batch, self.runs, step, clips)
            self.left_out.note(batch, self.runs, step)
            with self.timeouts.during("step"):
                sums, micro_batches, outcome = self.step(batch, step, clips)
            if clips.counted:
                self.guard.check(outcome.applied, step=step, clips=clip_names(batch, self.runs))
            self.window.add(sums, micro_batches, wait_s, clips.storage_wait_s)
            done = step + 1
            if self.config.tracking.clip_ledger:
                self.write_ledger(step, batch, sums / max(micro_batches, 1))
            self.account.stepped(done, startup=first)
            step_s = time.perf_counter() - waiting_s
            if first:
                self.window.restart_clock()
                self.say("first_step", wait_s=wait_s, step_s=step_s - wait_s)
            else:
                self.time_left.took("step", step_s)
            if done % self.config.train.log_every == 0 or done == self.total_steps:
                self.log(done, outcome.gradient_norm)
            if done % self.config.train.validate_every == 0 or done == self.total_steps:
                result = self.validate(done)
            notice = not told and done % self.config.checkpoint.preemption_check_every == 0 and self.notice()
            if notice:
                told = True
                self.say("preemption", step=done)
            if notice or clips.stop or done % self.config.checkpoint.every == 0 or done == self.total_steps:
                self.save(done)
            if clips.stop and done < self.total_steps:
                self.say("stopped", step=done)
                return None
        return result or self.validate(self.total_steps)

    def next_batch(self, step: int) -> tuple[ClipBatch, StepClips]:
        """This rank's batch of `step`, and what all ranks' batches hold; a collective call."""
        try:
            return self.barrier.next_batch(self.batches)
        except StopIteration:
            message = f"the data loader ended before step {step} of {self.total_steps}: start the job again"
            raise RuntimeError(message) from None

    def step(self, batch: ClipBatch, step: int, clips: StepClips) -> tuple[torch.Tensor, int, StepOutcome]:
        """What `forward_backward` gives, and the optimiser's step.

        One that is not finite is computed once more, from the same seeds: a fault that is none of the clips or weights
        does not come again, and then nothing happened. Without a clip that counts on any rank nothing is done: AdamW
        would move the weights by its moments and the weight decay.
        """
        if not clips.counted:
            self.say("no_clips", step=step, damaged=clips.damaged, withdrawn=clips.withdrawn)
            return torch.zeros_like(self.window.sums), 0, StepOutcome(False, 0.0)
        sums, micro_batches = self.forward_backward(batch, step, clips)
        outcome = self.engine.step(self.learning_rate(step))
        if not outcome.applied:
            self.say("repeating", step=step)
            sums, micro_batches = self.forward_backward(batch, step, clips)
            outcome = self.engine.step(self.learning_rate(step))
        return sums, micro_batches, outcome

    def forward_backward(self, batch: ClipBatch, step: int, clips: StepClips) -> tuple[torch.Tensor, int]:
        """Gradients of the mean loss over the step's clips that count.

        Returns:
            The sums over micro-batches of loss, baseline, masked fraction and STRD rates, and how many micro-batches.
        """
        self.engine.train()
        size = self.config.train.micro_batch
        starts = range(0, len(batch.row), size)
        before = self.rank * len(starts)  # micro-batches of the step, on the ranks before this one
        sums = torch.zeros_like(self.window.sums)
        for nth, start in enumerate(starts):
            micro = batch.part(start, size)
            torch.manual_seed(seed_for(self.config.run.seed, DROPOUT, step, before + nth))
            patches = self.patches(micro)
            mask = draw_masks(self.model, micro.row, self.config, MASK)
            out = self.engine(patches.values, mask=mask, inside=patches.inside, centre=patches.centre)
            weight = self.loss_weight(micro, clips)
            self.engine.backward(out.loss * weight)
            parts = torch.stack([out.loss.detach() * weight, out.baseline * clips.weight, out.masked_fraction])
            sums += torch.cat([parts, out.strd_rates]).double()
        return sums, len(starts)

    def loss_weight(self, micro: ClipBatch, clips: StepClips) -> float:
        """What makes the mean over ranks and micro-batches one over the step's clips that count; 1 when all do.

        A clip without data has loss 0 in a micro-batch's mean over clips (model.loss_on=brain), and no part in its mean
        over voxels (all).
        """
        if self.config.model.loss_on == "brain":
            return clips.weight
        return clips.weight * (1 - float((micro.bad | micro.withdrawn).double().mean()))

    def patches(self, batch: ClipBatch) -> Patches:
        """Training clips as the model takes them."""
        if self.unpack_view is None:
            return self.unpack(batch)
        return self.unpack_view(batch, draw_views(batch.row, self.config))

    def learning_rate(self, step: int) -> float:
        """The learning rate of `step` (counted from 0)."""
        train = self.config.train
        return learning_rate(
            step,
            self.total_steps,
            peak=train.lr,
            warmup_fraction=train.warmup_fraction,
            min_fraction=train.min_lr_fraction,
        )

    def log(self, done: int, gradient_norm: float) -> None:
        """Averages the window over ranks, logs it on rank 0 and starts a new one."""
        loss, baseline, masked, *rates = self.window.means()
        speeds = self.window.speed(self.config.train.global_batch)
        shown: dict[str, object] = {}
        if speeds:
            clips_per_s = speeds["speed/clips_per_s"]
            speeds["speed/mfu"] = clips_per_s * self.clip_flops / self.peak_flops_per_s
            shown = {"clips_per_s": clips_per_s, "wait": percent(speeds["data/wait_fraction"])}
        values = {
            "loss/train": loss, "loss/train_predicting_mean": baseline, "mask/fraction": masked,
            "strd/drop_rate": sum(rates) / len(rates), **{f"strd/drop_rate_stage{i}": r for i, r in enumerate(rates)},
            "optim/lr": self.learning_rate(done - 1), "optim/gradient_norm": gradient_norm,
            "data/bad_clips": float(self.damaged.total), "data/storage_wait_s": self.window.storage_wait_s,
            "health/skipped_steps": float(self.guard.total),
            "progress/epoch": done * self.config.train.global_batch / self.clips_per_epoch,
            **speeds, **memory(self.device), **self.account.metrics(),
        }  # fmt: skip
        self.tracker.metrics({name: value for name, value in values.items() if value == value}, done)
        self.say(
            "step", f"{done}/{self.total_steps}", loss=loss, predicting_mean=baseline, **shown,
            gradient_norm=gradient_norm, skipped_steps=self.guard.total, goodput=percent(values["time/goodput"]),
            **self.time_left.values(done),
        )  # fmt: skip
        self.account.keep("log")
        self.window.restart()

    def validate(self, done: int) -> dict[str, float]:
        """The validation's metrics after `done` finished steps; a collective call."""
        with self.window.aside(), self.time_left.timed("validation"), self.timeouts.during("validation"):
            result = self.validation.run(done)
            self.account.charge("validation")
        loss, baseline = result["loss/validation"], result["loss/validation_predicting_mean"]
        self.say("validation", step=done, loss=loss, predicting_mean=baseline)
        return result

    def save(self, done: int) -> None:
        """Commits a checkpoint of `done` finished steps, and what was noted down to there; a collective call."""
        with self.window.aside(), self.time_left.timed("checkpoint"), self.timeouts.during("checkpoint"):
            self.ledger.keep(done)
            self.damaged.keep(done)
            self.left_out.keep(done)
            checkpoints.save(
                self.folder / "checkpoints", done, write_shards=self.engine.save, gather=gather, rank=self.rank,
                trainer=self.trainer, keep=self.config.checkpoint.keep,
            )  # fmt: skip
            self.account.saved()
        self.say("checkpoint", step=done)

    def say(self, event: str, about: str = "", **values: object) -> None:
        """Prints an event's line on rank 0."""
        if self.rank == 0:
            logger.info(line(event, about, **values))

    def write_ledger(self, step: int, batch: ClipBatch, means: torch.Tensor) -> None:
        """Appends this worker's clips of one step, and the step's mean loss over all workers, to RUN/ledger."""
        loss = mean_over_ranks(means)[0]
        workers = self.config.scale.workers
        self.ledger.add(
            step=step, workers=workers, loss=loss, rows=batch.row.tolist(), clips=clip_names(batch, self.runs)
        )


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process, and of its GPU, in MiB."""
    unit = 1024 if sys.platform != "darwin" else 1024**2  # ru_maxrss counts KiB on Linux, bytes on macOS
    peaks = {"memory/peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if device.type == "cuda":
        peaks["memory/gpu_peak_mib"] = torch.cuda.max_memory_allocated(device) / 1024**2
    return peaks

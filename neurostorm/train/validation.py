"""Loss on held-out clips, beside that of predicting each voxel's mean, and a picture of one reconstruction.

    fixed held-out rows -> each rank reads its share -> equal number of forward passes on all ranks -> mean over clips

The clips and their masks are the same at every validation of a run, so its points compare. ZeRO 3 needs every rank to
make as many forward passes, so a short share is filled up with clips that do not count.
"""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from neurostorm.config import Config
from neurostorm.data.batch_stream import BatchStream
from neurostorm.data.clips import ClipReader
from neurostorm.data.unpack import ClipUnpacker, Patches
from neurostorm.model.autoencoder import MaeOutput, MaskedAutoencoder
from neurostorm.model.decoders import DECODERS
from neurostorm.tracking.tracker import Tracker
from neurostorm.train.engine import Engine
from neurostorm.train.health.barrier import Barrier
from neurostorm.train.health.collectives import sum_over_ranks
from neurostorm.train.schedule import VALIDATION, draw_masks

CLIPS = "data/validation_clips"
logger = logging.getLogger(__name__)


def shares(
    rows: NDArray[np.void], *, rank: int, workers: int, size: int
) -> list[tuple[NDArray[np.void], NDArray[np.bool_]]]:
    """Micro-batches of `size` rows for one rank and which of the rows count; equally many on every rank.

    Row i goes to rank i mod workers, so that all rows count on exactly one rank.
    """
    per_rank = -(-len(rows) // workers)
    position = np.arange(-(-per_rank // size) * size) * workers + rank
    counts = position < len(rows)
    taken = rows[np.minimum(position, len(rows) - 1)]
    return [(taken[first : first + size], counts[first : first + size]) for first in range(0, len(position), size)]


@dataclass(frozen=True)
class Validation:
    """One rank's part of validating a run; `rows` are the plan's held-out rows, the same on all ranks."""

    config: Config
    engine: Engine
    model: MaskedAutoencoder
    unpack: ClipUnpacker
    reader: ClipReader
    rows: NDArray[np.void]
    tracker: Tracker
    barrier: Barrier
    rank: int

    def run(self, done: int) -> dict[str, float]:
        """Validates after `done` steps; a collective call.

        Returns:
            The loss, its baseline, and how many clips they are the means of; both NaN, and not logged, without any.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        self.engine.train(False)
        parts = shares(self.rows, rank=self.rank, workers=self.config.scale.workers, size=self.config.train.micro_batch)
        # Through the barrier, as in training: a rank whose reads wait for storage is not hung.
        data = self.config.data
        batches = BatchStream(
            map(self.reader.batch, (rows for rows, _ in parts)),
            rank=self.rank,
            first_step=done,
            timeout_s=data.batch_timeout_s,
        )
        for nth, (_, counts) in enumerate(parts):
            batch, _ = self.barrier.next_batch(batches)
            patches = self.unpack(batch)
            mask = draw_masks(self.model, batch.row, self.config, VALIDATION)
            with torch.no_grad():
                out = self.engine(patches.values, mask=mask, inside=patches.inside, centre=patches.centre)
            usable = torch.from_numpy(counts) & ~(batch.bad | batch.withdrawn)
            losses = torch.stack([out.clip_loss, out.clip_baseline]).double().cpu()
            sums += torch.cat([losses[:, usable].sum(dim=1), usable.sum()[None]])
            if nth == 0 and self.rank == 0 and self.config.tracking.pictures and usable[0]:
                self.tracker.image("reconstruction", self.picture(patches, out, done), done)
        loss, baseline, clips = sum_over_ranks(sums, self.unpack.table.device)
        means = {"loss/validation": loss, "loss/validation_predicting_mean": baseline}
        result = {CLIPS: clips, **{name: total / clips if clips else math.nan for name, total in means.items()}}
        if not clips and self.rank == 0:
            logger.warning("step %d: no held-out clip counts: their subjects withdrew, or they are damaged", done)
        self.tracker.metrics(result if clips else {CLIPS: clips}, done)
        return result

    def picture(self, patches: Patches, out: MaeOutput, done: int) -> NDArray[np.uint8]:
        """The first clip's middle frame: target, what the model saw, its prediction, its error."""
        from neurostorm.tracking.images import (
            reconstruction_figure,  # and with it matplotlib, which other ranks do not need
        )

        frame = self.config.data.clip_frames // 2
        hidden = out.mask[:1, :, None].expand_as(patches.values[:1])
        target = patches.values[:1]
        prediction = out.prediction[:1].float()
        if DECODERS[self.model.decoder].visible_alone:  # which predicts nothing that is visible
            prediction = torch.where(hidden, prediction, target)
        boxes = (target, target.masked_fill(hidden, 0), prediction, hidden.float())
        seen, masked, predicted, unseen = [self.model.to_volume(box)[0, 0, ..., frame].cpu().numpy() for box in boxes]
        store = self.reader.store
        unit = "z over time" if self.config.data.normalize == "voxel" else "z over the run"
        return reconstruction_figure(
            seen,
            masked,
            predicted,
            (unseen > 0) & store.mask,
            brain=store.mask,
            affine=store.grid.affine,
            title=f"held-out clip, frame {frame}, after {done} steps",
            unit=unit,
        )

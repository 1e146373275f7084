"""Where all ranks meet before they compute on clips, so that a rank that waits for its own is not taken for a hung one.

    rank 0: batch there ------------------> meet: "1 is missing" -> meet: "none is missing" -> step
    rank 1: batch not there for 5 s ------> meet: "1 is missing" -> meet: "none is missing" -> step
    rank 2: hangs                            ... the meeting times out on the others

Whoever waits for data comes to every meeting and says so: the timeout of collectives can be short, however slow a data
loader or a store is. The same meeting adds up what the batches hold, so that all ranks take the same decisions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from neurostorm.data.batch_stream import BatchStream
from neurostorm.data.clips import ClipBatch
from neurostorm.train.health.timeouts import CollectiveTimeouts

LONGEST_POLL_S = 5.0


@dataclass(frozen=True)
class StepClips:
    """The clips of one step over all ranks.

    Attributes:
        total: clips.
        damaged: of those, clips whose data is damaged or missing.
        storage_wait_s: for how long storage was away for their reads, mean over ranks, seconds.
        withdrawn: of the clips, those that are left out because their subjects withdrew.
        stop: a rank was asked to stop the run after this step.
    """

    total: int
    damaged: int
    storage_wait_s: float
    withdrawn: int = 0
    stop: bool = False

    @property
    def counted(self) -> int:
        """Clips that the loss counts."""
        return self.total - self.damaged - self.withdrawn

    @property
    def weight(self) -> float:
        """What makes a mean over all clips, in which those that do not count are 0, one over those that count."""
        return self.total / self.counted


class Barrier:
    """A process group of its own on the CPU; making one is a collective call.

    Args:
        timeouts: of the run's collectives; a meeting is of the kind `meet`.
        least_s: lower bound of those timeouts: a rank comes to a meeting several times within it.
        stop: whether this rank was asked to stop the run; returns at once.
    """

    def __init__(self, timeouts: CollectiveTimeouts, least_s: float, stop: Callable[[], bool] = lambda: False) -> None:
        self._stop = stop
        self._timeouts, self._poll_s = timeouts, min(LONGEST_POLL_S, least_s / 4)
        self._group = dist.new_group(backend="gloo")
        self._ranks = dist.get_world_size()

    def next_batch(self, stream: BatchStream) -> tuple[ClipBatch, StepClips]:
        """This rank's next batch, once every rank has its own, and what all of them hold; a collective call.

        Raises:
            StopIteration: this rank's stream has ended.
            BatchTimeout, StorageAwayError: this rank's batch cannot be had.
        """
        batch = None
        while True:
            if batch is None:
                batch = stream.poll(self._poll_s)
            missing, total, damaged, withdrawn, waited_s, asked = self._sum(batch)
            if not missing:
                assert batch is not None
                return batch, StepClips(
                    round(total), round(damaged), waited_s / self._ranks, withdrawn=round(withdrawn), stop=asked > 0
                )

    def _sum(self, batch: ClipBatch | None) -> list[float]:
        """Missing batches, clips, damaged ones, withdrawn ones, seconds of waiting for storage, requests to stop.

        Summed over all ranks.
        """
        values = torch.zeros(6, dtype=torch.float64)
        values[5] = float(self._stop())
        if batch is None:
            values[0] = 1
        else:
            parts = [len(batch.bad), int(batch.bad.sum()), int(batch.withdrawn.sum()), float(batch.waited_s.max())]
            values[1:5] = torch.tensor(parts, dtype=torch.float64)
        with self._timeouts.during("meet"):
            dist.all_reduce(values, group=self._group)
        summed: list[float] = values.tolist()
        return summed

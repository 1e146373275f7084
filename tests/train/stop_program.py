"""One rank that takes batches until it hears that the run is to stop; see ranks.py. Rank 0 is asked before step 2."""

from pathlib import Path

import torch
import torch.distributed as dist

from neurostorm.data.batch_stream import BatchStream
from neurostorm.data.clips import ClipBatch
from neurostorm.train.health.barrier import Barrier
from neurostorm.train.health.timeouts import CollectiveTimeouts


def stream(batches: int) -> BatchStream:
    index = torch.arange(2)
    one = ClipBatch(index, index, index, index > 5, index > 5, torch.zeros(2), torch.zeros(2, 1, 1, dtype=torch.int8))
    return BatchStream(iter([one] * batches))


def main(rank: int, workers: int, meeting: Path, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)
    steps, batches = 0, stream(10)
    barrier = Barrier(CollectiveTimeouts(60, 60, lambda timeout_s: None), 60, lambda: rank == 0 and steps >= 2)
    stop = False
    while not stop:
        _, clips = barrier.next_batch(batches)
        stop = clips.stop
        steps += 1
    (folder / f"rank-{rank}.txt").write_text(f"stopped after {steps} steps")

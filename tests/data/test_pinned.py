"""Copies to a GPU overlap with its work, and no buffer is filled again before its copy is done.

The device of these tests is as late as CUDA allows: a stream does nothing until an event on it is waited for.
"""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neurostorm.data.batch_stream import BatchStream
from neurostorm.data.clips import as_batch
from neurostorm.data.loader import batches
from neurostorm.data.pinned import Cuda, DeviceCopies

ORDERS, AHEAD = 8, 2


class LateStream:
    """Work waits in the queue of its stream until it has to be done."""

    def __init__(self, log, name):
        self.queue, self.log, self.name = [], log, name

    def run(self, until=None):
        while self.queue:
            work = self.queue.pop(0)
            work()
            if until is not None and work is until:
                return

    def wait_event(self, event):
        self.log.append(f"{self.name} waits")
        self.queue.append(event.finish)
        self.run()  # what is computed next is looked at by the test at once


class LateEvent:
    def __init__(self, log):
        self.log, self.done = log, False

    def record(self, stream):
        self.stream = stream
        self.mark = self._mark
        stream.queue.append(self.mark)

    def _mark(self):
        self.done = True

    def finish(self):
        if not self.done:
            self.stream.run(until=self.mark)

    def synchronize(self):
        self.log.append("host waits")
        self.finish()


class LateCuda(Cuda):
    """A device whose memory is the CPU's."""

    def __init__(self):
        self.log, self.pinned, self.kept, self.active = [], [], [], None
        self.copying, self.computing = LateStream(self.log, "copy"), LateStream(self.log, "compute")

    def empty(self, shape, dtype):
        self.pinned.append(np.empty(shape, dtype))
        return self.pinned[-1]

    def stream(self):
        return self.copying

    def current_stream(self):
        return self.computing

    def event(self):
        return LateEvent(self.log)

    @contextmanager
    def on(self, stream):
        self.active = stream
        yield
        self.active = None

    def copy(self, values):
        assert any(values.data_ptr() == buffer.ctypes.data for buffer in self.pinned), "not from pinned memory"
        target = torch.zeros_like(values)
        self.active.queue.append(lambda: target.copy_(values))
        return target

    def record_stream(self, values, stream):
        self.kept.append((values.data_ptr(), stream))


class NoWait(DeviceCopies):
    """What happens without the wait before a buffer is filled again."""

    def wait(self, columns):
        pass


@pytest.fixture
def orders(uneven, rows_of):
    return [(rows_of([(nth, 2 * nth), (nth, 2 * nth + 1)]), [uneven.runs[nth]] * 2) for nth in range(ORDERS)]


def sent(reader, orders, copies):
    """All batches, each sent when it is read, none of them used yet: the host is far ahead of the device."""
    return list(map(copies.send, reader.read_ahead(orders, threads=2, ahead=AHEAD, copies=copies)))


def test_no_buffer_is_filled_again_before_its_copy_is_done(uneven, orders):
    reader, cuda = uneven.reader(normalise="global"), LateCuda()
    batches = sent(reader, orders, DeviceCopies(cuda))
    assert len({buffer.ctypes.data for buffer in cuda.pinned}) == 3 * (AHEAD + 2), "memory is used again"
    assert cuda.log == ["host waits"] * (ORDERS - AHEAD - 2)
    for (rows, _), batch in zip(orders, batches, strict=True):
        found, expected = batch.to(torch.device("cpu")), reader.batch(rows)
        for name in ("row", "bad", "frames", "scale", "shift", "fill"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_without_that_wait_clips_are_lost(uneven, orders):
    reader = uneven.reader()
    batches = sent(reader, orders, NoWait(LateCuda()))
    frames = [batch.to(torch.device("cpu")).frames for batch in batches]
    assert any(not torch.equal(f, reader.batch(rows).frames) for f, (rows, _) in zip(frames, orders, strict=True))


def test_computing_waits_for_the_copy_and_keeps_its_memory(uneven, orders):
    reader, cuda = uneven.reader(normalise="global"), LateCuda()
    copies = DeviceCopies(cuda)
    batch = copies.send(next(reader.read_ahead(orders[:1], threads=1, ahead=AHEAD, copies=copies)))
    assert not batch.frames.any(), "nothing is copied yet, and no stream has waited"
    assert batch.bad.data_ptr() != 0 and cuda.log == []
    part = batch.part(1, 1).to(torch.device("cpu"))
    assert cuda.log == ["compute waits"]
    assert torch.equal(part.frames, reader.batch(orders[0][0]).frames[1:])
    assert cuda.kept == [(values.data_ptr(), cuda.computing) for values in (part.frames, part.scale, part.shift)]


def test_clips_of_rays_shared_memory_go_through_two_pinned_buffers(uneven, orders):
    reader, cuda = uneven.reader(normalise="global"), LateCuda()
    copies, batches = DeviceCopies(cuda), []
    for rows, _ in orders:
        columns = reader.read(rows)
        for values in columns.values():
            values.flags.writeable = False
        batches.append(copies.send_shared(columns))
        del columns
    assert len(cuda.pinned) == 3 * 2 and cuda.log == ["host waits"] * (ORDERS - 2)
    for (rows, _), batch in zip(orders, batches, strict=True):
        assert torch.equal(batch.to(torch.device("cpu")).frames, reader.batch(rows).frames)


def test_the_next_batch_is_made_while_one_is_in_use():
    made = []

    def make():
        for number in range(3):
            made.append(number)
            yield number

    stream = BatchStream(make(), ask_ahead=True)
    assert made == []
    assert stream.poll(10) == 0
    while len(made) < 2:
        pass
    assert stream.poll(10) == 1 and stream.poll(10) == 2
    for _ in range(2):
        with pytest.raises(StopIteration):
            stream.poll(10)
    assert made == [0, 1, 2]


def test_a_batch_on_the_cpu_has_no_copy_to_wait_for(uneven, rows_of):
    batch = as_batch(uneven.reader().read(rows_of([(0, 0)])))
    assert batch.copied is None
    assert replace(batch.to(torch.device("cpu"))).copied is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_to_a_gpu_do_not_wait_for_its_work(uneven, orders):
    device, reader = torch.device("cuda"), uneven.reader(normalise="global")
    copies, columns = DeviceCopies(Cuda(device)), reader.read(orders[0][0])
    assert torch.from_numpy(copies.empty((3, 4), np.int8)).is_pinned()
    for _ in range(3):  # memory is allocated here, which may wait for the device
        copies.send_shared(columns).copied.event.synchronize()
    torch.cuda._sleep(2_000_000_000)  # the computing stream is busy for about a second
    busy = torch.cuda.Event()
    busy.record()
    batch = copies.send_shared(columns)
    batch.copied.event.synchronize()
    assert not busy.query(), "the copy waited for what is computed"
    assert batch.frames.device.type == "cuda" and batch.bad.device.type == "cpu"
    assert torch.equal(batch.to(device).frames.cpu(), torch.from_numpy(columns["frames"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_what_was_read_however_far_the_host_is_ahead(uneven, orders):
    device, reader = torch.device("cuda"), uneven.reader(normalise="global")
    torch.cuda._sleep(200_000_000)
    batches = sent(reader, orders * 4, DeviceCopies(Cuda(device)))
    for (rows, _), batch in zip(orders * 4, batches, strict=True):
        found, expected = batch.to(device), reader.batch(rows)
        for name in ("frames", "scale", "shift", "fill"):
            assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name


@pytest.mark.parametrize("read_in", ["worker", "tasks"])
def test_the_feed_of_a_worker_sends_its_batches(read_in, uneven, orders):
    reader, cuda = uneven.reader(normalise="global"), LateCuda()

    def blocks():
        for step, (rows, paths) in enumerate(orders):
            clips = reader.read(rows) if read_in == "tasks" else {name: rows[name] for name in rows.dtype.names}
            extra = {"path": np.array(paths)} if read_in == "worker" else {}
            yield {**clips, **extra, "step": np.full(2, step), "rank": np.zeros(2, int)}

    shard = SimpleNamespace(iter_batches=lambda **options: blocks())
    stream = batches(shard, reader, rank=0, first_step=0, clips=2, copies=DeviceCopies(cuda))
    held = list(stream)  # none is looked at before all are sent
    assert len(held) == ORDERS
    for (rows, _), batch in zip(orders, held, strict=True):
        assert torch.equal(batch.to(torch.device("cpu")).frames, reader.batch(rows).frames)
    buffers = {"worker": AHEAD + 2, "tasks": 2}[read_in]
    assert len(cuda.pinned) == 3 * buffers

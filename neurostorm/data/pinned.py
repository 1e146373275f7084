"""Batches copied to a GPU while it computes, from memory that is not written again before its copy is done.

    reader -> pinned buffer --copy stream--> batch on the GPU, with the event after its copy
                 |                             '-- whoever computes on it: its stream waits for the event
                 '-- before it is filled again: the reading thread waits for the event

Copies from ordinary memory do not overlap: CUDA brings them into pinned memory of its own first, and the caller waits.
Clips of Ray's reading tasks lie in memory that Ray shares and that cannot be pinned; they are brought into two pinned
buffers in the thread that fetches them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurostorm.data.clips import ClipBatch, Columns, as_batch

LARGE = ("frames", "scale", "shift")  # columns that are copied ahead; the others are a few bytes a clip


class Cuda:
    """As much of torch.cuda as copying needs, for one device; tests bring another one.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Pinned memory, as a numpy array."""
        like = torch.from_numpy(np.empty(0, dtype))
        with torch.cuda.device(self._device):  # a thread of its own would use the first GPU of the node
            values: NDArray[Any] = torch.empty(shape, dtype=like.dtype, pin_memory=True).numpy()
        return values

    def stream(self) -> Any:
        """A new stream."""
        return torch.cuda.Stream(self._device)

    def current_stream(self) -> Any:
        """The stream on which the calling thread computes."""
        return torch.cuda.current_stream(self._device)

    def event(self) -> Any:
        """A new event; a thread that waits for it sleeps."""
        return torch.cuda.Event(blocking=True)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """What is begun inside runs on `stream`."""
        return torch.cuda.stream(stream)

    def copy(self, values: Tensor) -> Tensor:
        """Begins a copy to the device, of pinned memory."""
        return values.to(self._device, non_blocking=True)

    def record_stream(self, values: Tensor, stream: Any) -> None:
        """Keeps the memory of `values` from being used again before `stream` is done with it."""
        values.record_stream(stream)


@dataclass(frozen=True)
class Copied:
    """A copy to the GPU that may still be going on.

    Attributes:
        event: recorded after it.
        cuda: what made it.
    """

    event: Any
    cuda: Cuda

    def arrive(self, tensors: Sequence[Tensor]) -> None:
        """Makes the caller's stream wait for the copy, and keeps the memory of `tensors` as long as it is needed."""
        stream = self.cuda.current_stream()
        stream.wait_event(self.event)
        for values in tensors:
            self.cuda.record_stream(values, stream)


class DeviceCopies:
    """Sends one worker's batches to its GPU, on a stream of its own.

    Args:
        cuda: the device.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._stream = cuda, cuda.stream()
        self._events: dict[int, Any] = {}  # address of the frames of a buffer -> the event after its last copy
        self._staged: list[Columns] = []

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Memory for a column, pinned."""
        return self._cuda.empty(shape, dtype)

    def wait(self, columns: Columns) -> None:
        """Waits until the copy of a buffer's content, if there was one, is done: then it may be filled again."""
        event = self._events.pop(columns["frames"].ctypes.data, None)
        if event is not None:
            event.synchronize()

    def send(self, columns: Columns) -> ClipBatch:
        """Begins to copy a batch that lies in memory of `empty`.

        Returns:
            The batch: its large columns on the GPU, where `ClipBatch.to` waits for them; the others on the CPU.
        """
        batch = as_batch(columns)
        with self._cuda.on(self._stream):
            large = {name: self._cuda.copy(values) for name, values in vars(batch).items() if _is_large(name, values)}
            event = self._cuda.event()
            event.record(self._stream)
        self._events[columns["frames"].ctypes.data] = event
        return replace(batch, **large, copied=Copied(event, self._cuda))

    def send_shared(self, columns: Columns) -> ClipBatch:
        """`send` for a batch in any other memory, by way of two pinned buffers."""
        used = self._staged.pop(0) if len(self._staged) == 2 else None
        if used is not None:
            self.wait(used)
        staged = dict(columns)
        for name in LARGE:
            if name in columns:
                values = columns[name]
                fits = used is not None and used[name].shape == values.shape
                staged[name] = used[name] if used is not None and fits else self.empty(values.shape, values.dtype)
                staged[name][...] = values
        self._staged.append(staged)
        return self.send(staged)


def _is_large(name: str, values: Any) -> bool:
    return name in LARGE and values is not None

"""Reading the rows of one run from its shard, straight into the caller's array.

    rows -> chunks -> one contiguous range -> preadv: each chunk to its place in the result, its checksum beside
                                           -> or one request (object store, zstd), then chunk by chunk

A chunk's checksum is compared when this process reads it for the first time, or always. What the file system's cache
gives is read at its own speed that way: no second pass, no copy but the kernel's.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurostorm.io.object_store import ObjectPath
from neurostorm.io.paths import AnyPath
from neurostorm.store.shard import RunLayout, ShardError, check, decode_chunk, read_index

_IOV_MAX = 1024  # buffers in one call of preadv


class RunFile:
    """One run's layout, where its chunks lie, and which of them this process has found to be whole.

    Attributes:
        layout: shape and packing.
        shard: the file.
        stated: the layout is what a manifest says, and nothing that was read has confirmed the number of frames yet.
    """

    __slots__ = ("_index", "_whole", "layout", "shard", "stated")

    def __init__(self, layout: RunLayout, shard: AnyPath, *, stated: bool = False) -> None:
        self.layout, self.shard, self.stated = layout, shard, stated
        self._index: NDArray[np.uint64] | None = None  # of a compressed run, 16 bytes a chunk
        self._whole = 0  # bit i: chunk i; an array would be seven times as large

    def read(self, first: int, out: NDArray[np.int8], *, verify_all: bool) -> None:
        """Fill `out` (count, V) with the rows from `first` on. ShardError or OSError when they cannot be had."""
        chunks = self.layout.chunk_range(first, len(out))
        bits = ((1 << len(chunks)) - 1) << chunks.start
        unchecked = range(0) if not verify_all and self._whole & bits == bits else chunks
        if self.layout.compression == "none" and isinstance(self.shard, Path):
            self._read_in_place(self.shard, first, out, chunks, unchecked)
        else:
            self._read_and_decode(first, out, chunks, unchecked)
        if unchecked:
            self._whole |= bits

    def _extents(self, chunks: range) -> NDArray[np.int64]:
        """(n, 2) offset and length of `chunks`; those of a compressed run are read from its shard, once."""
        if self._index is None and self.layout.compression == "none":
            return self.layout.packed_index(chunks).astype(np.int64)
        if self._index is None:
            size, count = self.shard.stat().st_size, self.layout.index_bytes
            self._index = read_index(self.layout, read_range(self.shard, max(0, size - count), count), size)
        return self._index[chunks.start : chunks.stop].astype(np.int64)

    def _tail_bytes(self, chunks: range) -> int:
        """Bytes to read behind `chunks`: the index, where it can tell whether the run has as many frames as stated.

        Frames lie where they lie whatever their number, but the moments after them do not.
        """
        ends = self.stated and chunks.stop == self.layout.chunks and self.layout.compression == "none"
        return self.layout.index_bytes if ends else 0

    def _confirm(self, tail: Any) -> None:
        """Note that the run has as many frames as stated. ShardError when `tail` is not the index of such a run."""
        index = read_index(self.layout, tail, self.layout.shard_bytes)
        if not np.array_equal(index, self.layout.packed_index()):
            raise ShardError("has an index that does not say where the chunks are")
        self.stated = False

    def _read_in_place(self, shard: Path, first: int, out: NDArray[np.int8], chunks: range, unchecked: range) -> None:
        """One pass over the range: chunks that lie whole in `out` land there, checksums and other chunks beside."""
        rows, size = self.layout.chunk_frames, self.layout.chunk_bytes
        begin, end = -(-first // rows), (first + len(out)) // rows
        inside = range(begin, max(begin, end))
        land = out[inside.start * rows - first : inside.stop * rows - first].reshape(len(inside), size)
        beside = {number: np.empty(size, np.int8) for number in chunks if number not in inside}
        values = [*(beside[n] for n in chunks if n < begin), *land, *(beside[n] for n in chunks if n >= inside.stop)]
        crcs = list(np.empty((len(chunks), 4), np.uint8))
        buffers: list[Any] = [None] * (2 * len(chunks))
        buffers[::2], buffers[1::2] = values, crcs
        tail = np.empty(self._tail_bytes(chunks), np.uint8)
        _read_into(shard, self.layout.chunk_offset(chunks.start), [*buffers, tail] if len(tail) else buffers)
        if len(tail):
            self._confirm(tail)
        for number in unchecked:
            check(values[number - chunks.start], crcs[number - chunks.start], number * rows)
        for number, chunk in beside.items():
            _place(out, chunk.reshape(rows, -1), number * rows - first)

    def _read_and_decode(self, first: int, out: NDArray[np.int8], chunks: range, unchecked: range) -> None:
        """One request for the range, then chunk by chunk: for compressed runs, and for object stores."""
        index = self._extents(chunks)
        offset, tail_bytes = int(index[:, 0].min()), self._tail_bytes(chunks)
        data = read_range(self.shard, offset, int(index.sum(axis=1).max()) - offset + tail_bytes)
        if tail_bytes:
            self._confirm(data[-tail_bytes:])
        for number, (begin, length) in zip(chunks, index - [offset, 0], strict=True):
            record = data[begin : begin + length]
            values = decode_chunk(self.layout, record, number, verify=number in unchecked)
            _place(out, values, number * self.layout.chunk_frames - first)


def read_range(file: AnyPath, offset: int, size: int) -> memoryview:
    """`size` bytes of a file from `offset` on. ShardError when it ends before, OSError when it cannot be read."""
    if isinstance(file, ObjectPath):
        data = file.read_range(offset, size)
    else:
        buffer = np.empty(size, np.uint8)
        _read_into(file, offset, [buffer])
        data = memoryview(buffer.data)
    if len(data) < size:
        raise ShardError(f"is too short: {size} bytes were asked from byte {offset} on and {len(data)} are there")
    return data


def _read_into(file: Path, offset: int, buffers: list[Any]) -> None:
    """Fill the buffers, one after the other, with the bytes from `offset` on. ShardError when the file ends before."""
    handle = os.open(file, os.O_RDONLY)
    try:
        for first in range(0, len(buffers), _IOV_MAX):
            part = buffers[first : first + _IOV_MAX]
            wanted = sum(buffer.nbytes for buffer in part)
            there = os.preadv(handle, part, offset)
            while there < wanted:  # a call moves 2 GB at most, and less when a signal comes
                rest = _behind(part, there)
                more = os.preadv(handle, rest, offset + there)
                if more == 0:
                    raise ShardError(f"is too short: it ends at byte {offset + there}, inside the rows that were asked")
                there += more
            offset += wanted
    finally:
        os.close(handle)


def _behind(buffers: list[Any], done: int) -> list[Any]:
    """What is left of the buffers when their first `done` bytes are filled."""
    rest = []
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        rest += [view[done:]] if done < len(view) else []
        done = max(0, done - len(view))
    return rest


def _place(out: NDArray[np.int8], values: NDArray[np.int8], begin: int) -> None:
    """Copy the rows of a chunk that begins at row `begin` of `out`, as far as they belong there."""
    low, high = max(0, begin), min(len(out), begin + len(values))
    out[low:high] = values[low - begin : high - begin]

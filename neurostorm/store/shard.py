"""The bytes of one run: a Zarr v3 array of a single shard, and where in it each frame lies. Pure: no file is touched.

    row      0 .. T-1          T .. T+3              T+4 .. T+7
    holds    frame 0 .. T-1    mean (float32 bytes)  std (float32 bytes)       int8, V bytes each

    shard    chunk 0 + crc32c | chunk 1 + crc32c | ... | index: (offset, length) of every chunk, crc32c

One array and one shard keep a run at two files, and 66,000 runs within what a file system likes to hold; any Zarr
reader opens it, and row t of what it opens is frame t. The layout of a shard is that of the Zarr v3 codec
`sharding_indexed` with the index at the end; zarr-python is the oracle of the tests. Without compression chunk i lies
at i * (C V + 4), so a clip is one contiguous range that is found without reading the index.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from neurostorm.store.codec import FrameCodec

MOMENT_ROWS = 8  # mean and std, four bytes per voxel each
SHARD_FILE = "0.0"
CHUNK_BYTES = 1 << 17  # a chunk is what a checksum covers: small, so that a clip's range begins and ends near the clip
COMPRESSIONS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "zstd": [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}],
}
_CRC = {"name": "crc32c"}
_CRC_BYTES = 4
_ENTRY_BYTES = 16
_ABSENT = np.uint64(2**64 - 1)
_ZSTD = Zstd(level=1)

Buffer = Any  # bytes, a memoryview or an array: what gives its memory away


class ShardError(ValueError):
    """Bytes that are no shard, or not the chunk they should be; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class RunLayout:
    """Shape and packing of one run, all that finding its rows takes.

    Attributes:
        frames: T.
        voxels: V.
        chunk_frames: C, rows of a chunk; the last chunk is filled up.
        compression: key of `COMPRESSIONS`.
    """

    frames: int
    voxels: int
    chunk_frames: int
    compression: str

    @property
    def rows(self) -> int:
        """Rows of the array: the frames and the moments."""
        return self.frames + MOMENT_ROWS

    @property
    def chunks(self) -> int:
        """Chunks of the shard."""
        return -(-self.rows // self.chunk_frames)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return self.chunk_frames * self.voxels

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of the shard."""
        return self.chunks * _ENTRY_BYTES + _CRC_BYTES

    @property
    def shard_bytes(self) -> int:
        """Bytes of the shard without compression; with it, about what it can be at most."""
        return self.chunks * (self.chunk_bytes + _CRC_BYTES) + self.index_bytes

    def chunk_offset(self, number: int) -> int:
        """First byte of chunk `number` when nothing is compressed."""
        return number * (self.chunk_bytes + _CRC_BYTES)

    def packed_index(self, chunks: range | None = None) -> NDArray[np.uint64]:
        """(n, 2) offset and length of `chunks`, of all by default, when nothing is compressed."""
        chunks = range(self.chunks) if chunks is None else chunks
        record = self.chunk_offset(1)
        offset = np.arange(chunks.start, chunks.stop, dtype=np.uint64) * np.uint64(record)
        return np.stack([offset, np.full_like(offset, record)], axis=1)

    def chunk_range(self, first: int, count: int) -> range:
        """The chunks that hold rows [first, first + count)."""
        return range(first // self.chunk_frames, -(-(first + count) // self.chunk_frames))


def default_chunk_frames(voxels: int) -> int:
    """Rows that come nearest to a chunk of 128 kB: 1 at 2 mm, 4 or 5 at 4 mm."""
    return max(1, round(CHUNK_BYTES / voxels))


def run_files() -> int:
    """Files of one run: its metadata and its shard."""
    return 2


def run_bytes(frames: int, voxels: int, chunk_frames: int | None = None) -> int:
    """Bytes of one uncompressed run, without its 2 kB of metadata."""
    rows = min(chunk_frames or default_chunk_frames(voxels), frames + MOMENT_ROWS)
    return RunLayout(frames, voxels, rows, "none").shard_bytes


def array_metadata(layout: RunLayout, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The run's zarr.json as a tree of JSON values."""
    inner = {
        "chunk_shape": [layout.chunk_frames, layout.voxels],
        "codecs": [{"name": "bytes"}, *COMPRESSIONS[layout.compression], _CRC],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, _CRC],
        "index_location": "end",
    }
    shard_rows = layout.chunks * layout.chunk_frames
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [layout.rows, layout.voxels],
        "data_type": FrameCodec.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, layout.voxels]}},
        # One file name per chunk ("0.0") instead of a folder per dimension: inodes are what a corpus runs out of.
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
        "fill_value": FrameCodec.missing,
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        "dimension_names": ["frame", "voxel"],
        "attributes": dict(attributes),
        "storage_transformers": [],
    }


def layout_of(metadata: Mapping[str, Any]) -> RunLayout:
    """The layout that a run's zarr.json describes. ShardError when it is not one of ours."""
    try:
        rows, voxels = (int(n) for n in metadata["shape"])
        (sharding,) = metadata["codecs"]
        chunk_frames = int(sharding["configuration"]["chunk_shape"][0])
        names = [codec["name"] for codec in sharding["configuration"]["codecs"]]
        compression = next(
            key for key, extra in COMPRESSIONS.items() if names == ["bytes", *(c["name"] for c in extra), "crc32c"]
        )
        layout = RunLayout(rows - MOMENT_ROWS, voxels, chunk_frames, compression)
        if min(layout.frames, voxels, chunk_frames) < 1:
            raise ValueError("no frames, no voxels or no rows in a chunk")
        if metadata["attributes"]["frames"] != layout.frames:
            raise ValueError("its attribute `frames` does not agree with its shape")
        if dict(metadata, attributes={}) != array_metadata(layout, {}):
            raise ValueError("shape, chunks or codecs are not those of a run")
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, ZeroDivisionError) as error:
        raise ShardError(f"does not describe a run of this format ({error or 'an unknown compression'})") from error
    return layout


def moment_rows(mean: NDArray[np.floating[Any]], std: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
    """(8, V) int8: mean and std (V) as the bytes of little-endian float32."""
    both = np.stack([np.asarray(mean, "<f4"), np.asarray(std, "<f4")])
    return both.view(np.int8).reshape(MOMENT_ROWS, -1)


def moments_of(rows: NDArray[np.int8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and std, (V) float32 each, of the (8, V) rows that `moment_rows` made."""
    mean, std = np.ascontiguousarray(rows).reshape(2, -1).view("<f4")
    return mean, std


def encode(layout: RunLayout, frames: NDArray[np.int8], moments: NDArray[np.int8]) -> Iterator[bytes | memoryview]:
    """The shard's bytes, in pieces: frames (T, V) and `moment_rows` (8, V), then the index."""
    index = np.empty((layout.chunks, 2), "<u8")
    offset = 0
    for number in range(layout.chunks):
        chunk = _chunk_rows(layout, frames, moments, number)
        data = chunk if layout.compression == "none" else memoryview(_ZSTD.encode(chunk))
        yield data
        yield _crc(data)
        length = len(data) + _CRC_BYTES
        index[number] = offset, length
        offset += length
    table = index.tobytes()
    yield table
    yield _crc(table)


def read_index(layout: RunLayout, tail: Buffer, shard_bytes: int) -> NDArray[np.uint64]:
    """(chunks, 2) offset and length of every chunk, from the last `index_bytes` of a shard of `shard_bytes`.

    ShardError: too short, a wrong checksum, a missing chunk, or one that does not lie in the file.
    """
    view = memoryview(tail).cast("B")
    if len(view) != layout.index_bytes:
        raise ShardError("is too short to hold its index")
    if _crc(view[:-_CRC_BYTES]) != bytes(view[-_CRC_BYTES:]):
        raise ShardError("has a damaged index: its checksum does not match")
    index = np.frombuffer(view[:-_CRC_BYTES], "<u8").reshape(-1, 2)
    absent = np.flatnonzero((index == _ABSENT).all(axis=1))
    if len(absent):
        raise ShardError(f"lacks the chunk of row {absent[0] * layout.chunk_frames}")
    length, room = index[:, 1], np.uint64(shard_bytes - layout.index_bytes)
    if (length > room).any() or (index[:, 0] > room - length).any():  # a sum of the two might wrap around
        raise ShardError("has an index that points behind its end")
    return index.astype(np.uint64)


def check(data: Buffer, stored: Buffer, first_row: int) -> None:
    """ShardError when the encoded chunk `data` that begins with row `first_row` does not have the checksum `stored`."""
    if _crc(data) != bytes(stored):
        raise ShardError(f"has a damaged chunk: the checksum of the rows from {first_row} on does not match")


def decode_chunk(layout: RunLayout, record: Buffer, number: int, *, verify: bool = True) -> NDArray[np.int8]:
    """(C, V) rows of chunk `number` from its bytes in the shard. ShardError when they are damaged."""
    view = memoryview(record).cast("B")
    data, stored = view[:-_CRC_BYTES], view[-_CRC_BYTES:]
    first_row = number * layout.chunk_frames
    if verify:
        check(data, stored, first_row)
    if layout.compression != "none":
        try:
            data = memoryview(_ZSTD.decode(data))
        except (RuntimeError, ValueError) as error:
            raise ShardError(f"has a chunk that cannot be decompressed, rows from {first_row} on: {error}") from error
    if len(data) != layout.chunk_bytes:
        raise ShardError(
            f"has a chunk of {len(data)} bytes where {layout.chunk_bytes} belong, rows from {first_row} on"
        )
    return np.frombuffer(data, np.int8).reshape(layout.chunk_frames, layout.voxels)


def _chunk_rows(layout: RunLayout, frames: NDArray[np.int8], moments: NDArray[np.int8], number: int) -> memoryview:
    """The C rows of one chunk as bytes; rows behind the last are fill."""
    first, stop = number * layout.chunk_frames, (number + 1) * layout.chunk_frames
    if stop <= layout.frames:
        return np.ascontiguousarray(frames[first:stop]).data.cast("B")
    held = np.full((layout.chunk_frames, layout.voxels), FrameCodec.missing, np.int8)
    tail = np.concatenate([frames[first:], moments[max(0, first - layout.frames) : max(0, stop - layout.frames)]])
    held[: len(tail)] = tail
    return held.data.cast("B")


def _crc(data: Buffer) -> bytes:
    array = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)  # the library takes no memoryview
    return int(google_crc32c.value(array)).to_bytes(_CRC_BYTES, "little")

"""Is one run what it says it is? Its metadata, every byte of its shard, and the figures that follow from them.

    zarr.json ─ layout ─ attributes ─┐
    shard     ─ size ─ index ─ every chunk's checksum ─ blocks of frames ─> sums per voxel ─┐
                                                └─ mean, std ───────────────────────────────┴─> figures as stated?

Bytes alone can only be compared with their checksums. That they are a run follows from what z-scores are: rounded to
steps of 1/16, a voxel's mean is within 1/32 of 0 and its deviation within 1/32 of 1. Values cut off at a = 127/16 take
at most E[(|z| - a)+] <= E[z^2] / 4a = 1/4a from the mean, and make the deviation smaller.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurostorm.io.paths import AnyPath
from neurostorm.store.codec import FrameCodec
from neurostorm.store.files import read_metadata
from neurostorm.store.layout import FORMAT, METADATA, StoreError, split_run
from neurostorm.store.manifest import LAYOUT_COLUMNS, MANIFEST_SCHEMA, manifest_row
from neurostorm.store.run_file import RunFile, read_range
from neurostorm.store.shard import MOMENT_ROWS, SHARD_FILE, RunLayout, ShardError, layout_of, moments_of, read_index

BLOCK_BYTES = 32 << 20  # frames read at a time
_BLOCK_FRAMES = 1000  # sums of their squares are exact in float32
_BLOCK_VOXELS = 1024  # summed at a time: a block of them stays in the processor's cache
_ROUNDING_STEPS, _FLOAT32 = 0.5, 1e-3  # of a mean and a deviation of z-scores
_AGAIN = "delete it with `repair --drop-damaged`, then ingest it again"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        where: a run, a table, a file: its path inside the store.
        what: in words.
        fix: what to do.
        damaged: the run itself is wrong and has to be ingested again; not so when it could only not be read just now.
    """

    where: str
    what: str
    fix: str
    damaged: bool = False


def check_run(
    root: AnyPath,
    run: str,
    *,
    voxels: int,
    tr_s: float,
    codec: FrameCodec,
    row: Mapping[str, Any] | None,
    advance: Callable[[int], None],
) -> list[Problem]:
    """Everything that is wrong with one run; reads all of it, `BLOCK_BYTES` at a time.

    Args:
        root, run: the store and the run.
        voxels, tr_s, codec: of the store.
        row: the run's row of the manifest; None if it shall not be compared.
        advance: told the bytes that were read, as they are.
    """
    try:
        metadata = read_metadata(root / run)
        layout = layout_of(metadata)
        stated = metadata.get("attributes", {})
        problems = _stated_wrongly(stated, run, layout, voxels, tr_s)
        if layout.voxels == voxels:
            problems += _bytes_wrong(RunFile(layout, root / run / SHARD_FILE), stated, codec, advance)
    except ShardError as error:
        return [Problem(run, str(error), _AGAIN, damaged=True)]
    except (StoreError, OSError) as error:
        return [_unreadable(run, error)]
    found = [Problem(run, what, _AGAIN, damaged=True) for what in problems]
    return found if row is None else found + _row_wrong(root, run, metadata, row)


def _unreadable(run: str, error: StoreError | OSError) -> Problem:
    """What could not be read: damaged if its bytes say so, or its shard is not there; else the disk or network is."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(error, FileNotFoundError):
        return Problem(run, f"its shard {SHARD_FILE} is missing", _AGAIN, damaged=True)
    if isinstance(cause, OSError):
        return Problem(run, f"cannot be read: {cause}", "see to the disk or network, then verify again")
    return Problem(run, f"{METADATA}: {error}", _AGAIN, damaged=True)


def _stated_wrongly(stated: Mapping[str, Any], run: str, layout: RunLayout, voxels: int, tr_s: float) -> list[str]:
    """Attributes that are missing, or contradict the run's path, its shape or the store."""
    dataset, subject, _ = split_run(run)
    expected: dict[str, Any] = {"neurostorm_format": FORMAT, "tr_s": tr_s}
    expected |= {"dataset": dataset, "subject": subject}
    wrong = [
        f"attribute {name} is {stated[name]!r}, not {value!r}"
        for name, value in expected.items()
        if name in stated and stated[name] != value
    ]
    needed = sorted({*expected, *MANIFEST_SCHEMA.names} - {"run", *LAYOUT_COLUMNS})
    missing = [name for name in needed if stated.get(name) is None]
    if missing:
        wrong.append(f"has no attribute {', '.join(missing)}")
    if layout.voxels != voxels:
        wrong.append(f"has {layout.voxels} voxels, the store's mask {voxels}")
    return wrong


def _bytes_wrong(
    file: RunFile, stated: Mapping[str, Any], codec: FrameCodec, advance: Callable[[int], None]
) -> list[str]:
    """What is wrong with shard and values. ShardError for damage that makes the values worthless, OSError."""
    layout = file.layout
    _check_index(file)
    sums = _Sums(layout.voxels, codec)
    step = max(1, min(_BLOCK_FRAMES, BLOCK_BYTES // layout.voxels) // layout.chunk_frames) * layout.chunk_frames
    for first in range(0, layout.frames, step):
        block = np.empty((min(step, layout.frames - first), layout.voxels), np.int8)
        file.read(first, block, verify_all=True)
        sums.add(block)
        advance(block.nbytes)
    rows = np.empty((MOMENT_ROWS, layout.voxels), np.int8)
    file.read(layout.frames, rows, verify_all=True)
    advance(rows.nbytes)
    mean, std = moments_of(rows)
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
        return ["mean or std is not finite, or std is negative"]
    return sums.wrong(layout.frames, std > 0) + _figures_wrong(stated, mean, std, sums, layout.frames)


def _check_index(file: RunFile) -> None:
    """ShardError when the shard has not the size or the index that the layout gives it."""
    layout, size = file.layout, file.shard.stat().st_size
    if size < layout.index_bytes or (layout.compression == "none" and size != layout.shard_bytes):
        raise ShardError(f"its shard has {size} bytes instead of {layout.shard_bytes}")
    index = read_index(layout, read_range(file.shard, size - layout.index_bytes, layout.index_bytes), size)
    if layout.compression == "none" and not np.array_equal(index, layout.packed_index()):
        raise ShardError("its shard has an index that does not say where the chunks are")


def _figures_wrong(
    stated: Mapping[str, Any], mean: NDArray[np.float32], std: NDArray[np.float32], sums: "_Sums", frames: int
) -> list[str]:
    """Quality figures that do not follow from the stored bytes."""
    inside = std > 0
    if not inside.any():
        return ["no voxel has signal: std is 0 everywhere"]
    level, spread = mean[inside].astype(np.float64), std[inside].astype(np.float64)
    total = float(level.mean())
    deviation = math.sqrt(float((spread**2 + (level - total) ** 2).mean()))
    found = {  # value, and how far from it the stated figure may be
        "coverage": (float(inside.mean()), 1e-6),
        "clipped_fraction": (sums.clipped_values / (frames * int(inside.sum())), 1e-9),
        "tsnr_median": (float(np.median(level / spread)), 1e-3),
        "global_mean": (total, 1e-3 * deviation),
        "global_std": (deviation, 0.0),
    }
    wrong = []
    for name, (value, room) in found.items():
        figure = stated.get(name)
        if figure is None:
            continue
        if not isinstance(figure, int | float) or not abs(figure - value) <= room + 1e-4 * abs(value):
            wrong.append(f"{name} is {value:.6g} by its bytes, {figure!r} by its attributes")
    return wrong


def _row_wrong(root: AnyPath, run: str, metadata: Mapping[str, Any], row: Mapping[str, Any]) -> list[Problem]:
    """The columns in which the manifest says something else than the run; an earlier version's states no layout."""
    try:
        expected = manifest_row(root, run, metadata)
    except StoreError as error:
        return [Problem(run, str(error), _AGAIN, damaged=True)]
    differing = [
        f"{name} {row[name]!r}, the run {value!r}"
        for name, value in expected.items()
        if row[name] != value and not (name in LAYOUT_COLUMNS and row[name] is None)
    ]
    if not differing:
        return []
    return [Problem(run, f"the manifest says {'; '.join(differing)}", "rebuild the manifest with `repair`")]


class _Sums:
    """Per voxel, over all frames: the sum of the bytes and of their squares, and whether any is at the limit."""

    def __init__(self, voxels: int, codec: FrameCodec) -> None:
        self.codec = codec
        self.total, self.squares = np.zeros(voxels, np.int64), np.zeros(voxels, np.int64)
        self.clipped = np.zeros(voxels, bool)
        self.clipped_values = 0

    def add(self, block: NDArray[np.int8]) -> None:
        """Take in (n <= 1000, V) frames. ShardError when one holds the value that marks what is missing."""
        ones = np.ones(len(block), np.float32)
        for first in range(0, block.shape[1], _BLOCK_VOXELS):
            part = slice(first, first + _BLOCK_VOXELS)
            values = block[:, part].astype(np.float32)
            self.total[part] += (ones @ values).astype(np.int64)
            np.multiply(values, values, out=values)
            self.squares[part] += (ones @ values).astype(np.int64)
            at_limit = values >= self.codec.limit**2
            count = int(np.count_nonzero(at_limit))
            if count:
                if values.max() > self.codec.limit**2:
                    raise ShardError(f"holds the value {self.codec.missing}, which stands for missing frames")
                self.clipped_values += count
                self.clipped[part] |= at_limit.any(axis=0)

    def wrong(self, frames: int, inside: NDArray[np.bool_]) -> list[str]:
        """Voxels whose bytes cannot be z-scores; `inside` (V) tells where they have to be, elsewhere they are 0."""
        wrong, scale = [], self.codec.scale
        rounding, clipping = _ROUNDING_STEPS / scale + _FLOAT32, scale / (4 * self.codec.limit)
        stray = int(np.count_nonzero(self.squares[~inside]))
        if stray:
            wrong.append(f"{stray} voxel(s) have std 0, but frames that are not 0")
        mean = self.total[inside] / (frames * scale)
        deviation = np.sqrt(np.maximum(self.squares[inside] / (frames * scale**2) - mean**2, 0))
        clipped = self.clipped[inside]
        off = np.abs(mean) > rounding + clipping * clipped
        odd = (deviation > 1 + rounding) | ((deviation < 1 - rounding) & ~clipped)
        for name, voxels in (("a mean other than 0", off), ("a deviation other than 1", odd)):
            if voxels.any():
                wrong.append(f"the z-scores of {np.count_nonzero(voxels)} voxel(s) have {name}")
        return wrong

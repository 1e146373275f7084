"""Files as a broken disk, a broken converter or a joker makes them: each is quarantined in words, or ingested.

A seeded generator spoils a good run in a few hundred ways: bytes and fields of the header, its number type, axes and
offsets, the compression, the length. Every case goes through the real `attempt`, with an alarm against hanging.
"""

import gzip
import itertools
import math
import os
import resource
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from neurostorm.ingest.convert import RunOutcome, attempt
from neurostorm.ingest.layouts.discover import Source
from neurostorm.store import FrameStore

SHAPE, FRAMES = (18, 22, 18), 6
CASE_S = 5
MEMORY_BYTES = 1 << 30  # that all cases together may add to the process's peak; some headers announce terabytes
PER_KIND = 22
Spoil = Callable[[bytes, np.random.Generator], bytes]

DIM, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET, SLOPE, UNITS = 40, 70, 72, 76, 108, 112, 123
QFORM_CODE, SROW_X, MAGIC, HEADER = 252, 280, 344, 352


def put(raw: bytes, offset: int, form: str, *values: float) -> bytes:
    """`raw` with little-endian numbers in place of its own."""
    data = struct.pack(f"<{len(values)}{form}", *values)
    return raw[:offset] + data + raw[offset + len(data) :]


def header_bytes(raw: bytes, rng: np.random.Generator) -> bytes:
    for offset in rng.integers(0, HEADER, rng.integers(1, 12)):
        raw = put(raw, int(offset), "B", int(rng.integers(256)))
    return raw


def dims(raw: bytes, rng: np.random.Generator) -> bytes:
    axes = rng.choice([-32768, -1, 0, 1, 2, 6, 7, 18, 22, 1000, 32767], int(rng.integers(1, 8)))
    return put(raw, DIM + 2 * int(rng.integers(0, 9 - len(axes))), "h", *(int(n) for n in axes))


def number_type(raw: bytes, rng: np.random.Generator) -> bytes:
    code = int(rng.choice([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 999]))
    return put(put(raw, DATATYPE, "h", code), BITPIX, "h", int(rng.choice([0, 1, 8, 16, 32, 64, 128, 256])))


def odd_floats(offset: int, count: int) -> Spoil:
    """Any of `count` floats from `offset` on becomes one that no converter writes."""

    def spoil(raw: bytes, rng: np.random.Generator) -> bytes:
        for place in rng.integers(0, count, rng.integers(1, count + 1)):
            value = float(rng.choice([math.nan, math.inf, -math.inf, 0, -1, 1e-30, 1e30, 3e9, 29.9, 0.06, 1e38]))
            raw = put(raw, offset + 4 * int(place), "f", value)
        return raw

    return spoil


def codes(raw: bytes, rng: np.random.Generator) -> bytes:
    raw = put(raw, QFORM_CODE, "h", *(int(code) for code in rng.choice([-1, 0, 1, 4, 99, 32767], 2)))
    return put(raw, UNITS, "B", int(rng.integers(256)))


def magic(raw: bytes, rng: np.random.Generator) -> bytes:
    word = rng.choice([b"ni1\0", b"n+1\0", b"n+2\0", b"\0\0\0\0", b"n+1x", b"ABCD"])
    raw = put(raw, 0, "i", int(rng.choice([348, 540, 0, -1, 1543569408])))
    return raw[:MAGIC] + bytes(word).ljust(4, b"\0") + raw[MAGIC + 4 :]


def length(raw: bytes, rng: np.random.Generator) -> bytes:
    """Cut anywhere, emptied, or with rubbish behind."""
    cut = raw[: int(rng.choice([0, 1, 4, 300, 348, 352, rng.integers(len(raw))]))]
    return cut if rng.random() < 0.7 else raw + rng.bytes(int(rng.integers(1, 5000)))


def garbage(raw: bytes, rng: np.random.Generator) -> bytes:
    return rng.bytes(int(rng.integers(1, 4000)))


def nothing(raw: bytes, rng: np.random.Generator) -> bytes:
    return raw


def flipped(packed: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes of the compressed file changed."""
    for offset in rng.integers(0, len(packed), rng.integers(1, 5)):
        packed = put(packed, int(offset), "B", int(rng.integers(256)))
    return packed


def joined(packed: bytes, rng: np.random.Generator) -> bytes:
    """Another stream, or none, behind the compressed file's own."""
    return packed + (gzip.compress(rng.bytes(500)) if rng.random() < 0.5 else rng.bytes(500))


def terabytes(raw: bytes, rng: np.random.Generator) -> bytes:
    """NIfTI-2, where an axis may be as long as one likes; the data are those of the good file."""
    header = nibabel.Nifti2Header.from_header(nibabel.Nifti1Header(raw[:348], check=False), check=False)
    long = int(rng.choice([10**6, 10**9, 10**12, 2**62]))
    axes = [*SHAPE, FRAMES]
    axes[int(rng.integers(4))] = long
    block = bytearray(header.binaryblock)
    struct.pack_into("<8q", block, 16, 4, *axes, 1, 1, 1)
    struct.pack_into("<q", block, 168, int(rng.choice([544, 0, -1, 10**12])))
    return bytes(block) + bytes(4) + raw[HEADER:]


# How the decompressed file is spoilt, and how what lies on disk is.
KINDS: dict[str, tuple[Spoil, Spoil]] = {
    "header bytes": (header_bytes, nothing),
    "dims": (dims, nothing),
    "number type": (number_type, nothing),
    "pixdim": (odd_floats(PIXDIM, 8), nothing),
    "affine": (odd_floats(SROW_X, 12), nothing),
    "offset, scaling": (odd_floats(VOX_OFFSET, 3), nothing),
    "codes": (codes, nothing),
    "magic": (magic, nothing),
    "length": (length, nothing),
    "garbage": (garbage, nothing),
    "terabytes": (terabytes, nothing),
    "compressed bytes": (nothing, flipped),
    "compressed length": (nothing, length),
    "two streams": (nothing, joined),
}


@pytest.fixture
def good(tmp_path: Path, kit: Any) -> bytes:
    """The decompressed bytes of a run that can be ingested."""
    affine = kit.affine_of("LAS", 11.0, SHAPE, (0.0, -18.0, 8.0))
    path = kit.save(tmp_path / "good.nii", kit.phantom(SHAPE, affine, FRAMES, 0.8).astype(np.int16), affine)
    return path.read_bytes()


@pytest.fixture
def alarm() -> Iterator[None]:
    """SIGALRM becomes an error that `attempt` does not catch."""

    class Hangs(BaseException):
        pass

    def ring(*_: object) -> None:
        raise Hangs(f"a case took more than {CASE_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def cases(good: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every spoilt file; half of them are compressed, whatever their name will say."""
    for number, (kind, (inner, outer)) in itertools.product(range(PER_KIND), KINDS.items()):
        rng = np.random.default_rng([seed, number, *kind.encode()])
        raw = inner(good, rng)
        packed = outer is not nothing or rng.random() < 0.5
        yield f"{kind} {number}", outer(gzip.compress(raw, 1, mtime=0), rng) if packed else raw


def test_each_spoilt_file_is_quarantined_in_words_or_ingested(
    tmp_path: Path, good: bytes, store: Path, source_of: Callable[..., Source], alarm: None
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: list[tuple[str, RunOutcome]] = []
    for position, (name, data) in enumerate(cases(good, seed=4)):
        path = tmp_path / f"{position}{'.nii.gz' if position % 3 else '.nii'}"
        path.write_bytes(data)
        signal.alarm(CASE_S)
        outcomes.append((name, attempt(source_of(path), store)))
        signal.alarm(0)
        path.unlink()
    assert len(outcomes) >= 200
    for name, outcome in outcomes:
        assert outcome.status in ("ingested", "quarantined"), (name, outcome)
        assert (outcome.status == "quarantined") == bool(outcome.reason), (name, outcome)
        assert "unexpected" not in outcome.reason and "memory" not in outcome.reason, (name, outcome)
    opened = FrameStore.open(store)
    ingested = [outcome for _, outcome in outcomes if outcome.status == "ingested"]
    assert opened.runs() == sorted(outcome.run for outcome in ingested)
    for outcome in ingested:
        assert np.isfinite(opened.moments(outcome.run)).all()
        assert opened.frames(outcome.run).shape == (outcome.frames, opened.voxel_count)
    counted = Counter(outcome.status for _, outcome in outcomes)
    assert counted["quarantined"] > 100 and counted["ingested"] > 20, "the generator spoils too much, or too little"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY_BYTES


def test_what_is_no_file_is_refused(tmp_path: Path, store: Path, source_of: Callable[..., Source], alarm: None) -> None:
    """A folder, a pipe that nobody writes to, a link to nothing, in the place of a file."""
    (tmp_path / "folder.nii.gz").mkdir()
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "pipe", "link"):
        signal.alarm(CASE_S)
        outcome = attempt(source_of(tmp_path / f"{name}.nii.gz"), store)
        assert (outcome.status, "unexpected" in outcome.reason) == ("quarantined", False)
        assert outcome.reason.startswith("is not a file" if name != "link" else "cannot be read")

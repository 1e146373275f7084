"""Reading one NIfTI file, once, front to back, and saying in plain words what is wrong with it.

    open_run(path) -> RunHeader           grid, affine, TR, number type; RunError before any data is read
    read_stored(header, digest)           one frame at a time in the file's own numbers, its sha256 on the way
    read_frames(header, digest)           the same as values: float32, scaled
    read_volume(path) -> (array, affine)  a mask or another single volume

A `.nii.gz` cannot be entered in the middle, so frames come in the order of the file from one forward pass: a run is
decompressed once, and memory holds one frame, or a few with a thread that reads ahead (`stream.py`).
"""

import hashlib
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from neurostorm.ingest.stream import DAMAGE, Digest, Stream, open_head, open_stream, read_ahead
from neurostorm.io.paths import AnyPath

MIN_TR_S, MAX_TR_S = 0.05, 30.0
MAX_VOXELS = 1 << 28  # of a frame; 0.7 mm over the whole head are 2^25
MAX_MASK_VOXELS = 1 << 26  # of a mask; 0.5 mm over the whole head
MAX_RUN_BYTES = 1 << 38  # inflated, 275 GB; an hour of 0.7 mm has 90 GB
MAX_OTHER_BYTES = 1 << 28  # in front of the first frame, or behind the last one; extensions have some MB
_HEADERS = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
_SINGLE_FILE = {b"n+1\0", b"n+2\0"}
_HEADER_FILE = {b"ni1\0", b"ni2\0"}
# NIfTI codes of `xyzt_units & 0x38`. Files that do not say (0) nearly always mean seconds; the limits catch the rest.
_SECONDS_PER_UNIT = {0: 1.0, 8: 1.0, 16: 1e-3, 24: 1e-6}
_STEP_BYTES = 1 << 20
_MOST_GZIP_SHRINKS = 1032  # 258 bytes per 2 bits: no deflate stream holds more for its length
_FRAMES_AHEAD = 4  # frames in their file's numbers that wait for who takes them, with a thread of its own to read


class RunError(ValueError):
    """One input file that cannot be ingested; the message is the reason, in words, for the quarantine table."""


@dataclass(frozen=True)
class RunHeader:
    """What the header of a NIfTI file says.

    Attributes:
        path: the file.
        shape: voxels along the array's three axes.
        frames: volumes in the file.
        affine: (4, 4) float64, voxel index -> mm (RAS+).
        tr_s: repetition time in seconds; None when the header has none.
        dtype: numbers in the file, with their byte order.
        slope, intercept: stored number -> value; 1 and 0 when the file does not scale.
        data_offset: byte of the (decompressed) file where the first frame begins.
    """

    path: AnyPath
    shape: tuple[int, int, int]
    frames: int
    affine: NDArray[np.float64]
    tr_s: float | None
    dtype: np.dtype[Any]
    slope: float
    intercept: float
    data_offset: int

    @property
    def voxels(self) -> int:
        """Voxels of one frame."""
        return math.prod(self.shape)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame in the (decompressed) file."""
        return self.voxels * self.dtype.itemsize


def open_nifti(path: AnyPath) -> RunHeader:
    """The checked header of a 4D file.

    RunError: empty, truncated or not a NIfTI; 3D or one frame; no usable affine; no real numbers.
    """
    header = _read_header(path)
    if header.frames < 2:
        kind = "one volume (3D)" if header.frames == 0 else "one frame"
        raise RunError(f"holds only {kind}: a run needs at least two frames")
    return header


def read_volume(path: AnyPath) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The first volume of a file, (X, Y, Z) float32, and its (4, 4) affine. RunError as `open_volume`, and damage."""
    header = open_volume(path)
    return first_volume(header), header.affine


def open_volume(path: AnyPath) -> RunHeader:
    """The checked header of a mask; 3D, or the first frame counts. RunError as `open_run`, or for too many voxels."""
    header = _read_header(path)
    if header.voxels > MAX_MASK_VOXELS:
        raise RunError(
            f"has the shape {header.shape}: more than {MAX_MASK_VOXELS:,} voxels cannot be a mask; resample it to "
            "1 mm or coarser"
        )
    return header


def first_volume(header: RunHeader) -> NDArray[np.float32]:
    """The first frame of a file, (X, Y, Z) float32. RunError for damage."""
    return next(read_frames(header)).reshape(header.shape, order="F")


def read_stored(
    header: RunHeader, digest: Digest | None = None, *, threads: int = 1
) -> Generator[NDArray[Any], None, None]:
    """Every frame of a run in the order of the file, as its numbers are stored.

    Args:
        header: from `open_run`.
        digest: given every byte of the file as it lies on disk, so that one pass both reads and hashes; complete when
            the iterator has come to its end. sha256 costs about a tenth of the decompression.
        threads: with more than one, a thread of its own reads and decompresses, up to five frames ahead; it ends with
            the iterator. What is yielded and raised is the same.

    Yields:
        (X * Y * Z) of `header.dtype`, read-only, with the array's first axis fastest (Fortran order, as in the file).

    Raises:
        RunError: the data end early or the compression is damaged; names the frame.
    """
    frames = _one_pass(header, digest)
    yield from read_ahead(frames, _FRAMES_AHEAD) if threads > 1 else frames


def read_frames(header: RunHeader, digest: Digest | None = None) -> Iterator[NDArray[np.float32]]:
    """`read_stored` as values: each frame (X * Y * Z) float32, scaled."""
    for stored in read_stored(header, digest):
        yield as_values(stored, header.slope, header.intercept)


def as_values(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[np.float32]:
    """Stored numbers of any real type and shape as float32: slope * stored + intercept, always a new array.

    What float32 cannot hold becomes infinite, so that its voxel is left out of the run.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        values = stored.astype(np.float32)
        if (slope, intercept) != (1.0, 0.0):
            values *= np.float32(slope)
            values += np.float32(intercept)
    return values


def repetition_time_s(header: RunHeader, sidecar_tr_s: float | None) -> float:
    """The run's TR in seconds: the sidecar's RepetitionTime if there is one, else the header's.

    RunError when neither has one, or the value cannot be a TR (outside 0.05 to 30 s).
    """
    origin = "the header" if sidecar_tr_s is None else "RepetitionTime of its JSON sidecar"
    tr_s = header.tr_s if sidecar_tr_s is None else sidecar_tr_s
    if tr_s is None:
        raise RunError(
            "has no TR: pixdim[4] of the header is 0 or not in units of time, and no JSON sidecar has RepetitionTime"
        )
    if not (math.isfinite(tr_s) and MIN_TR_S <= tr_s <= MAX_TR_S):
        hint = " (milliseconds written as seconds?)" if math.isfinite(tr_s) and tr_s > MAX_TR_S else ""
        raise RunError(
            f"has a TR of {tr_s:g} s in {origin}, outside {MIN_TR_S:g} to {MAX_TR_S:g} s{hint}. "
            "Correct it there, or write RepetitionTime (seconds) in a JSON sidecar"
        )
    return tr_s


def file_sha256(path: AnyPath) -> str:
    """sha256 in hex of a file's bytes on disk. OSError when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one_pass(header: RunHeader, digest: Digest | None) -> Generator[NDArray[Any], None, None]:
    done = 0
    try:
        stream, _ = open_stream(header.path, digest)
        with stream:
            _skip(stream, header.data_offset)
            while done < max(header.frames, 1):
                data = stream.read(header.frame_bytes)
                if len(data) < header.frame_bytes:
                    raise EOFError
                yield np.frombuffer(data, header.dtype)
                done += 1
            _read_to_end(stream)
    except DAMAGE as error:
        raise RunError(_damage(error, header, done)) from error
    except OSError as error:
        raise RunError(f"cannot be read: {error.strerror or error}") from error


def _read_to_end(stream: Stream) -> None:
    """Gzip's checksum comes last, and the digest covers all bytes. RunError for much more than the header says."""
    behind = 0
    while data := stream.read(_STEP_BYTES):
        behind += len(data)
        if behind > MAX_OTHER_BYTES:
            raise RunError(
                f"holds more than {MAX_OTHER_BYTES:,} bytes behind the last frame that its header announces: correct "
                "the number of frames there"
            )


def _read_header(path: AnyPath) -> RunHeader:
    """Header of a single-file NIfTI-1 or -2. `frames` is 0 for a 3D file."""
    block, compressed = _first_bytes(path, 540)
    size = next((size for size in _HEADERS for order in ("little", "big") if _leading_int(block, order) == size), None)
    if size is None or len(block) < size:
        raise RunError("is not a NIfTI file: its first bytes are no NIfTI-1 or NIfTI-2 header")
    magic = block[344:348] if size == 348 else block[4:8]
    if magic in _HEADER_FILE:
        raise RunError("is the header half of a .hdr/.img pair: convert it to one .nii or .nii.gz file")
    if magic not in _SINGLE_FILE:
        raise RunError("is not a NIfTI file: the magic word of the header is missing (Analyze 7.5?)")
    try:
        header = _HEADERS[size](block[:size], check=True)
        dtype, shape = header.get_data_dtype(), tuple(int(n) for n in header.get_data_shape())
        data_offset = max(int(header.get_data_offset()), size)
    except (HeaderDataError, ValueError, KeyError, OverflowError) as error:
        raise RunError(f"has a damaged NIfTI header: {error}") from error
    if dtype.kind not in "iuf":
        raise RunError(f"holds {dtype} data: a run needs real numbers")
    space, frames = _axes(shape)
    slope, intercept = _scaling(header)
    checked = RunHeader(
        path, space, frames, _affine(header), _header_tr_s(header), dtype, slope, intercept, data_offset
    )  # fmt: skip
    _check_size(checked)
    _check_length(checked, compressed)
    return checked


def _first_bytes(path: AnyPath, count: int) -> tuple[bytes, bool]:
    """The beginning of the decompressed file, and whether it is compressed."""
    try:
        size = path.stat().st_size
        if isinstance(path, Path) and not path.is_file():  # reading a pipe would wait for ever
            raise RunError("is not a file: a folder, a pipe or a device has its name")
        if size == 0:
            raise RunError("is an empty file (0 bytes)")
        stream, compressed = open_head(path)
        with stream:
            return stream.read(count), compressed
    except DAMAGE as error:
        raise RunError("is a truncated or damaged gzip file: not even the NIfTI header can be read") from error
    except OSError as error:
        raise RunError(f"cannot be read: {error.strerror or error}") from error


def _leading_int(block: bytes, order: Any) -> int:
    return int.from_bytes(block[:4], order)


def _axes(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    """Space and frames of a header's shape; a fifth axis of one is dropped, a missing fourth gives 0 frames."""
    if len(shape) < 3 or min(shape) < 1:
        raise RunError(f"has the shape {shape}: a run is X, Y, Z and time")
    if math.prod(shape[4:]) > 1:
        raise RunError(f"has the shape {shape}: more than four axes are in use")
    if math.prod(shape[:3]) > MAX_VOXELS:
        raise RunError(f"has the shape {shape}: more than {MAX_VOXELS:,} voxels in a frame is no functional run")
    return (shape[0], shape[1], shape[2]), (shape[3] if len(shape) > 3 else 0)


def _affine(header: Any) -> NDArray[np.float64]:
    """The sform, or else the qform. RunError when neither is set, finite and invertible: no guess is made."""
    reason = "the codes of sform and qform are both 0, so the space is unknown"
    for read in (header.get_sform, header.get_qform):
        try:
            affine, code = read(coded=True)
        except (HeaderDataError, ValueError) as error:
            reason = str(error)
            continue
        if code:
            affine = np.asarray(affine, np.float64)
            if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-6:
                return affine
            reason = "it is singular or not finite"
    raise RunError(f"has no usable affine: {reason}")


def _header_tr_s(header: Any) -> float | None:
    """Seconds between frames; None for none, a negative or zero value, or units that are not time."""
    unit = _SECONDS_PER_UNIT.get(int(header["xyzt_units"]) & 0x38)
    step = float(header["pixdim"][4])
    if unit is None or not math.isfinite(step) or step <= 0:
        return None
    return float(f"{step * unit:.7g}")  # float32 in the file: 0.72 was meant, not 0.7200000286


def _scaling(header: Any) -> tuple[float, float]:
    """Slope and intercept; a slope of 0 or nan means that the stored numbers are the values."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    return slope, intercept if math.isfinite(intercept) else 0.0


def _check_size(header: RunHeader) -> None:
    """A header of a few bytes can announce any size: what no run has is refused before it is read."""
    total = max(header.frames, 1) * header.frame_bytes
    if total > MAX_RUN_BYTES:
        raise RunError(f"would have {total:,} bytes of data: more than {MAX_RUN_BYTES:,} is no functional run")
    if header.data_offset > MAX_OTHER_BYTES:
        raise RunError(
            f"has a header of {header.data_offset:,} bytes (vox_offset): more than {MAX_OTHER_BYTES:,} are none"
        )


def _check_length(header: RunHeader, compressed: bool) -> None:
    """A file shows by its length that data are missing, so that nothing is planned for frames that cannot be there.

    For a compressed one this is a bound only; the rest shows while it is read.
    """
    there = header.path.stat().st_size
    needed = header.data_offset + max(header.frames, 1) * header.frame_bytes
    if there * (_MOST_GZIP_SHRINKS if compressed else 1) < needed:
        packed = " compressed" if compressed else ""
        raise RunError(f"is truncated: {there:,}{packed} bytes are there for {needed:,} that the header announces")


def _skip(stream: Stream, count: int) -> None:
    while count > 0:
        data = stream.read(min(count, _STEP_BYTES))
        if not data:
            raise EOFError
        count -= len(data)


def _damage(error: Exception, header: RunHeader, done: int) -> str:
    total = max(header.frames, 1)
    where = f"in frame {done + 1} of {total}" if done < total else "behind the last frame"
    if isinstance(error, EOFError):
        return f"is truncated: the data end {where}"
    return f"is a damaged gzip file: {error} ({where})"

"""From a subject and a site to one BOLD run: what the scanner would have delivered after preprocessing.

    anatomy(grid) + topography(subject) -> maps (M, V)      how strongly each course moves each voxel
    Recording at the site's TR          -> courses (T, M)   networks, nuisance, head motion
                                               |
    frame t = gain x (mean + courses[t] @ maps + thermal AR(1) noise[t])  -> blocks of frames -> .nii.gz

Frames are made and written a few at a time, so memory is the maps (about 45 per brain voxel) and not the run.
Products use einsum, whose sums do not depend on the number of BLAS threads: the same seed gives the same bytes on
the same kind of machine (another kind of CPU may round a count differently).
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from neurostorm.synthetic.people import Subject, centres_mm, stream
from neurostorm.synthetic.signal import Recording, TaskEvent
from neurostorm.synthetic.sites import SIGNAL, Anatomy, Site, anatomy

Float32 = NDArray[np.float32]

# Standard deviations in percent of the mean signal. Networks come to 58 % of grey matter's variance (77 % of that in
# .01-.1 Hz), thermal noise to 30 %, and the temporal SNR to 62; white matter shares the networks weakly (20 %).
NETWORK_PERCENT = 1.3  # in pure grey matter
NETWORK_FLOOR = 0.3  # of NETWORK_PERCENT where there is no grey matter
GLOBAL_PERCENT = 0.45
BREATHING_PERCENT = 0.2
HEARTBEAT_PERCENT = 0.3  # at the brain stem, less around it
STEM_MM, STEM_SPREAD_MM = (0.0, -20.0, -30.0), 30.0
DRIFT_PERCENT = 0.25  # each mode; the gradients reach it 70 mm from the centre
THERMAL_PERCENT = 0.85  # of grey matter's mean, the same everywhere, times the site's noise
THERMAL_MEMORY_S = 0.6  # AR(1): correlation exp(-TR / memory) from frame to frame
MOTION_RESIDUE = 0.15  # of head motion is left after realignment
SPIKE_LOSS_PERCENT = 2.0  # signal lost per mm of sudden movement (spin history)
REGION_SPREAD_MM = 16.0  # smoothness of the border between regions
SHADING = 0.02  # SD of the log intensity's slope over 70 mm, each subject's coil shading

COUNT = 75.0  # signal units per stored integer: half a grey voxel's standard deviation, so that gzip bites
FRAMES_PER_BLOCK = 16
REFERENCE_MM = 70.0


@dataclass(frozen=True)
class SyntheticRun:
    """One rendered run, its frames made on demand. V brain voxels in the C order of the RAS box.

    Attributes:
        recording: who did what.
        site: where; its affine and orientation are the stored file's.
        frames: number of frames T.
        anatomy: mask, coordinates and tissue on the site's grid.
        mean: float32 (V), the noiseless mean image in scanner units.
        maps: float32 (M, V), scanner units per unit of each course.
        courses: float32 (T, M).
        motion: float64 (6, T), rigid head motion, mm and radians.
    """

    recording: Recording
    site: Site
    frames: int
    anatomy: Anatomy
    mean: Float32
    maps: Float32
    courses: Float32
    motion: NDArray[np.float64]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Brain mask (X, Y, Z) in the stored orientation."""
        return _stored(self.anatomy.mask, self.site)

    @property
    def events(self) -> tuple[TaskEvent, ...]:
        """The block design of a task run; empty at rest."""
        return self.recording.events

    @property
    def count(self) -> float:
        """Scanner units per stored integer (`scl_slope`)."""
        return COUNT * self.site.gain

    def blocks(self) -> Iterator[Float32]:
        """The frames in order, (up to FRAMES_PER_BLOCK, V) at a time, in scanner units."""
        subject = self.recording.subject
        rng = stream(subject.seed, "thermal", subject.index, self.recording.session, self.recording.task)
        memory = np.float32(np.exp(-self.site.tr_s / THERMAL_MEMORY_S))
        fresh = np.sqrt(1 - memory**2)
        thermal = rng.standard_normal(len(self.mean), dtype=np.float32)
        scale = np.float32(THERMAL_PERCENT / 100 * SIGNAL * self.site.noise * self.site.gain)
        for start in range(0, self.frames, FRAMES_PER_BLOCK):
            block = self.mean + np.einsum("tm,mv->tv", self.courses[start : start + FRAMES_PER_BLOCK], self.maps)
            for frame in block:
                frame += scale * thermal
                thermal = memory * thermal + fresh * rng.standard_normal(len(thermal), dtype=np.float32)
            yield block


def render_run(subject: Subject, site: Site, *, session: int = 1, task: str = "rest", frames: int = 48) -> SyntheticRun:
    """One run of a subject at a site.

    Topography, time courses and head motion are defined in world millimetres and seconds by (subject, session, task):
    another site shows the same activity on its own grid and at its own TR. Only thermal noise is drawn voxel by voxel.

    Args:
        subject, site: who and where.
        session: from 1.
        task: "rest", or "states" for the five-state block design.
        frames: number of frames.

    Raises:
        ValueError: an unknown task, or fewer than two frames.
    """
    if task not in ("rest", "states"):
        raise ValueError(f"task: {task!r} is not known; use rest or states")
    if frames < 2:
        raise ValueError(f"frames: {frames} is too few; a run needs at least 2")
    brain = anatomy(site.voxel_mm, site.space)
    recording = Recording(subject, session, task, frames * site.tr_s)
    times_s = site.tr_s * np.arange(frames, dtype=np.float64)
    courses, motion = _courses(recording, times_s)
    mean = site.gain * brain.mean * _shading(subject, brain)
    maps = _percent_maps(recording, brain)
    maps *= mean / 100
    return SyntheticRun(recording, site, frames, brain, mean, maps, courses.astype(np.float32), motion)


def region_weights(coordinates_mm: Float32, centres: NDArray[np.float64]) -> Float32:
    """How much of each region's course each voxel shows: (V, 3), (R, 3) -> float32 (R, V), unit norm over regions.

    A soft nearest-centre assignment with borders about REGION_SPREAD_MM wide, mirrored at the midline. Unit norm keeps
    the variance alike inside a region and at its border.
    """
    folded = np.stack([np.abs(coordinates_mm[:, 0]), coordinates_mm[:, 1], coordinates_mm[:, 2]])  # (3, V)
    weights = np.empty((len(centres), len(coordinates_mm)), dtype=np.float32)
    for row, centre in zip(weights, centres.astype(np.float32), strict=True):
        row[:] = np.sum((folded - centre[:, None]) ** 2, axis=0)
    weights -= weights.min(axis=0)  # the nearest centre has exponent 0: no underflow far from all of them
    np.exp(-weights / (2 * REGION_SPREAD_MM**2), out=weights)
    return weights / np.sqrt(np.sum(weights**2, axis=0))


def write_bold(path: Path, run: SyntheticRun) -> NDArray[np.float64]:
    """Writes a run as int16 NIfTI with a slope, gzipped without name or time; returns its global signal (T).

    The global signal is the mean over the brain of what was written, in scanner units.
    """
    mask = run.mask
    order = _stored(_voxel_numbers(run.anatomy.mask), run.site).ravel(order="F")
    place = np.flatnonzero(order >= 0)  # positions in the file's (Fortran) order
    voxel = order[place]
    volume = np.zeros(mask.size, dtype="<i2")
    global_signal = []
    with _gzip_writer(path) as write:
        write(_header((*mask.shape, run.frames), np.int16, run.site, run.count))
        for block in run.blocks():
            counts = np.rint(block / np.float32(run.count)).astype("<i2")
            global_signal += [run.count * float(frame.mean(dtype=np.float64)) for frame in counts]
            for frame in counts:
                volume[place] = frame[voxel]
                write(volume.tobytes())
    return np.array(global_signal)


def write_mask(path: Path, run: SyntheticRun) -> None:
    """Writes the run's brain mask as uint8 NIfTI, gzipped without name or time."""
    mask = run.mask
    with _gzip_writer(path) as write:
        write(_header(mask.shape, np.uint8, run.site, 1.0))
        write(mask.astype(np.uint8).tobytes(order="F"))


def _courses(recording: Recording, times_s: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """All courses (T, M) in the order of `_percent_maps`, and the head motion (6, T)."""
    nuisance = recording.nuisance_courses(times_s)
    motion, spikes_mm = recording.head_motion(times_s)
    rows = [recording.region_courses(times_s), *nuisance.values(), MOTION_RESIDUE * motion[:3], spikes_mm[None]]
    return np.concatenate(rows).T, motion


def _percent_maps(recording: Recording, brain: Anatomy) -> Float32:
    """Percent signal change (M, V) per unit of each course.

    Rows: regions, global, breathing, heartbeat, drift (4), head translation (3), spikes; as `_courses` orders them.
    """
    regions = region_weights(brain.coordinates_mm, centres_mm(recording.subject, recording.session))
    regions *= NETWORK_PERCENT * (NETWORK_FLOOR + (1 - NETWORK_FLOOR) * brain.grey)
    everywhere = np.ones((1, len(brain.mean)), dtype=np.float32)
    along = brain.coordinates_mm.T / REFERENCE_MM  # (3, V)
    from_stem_mm = np.linalg.norm(brain.coordinates_mm - np.array(STEM_MM, dtype=np.float32), axis=1)
    stem = np.exp(-((from_stem_mm / STEM_SPREAD_MM) ** 2) / 2)
    return np.concatenate(
        [
            regions,
            GLOBAL_PERCENT * everywhere,
            BREATHING_PERCENT * everywhere,
            HEARTBEAT_PERCENT * stem[None],
            DRIFT_PERCENT * np.concatenate([everywhere, along]),
            100 * (brain.gradient / brain.mean[:, None]).T,
            -SPIKE_LOSS_PERCENT * everywhere,
        ]
    ).astype(np.float32)


def _shading(subject: Subject, brain: Anatomy) -> Float32:
    """Smooth factor (V) on the subject's mean image: a gradient that stays over sessions."""
    slope = stream(subject.seed, "shading", subject.index).normal(0, SHADING, size=3)
    return np.exp(np.einsum("vc,c->v", brain.coordinates_mm, slope / REFERENCE_MM)).astype(np.float32)


def _voxel_numbers(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Packed number of each brain voxel in its box (X, Y, Z), -1 outside the brain."""
    numbers = np.full(mask.shape, -1)
    numbers[mask] = np.arange(np.count_nonzero(mask))
    return numbers


def _stored(box: NDArray, site: Site) -> NDArray:
    """A RAS box (X, Y, Z) as the site's files store it."""
    return box[::-1] if site.orientation == "LAS" else box


def _header(shape: tuple[int, ...], dtype: type, site: Site, slope: float) -> bytes:
    """The 352 bytes before the data of a single-file NIfTI-1 image on the site's grid."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.dtype(dtype).newbyteorder("<"))
    header.set_data_shape(shape)
    header.set_zooms((site.voxel_mm,) * 3 + (site.tr_s,) * (len(shape) - 3))
    header.set_xyzt_units("mm", "sec")
    header.set_sform(site.affine, code="mni")
    header.set_qform(site.affine, code="mni")
    header["scl_slope"], header["scl_inter"] = slope, 0
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header["descrip"] = b"synthetic"
    return header.binaryblock + bytes(4)  # four zeros: no header extensions


@contextmanager
def _gzip_writer(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that appends to a gzip file whose bytes hold neither name nor time: equal content, equal file.

    Run-length matching only: longer matches are rare in noise and cost more than they save (8 % larger, and slower).
    """
    squeeze = zlib.compressobj(level=1, wbits=31, strategy=zlib.Z_RLE)  # 31: a gzip header, all its fields zero

    with path.open("wb") as file:

        def write(data: bytes) -> None:
            file.write(squeeze.compress(data))

        yield write
        file.write(squeeze.flush())

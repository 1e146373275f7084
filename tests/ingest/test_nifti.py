"""One NIfTI file: what is read of it, and that each defect is named in words."""

import gzip
import hashlib
import threading
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from neurostorm.ingest.nifti import RunError, open_nifti, read_frames, read_stored, read_volume, repetition_time_s

AFFINE = np.diag([-4.0, 4.0, 4.0, 1.0])
SHAPE = (6, 7, 5)


@pytest.fixture
def data() -> np.ndarray:
    return np.random.default_rng(0).normal(1000, 50, (*SHAPE, 9)).astype(np.float32)


def read(path: Path) -> np.ndarray:
    header = open_nifti(path)
    return np.stack([frame.reshape(header.shape, order="F") for frame in read_frames(header)], axis=-1)


def rewrite(path: Path, change: Any) -> Path:
    """Change the decompressed bytes of a file in place."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    change(raw)
    path.write_bytes(gzip.compress(bytes(raw)))
    return path


def put(offset: int, number: Any) -> Any:
    """A change that writes a numpy scalar at a byte of the header."""

    def change(raw: bytearray) -> None:
        raw[offset : offset + number.nbytes] = number.tobytes()

    return change


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_frames_are_those_of_nibabel(tmp_path: Path, kit: Any, data: np.ndarray, ending: str) -> None:
    path = kit.save(tmp_path / f"run{ending}", data, AFFINE, tr_s=0.72)
    header = open_nifti(path)
    assert (header.shape, header.frames, header.tr_s) == (SHAPE, 9, 0.72)
    np.testing.assert_array_equal(header.affine, AFFINE)
    np.testing.assert_array_equal(read(path), data)


def test_scaled_integers_and_foreign_byte_order(tmp_path: Path, kit: Any, data: np.ndarray) -> None:
    stored = data.astype(np.int16)
    path = kit.save(tmp_path / "scaled.nii.gz", stored, AFFINE)
    rewrite(path, put(112, np.float32(0.25)))  # scl_slope
    rewrite(path, put(116, np.float32(5)))  # scl_inter
    np.testing.assert_allclose(read(path), stored * 0.25 + 5)
    swapped = nibabel.Nifti1Image(stored, AFFINE, nibabel.Nifti1Header(endianness=">"))
    swapped.header.set_data_dtype(np.int16)
    nibabel.save(swapped, tmp_path / "swapped.nii.gz")
    assert open_nifti(tmp_path / "swapped.nii.gz").dtype.byteorder == ">"
    np.testing.assert_array_equal(read(tmp_path / "swapped.nii.gz"), stored)


def test_nifti2_and_a_fifth_axis_of_one(tmp_path: Path, data: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti2Image(data[..., None], AFFINE), tmp_path / "two.nii.gz")
    np.testing.assert_array_equal(read(tmp_path / "two.nii.gz"), data)


def test_compression_is_told_by_the_bytes_not_the_name(tmp_path: Path, kit: Any, data: np.ndarray) -> None:
    plain = kit.save(tmp_path / "run.nii", data, AFFINE)
    np.testing.assert_array_equal(read(plain.rename(tmp_path / "misnamed.nii.gz")), data)


def test_one_pass_gives_the_hash_of_the_file(tmp_path: Path, kit: Any, data: np.ndarray) -> None:
    for name in ("run.nii", "run.nii.gz"):
        path = kit.save(tmp_path / name, data, AFFINE)
        digest = hashlib.sha256()
        assert sum(1 for _ in read_frames(open_nifti(path), digest)) == 9
        assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_frames_are_read_one_by_one(tmp_path: Path, kit: Any, data: np.ndarray) -> None:
    """The first frames of a truncated file are delivered before the error: nothing is read ahead."""
    path = kit.save(tmp_path / "run.nii.gz", data, AFFINE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames = read_frames(open_nifti(path))
    np.testing.assert_array_equal(next(frames), data[..., 0].ravel(order="F"))
    with pytest.raises(RunError, match=r"truncated: the data end in frame [3-7] of 9"):
        list(frames)


def test_what_a_thread_reads_ahead_is_the_same(tmp_path: Path, kit: Any, data: np.ndarray) -> None:
    for name in ("run.nii", "run.nii.gz"):
        header = open_nifti(kit.save(tmp_path / name, data, AFFINE))
        digests = hashlib.sha256(), hashlib.sha256()
        alone, ahead = (list(read_stored(header, d, threads=n)) for n, d in enumerate(digests, start=1))
        np.testing.assert_array_equal(ahead, alone)
        assert digests[0].digest() == digests[1].digest() == hashlib.sha256(header.path.read_bytes()).digest()


def test_damage_in_the_thread_is_the_same_error(tmp_path: Path, kit: Any, data: np.ndarray) -> None:
    path = kit.save(tmp_path / "run.nii.gz", data, AFFINE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    header, counts, reasons = open_nifti(path), [], []
    for threads in (1, 2):
        frames, taken = read_stored(header, threads=threads), 0
        with pytest.raises(RunError) as error:
            for _ in frames:
                taken += 1
        counts.append(taken)
        reasons.append(str(error.value))
    assert counts[0] == counts[1] > 0
    assert reasons[0] == reasons[1]
    assert not readers()


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "read-ahead"]


@pytest.mark.parametrize("taken", [1, 3, 9])
def test_the_thread_ends_when_nobody_reads_on(tmp_path: Path, kit: Any, data: np.ndarray, taken: int) -> None:
    header = open_nifti(kit.save(tmp_path / "run.nii.gz", np.repeat(data, 9, axis=3), AFFINE))
    frames = read_stored(header, threads=2)
    for _ in range(taken):
        next(frames)
    assert readers()
    frames.close()
    assert not readers()


def test_members_and_what_follows_the_last(tmp_path: Path, kit: Any, data: np.ndarray) -> None:
    """A gzip file may have several members (as bgzip writes them) and zeros behind; other bytes are damage."""
    path = kit.save(tmp_path / "run.nii.gz", data, AFFINE)
    plain = gzip.decompress(path.read_bytes())
    path.write_bytes(b"".join(gzip.compress(plain[first : first + 999]) for first in range(0, len(plain), 999)))
    np.testing.assert_array_equal(read(path), data)
    path.write_bytes(gzip.compress(plain) + bytes(512))
    np.testing.assert_array_equal(read(path), data)
    path.write_bytes(gzip.compress(plain) + b"trailing" * 9)
    with pytest.raises(RunError, match="damaged gzip file: Not a gzipped file"):
        read(path)


def test_frames_that_cannot_be_there_are_refused_at_once(tmp_path: Path, kit: Any, data: np.ndarray) -> None:
    """What a header announces is bounded by the file's length before memory is planned for it."""
    path = kit.save(tmp_path / "run.nii.gz", data, AFFINE)
    rewrite(path, put(48, np.int16(32767)))  # dim[4]
    with pytest.raises(RunError, match=r"truncated: [\d,]+ compressed bytes"):
        open_nifti(path)
    rewrite(path, put(42, np.full(3, 30000, np.int16)))  # dim[1..3]
    with pytest.raises(RunError, match="voxels in a frame"):
        open_nifti(path)


def test_volume_of_three_dimensions(tmp_path: Path, kit: Any, data: np.ndarray) -> None:
    path = kit.save(tmp_path / "mask.nii.gz", (data[..., 0] > 1000).astype(np.uint8), AFFINE)
    volume, affine = read_volume(path)
    np.testing.assert_array_equal(volume, data[..., 0] > 1000)
    np.testing.assert_array_equal(affine, AFFINE)


def test_sform_goes_before_qform_and_qform_does_alone(tmp_path: Path, kit: Any, data: np.ndarray) -> None:
    assert open_nifti(kit.save(tmp_path / "q.nii.gz", data, AFFINE, codes=(0, 1))).affine[0, 0] == pytest.approx(-4)
    both = kit.save(tmp_path / "both.nii.gz", data, AFFINE)
    rewrite(both, put(280, np.float32(-3)))  # srow_x[0]
    assert open_nifti(both).affine[0, 0] == -3


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, np.int32(7), "not a NIfTI file"),
        (40, np.int16(3), "one volume"),  # dim[0]
        (48, np.int16(1), "one frame"),  # dim[4]
        (42, np.int16(0), "shape"),  # dim[1]
        (70, np.int16(32), "real numbers"),  # datatype: complex64
        (70, np.int16(128), "real numbers"),  # datatype: RGB
        (280, np.float32(np.nan), "no usable affine"),  # srow_x[0]
        (344, np.frombuffer(b"ni1\0", np.uint8), "header half"),
        (344, np.frombuffer(b"abcd", np.uint8), "not a NIfTI file"),
    ],
)
def test_defects_of_the_header(
    tmp_path: Path, kit: Any, data: np.ndarray, offset: int, value: Any, reason: str
) -> None:
    path = kit.save(tmp_path / "run.nii.gz", data, AFFINE, codes=(4, 0))
    rewrite(path, put(offset, value))
    with pytest.raises(RunError, match=reason):
        open_nifti(path)


def test_five_dimensions_are_refused(tmp_path: Path, data: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(np.stack([data, data], axis=-1), AFFINE), tmp_path / "five.nii.gz")
    with pytest.raises(RunError, match="more than four axes"):
        open_nifti(tmp_path / "five.nii.gz")


@pytest.mark.parametrize(
    ("affine", "codes", "reason"),
    [(AFFINE, (0, 0), "codes of sform and qform are both 0"), (np.diag([4.0, 4, 0, 1]), (4, 0), "singular")],
)
def test_no_affine_is_guessed(
    tmp_path: Path, kit: Any, data: np.ndarray, affine: np.ndarray, codes: tuple[int, int], reason: str
) -> None:
    path = kit.save(tmp_path / "run.nii.gz", data, AFFINE, codes=codes)
    rewrite(path, put(280, np.asarray(affine[:3], np.float32)))
    with pytest.raises(RunError, match=f"no usable affine.*{reason}"):
        open_nifti(path)


def test_files_that_are_no_images(tmp_path: Path, kit: Any, data: np.ndarray) -> None:
    good = kit.save(tmp_path / "good.nii.gz", data, AFFINE).read_bytes()
    plain = kit.save(tmp_path / "good.nii", data, AFFINE).read_bytes()
    cases = {
        "empty.nii.gz": (b"", "empty file"),
        "text.nii.gz": (b"these are not the voxels you are looking for " * 20, "not a NIfTI file"),
        "short.nii": (plain[:200], "not a NIfTI file"),
        "cut.nii": (plain[:-100], "truncated"),
        "head.nii.gz": (good[:30], "truncated or damaged gzip"),
        "zipped.nii.gz": (gzip.compress(b"hello" * 200), "not a NIfTI file"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunError, match=reason):
            open_nifti(tmp_path / name)
    with pytest.raises(RunError, match="cannot be read: No such file"):
        open_nifti(tmp_path / "absent.nii.gz")


def test_damaged_compression_is_found_while_reading(tmp_path: Path, kit: Any, data: np.ndarray) -> None:
    """A flipped bit deep inside, and a missing checksum behind the last frame."""
    path = kit.save(tmp_path / "run.nii.gz", data, AFFINE)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) * 3 // 4] ^= 0x10
    for content in (bytes(flipped), good[:-4], good[:-8] + b"\0\0\0\0" + good[-4:]):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"damaged gzip|truncated"):
            list(read_frames(open_nifti(path)))


@pytest.mark.parametrize(
    ("value", "unit", "seconds"),
    [
        (2.0, "sec", 2.0),
        (720.0, "msec", 0.72),
        (8e5, "usec", 0.8),
        (1.5, "unknown", 1.5),
        (0.0, "sec", None),
        (2.0, "hz", None),
    ],
)
def test_units_of_the_repetition_time(
    tmp_path: Path, kit: Any, data: np.ndarray, value: float, unit: str, seconds: float | None
) -> None:
    path = kit.save(tmp_path / "run.nii.gz", data, AFFINE, tr_s=value, units=("mm", unit))
    header = open_nifti(path)
    assert header.tr_s == seconds
    if seconds is None:
        with pytest.raises(RunError, match="no TR"):
            repetition_time_s(header, None)
    assert repetition_time_s(header, 1.25) == 1.25  # a sidecar goes before the header


@pytest.mark.parametrize(("tr_s", "hint"), [(2000.0, "milliseconds"), (0.002, "outside"), (31.0, "outside")])
def test_impossible_repetition_times(tmp_path: Path, kit: Any, data: np.ndarray, tr_s: float, hint: str) -> None:
    header = open_nifti(kit.save(tmp_path / "run.nii.gz", data, AFFINE, tr_s=tr_s))
    with pytest.raises(RunError, match=hint):
        repetition_time_s(header, None)
    with pytest.raises(RunError, match="sidecar"):
        repetition_time_s(header, tr_s)

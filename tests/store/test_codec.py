"""One byte per value keeps z-scores within 1/32, and every figure about it is the true one."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from neurostorm.store import FRAME_CODECS, INT8_16, FrameStore, StoreError, codec

INSIDE = 127 / 16


@settings(deadline=None, max_examples=200)
@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=st.floats(-20, 20, width=32)))
def test_the_error_is_at_most_half_a_step_and_beyond_the_range_values_clip(z: np.ndarray) -> None:
    q = INT8_16.encode(z)
    back = INT8_16.decode(q)
    assert q.dtype == np.int8 and back.dtype == np.float32 and q.shape == back.shape == z.shape
    assert q.min() >= -127, "-128 marks what is missing"
    inside = np.abs(z) <= INSIDE
    assert np.all(np.abs(back - z)[inside] <= 1 / 32)
    assert np.array_equal(back[~inside], np.copysign(INSIDE, z[~inside]))


def test_halves_round_to_even() -> None:
    assert INT8_16.encode(np.array([0.5, 1.5, 2.5, -0.5, -1.5]) / 16).tolist() == [0, 2, 2, 0, -2]


def test_every_byte_survives_the_way_there_and_back() -> None:
    q = np.arange(-127, 128, dtype=np.int8)
    assert np.array_equal(INT8_16.encode(INT8_16.decode(q)), q)


def test_working_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z = np.random.default_rng(0).standard_normal((13, 37)).astype(np.float32)
    q = INT8_16.encode(z)
    decibels = INT8_16.signal_to_noise_db(z, q)
    monkeypatch.setattr(codec, "_BLOCK_FLOATS", 50)
    assert np.array_equal(INT8_16.encode(z), q)
    assert np.array_equal(INT8_16.signal_to_noise_db(z, q), decibels)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 39), st.sampled_from(["f2", "f4", "f8"]))
def test_one_value_that_is_no_number_is_refused(bad: float, position: int, dtype: str) -> None:
    z = np.zeros((5, 8), dtype)
    z.flat[position] = bad
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(codec, "_BLOCK_FLOATS", 7)
        with pytest.raises(ValueError, match="finite"):
            INT8_16.encode(z)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["f2", "f4", "f8"]), st.data())
def test_any_finite_number_has_its_byte(dtype: str, data: st.DataObject) -> None:
    numbers = st.floats(allow_nan=False, allow_infinity=False, width=8 * int(dtype[1]))
    z = data.draw(hnp.arrays(dtype, st.integers(1, 20), elements=numbers))
    exact = np.clip(z.astype(np.float64), -8, 8) * 16
    assert np.array_equal(INT8_16.encode(z), np.clip(np.rint(exact), -127, 127))


@pytest.mark.parametrize(
    ("z", "byte"),
    [
        (INSIDE, 127), (np.nextafter(INSIDE, 9), 127), (126.5 / 16, 126), (np.nextafter(126.5 / 16, 9), 127),
        (8.0, 127),
        (-8.0, -127), (1e30, 127), (-np.finfo("f4").max, -127), (5e-324, 0), (-1e-45, 0), (-0.0, 0), (1 / 32, 0),
        (np.nextafter(1 / 32, 1), 1),
    ],
)  # fmt: skip
def test_extreme_values(z: float, byte: int) -> None:
    assert INT8_16.encode(np.array([z])).tolist() == [byte]
    with np.errstate(under="ignore"):
        assert INT8_16.encode(np.array([[z]]).astype(np.float32).repeat(2, 1)).shape == (1, 2)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 30), st.floats(1e-3, 1e6), st.floats(-1e6, 1e6), st.integers(0, 99))
def test_signals_come_back_within_half_a_step_and_constant_voxels_as_they_were(
    frames: int, spread: float, level: float, seed: int
) -> None:
    signal = np.random.default_rng(seed).standard_normal((frames, 4)) * spread + level
    signal[:, 1] = level
    mean, std = signal.mean(0), signal.std(0)
    mean[1], std[1] = level, 0
    z = np.divide(signal - mean, std, out=np.zeros_like(signal), where=std > 0)
    back = INT8_16.decode(INT8_16.encode(z)) * std + mean
    assert (np.abs(back - signal) <= std / 32 * (1 + 1e-6) + 1e-9 * abs(level)).all()
    assert (back[:, 1] == level).all()


def test_gaussian_signals_keep_35_db() -> None:
    z = np.random.default_rng(0).standard_normal((400, 500)).astype(np.float32)
    decibels = INT8_16.signal_to_noise_db(z, INT8_16.encode(z))
    assert decibels.shape == (500,)
    assert abs(np.median(decibels) - 10 * np.log10(12 * 256)) < 0.2
    assert decibels.min() > 32 and decibels.max() < 37


def test_the_decibels_are_those_of_the_formula() -> None:
    z = np.array([[0.0, 1.0, 0.5], [1 / 64, 2.0, 0.5]], np.float32)  # rounds to 0 and 0; exact; constant
    decibels = INT8_16.signal_to_noise_db(z, INT8_16.encode(z))
    assert decibels[0] == pytest.approx(0.0, abs=1e-5), "all signal lost: noise equals signal"
    assert np.isposinf(decibels[1])
    assert np.isnan(decibels[2])
    with pytest.raises(ValueError, match="voxels"):
        INT8_16.signal_to_noise_db(z, INT8_16.encode(z[:1]))


def test_the_clipped_share_counts_both_ends() -> None:
    assert INT8_16.count_clipped(INT8_16.encode(np.array([0.0, 9.0, -9.0, 1.0]))) == 2
    assert INT8_16.count_clipped(np.empty((0, 4), np.int8)) == 0


def rewrite_header(path, **changed):
    file = path / "zarr.json"
    content = json.loads(file.read_text())
    content["attributes"] = {key: value for key, value in {**content["attributes"], **changed}.items() if value}
    file.write_text(json.dumps(content))


def test_the_header_names_the_codec_and_a_store_of_an_earlier_version_has_the_first(example):
    assert json.loads((example.path / "zarr.json").read_text())["attributes"]["frame_codec"] == "int8-16"
    rewrite_header(example.path, frame_codec=None)
    assert FrameStore.open(example.path).codec is INT8_16
    example.add()  # an ingest into it goes on


def test_a_codec_that_is_not_known_is_named(example):
    rewrite_header(example.path, frame_codec="int8-99")
    with pytest.raises(StoreError, match=r"zarr\.json: frame_codec 'int8-99' is not known: update neurostorm"):
        _ = FrameStore.open(example.path).codec


@pytest.mark.parametrize("each", FRAME_CODECS.values(), ids=FRAME_CODECS)
def test_every_codec_is_one_byte_that_is_never_the_missing_value(each):
    z = np.linspace(-20, 20, 999)
    stored = each.encode(z)
    assert stored.dtype == each.dtype and stored.itemsize == 1 and each.missing not in stored
    inside = np.abs(z) < each.limit / each.scale
    assert np.abs(each.decode(stored) - z)[inside].max() <= 0.5 / each.scale + 1e-6
    assert each.count_clipped(stored) == np.count_nonzero(np.abs(stored.astype(int)) == each.limit)

"""Clips as the reader gives them: the stored bytes, the voxels' own scale, and no data where a chunk is damaged."""

import json
import logging
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.data import storage_wait
from neurostorm.data.clips import Read, plan_reads
from neurostorm.data.storage_wait import StorageAwayError
from neurostorm.store.layout import StoreUnavailableError
from neurostorm.store.shard import SHARD_FILE

PLACES = [(3, 0), (0, 20), (8, 19), (3, 7)]


def test_a_clip_is_the_stored_frames_of_its_run_from_its_start(uneven, rows_of):
    columns = uneven.reader().read(rows_of(PLACES))
    assert columns["row"].tolist() == [100, 101, 102, 103]
    assert list(zip(columns["run"].tolist(), columns["start"].tolist(), strict=True)) == PLACES
    for clip, (run, start) in zip(columns["frames"], PLACES, strict=True):
        assert np.array_equal(clip, uneven.frames[uneven.runs[run]][start : start + 6])
    assert columns["frames"].dtype == np.int8
    assert not columns["bad"].any()
    names = {"row", "run", "start", "bad", "withdrawn", "waited_s", "frames"}
    assert set(columns) == names, "voxel z needs nothing else"


def test_scale_and_shift_turn_the_bytes_into_z_over_the_run(uneven, rows_of):
    columns = uneven.reader(normalise="global").read(rows_of(PLACES))
    for clip, (number, start) in enumerate(PLACES):
        run = uneven.runs[number]
        z = uneven.frames[run][start : start + 6] / np.float64(16)
        intensity = uneven.mean[run] + z * uneven.std[run]
        centre, spread = uneven.overall[run]
        found = columns["frames"][clip] / np.float64(16) * columns["scale"][clip] + columns["shift"][clip]
        np.testing.assert_allclose(found, (intensity - centre) / spread, atol=1e-5)
        assert columns["fill"][clip] == pytest.approx((0 - centre) / spread)  # no signal outside the mask


@pytest.fixture
def damaged(uneven, tmp_path):
    """A copy of the store in which one byte of frames 8 to 11 of run 3 is another."""
    path = tmp_path / "damaged.zarr"
    shutil.copytree(uneven.path, path)
    shard = path / uneven.runs[3] / SHARD_FILE
    content = bytearray(shard.read_bytes())
    content[2 * (4 * uneven.mask.sum() + 4) + 50] ^= 1  # two whole chunks, each with its checksum, come before
    shard.write_bytes(content)
    return path


@pytest.mark.parametrize("normalise", ["voxel", "global"])
def test_an_unreadable_clip_holds_no_data_is_marked_and_named_and_leaves_the_others(
    normalise, uneven, damaged, rows_of, caplog
):
    rows = rows_of([(3, 2), (3, 4), (2, 6), (3, 12)])
    whole = uneven.reader(normalise=normalise).read(rows)
    assert whole["frames"][1].any()
    with caplog.at_level(logging.WARNING, "neurostorm.data.clips"):
        found = uneven.reader(normalise=normalise, path=damaged).read(rows)
    assert found["bad"].tolist() == [False, True, False, False], "only the clip of frames 4 to 9 touches 8 to 11"
    assert not found["frames"][1].any()
    for name in whole:
        if name != "bad":
            assert np.array_equal(found[name][[0, 2, 3]], whole[name][[0, 2, 3]])
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"{uneven.runs[3]}, clip from frame 4"]


def test_moments_that_cannot_be_read_make_the_clip_bad_too(uneven, rows_of, tmp_path):
    path = tmp_path / "momentless.zarr"
    shutil.copytree(uneven.path, path)
    shard = path / uneven.runs[0] / SHARD_FILE
    content = bytearray(shard.read_bytes())
    content[-(16 * 9 + 4) - 10] ^= 1  # before the index: the last chunk, rows of the moments and what fills it up
    shard.write_bytes(content)
    rows = rows_of([(0, 0), (1, 0)])
    found = uneven.reader(normalise="global", path=path).read(rows)
    assert found["bad"].tolist() == [True, False]
    assert not found["frames"][0].any()
    assert not uneven.reader(path=path).read(rows)["bad"].any(), "voxel z needs no moments"


def test_a_batch_holds_what_was_read_and_its_parts_are_views(uneven, rows_of):
    reader, rows = uneven.reader(normalise="global"), rows_of(PLACES)
    batch, columns = reader.batch(rows), reader.read(rows)
    for name, values in columns.items():
        assert np.array_equal(getattr(batch, name).numpy(), values)
    part = batch.part(1, 2)
    for name in columns:
        assert torch.equal(getattr(part, name), getattr(batch, name)[1:3])
    part.frames[0, 0, 0] = 99
    assert batch.frames[1, 0, 0] == 99
    assert len(batch.part(3, 2).row) == 1


def test_mapping_a_batch_leaves_out_what_is_not_there(uneven, rows_of):
    seen = []
    doubled = uneven.reader().batch(rows_of(PLACES)).map(lambda values: seen.append(values) or values + values)
    assert len(seen) == 7
    assert doubled.row.tolist() == [200, 202, 204, 206]
    assert doubled.scale is None and doubled.shift is None and doubled.fill is None
    assert doubled.part(0, 2).to(torch.device("cpu")).scale is None


def test_a_reader_travels_as_a_path_and_not_as_data(uneven, rows_of):
    reader = uneven.reader(normalise="global")
    reader.read(rows_of(PLACES))  # with arrays open
    packed = pickle.dumps(reader)
    assert len(packed) < 2000 + len(json.dumps(uneven.runs))
    for name, values in pickle.loads(packed).read(rows_of(PLACES)).items():
        assert np.array_equal(values, reader.read(rows_of(PLACES))[name])


@pytest.mark.parametrize("normalise", ["voxel", "global"])
def test_neighbours_that_are_read_together_are_the_clips_read_alone(normalise, uneven, rows_of, monkeypatch):
    # in order; overlapping; the same clip again; another run between; backwards
    places = [(3, 0), (3, 6), (3, 12), (0, 2), (0, 4), (0, 4), (1, 0), (3, 12), (3, 6)]
    reader, rows = uneven.reader(normalise=normalise), rows_of(places)
    asked = []
    frames = type(reader.store).frames
    monkeypatch.setattr(
        type(reader.store), "frames",
        lambda self, run, start=0, count=None, out=None: (
            asked.append((run, start, count)) or frames(self, run, start, count, out)
        ),
    )  # fmt: skip
    together = reader.read(rows)
    assert [(uneven.runs.index(run), start, count) for run, start, count in asked] == [
        (3, 0, 18), (0, 2, 8), (1, 0, 6), (3, 12, 6), (3, 6, 6)
    ]  # fmt: skip
    for index in range(len(rows)):
        for name, values in reader.read(rows[index : index + 1]).items():
            assert np.array_equal(values[0], together[name][index]), f"{name} of clip {index}"


def test_of_neighbours_only_the_damaged_clip_is_lost(uneven, damaged, rows_of):
    found = uneven.reader(path=damaged).read(rows_of([(3, 0), (3, 2), (3, 8), (3, 14)]))
    assert found["bad"].tolist() == [False, False, True, False], "frames 8 to 11 are damaged"
    assert np.array_equal(found["frames"][3], uneven.frames[uneven.runs[3]][14:20])
    assert not found["frames"][2].any()


def test_reading_ahead_gives_the_same_in_order_and_begins_no_more_than_it_may(uneven, rows_of):
    reader = uneven.reader(normalise="global")
    orders = [(rows_of([(nth, 2 * nth), (nth, 2 * nth + 1)]), [uneven.runs[nth]] * 2) for nth in range(8)]
    begun = []

    def asked():
        for order in orders:
            begun.append(1)
            yield order

    stream = reader.read_ahead(asked(), threads=3, ahead=2)
    before, places = None, set()
    for nth, columns in enumerate(stream):
        assert len(begun) <= nth + 3
        for name, values in reader.read(orders[nth][0]).items():
            assert np.array_equal(columns[name], values)
        if before is not None:
            assert np.array_equal(before["frames"], reader.read(orders[nth - 1][0])["frames"]), "overwritten too early"
        before = columns
        places.add(columns["frames"].ctypes.data)
    assert nth == 7 and len(places) == 4, "memory is used again"


def test_storage_that_is_away_for_a_while_costs_no_clip(uneven, rows_of, monkeypatch):
    monkeypatch.setattr(storage_wait, "SHORTEST_S", 0.01)
    reader, rows = uneven.reader(), rows_of(PLACES)
    whole, read, left = reader.read(rows), reader.store.frames, [2]

    def away(*arguments, **named):
        if left[0]:
            left[0] -= 1
            raise StoreUnavailableError("503")
        return read(*arguments, **named)

    monkeypatch.setattr(reader.store, "frames", away)
    found = reader.read(rows)
    assert not found["bad"].any() and np.array_equal(found["frames"], whole["frames"])
    assert found["waited_s"][0] > 0 and not found["waited_s"][1:].any() and not whole["waited_s"].any()


@pytest.mark.parametrize("ahead", [False, True])
def test_storage_that_stays_away_is_an_error_and_no_damaged_clip(ahead, uneven, rows_of, monkeypatch):
    monkeypatch.setattr(storage_wait, "SHORTEST_S", 0.01)
    reader = replace(uneven.reader(), unavailable_s=0.05)
    rows = rows_of(PLACES)

    def away(*arguments, **named):
        raise StoreUnavailableError("503")

    monkeypatch.setattr(reader.store, "frames", away)
    with pytest.raises(StorageAwayError, match=r"503\. Its storage was away .*data\.unavailable_s=0\.05"):
        if ahead:
            list(reader.read_ahead([(rows, None)], threads=2, ahead=1))
        else:
            reader.read(rows)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=12), st.integers(1, 6))
def test_reads_cover_each_clip_once_and_nothing_else(clips, length):
    run = np.array([r for r, _ in clips], np.int32)
    start = np.array([s for _, s in clips], np.int32)
    reads = plan_reads(run, start, length)
    assert [i for read in reads for i in range(read.first, read.first + read.count)] == list(range(len(clips)))
    for read in reads:
        mine = range(read.first, read.first + read.count)
        assert len({int(run[i]) for i in mine}) == 1
        asked = {frame for i in mine for frame in range(start[i], start[i] + length)}
        assert asked == set(range(read.start, read.start + read.frames))
        lie_in_order = [int(start[i]) for i in mine] == [read.start + nth * length for nth in range(read.count)]
        assert read.in_order == lie_in_order


def test_neighbours_become_one_read():
    starts = [0, 20, 20, 7, 60]
    assert plan_reads(np.array([0, 0, 0, 1, 0]), np.array(starts), 20) == [
        Read(0, 3, 0, 40, False), Read(3, 1, 7, 20, True), Read(4, 1, 60, 20, True)
    ]  # fmt: skip

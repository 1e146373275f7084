"""Every kind of damage is found, named with its place and a fix, and a sound store has none."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neurostorm.io.processes import machine_tag
from neurostorm.store import StoreError, create_store, run_path, write_manifest, write_participants, write_run
from neurostorm.store.maintenance import check_run as check_run_module
from neurostorm.store.maintenance.verify import Verified, verify
from neurostorm.store.tables import add_withdrawn

UNFINISHED = f"{machine_tag()}-abc"  # a name that this machine's writers give

AGAIN = "delete it with `repair --drop-damaged`, then ingest it again"


@pytest.fixture
def sound(example: Any) -> Any:
    """A store of two runs with nothing wrong."""
    for number in (1, 2):
        example.add_true(f"sub-0{number}", seed=number)
    write_manifest(example.path)
    return example


def shard_of(store: Any, subject: str = "sub-01") -> Path:
    return store.path / run_path("made", subject, "ses-1_task-rest") / "0.0"


def edit_metadata(shard: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = shard.with_name("zarr.json")
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def flip(shard: Path, offset: int) -> None:
    data = bytearray(shard.read_bytes())
    data[offset] ^= 0x40
    shard.write_bytes(data)


def rows(found: Verified) -> list[tuple[str, str, str]]:
    return [(problem.where, problem.what, problem.fix) for problem in found.problems]


def test_a_sound_store_has_no_problem_and_every_byte_was_read(sound: Any) -> None:
    told: list[int] = []

    class Bar:
        def __init__(self, total: int) -> None:
            told.append(-total)

        def __enter__(self) -> Callable[[int], None]:
            return told.append

        def __exit__(self, *error: object) -> None: ...

    found = verify(sound.path, progress=Bar, workers=2)
    assert rows(found) == [] and found.runs == 2
    files = sum(file.stat().st_size for file in (sound.path / "runs").glob("*/*/*/*"))
    assert found.size_bytes == files == -told[0]
    assert sum(told[1:]) == 2 * (70 + 8) * sound.voxels, "frames and moments of both runs"


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("chunk_frames", [1, 7, 100])
def test_any_packing_is_sound(
    example: Any, compression: str, chunk_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_run_module, "BLOCK_BYTES", 20 * example.voxels)  # several blocks
    example.add_true("sub-1", compression=compression, chunk_frames=chunk_frames)
    write_manifest(example.path)
    assert rows(verify(example.path)) == []


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_flipped_bit_is_found_wherever_it_is(sound: Any, compression: str) -> None:
    sound.add_true("sub-03", seed=3, compression=compression, chunk_frames=5)
    write_manifest(sound.path)
    shard = shard_of(sound, "sub-03")
    whole = shard.read_bytes()
    for offset in (0, 5 * sound.voxels // 2, len(whole) // 2, len(whole) - 300, len(whole) - 10, len(whole) - 1):
        flip(shard, offset)
        found = verify(sound.path, workers=1)
        assert [(p.where, p.fix, p.damaged) for p in found.problems] == [
            ("runs/made/sub-03/ses-1_task-rest", AGAIN, True)
        ], offset
        assert "checksum" in found.problems[0].what or "index" in found.problems[0].what
        shard.write_bytes(whole)
    assert rows(verify(sound.path)) == []


def test_a_shard_that_is_short_long_or_missing(sound: Any) -> None:
    shard = shard_of(sound)
    whole = shard.read_bytes()
    for data in (whole[:-1], whole[:10], b"", whole + b"\0"):
        shard.write_bytes(data)
        assert rows(verify(sound.path)) == [
            (
                "runs/made/sub-01/ses-1_task-rest",
                f"its shard has {len(data)} bytes instead of {len(whole)}",
                AGAIN,
            )
        ]
    shard.unlink()
    assert [row[1] for row in rows(verify(sound.path))] == ["its shard 0.0 is missing"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tree: tree["shape"].__setitem__(0, 77), "does not describe a run of this format"),
        (lambda tree: tree.__setitem__("fill_value", 0), "does not describe a run of this format"),
        (lambda tree: tree["attributes"].__setitem__("frames", 69), "attribute `frames` does not agree with its shape"),
        (lambda tree: tree["attributes"].__setitem__("subject", "sub-09"), "attribute subject is 'sub-09'"),
        (lambda tree: tree["attributes"].__setitem__("tr_s", 2.0), "attribute tr_s is 2.0, not 0.8"),
        (lambda tree: tree["attributes"].__setitem__("neurostorm_format", 1), "attribute neurostorm_format is 1"),
        (lambda tree: tree["attributes"].pop("coverage"), "has no attribute coverage"),
        (lambda tree: tree["attributes"].__setitem__("source_tr_s", None), "has no attribute source_tr_s"),
        (lambda tree: tree["attributes"].__setitem__("coverage", 0.5), "0.5 by its attributes"),
        (lambda tree: tree["attributes"].__setitem__("clipped_fraction", 0.0), "clipped_fraction is"),
        (lambda tree: tree["attributes"].__setitem__("tsnr_median", 60.0), "tsnr_median is"),
        (lambda tree: tree["attributes"].__setitem__("global_std", "much"), "global_std is"),
    ],
)
def test_metadata_that_contradicts_path_bytes_or_store(
    sound: Any, change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    edit_metadata(shard_of(sound), change)
    found = verify(sound.path).problems
    assert [problem.what for problem in found if expected in problem.what and problem.damaged], found
    assert {problem.where for problem in found} == {"runs/made/sub-01/ses-1_task-rest"}


def test_metadata_that_is_no_json(sound: Any) -> None:
    shard_of(sound).with_name("zarr.json").write_bytes(b'{"shape": [')
    (problem,) = verify(sound.path).problems
    assert "cannot be read as the metadata" in problem.what and problem.damaged


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("mean", lambda a: a["mean"].__iadd__(500), "global_mean is"),
        ("std", lambda a: a["std"].__imul__(2), "global_std is"),
        ("std", lambda a: a["std"].__setitem__(slice(6, 9), 0), "3 voxel(s) have std 0, but frames that are not 0"),
        ("frames", lambda a: a["frames"].__setitem__((slice(None), 7), 3), "z-scores of 1 voxel(s) have a mean other"),
        ("frames", lambda a: a["frames"].__ifloordiv__(2), "voxel(s) have a deviation other than 1"),
        ("frames", lambda a: a["frames"].__setitem__((3, 5), 60), "clipped_fraction is 0 by its bytes"),
        ("std", lambda a: a["std"].fill(0), "no voxel has signal"),
    ],
)
def test_values_that_are_not_z_scores_with_these_moments(
    example: Any, name: str, change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    arrays = example.true_arrays(70)
    change(arrays)
    run = example.add_true(**arrays)
    write_manifest(example.path)
    found = verify(example.path).problems
    assert any(expected in problem.what for problem in found), found
    assert {(problem.where, problem.damaged) for problem in found} == {(run, True)}


def test_moments_that_are_no_numbers_and_frames_that_are_missing(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurostorm.store.writer._check_arrays", lambda *_: None)
    bad = example.true_arrays(70)
    bad["mean"][3] = np.inf
    example.add_true("sub-1", **bad)
    bad = example.true_arrays(70)
    bad["frames"][2, 9] = -128
    example.add_true("sub-2", **bad)
    write_manifest(example.path)
    found = [problem.what for problem in verify(example.path).problems]
    assert found == [
        "mean or std is not finite, or std is negative",
        "holds the value -128, which stands for missing frames",
    ]


@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_rounding_and_clipping_are_allowed(example: Any, spread: float) -> None:
    """Voxels of two levels round to the same side in all frames; those of one spike are cut off, or all but."""
    arrays = example.true_arrays(200)
    rng = np.random.default_rng(0)
    for voxel, ones in enumerate((1, 2, 3, 4, 50, 100, 199), start=10):
        values = np.full(200, 7.0)
        values[rng.permutation(200)[:ones]] += spread
        z = (values - values.mean()) / values.std()
        arrays["frames"][:, voxel] = np.clip(np.rint(16 * z), -127, 127)
        arrays["mean"][voxel], arrays["std"][voxel] = values.mean(), values.std()
    for name in ("tsnr_median", "global_mean", "global_std", "clipped_fraction"):
        arrays["attributes"].pop(name)
    example.add_true(**arrays)
    write_manifest(example.path)
    found = [problem.what for problem in verify(example.path).problems]
    assert found == ["has no attribute clipped_fraction, global_mean, global_std, tsnr_median"]


def test_a_manifest_that_does_not_say_what_the_runs_say(sound: Any) -> None:
    file = sound.path / "manifest.parquet"
    table = pq.read_table(file).to_pylist()
    table[0]["coverage"], table[0]["task"] = 0.25, "nback"
    table[1]["run"] = "runs/made/sub-07/ses-1_task-rest"
    pq.write_table(pq.read_table(file).from_pylist(table, pq.read_schema(file)), file)
    found = rows(verify(sound.path))
    stated = json.loads(shard_of(sound).with_name("zarr.json").read_text())["attributes"]["coverage"]
    one, two = "runs/made/sub-01/ses-1_task-rest", "runs/made/sub-02/ses-1_task-rest"
    assert found[0][:2] == (
        one,
        f"the manifest says task 'nback', the run 'rest'; coverage 0.25, the run {float(np.float32(stated))!r}",
    )
    assert found[1:] == [
        (two, "has no row in manifest.parquet", "start `repair`"),
        (table[1]["run"], "has a row in manifest.parquet, but is not there", "start `repair`"),
    ]
    file.write_bytes(b"PAR1")
    assert [row[0] for row in rows(verify(sound.path))] == ["manifest.parquet"]
    file.unlink()
    assert "is missing" in rows(verify(sound.path))[0][1]


def test_what_writers_left_and_groups_without_metadata(sound: Any) -> None:
    (sound.path / ".partial" / UNFINISHED).mkdir(parents=True)
    (sound.path / ".partial" / UNFINISHED / "0.0").write_bytes(b"cut off")
    (sound.path / "runs" / "made" / "sub-01" / f".zarr.json.{UNFINISHED}.partial").write_bytes(b"{")
    shard = shard_of(sound)
    shutil.copytree(shard.parent, shard.parents[1] / "ses-2")
    (shard.parents[1] / "ses-2" / "zarr.json").unlink()
    (sound.path / "runs" / "made" / "zarr.json").unlink()
    assert rows(verify(sound.path)) == [
        (f".partial/{UNFINISHED}", "was left unfinished by a writer", "start `repair`"),
        (f"runs/made/sub-01/.zarr.json.{UNFINISHED}.partial", "was left unfinished by a writer", "start `repair`"),
        ("runs/made/sub-01/ses-2", "was left unfinished by a writer", "start `repair`"),
        ("runs/made/zarr.json", "is missing: Zarr readers do not find what is below", "start `repair`"),
    ]


def test_a_mask_that_is_not_the_one_of_the_header(sound: Any) -> None:
    file = sound.path / "zarr.json"
    tree = json.loads(file.read_text())
    tree["attributes"]["mask_sha256"] = "0" * 64
    file.write_text(json.dumps(tree))
    assert [row[:2] for row in rows(verify(sound.path))] == [
        ("mask", "does not match the grid and the hash in zarr.json")
    ]
    shutil.rmtree(sound.path / "mask")
    assert [row[0] for row in rows(verify(sound.path))] == ["mask"]


def test_a_subject_who_withdrew_and_is_here(sound: Any) -> None:
    write_participants(sound.path, pa.table({"dataset": ["made"], "participant_id": ["sub-01"]}))
    add_withdrawn(sound.path, [("made", "sub-01")])
    assert [row[:2] for row in rows(verify(sound.path))] == [
        ("participants.parquet", "made/sub-01 withdrew, but their labels are here"),
        ("runs/made/sub-01/ses-1_task-rest", "its subject withdrew, but it is here"),
    ]


def test_what_cannot_be_read_just_now_is_not_called_damaged(sound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    found = verify(sound.path).problems
    assert len(found) == 2 and not any(problem.damaged for problem in found)
    assert all("Input/output error" in problem.what for problem in found)


def test_one_run_or_a_share_of_them(sound: Any) -> None:
    for number in range(3, 11):
        sound.add_true(f"sub-{number:02d}", seed=number)
    write_manifest(sound.path)
    flip(shard_of(sound, "sub-02"), 3)
    assert verify(sound.path, run="made/sub-01/ses-1_task-rest").problems == ()
    (problem,) = verify(sound.path, run="runs/made/sub-02/ses-1_task-rest").problems
    assert "checksum" in problem.what
    assert [verify(sound.path, sample=share).runs for share in (0.001, 0.3, 1.0)] == [1, 3, 10]
    with pytest.raises(StoreError, match="the nearest: runs/made/sub-0"):
        verify(sound.path, run="made/sub-2/ses-1_task-rest")


def test_a_run_of_another_mask(sound: Any, make_example: Any) -> None:
    other = make_example("other")
    mask = other.mask.copy()
    mask[np.unravel_index(np.flatnonzero(mask)[0], mask.shape)] = False
    create_store(other.path, **(other.properties | {"mask": mask}))
    arrays = sound.true_arrays(70)
    arrays = {name: value[..., 1:] if name != "attributes" else value for name, value in arrays.items()}
    run = run_path("made", "sub-03", "ses-1_task-rest")
    assert write_run(other.path, run, **arrays)
    shutil.copytree(other.path / run, sound.path / run)
    shutil.copy(other.path / "runs" / "zarr.json", sound.path / "runs" / "made" / "sub-03")
    write_manifest(sound.path)
    assert [row[:2] for row in rows(verify(sound.path))] == [
        (run, f"has {sound.voxels - 1} voxels, the store's mask {sound.voxels}")
    ]

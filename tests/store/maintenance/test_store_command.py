"""tools/store.py: its commands, what they print, and their exit status."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pytest
import zarr
from matplotlib.image import imread

from neurostorm.commands import store as store_command
from neurostorm.store import (
    add_quarantine,
    create_store,
    read_manifest,
    withdrawn_subjects,
    write_manifest,
    write_participants,
    write_run,
)
from neurostorm.store.files import find_runs

RUN = "runs/made/sub-01/ses-1_task-rest"
COMMANDS = ("stats", "list", "show", "verify", "repair", "remove", "merge", "export")


@pytest.fixture
def main() -> Callable[..., int]:
    """The command's entry point."""
    return lambda *words: store_command.main([str(word) for word in words])


@pytest.fixture
def store(example: Any) -> Any:
    """Three subjects in two datasets, nothing wrong."""
    for number, (dataset, subject) in enumerate([("made", "sub-01"), ("made", "sub-02"), ("other", "sub-01")]):
        example.add_true(subject, dataset, seed=number)
    write_manifest(example.path)
    return example


def damage(store: Any, run: str = RUN) -> None:
    shard = store.path / run / "0.0"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])


def test_stats_counts_what_is_there(main: Any, store: Any, tmp_path: Path, capsys: Any) -> None:
    people = {"dataset": ["made"] * 2, "participant_id": ["sub-01", "sub-02"], "age": [31, None]}
    write_participants(store.path, pa.table(people))
    reasons = ["covers 3.2 % of the brain", "covers 17 % of the brain", "gzip stream ends early"]
    add_quarantine(store.path, [{"source": f"{n}.nii.gz", "reason": reason} for n, reason in enumerate(reasons)])
    assert main("stats", store.path, "--json", tmp_path / "stats.json") == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert lines["made"][:4] == ["2", "2", "140", "0.03"] and lines["other"][:4] == ["1", "1", "70", "0.02"]
    assert lines["all"][:4] == ["3", "3", "210", "0.05"]
    assert lines["format"] == ["2"] and lines["TR"] == ["0.8", "s"] and lines["withdrawn"] == ["0", "subjects"]
    assert "box: 6 x 7 x 8 voxels of 4 mm" in text and f"{store.voxels} voxels" in text
    assert "2 rows: age (1)" in text and "2 x covers 3.2 % of the brain (as 0.nii.gz)" in text and "note:" not in text
    found = json.loads((tmp_path / "stats.json").read_text())
    files = [item for item in store.path.rglob("*") if item.is_file()]
    assert (found["files"], found["size_bytes"]) == (len(files), sum(item.stat().st_size for item in files))
    total = found["datasets"][-1]
    manifest = read_manifest(store.path)
    assert total["size_bytes"] == sum(
        item.stat().st_size for item in files if len(item.relative_to(store.path).parts) == 5
    )
    for name in ("tsnr_median", "coverage", "clipped_fraction"):
        assert total[name] == np.median(manifest.column(name).to_pylist())
    assert f"{total['tsnr_median']:.1f}" in lines["all"] and f"{total['coverage']:.1%}" in lines["all"]


def test_stats_warns_of_a_manifest_that_is_missing_or_old(main: Any, example: Any, capsys: Any) -> None:
    assert main("stats", example.path) == 0
    assert "manifest.parquet is missing" in capsys.readouterr().out
    write_manifest(example.path)
    example.add()
    assert main("stats", example.path) == 0
    assert "manifest.parquet (0 runs) is not up to date: `repair` rebuilds it" in capsys.readouterr().out


def test_list_names_every_run_with_its_figures(main: Any, store: Any, tmp_path: Path, capsys: Any) -> None:
    assert main("list", store.path) == 0
    head, *rows, empty, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "subject", "session", "task", "frames", "minutes", "coverage"]
    assert [row.split()[:6] for row in rows] == [
        [f"{dataset}/{subject}/ses-1_task-rest", subject, "1", "rest", "70", "0.9"]
        for dataset, subject in (("made", "sub-01"), ("made", "sub-02"), ("other", "sub-01"))
    ]
    assert not empty and total == "3 run(s) of 3 subject(s), 2.8 minutes"
    assert main("list", store.path, "--subject", "sub-02", "--json", tmp_path / "runs.json") == 0
    assert "1 run(s) of 1 subject(s)" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert (row["run"], row["frames"], row["minutes"]) == ("made/sub-02/ses-1_task-rest", 70, pytest.approx(70 / 75))
    assert rows[1].split()[6] == f"{row['coverage']:.1%}"
    assert main("list", store.path, "--subject", "sub-2") == 1
    assert "no subject 'sub-2'; the nearest: " in capsys.readouterr().err


def test_list_shows_runs_that_the_manifest_lacks(main: Any, example: Any, capsys: Any) -> None:
    example.add()
    assert main("list", example.path) == 0
    text = capsys.readouterr().out
    assert "made/sub-01/ses-1_task-rest" in text and "note: " in text and "manifest.parquet is missing" in text


@pytest.mark.parametrize("name", ["sub-02", "made/sub-02", "sub-02_task-rest", "sub-02_ses-1_task-rest", "other"])
def test_parts_of_a_name_that_only_one_run_has_find_it(main: Any, store: Any, capsys: Any, name: str) -> None:
    assert main("show", store.path, name) == 0
    run = "other/sub-01" if name == "other" else "made/sub-02"
    assert capsys.readouterr().out.startswith(f"run runs/{run}/ses-1_task-rest\n")


def test_parts_of_a_name_that_several_runs_have_list_them(main: Any, store: Any, capsys: Any) -> None:
    assert main("show", store.path, "sub-01") == 1
    assert capsys.readouterr().err == (
        f"store.py show: 'sub-01' means 2 runs of {store.path}, name one of them:\n"
        "  made/sub-01/ses-1_task-rest\n  other/sub-01/ses-1_task-rest\n"
    )


def test_a_name_that_is_whole_but_for_the_dataset_wins_over_longer_ones(main: Any, example: Any, capsys: Any) -> None:
    for entities in ("task-rest", "task-rest_run-2"):
        assert write_run(example.path, f"runs/made/sub-01/{entities}", **example.arrays())
    assert main("show", example.path, "sub-01_task-rest") == 0
    assert capsys.readouterr().out.startswith("run runs/made/sub-01/task-rest\n")


@pytest.mark.parametrize("name", [RUN, RUN.removeprefix("runs/"), f"{RUN}/"])
def test_show_describes_a_run_from_its_stored_arrays(main: Any, example: Any, capsys: Any, name: str) -> None:
    arrays = example.arrays()
    arrays["std"][:5] = 0
    arrays["frames"][:, :5], arrays["frames"][0, 5:] = 0, 127
    facts = arrays["attributes"] | {"quantisation_db": 34.87}
    assert write_run(example.path, RUN, **(arrays | {"attributes": facts}))
    assert main("show", example.path, name) == 0
    text = capsys.readouterr().out
    snr = np.median(arrays["mean"][5:] / arrays["std"][5:])
    assert f"temporal SNR      {snr:.1f} (" in text
    assert f"coverage          {1 - 5 / example.voxels:.1%} of the brain mask" in text
    assert "clipped values    4.0000%" in text, "one frame of 25"
    assert "34.9 dB" in text and "raw/0.nii.gz" in text


def test_show_draws_a_png_of_the_run(main: Any, example: Any, tmp_path: Path) -> None:
    pictures = []
    for seed in (1, 2):
        run = example.add(f"sub-0{seed}", seed=seed)
        assert main("show", example.path, run, "--png", tmp_path / f"{seed}.png") == 0
        pictures.append(imread(tmp_path / f"{seed}.png"))
    assert pictures[0].ndim == 3 and min(pictures[0].shape[:2]) > 300
    assert (pictures[0] != pictures[1]).any()


def test_verify_says_what_is_wrong_where_and_what_to_do(main: Any, store: Any, tmp_path: Path, capsys: Any) -> None:
    assert main("verify", store.path) == 0
    assert "3 run(s)" in (text := capsys.readouterr().out) and text.rstrip().endswith("nothing is wrong")
    damage(store)
    assert main("verify", store.path, "--workers", 1, "--json", tmp_path / "found.json") == 1
    head, row, _, closing = capsys.readouterr().out.splitlines()
    assert head.split() == ["where", "what", "fix"]
    assert row.startswith(f"{RUN}  ") and "checksum of the rows from 0 on does not match" in row
    assert row.endswith("delete it with `repair --drop-damaged`, then ingest it again")
    assert closing.startswith("3 run(s), ") and closing.endswith(": 1 problem(s)")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["runs"] == 3 and [problem["where"] for problem in found["problems"]] == [RUN]
    assert main("verify", store.path, "--run", "made/sub-02/ses-1_task-rest") == 0


def test_repair_says_what_it_did(main: Any, store: Any, capsys: Any) -> None:
    damage(store)
    (store.path / "runs" / "made" / "sub-02" / "zarr.json").unlink()
    assert main("repair", store.path, "--dry-run", "--drop-damaged") == 0
    text = capsys.readouterr().out
    assert f"would be deleted, damaged: {RUN}" in text and "would be given its metadata: runs/made/sub-02" in text
    assert main("verify", store.path) == 1
    assert main("repair", store.path, "--drop-damaged") == 0
    text = capsys.readouterr().out
    assert f"deleted, damaged: {RUN}" in text and "manifest rebuilt from 2 run(s)" in text and "ingest again" in text
    assert main("verify", store.path) == 0


def test_remove_asks_first_and_can_be_taken_back(
    main: Any, store: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert main("remove", store.path, "--subject", "sub-02") == 1
    assert "made/sub-02: 1 run(s)" in capsys.readouterr().out and len(find_runs(store.path)) == 3
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    assert main("remove", store.path, "--subject", "sub-02", "--subject", "other/sub-01") == 0
    assert find_runs(store.path) == [RUN]
    assert withdrawn_subjects(store.path) == {("made", "sub-02"), ("other", "sub-01")}
    assert main("remove", store.path, "--subject", "sub-02", "--undo") == 0
    assert withdrawn_subjects(store.path) == {("other", "sub-01")}
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert main("remove", store.path, "--subject", "made/sub-01", "--yes") == 0
    assert find_runs(store.path) == []


def test_a_subject_of_two_datasets_must_be_named(main: Any, store: Any, capsys: Any) -> None:
    assert main("remove", store.path, "--subject", "sub-01", "--yes") == 1
    assert "name one of made/sub-01, other/sub-01" in capsys.readouterr().err
    assert len(find_runs(store.path)) == 3


def test_merge_says_what_came(main: Any, store: Any, make_example: Any, capsys: Any) -> None:
    other = make_example("other.zarr")
    create_store(other.path, **other.properties)
    other.add_true("sub-03", seed=9)
    other.add_true("sub-02", seed=8)
    assert main("merge", store.path, other.path) == 1
    text = capsys.readouterr().out
    assert (
        "1 run(s) copied" in text
        and "there already" not in text
        and "runs/made/sub-02/ses-1_task-rest" in text
        and "stays" in text
    )
    assert main("verify", store.path) == 0 and len(find_runs(store.path)) == 4
    assert main("merge", store.path, other.path) == 1
    assert "0 run(s) copied, 0 B; 1 were there already" in capsys.readouterr().out


def test_export_writes_a_run_and_the_whole_store(main: Any, store: Any, tmp_path: Path, capsys: Any) -> None:
    assert main("export", store.path, RUN, "--nifti", tmp_path / "run.nii.gz") == 0
    image = nib.load(tmp_path / "run.nii.gz")
    assert main("export", store.path, RUN, "--nifti-zarr", tmp_path / "run.nii.zarr") == 0
    data = zarr.open_array(tmp_path / "run.nii.zarr" / "0", mode="r")
    assert np.array_equal(data[:].T, np.asarray(image.dataobj))
    assert main("export", store.path, RUN, "--nifti-zarr", tmp_path / "run.nii.zarr") == 1
    assert "is there already" in capsys.readouterr().err
    for written in (3, 0):
        assert main("export", store.path, "--nifti-zarr", tmp_path / "all") == 0
        text = capsys.readouterr().out
        assert f"{written} of 3 run(s) written" in text
        assert ("; 3 were there already" in text) == (written == 0) and ("already" in text) == (written == 0)
    found = sorted(folder.relative_to(tmp_path / "all").as_posix() for folder in (tmp_path / "all").rglob("*.nii.zarr"))
    assert found == [f"{who}/ses-1_task-rest.nii.zarr" for who in ("made/sub-01", "made/sub-02", "other/sub-01")]


def test_what_is_not_there_is_said_with_the_nearest(main: Any, store: Any, tmp_path: Path, capsys: Any) -> None:
    assert main("stats", tmp_path / "nowhere") == 1
    assert "no store at" in capsys.readouterr().err
    for words in (("show", store.path, "made/sub-1/ses-1_task-rest"),
                  ("export", store.path, "made/sub-1/ses-1_task-rest", "--nifti", tmp_path / "a.nii")):  # fmt: skip
        assert main(*words) == 1
        assert "no run 'made/sub-1/ses-1_task-rest'; the nearest: runs/made/sub-01" in (
            error := capsys.readouterr().err
        )
        assert f"store.py list {store.path}" in error
    damage(store)
    assert main("export", store.path, RUN, "--nifti", tmp_path / "a.nii") == 1
    assert RUN in capsys.readouterr().err and not (tmp_path / "a.nii").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_format_that_is_not_known_is_refused(
    main: Any, store: Any, tmp_path: Path, capsys: Any, command: str
) -> None:
    header = json.loads((store.path / "zarr.json").read_text())
    header["attributes"]["neurostorm_format"] = 99
    (store.path / "zarr.json").write_text(json.dumps(header))
    rest = {
        "show": [RUN], "remove": ["--subject", "sub-02", "--yes"], "merge": [store.path],
        "export": ["--nifti-zarr", tmp_path / "all"],
    }  # fmt: skip
    assert main(command, store.path, *rest.get(command, [])) == 1
    assert f"store.py {command}: {store.path} has format 99, this version reads format 2" in capsys.readouterr().err
    assert len(find_runs(store.path)) == 3 and not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["show", "s", RUN, "--png", "a.jpg"], "must end in .png"),
        (["export", "s", RUN, "--nifti", "a.img"], "must end in .nii"),
        (["export", "s", RUN, "--nifti", "no/such/folder/a.nii"], "there is no folder"),
        (["export", "s", "--nifti", "a.nii"], "name it behind STORE"),
        (["export", "s", RUN], "say what to write"),
        (["remove", "s", "--subject", "sub-01"], "add --yes"),
        (["remove", "s"], "--subject"),
        (["verify", "s", "--sample", "0"], "--sample"),
        (["verify", "s", "--workers", "0"], "--workers"),
        (["verify", "ftp://a/b"], "STORE"),
        (["merge", "s"], "FROM"),
        ([], "COMMAND"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    main: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], reason: str
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(SystemExit) as caught:
        main(*words)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_explains_every_command_and_option(main: Any, capsys: Any, command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(*([command] if command else []), "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    if not command:
        assert all(f"store.py {name} STORE" in text for name in COMMANDS)
    else:
        assert "STORE" in text and "s3://BUCKET/KEY" in text

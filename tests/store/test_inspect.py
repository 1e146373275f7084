"""tools/inspect_store.py says what a store holds, and brings a run back as a picture and as NIfTI."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pytest

from neurostorm.store import add_quarantine, dequantise, write_manifest, write_participants, write_run

RUN = "runs/made/sub-01/ses-1_task-rest"


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    """The tool's entry point; it is a script beside the package, not a part of it."""
    file = Path(__file__).resolve().parents[2] / "tools" / "inspect_store.py"
    spec = importlib.util.spec_from_file_location("inspect_store", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_summary_counts_what_is_there(main: Any, example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (dataset, subject) in enumerate([("made", "sub-01"), ("made", "sub-02"), ("other", "sub-01")]):
        example.add(subject, dataset, frames=450 * (number + 1), seed=number)
    write_manifest(example.path)
    write_participants(example.path, pa.table({"dataset": ["made"], "participant_id": ["sub-01"], "age": [31]}))
    add_quarantine(example.path, [{"source": "bad.nii.gz", "reason": "gzip stream ends early", "when": "2026-01-01"}])
    assert main([str(example.path)]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert lines["made"] == ["2", "2", "1,350", "0.30"]
    assert lines["other"] == ["1", "1", "1,350", "0.30"]
    assert lines["all"] == ["3", "3", "2,700", "0.60"]
    assert lines["format"] == ["1"] and lines["TR"] == ["0.8", "s"]
    assert "box: 6 x 7 x 8 voxels of 4 mm" in text and f"{example.voxels} voxels" in text
    assert "gzip stream ends early" in text and "age" in text
    files = [item for item in example.path.rglob("*") if item.is_file()]
    assert f"in {len(files):,} files" in text
    assert "note:" not in text


def test_the_summary_warns_of_a_manifest_that_is_missing_or_old(
    main: Any, example: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(example.path)]) == 0
    assert "manifest.parquet is missing" in capsys.readouterr().out
    write_manifest(example.path)
    example.add()
    assert main([str(example.path)]) == 0
    assert "manifest.parquet (0 runs) is not up to date" in capsys.readouterr().out


@pytest.mark.parametrize("name", [RUN, RUN.removeprefix("runs/"), f"{RUN}/"])
def test_a_run_is_described_from_its_stored_arrays(
    main: Any, example: Any, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arrays = example.arrays()
    arrays["std"][:5] = 0
    frames = arrays["frames"]
    frames[0, :] = 127
    facts = arrays["attributes"] | {"quantisation_db": 34.87}
    assert write_run(example.path, RUN, **(arrays | {"frames": frames, "attributes": facts}))
    assert main([str(example.path), "--run", name]) == 0
    text = capsys.readouterr().out
    snr = np.median(arrays["mean"][5:] / arrays["std"][5:])
    assert f"temporal SNR      {snr:.1f} (" in text
    assert f"coverage          {1 - 5 / example.voxels:.1%} of the brain mask" in text
    assert "clipped values    4.0000%" in text, "one frame of 25"
    assert "34.9 dB" in text
    assert "raw/0.nii.gz" in text


@pytest.mark.parametrize("name", ["run.nii", "run.nii.gz"])
def test_the_exported_nifti_is_the_run_in_source_units(main: Any, example: Any, tmp_path: Path, name: str) -> None:
    run = example.add(frames=130)
    arrays = example.arrays(130)
    assert main([str(example.path), "--run", run, "--nifti", str(tmp_path / name)]) == 0
    image = nib.load(tmp_path / name)
    assert image.shape == (*example.grid.shape, 130) and image.get_data_dtype() == np.float32
    assert np.array_equal(image.affine, example.grid.affine)
    assert image.header["sform_code"] == image.header["qform_code"] == 4  # MNI152
    assert np.array_equal(image.header.get_best_affine(), image.header.get_qform())
    assert image.header.get_zooms() == pytest.approx((4, 4, 4, 0.8))
    assert image.header.get_xyzt_units() == ("mm", "sec")
    values = np.asarray(image.dataobj)
    expected = dequantise(arrays["frames"]) * arrays["std"] + arrays["mean"]
    assert np.allclose(values[example.mask].T, expected, rtol=1e-6)
    assert not values[~example.mask].any()
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([name, example.path.name]), (
        "no temporary file stays"
    )


def test_the_picture_is_a_png_of_the_run(main: Any, example: Any, tmp_path: Path) -> None:
    from matplotlib.image import imread

    pictures = []
    for seed in (1, 2):
        run = example.add(f"sub-0{seed}", seed=seed)
        assert main([str(example.path), "--run", run, "--png", str(tmp_path / f"{seed}.png")]) == 0
        pictures.append(imread(tmp_path / f"{seed}.png"))
    assert pictures[0].ndim == 3 and min(pictures[0].shape[:2]) > 300
    assert (pictures[0] != pictures[1]).any()


def test_what_is_not_there_is_said_with_the_nearest(
    main: Any, example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.add("sub-07")
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "no store at" in capsys.readouterr().err
    assert main([str(example.path), "--run", "made/sub-7/ses-1_task-rest"]) == 1
    error = capsys.readouterr().err
    assert "no run 'made/sub-7/ses-1_task-rest'" in error and "the nearest: runs/made/sub-07/ses-1_task-rest" in error


def test_a_damaged_run_ends_in_its_name_and_leaves_no_file(
    main: Any, example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = example.add()
    shard = example.path / run / "frames" / "0.0"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    assert main([str(example.path), "--run", run, "--nifti", str(tmp_path / "out.nii")]) == 1
    assert run in capsys.readouterr().err
    assert [item.name for item in tmp_path.iterdir()] == [example.path.name]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--png", "a.png"], "name it with --run"),
        (["--run", RUN, "--png", "a.jpg"], "must end in .png"),
        (["--run", RUN, "--nifti", "a.img"], "must end in .nii"),
        (["--run", RUN, "--png", "no/such/folder/a.png"], "there is no folder"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    main: Any, example: Any, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(example.path), *options])
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


def test_help_explains_every_option(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("STORE", "--run", "--png", "--nifti"))

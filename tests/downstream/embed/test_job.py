"""Embedding runs: from a store or from files, interrupted or not, the tables are the same; what does not fit is named.

Most of it goes without Ray; the job itself runs once over Ray, with its interruptions.
"""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from neurostorm.config import EmbedConfig
from neurostorm.downstream.embed.embed_run import Embedder, EmbedTask
from neurostorm.downstream.embed.inputs import open_input, remember
from neurostorm.downstream.embed.job import embed_runs, task_of
from neurostorm.downstream.embed.parts import ClipResult, RunToEmbed, assemble, write_part
from neurostorm.ingest.layouts.discover import discover
from neurostorm.io.paths import AnyPath, copy_files, list_files, to_path
from neurostorm.model.hub.pretrained import NeuroStorm
from neurostorm.store import FrameStore
from neurostorm.store.shard import SHARD_FILE

ROOT = Path(__file__).resolve().parents[3]
FRAMES = 10  # of the model's clip
TABLES = ("clips", "runs", "subjects")


def table(out: Path, name: str) -> pa.Table:
    return pq.read_table(out / f"{name}.parquet")


def vectors(rows: pa.Table) -> np.ndarray:
    return np.array(rows["embedding"].to_pylist(), np.float32)


def content(out: AnyPath) -> dict[str, bytes]:
    return {name: (out / f"{name}.parquet").read_bytes() for name in TABLES}


@pytest.mark.parametrize("tokens", ["dense", "brain"])
def test_each_clip_has_the_vector_of_its_frames(
    tmp_path: Path, ball_store: Path, tokens: str, make_model: Any, here: Any
) -> None:
    """Against the model on dense volumes made of the store's own bytes; the means follow."""
    folder = make_model(tmp_path / "model", ball_store, tokens=tokens)
    done = here(tmp_path / "out", model=folder, store=ball_store, clip_stride_frames=16, batch_clips=2)
    assert (done.clips, done.runs, done.subjects, done.failed, done.width) == (18, 6, 6, (), 16)
    clips, network, store = (
        table(tmp_path / "out", "clips"),
        NeuroStorm.from_pretrained(folder),
        FrameStore.open(ball_store),
    )
    assert clips["start_frame"].to_pylist() == [0, 16, 32] * 6
    assert clips["start_s"].to_pylist() == pytest.approx([0, 12.8, 25.6] * 6)
    for row in clips.to_pylist()[::4]:
        volume = (
            torch.from_numpy(store.unpack(store.frames(row["run"], row["start_frame"], FRAMES))).movedim(0, -1) / 16
        )
        expected = network.embed(volume)
        torch.testing.assert_close(torch.tensor(row["embedding"]), expected, atol=1e-5, rtol=1e-4)
    runs = table(tmp_path / "out", "runs")
    assert runs["clips"].to_pylist() == [3] * 6
    np.testing.assert_allclose(vectors(runs), vectors(clips).reshape(6, 3, -1).mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalise", ["voxel", "global"])
def test_files_and_a_store_of_them_give_the_same_bits(
    tmp_path: Path, files: tuple[Path, Path], normalise: str, make_model: Any, here: Any
) -> None:
    """A run shorter than a clip is one shorter clip; a model embeds the file itself alike."""
    root, store = files
    folder = make_model(tmp_path / "model", store, normalise=normalise)
    for name, settings in (("plain", {}), ("dense", {"clip_stride_frames": 4, "batch_clips": 2})):
        a, b = tmp_path / name / "a", tmp_path / name / "b"
        here(a, model=folder, store=store, **settings)
        here(b, model=folder, source=root, **settings)
        assert content(a) == content(b)
        starts = [0, 4, 8, 12, 0] if settings else [0, 10, 0]
        assert table(a, "clips")["start_frame"].to_pylist() == starts
    runs = table(tmp_path / "plain/a", "runs")
    assert runs["subject"].to_pylist() == ["sub-1", "sub-2"]
    network = NeuroStorm.from_pretrained(folder)
    for source, run in zip(discover(root), vectors(runs), strict=True):
        torch.testing.assert_close(network.embed(source.path), torch.from_numpy(run), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_read_is_listed_and_tried_again(
    tmp_path: Path, ball_store: Path, model: Path, here: Any
) -> None:
    """A damaged chunk costs its clips, a missing folder its run; repaired, a second start makes the twin's tables."""
    store, out = tmp_path / "store", tmp_path / "out"
    shutil.copytree(ball_store, store)
    twin = here(tmp_path / "twin", model=model, store=store)
    damaged, gone = (store / f"runs/balls/sub-{subject}/task-rest" for subject in (1, 4))
    shard = damaged / SHARD_FILE
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + b"\x55" * 10 + whole[110:])  # within the first 24 frames
    shutil.move(gone, tmp_path / "aside")
    done = here(out, model=model, store=store)
    assert (done.clips, done.runs) == (twin.clips - 7, twin.runs - 1)
    rows = table(out, "failed").to_pylist()
    assert [(row["run"], row["start_frame"]) for row in rows] == [
        *(("runs/balls/sub-1/task-rest", start) for start in (0, 10, 20)),
        *(("runs/balls/sub-4/task-rest", start) for start in (0, 10, 20, 30)),
    ]
    assert "damaged chunk" in rows[0]["reason"]
    assert "no run" in rows[-1]["reason"] and str(store) in rows[-1]["source"]
    shard.write_bytes(whole)
    shutil.move(tmp_path / "aside", gone)
    assert here(out, model=model, store=store).failed == ()
    assert not (out / "failed.parquet").exists() and content(out) == content(tmp_path / "twin")
    assert not list((out / "parts").rglob("*.failed.parquet"))


def test_files_that_cannot_be_used_are_listed(
    tmp_path: Path, files: tuple[Path, Path], ball_store: Path, make_model: Any, here: Any
) -> None:
    root, store = files
    bold = next(root.rglob("*.nii.gz"))
    image = nibabel.load(bold)
    image.header["pixdim"][4] = 0
    nibabel.save(image, root / "sub-3_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    (root / "sub-4_task-rest_space-T1w_desc-preproc_bold.nii.gz").write_bytes(b"")
    (root / "sub-5_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz").symlink_to(tmp_path / "nowhere")
    folder = make_model(tmp_path / "model", store)
    done = here(tmp_path / "out", model=folder, source=root)
    reasons = {Path(str(row["source"])).name[:5]: row["reason"] for row in done.failed}
    assert done.runs == 2 and set(reasons) == {"sub-3", "sub-4", "sub-5"}
    assert "has no TR" in reasons["sub-3"] and "not in MNI space" in reasons["sub-4"]
    assert "No such file" in reasons["sub-5"]


def test_a_vector_that_is_not_finite_is_a_failure(tmp_path: Path, ball_store: Path, make_model: Any, here: Any) -> None:
    folder = make_model(tmp_path / "model", ball_store)
    network = NeuroStorm.from_pretrained(folder)
    network.network.patch_embed.fc.bias.data[0] = torch.inf
    network.save_pretrained(folder)
    done = here(tmp_path / "out", model=folder, store=ball_store)
    assert done.runs == 0 and {row["reason"] for row in done.failed} == {"gives values that are not finite"}
    assert table(tmp_path / "out", "subjects").num_rows == 0


@pytest.fixture(scope="module")
def job() -> ModuleType:
    """jobs/embed.py as a module."""
    spec = importlib.util.spec_from_file_location("embed_job", ROOT / "jobs" / "embed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.integration
@pytest.mark.usefixtures("local_ray")
def test_the_job_makes_the_same_tables_however_often_it_is_interrupted(
    tmp_path: Path, ball_store: Path, model: Path, job: ModuleType, capsys: pytest.CaptureFixture[str], make_bucket: Any
) -> None:
    """Undisturbed with two workers; as it lies after a kill, with two parts and a torn file, started again with one.

    A third one reads from and writes to an object store.
    """
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = ["--model", str(model), "--store", str(ball_store), "--embed.cpus_per_worker", "0.5"]
    assert job.main([*arguments, "--out", str(whole), "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert (
        "6 of 6 run(s) worked on" in printed
        and "already" not in printed
        and "24 clip(s), 6 run(s), 6 subject(s)" in printed
    )
    assert f"next: pandas.read_parquet('{whole}/subjects.parquet')" in printed

    config = EmbedConfig(model=model, store=ball_store, out=resumed)
    given = open_input(config)
    remember(resumed, given)
    embedder = Embedder(task_of(config, given, resumed))
    for run in given.runs[1:3]:
        embedder.embed(run)
    (resumed / "parts/balls/sub-5").mkdir()
    (resumed / "parts/balls/sub-5/.1234.task-rest.parquet").write_bytes(b"PAR1")
    kept = {part: part.stat().st_mtime_ns for part in (resumed / "parts").rglob("task-rest.*.parquet")}
    assert job.main([*arguments, "--out", str(resumed)]) == 0
    printed = capsys.readouterr().out
    assert "4 of 6 run(s) worked on" in printed and "2 were there already" in printed and len(kept) == 2
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert content(resumed) == content(whole)

    bucket = to_path(make_bucket())
    for name, folder in (("model", model), ("store", ball_store)):
        copy_files(folder, bucket / name, [file for file, _ in list_files(folder)])
    arguments = [f"--{name}={bucket / name}" for name in ("model", "store", "out")]
    assert job.main([*arguments, "--embed.cpus_per_worker", "0.5"]) == 0
    assert f"next: pandas.read_parquet('{bucket}/out/subjects.parquet')" in capsys.readouterr().out
    assert content(bucket / "out") == content(whole)


@pytest.mark.integration
@pytest.mark.usefixtures("local_ray")
def test_a_dying_worker_costs_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed at one run: all others have their part, those that waited for the same worker too."""
    monkeypatch.setattr("neurostorm.downstream.embed.job.CRASH_RETRIES", 0)
    monkeypatch.setattr("neurostorm.downstream.embed.job._Worker", killed_at(2, tmp_path))
    runs = [RunToEmbed(f"runs/a/sub-{n}/run", "a", f"sub-{n}", "", "", "here", "x") for n in range(6)]
    outcomes = list(embed_runs(runs, cast(EmbedTask, None), EmbedConfig(cpus_per_worker=0.5)))
    assert outcomes == [0] * 5
    done = assemble(tmp_path, runs, 1.0, "its process died")
    assert done.runs == 5 and [(row["run"], row["reason"]) for row in done.failed] == [
        (runs[2].run, "its process died")
    ]


def killed_at(number: int, out: Path) -> type:
    """A worker without a model, quickly started anew, whose process is killed at the run of that number."""

    class Killed:
        def __init__(self, task: None) -> None:
            pass

        def __call__(self, batch: dict[str, Any]) -> dict[str, list[bool]]:
            import os
            import pickle
            import signal
            import time

            run = pickle.loads(batch["run"][0])
            if run.subject == f"sub-{number}":
                time.sleep(1)  # others come to wait here, if they may
                os.kill(os.getpid(), signal.SIGKILL)
            write_part(out, run, [ClipResult(0, np.zeros(2, np.float32))])
            return {"failed": [False]}

    return Killed


def test_the_exit_status(
    tmp_path: Path, ball_store: Path, model: Path, job: ModuleType, capsys: pytest.CaptureFixture[str], make_bucket: Any
) -> None:
    assert job.main(["--model", str(tmp_path / "none"), "--store", str(ball_store)]) == 2
    assert "embed.model: " in capsys.readouterr().err
    assert job.main(["--model", str(model), "--store", str(tmp_path)]) == 1
    assert "is not a frame store" in capsys.readouterr().err
    assert job.main(["--model", str(model), "--source", str(tmp_path)]) == 1
    assert "no run found" in capsys.readouterr().err
    out = f"{make_bucket()}-that-is-not-there/out"
    assert job.main(["--model", str(model), "--store", str(ball_store), "--out", out]) == 1
    assert f"embed.py: {out}/embed.json" in capsys.readouterr().err

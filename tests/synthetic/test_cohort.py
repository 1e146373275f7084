"""The synthetic cohort on disk: same seed, same bytes; files as BIDS readers expect; the tool that makes it."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neurostorm.store.events import framewise_displacement
from neurostorm.synthetic.cohort import CohortError, CohortPlan, make_cohort, write_run
from neurostorm.synthetic.people import PHENOTYPES, make_subject
from neurostorm.synthetic.render import render_run
from neurostorm.synthetic.signal import STATES
from neurostorm.synthetic.sites import choose_sites

ROOT = Path(__file__).resolve().parents[2]
PLAN = CohortPlan(subjects=3, sessions=2, frames=6, sites="4mm")
FOUR_MM = choose_sites("4mm")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a TSV file."""
    with path.open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A tiny cohort made in this process."""
    folder = tmp_path_factory.mktemp("cohort") / "one"
    assert make_cohort(folder, PLAN).made == PLAN.subjects
    return folder


# Same seed, same bytes


def test_processes_and_cohort_size_do_not_change_a_byte(cohort, tmp_path):
    told = []
    make_cohort(tmp_path / "two", replace(PLAN, subjects=2), jobs=2, on_subject=told.append)
    assert sorted(told) == ["sub-001", "sub-002"]
    make_cohort(tmp_path / "two", PLAN)  # the larger cohort adds to the smaller one
    assert digests(tmp_path / "two") == digests(cohort)


def test_another_seed_gives_another_cohort(cohort, tmp_path):
    make_cohort(tmp_path, replace(PLAN, subjects=1, seed=1))
    assert table(tmp_path / "participants.tsv")[0] != table(cohort / "participants.tsv")[0]
    assert not set(digests(tmp_path / "sub-001").values()) & {
        digest for name, digest in digests(cohort).items() if name.endswith("bold.nii.gz")
    }


def test_gzip_holds_neither_name_nor_time(cohort):
    for path in cohort.rglob("*.nii.gz"):
        head = path.read_bytes()[:8]
        assert head[:3] == b"\x1f\x8b\x08"
        assert head[3:] == bytes(5), f"{path}: flags or time stamp set"


def test_an_interrupted_cohort_is_continued(cohort, tmp_path):
    folder = tmp_path / "cohort"
    shutil.copytree(cohort, folder)
    shutil.rmtree(folder / "sub-002")
    (folder / ".sub-002.123" / "ses-01").mkdir(parents=True)
    assert make_cohort(folder, PLAN).made == 1
    assert digests(folder) == digests(cohort)
    assert not list(folder.glob(".sub-*"))


@pytest.mark.parametrize(
    "change, field", [({"frames": 7}, "frames"), ({"seed": 3}, "seed"), ({"subjects": 2}, "subjects")]
)
def test_another_plan_in_the_same_folder_is_refused(cohort, change, field):
    before = digests(cohort)
    with pytest.raises(CohortError, match=f"{field}.*asked.*choose another folder"):
        make_cohort(cohort, replace(PLAN, **change))
    assert digests(cohort) == before


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CohortError, match="neither empty nor a synthetic cohort"):
        make_cohort(tmp_path, PLAN)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"subjects": 0}, "subjects: 0 is outside 1-9999"),
        ({"frames": 1}, "frames: 1 is outside"),
        ({"sites": "mars"}, "no site 'mars'.*alpine"),
        ({"voxel_mm": 1.0}, "voxel_mm: 1 is outside 2-8"),
    ],
)
def test_impossible_plans_are_refused_with_the_range(flags, message):
    with pytest.raises(CohortError, match=message):
        CohortPlan(**flags)


# Files


def test_every_run_is_readable_and_agrees_with_its_site(cohort):
    people = {row["participant_id"]: row for row in table(cohort / "participants.tsv")}
    sites = {site.name: site for site in FOUR_MM}
    images = sorted(cohort.rglob("*_desc-preproc_bold.nii.gz"))
    assert len(images) == PLAN.subjects * 3  # two rest runs and one of states
    for path in images:
        site = sites[people[path.parts[-4]]["site"]]
        image = nib.load(path)
        assert f"_space-{site.space}_" in path.name
        assert image.shape == (*site.shape, PLAN.frames)
        assert image.get_data_dtype() == np.int16
        assert "".join(nib.aff2axcodes(image.affine)) == site.orientation
        np.testing.assert_allclose(image.affine, site.affine)
        np.testing.assert_allclose(image.get_qform(), site.affine, atol=1e-4)
        assert image.header.get_zooms()[3] == pytest.approx(site.tr_s)
        assert image.header.get_xyzt_units() == ("mm", "sec")
        sidecar = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
        assert sidecar["RepetitionTime"] == site.tr_s
        assert f"task-{sidecar['TaskName']}_" in path.name


def test_the_brain_mask_is_where_the_signal_is(cohort):
    for path in sorted(cohort.rglob("*_desc-preproc_bold.nii.gz"))[:3]:
        signal = nib.load(path).get_fdata()
        mask = nib.load(str(path).replace("preproc_bold", "brain_mask")).get_fdata()
        assert set(np.unique(mask)) == {0, 1}
        assert np.array_equal(mask > 0, (signal > 0).all(axis=3))
        assert np.array_equal(mask > 0, (signal != 0).any(axis=3))
        assert 1.7e6 < mask.sum() * 64 < 2.0e6  # mm^3: the template's brain is 1.88 litres


def test_confounds_follow_the_frames(cohort):
    for path in sorted(cohort.rglob("*_desc-confounds_timeseries.tsv"))[:3]:
        rows = table(path)
        assert len(rows) == PLAN.frames
        assert rows[0]["framewise_displacement"] == "n/a"
        motion = np.array([[float(row[name]) for row in rows] for name in list(rows[0])[-6:]])
        written = [float(row["framewise_displacement"]) for row in rows[1:]]
        np.testing.assert_allclose(framewise_displacement(motion)[1:], written, atol=5e-4)
        (bold,) = path.parent.glob(path.name.replace("_desc-confounds_timeseries.tsv", "_space-*_bold.nii.gz"))
        signal = nib.load(bold).get_fdata()
        means = signal[(signal > 0).all(axis=3)].mean(axis=0)
        np.testing.assert_allclose([float(row["global_signal"]) for row in rows], means, rtol=1e-5)


def test_participants_and_description(cohort):
    people = table(cohort / "participants.tsv")
    assert [row["participant_id"] for row in people] == sorted(path.name for path in cohort.glob("sub-*"))
    sidecar = json.loads((cohort / "participants.json").read_text())
    assert set(people[0]) == {"participant_id", *sidecar}
    assert set(people[0]) >= {"age", "sex", "site", "diagnosis", *PHENOTYPES, "family_id"}
    assert all(row["diagnosis"] in sidecar["diagnosis"]["Levels"] for row in people)
    description = json.loads((cohort / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert {"Name", "BIDSVersion", "GeneratedBy"} <= set(description)


def test_events_cover_the_five_states_within_the_run(cohort):
    paths = sorted(cohort.rglob("*_events.tsv"))
    assert len(paths) == PLAN.subjects
    for path in paths:
        assert "task-states" in path.name and "ses-01" in path.name
        rows = table(path)
        assert {row["trial_type"] for row in rows} == set(STATES)
        (sidecar,) = path.parent.glob("*task-states_*bold.json")
        run_s = PLAN.frames * json.loads(sidecar.read_text())["RepetitionTime"]
        ends_s = [float(row["onset"]) + float(row["duration"]) for row in rows]
        assert all(end_s <= float(row["onset"]) for end_s, row in zip(ends_s, rows[1:], strict=False))
        assert ends_s[-1] <= run_s


def test_the_default_cohort_is_under_100_mb(tmp_path):
    plan = CohortPlan()
    sizes = []
    for index, site in enumerate(FOUR_MM):
        place = tmp_path / site.name
        place.mkdir()
        write_run(place, "run", render_run(make_subject(0, index), site, frames=plan.frames))
        sizes.append(sum(path.stat().st_size for path in place.iterdir()))
    runs = plan.subjects * len(plan.runs())
    assert 50e6 < runs * np.mean(sizes) < 100e6


# Command line


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`tools/make_cohort.py` as a person starts it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "make_cohort.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_the_tool_says_what_it_made_and_what_comes_next(tmp_path):
    out = tmp_path / "cohort"
    flags = ["--subjects", "2", "--sessions", "1", "--frames", "4", "--voxel-mm", "8", "--no-task", "--jobs", "1"]
    done = run_tool(str(out), *flags)
    assert done.returncode == 0, done.stderr
    assert "2 subjects (2 made" in done.stdout
    assert f"python jobs/ingest.py --source {out} --store STORE" in done.stdout
    assert "2/2" in done.stderr  # the progress bar
    assert nib.load(next(out.rglob("*bold.nii.gz"))).header.get_zooms()[:3] == (8, 8, 8)
    assert "was there already" in run_tool(str(out), *flags).stdout


def test_the_tool_refuses_with_the_reason(tmp_path):
    refused = run_tool(str(tmp_path / "cohort"), "--sites", "mars")
    assert refused.returncode == 2
    assert "no site 'mars'" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "cohort").exists()

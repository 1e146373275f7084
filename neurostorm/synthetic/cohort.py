"""A deterministic synthetic cohort on disk: BIDS derivatives of real NIfTI files with something to learn in them.

    CohortPlan -> make_cohort(folder)
        dataset_description.json, participants.tsv, participants.json, task-states_events.json, README
        sub-001/ses-01/func/sub-001_ses-01_task-rest_space-..._desc-preproc_bold.nii.gz  + .json
                                                 ..._desc-brain_mask.nii.gz
                            sub-001_ses-01_task-rest_desc-confounds_timeseries.tsv
                            sub-001_ses-01_task-states_...                               + _events.tsv

    people (synthetic_people) -> activity (synthetic_signal) -> images at a site (synthetic_render, synthetic_sites)

Subject k's files depend on the seed, k and the plan's flags, never on how many subjects or processes there are. Each
subject's folder appears under its name only when it is whole, so an interrupted cohort is continued by the same call.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurostorm import __version__
from neurostorm.store.events import PARAMETERS, framewise_displacement
from neurostorm.synthetic.people import (
    DIAGNOSES,
    PHENOTYPES,
    Subject,
    make_subject,
    participant_row,
    site_of,
)
from neurostorm.synthetic.render import SyntheticRun, render_run, write_bold, write_mask
from neurostorm.synthetic.signal import STATES
from neurostorm.synthetic.sites import Site, choose_sites

RECIPE = 1  # raise it when the same plan gives other bytes
NAME = "synthetic"
DESCRIPTION = "dataset_description.json"
README = """A synthetic cohort for testing NeuroSTORM: no person was scanned, and nothing about people follows from it.
Made by tools/make_cohort.py; the flags are in dataset_description.json.
"""


class CohortError(ValueError):
    """A cohort that cannot be made as asked; the message names the field or folder and the fix."""


@dataclass(frozen=True)
class CohortPlan:
    """What to make; the fields are the flags of `tools/make_cohort.py`.

    Attributes:
        subjects: number of people.
        sessions: rest runs of each, one per session.
        frames: frames per run at every site, whatever its TR.
        seed: all randomness.
        sites: "4mm" (every site with 4 mm voxels), "all" (their own voxels) or names joined by commas.
        voxel_mm: isotropic voxels for all sites, or None.
        task: whether session 1 also has a run of the five task states.
    """

    subjects: int = 24
    sessions: int = 2
    frames: int = 48
    seed: int = 0
    sites: str = "4mm"
    voxel_mm: float | None = None
    task: bool = True

    def __post_init__(self) -> None:
        ranges = {"subjects": (1, 9999), "sessions": (1, 99), "frames": (2, 10_000), "seed": (0, 2**32 - 1)}
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise CohortError(f"{name}: {getattr(self, name)} is outside {least}-{most}")
        try:
            self.scanners()
        except ValueError as error:
            raise CohortError(str(error)) from error

    def scanners(self) -> tuple[Site, ...]:
        """The sites that take part."""
        return choose_sites(self.sites, self.voxel_mm)

    def person(self, index: int) -> tuple[Subject, Site]:
        """Subject `index` (from 0) and where they are scanned."""
        return make_subject(self.seed, index), site_of(self.seed, index, self.scanners())

    def runs(self) -> list[tuple[int, str]]:
        """(session, task) of each run of every subject."""
        rest = [(session, "rest") for session in range(1, self.sessions + 1)]
        return [*rest, (1, "states")] if self.task else rest


@dataclass(frozen=True)
class CohortSummary:
    """What lies in the folder afterwards: subjects, BOLD runs, bytes of all files, and subjects made by this call."""

    subjects: int
    runs: int
    size_bytes: int
    made: int


def make_cohort(
    folder: Path, plan: CohortPlan, *, jobs: int = 1, on_subject: Callable[[str], None] | None = None
) -> CohortSummary:
    """Makes the cohort in `folder`, or what is still missing of it.

    Args:
        folder: new, empty, or an earlier cohort of the same plan (with as many subjects or fewer).
        plan: what to make.
        jobs: processes; 1 stays in this one. More are spawned: call it under `if __name__ == "__main__"`.
        on_subject: called with each subject's label when its files are in place (finished ones at once).

    Raises:
        CohortError: jobs below 1, a folder that holds something else, or a process that was killed.
    """
    if jobs < 1:
        raise CohortError(f"jobs: {jobs} is too few; use 1 or more")
    _claim(folder, plan)
    told = on_subject or (lambda label: None)
    missing = []
    for index in range(plan.subjects):
        label = make_subject(plan.seed, index).label
        if (folder / label).is_dir():
            told(label)
        else:
            missing.append(index)
    for label in _write_subjects(folder, plan, missing, jobs):
        told(label)
    files = [path for path in folder.rglob("*") if path.is_file()]
    size_bytes = sum(path.stat().st_size for path in files)
    return CohortSummary(plan.subjects, sum("_bold.nii" in path.name for path in files), size_bytes, len(missing))


def _write_subjects(folder: Path, plan: CohortPlan, indices: Sequence[int], jobs: int) -> Iterator[str]:
    """Writes these subjects with up to `jobs` processes; yields each label as its subject is finished."""
    if jobs == 1 or len(indices) < 2:
        for index in indices:
            yield write_subject(folder, plan, index)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that the caller's threads hold
    try:
        with ProcessPoolExecutor(min(jobs, len(indices)), mp_context=context) as pool:
            for done in as_completed([pool.submit(write_subject, folder, plan, index) for index in indices]):
                yield done.result()
    except BrokenProcessPool as error:
        fix = "run the same command again, with fewer jobs if memory ran out"
        raise CohortError(f"{folder}: a process that wrote it was killed; {fix}") from error


def write_subject(folder: Path, plan: CohortPlan, index: int) -> str:
    """Writes all runs of subject `index` under a temporary name, then renames; returns the label."""
    subject, site = plan.person(index)
    partial = folder / f".{subject.label}.{os.getpid()}"
    for session, task in plan.runs():
        place = partial / f"ses-{session:02d}" / "func"
        place.mkdir(parents=True, exist_ok=True)
        run = render_run(subject, site, session=session, task=task, frames=plan.frames)
        write_run(place, f"{subject.label}_ses-{session:02d}_task-{task}", run)
    partial.rename(folder / subject.label)
    return subject.label


def write_run(place: Path, stem: str, run: SyntheticRun) -> None:
    """Writes one run's image, sidecar, brain mask, confounds and, for a task, events into `place`."""
    image = f"{stem}_space-{run.site.space}"
    global_signal = write_bold(place / f"{image}_desc-preproc_bold.nii.gz", run)
    write_mask(place / f"{image}_desc-brain_mask.nii.gz", run)
    sidecar = {
        "RepetitionTime": run.site.tr_s,
        "TaskName": run.recording.task,
        "SkullStripped": True,
        "SliceTimingCorrected": False,
    }
    _write_json(place / f"{image}_desc-preproc_bold.json", sidecar)
    _write_json(place / f"{image}_desc-brain_mask.json", {"Type": "Brain"})
    columns = {
        "global_signal": global_signal,
        "framewise_displacement": framewise_displacement(run.motion),
        **dict(zip(PARAMETERS, run.motion, strict=True)),
    }
    _write_tsv(place / f"{stem}_desc-confounds_timeseries.tsv", _transposed(columns))
    if run.events:
        rows = [
            {"onset": f"{event.onset_s:.2f}", "duration": f"{event.duration_s:.2f}", "trial_type": event.state}
            for event in run.events
        ]
        _write_tsv(place / f"{stem}_events.tsv", rows)


def _claim(folder: Path, plan: CohortPlan) -> None:
    """Writes the dataset's own files; CohortError when the folder holds anything but this cohort or its beginning."""
    parameters: dict[str, Any] = asdict(plan) | {"recipe": RECIPE}
    described = folder / DESCRIPTION
    if described.is_file():
        earlier = _earlier_parameters(described)
        differing = sorted(key for key in parameters if key != "subjects" and earlier.get(key) != parameters[key])
        if differing or earlier.get("subjects", 0) > plan.subjects:
            keys = differing or ["subjects"]
            what = ", ".join(f"{key} {earlier.get(key)} (asked: {parameters[key]})" for key in keys)
            raise CohortError(f"{folder}: already holds another dataset: {what}; choose another folder or remove it")
    elif folder.is_dir() and any(folder.iterdir()):
        raise CohortError(f"{folder}: is neither empty nor a synthetic cohort; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(".sub-*"):  # left by an interrupted call
        shutil.rmtree(partial)
    people = [participant_row(*plan.person(index)) for index in range(plan.subjects)]
    _write_json(described, _description(parameters))
    _write_tsv(folder / "participants.tsv", people)
    _write_json(folder / "participants.json", _participants_sidecar(plan))
    if plan.task:
        _write_json(folder / "task-states_events.json", _events_sidecar())
    (folder / "README").write_text(README)


def _earlier_parameters(described: Path) -> Mapping[str, Any]:
    """The flags of the cohort that a folder's description names; {} for a foreign one."""
    try:
        content = json.loads(described.read_text())
        return content["GeneratedBy"][0]["Parameters"]
    except (json.JSONDecodeError, KeyError, IndexError, TypeError):
        return {}


def _description(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `dataset_description.json`."""
    made_by = {
        "Name": "neurostorm.synthetic.cohort",
        "Version": __version__,
        "Description": "synthetic BOLD in MNI space; no person was scanned",
        "Parameters": dict(parameters),
    }
    return {"Name": NAME, "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [made_by]}


def _participants_sidecar(plan: CohortPlan) -> dict[str, Any]:
    """The content of `participants.json`: what each column means, its unit or its levels."""
    sites = {
        site.name: f"{site.voxel_mm:g} mm, TR {site.tr_s:g} s, {site.space}, stored {site.orientation}, "
        f"label noise {site.label_noise:g}"
        for site in plan.scanners()
    }
    levels = {name: f"{name}, invented" for name in DIAGNOSES}
    scores = {
        name: {"Description": f"invented score, mean {mean:g}, SD {spread:g}", "Units": "points"}
        for name, (mean, spread, _) in PHENOTYPES.items()
    }
    return {
        "age": {"Description": "age", "Units": "years"},
        "sex": {"Description": "sex", "Levels": {"F": "female", "M": "male"}},
        "site": {"Description": "where the subject was scanned", "Levels": sites},
        "diagnosis": {"Description": "recorded diagnosis, label noise included", "Levels": levels},
        **scores,
        "family_id": {"Description": "subjects with the same value are siblings"},
    }


def _events_sidecar() -> dict[str, Any]:
    """The content of `task-states_events.json`, which holds for every subject's `_events.tsv`."""
    levels = {state: "drives " + ", ".join(f"{name} {by:+g}" for name, by in STATES[state].items()) for state in STATES}
    return {
        "onset": {"Description": "start of the block after the first frame", "Units": "s"},
        "duration": {"Description": "length of the block", "Units": "s"},
        "trial_type": {"Description": "state; strengths are in SDs of the resting fluctuation", "Levels": levels},
    }


def _transposed(columns: Mapping[str, NDArray[np.float64]]) -> list[dict[str, str]]:
    """Columns of numbers as rows of text; nan becomes BIDS's n/a."""
    texts = {name: ["n/a" if np.isnan(x) else f"{x:.6f}" for x in values] for name, values in columns.items()}
    return [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]


def _write_tsv(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Rows as a tab-separated table with a header."""
    lines: Iterable[Iterable[str]] = [rows[0].keys(), *(row.values() for row in rows)]
    path.write_text("".join("\t".join(line) + "\n" for line in lines))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n")

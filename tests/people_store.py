"""A small study whose effects are planted, and a small model of its grid: what evaluations are tested on.

sex        two halves of the brain go together (F) or against each other (M)       connectivity
age        how much a third region goes with the first                             connectivity
diagnosis  how much the head moved                                                 attributes of a run
person     a pattern of one's own, in both sessions                                covariance of places
state      the front (left) or the back (right) is active after an event           mean activity
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from scipy.ndimage import gaussian_filter

from neurostorm.data.plan.split import subject_hash
from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.hub.pretrained import save_pretrained
from neurostorm.store import (
    INT8_16,
    FrameStore,
    Grid,
    create_store,
    run_path,
    write_manifest,
    write_participants,
    write_run,
)

SHAPE, TR_S = (24, 24, 24), 0.8
PEOPLE, REST_FRAMES, TASK_FRAMES = 16, 24, 44
EVENTS = (("left", 0.8), ("right", 8.8), ("left", 16.8), ("right", 24.0))  # trial type, onset in seconds
EVENT_S, DELAY_FRAMES = 4.8, 7
CLIP_FRAMES = 4  # of the model


def sex_of(number: int) -> str:
    return "F" if number % 2 else "M"


def age_of(number: int) -> float:
    return 20.0 + 3.5 * (number * 5 % PEOPLE)


def diagnosis_of(number: int) -> str:
    return "patient" if number // 2 % 2 else "control"


def write_people(path: Path, people: int = PEOPLE) -> Path:
    """The store: for each person two sessions of rest and one run with events; 24^3 voxels, patches of 6."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    mask = sum(axis**2 for axis in axes) < 0.9
    x, y, z = (axis[mask] for axis in axes)
    create_store(path, grid=Grid("ball", SHAPE, 8.0, (-92.0, -92.0, -92.0)), mask=mask, tr_s=TR_S, recipe="test")
    for number in range(people):
        rng = np.random.default_rng([7, number])
        own = gaussian_filter(rng.standard_normal(SHAPE), 3)[mask]
        own *= 1.2 / own.std()
        for session in ("1", "2"):
            name = f"ses-{session}_task-rest"
            _write(path, number, session, "rest", name, rng, _rest(number, rng, own, x, y), [])
        events = [[onset_s, EVENT_S, kind] for kind, onset_s in EVENTS]
        _write(path, number, "1", "motor", "ses-1_task-motor", rng, _active(rng, y, len(z)), events)
    write_manifest(path)
    write_participants(path, participants(people))
    return path


def participants(people: int = PEOPLE) -> pa.Table:
    """Labels of everybody."""
    numbers = range(people)
    return pa.table(
        {
            "dataset": ["people"] * people,
            "participant_id": [f"sub-{n:03d}" for n in numbers],
            "age": [age_of(n) for n in numbers],
            "sex": [sex_of(n) for n in numbers],
            "diagnosis": [diagnosis_of(n) for n in numbers],
            "site": [f"site{n % 3}" for n in numbers],
            "family_id": [f"family{n // 2}" for n in numbers],
        }
    )


def write_model(
    folder: Path, store: Path, *, normalise: str | None = "voxel", seed: int = 0, subjects: tuple[str, ...] = ()
) -> Path:
    """A model of two stages on the store's grid with random weights; it says what `normalise` and `subjects` say."""
    opened = FrameStore.open(store)
    torch.manual_seed(seed)
    swin = SwinConfig((*SHAPE, CLIP_FRAMES), embed_dim=8, depths=(1, 1), heads=(1, 2))
    grid = {"name": opened.grid.name, "shape": list(SHAPE), "affine": opened.grid.affine.tolist()}
    extra = {"grid": grid, "tr_s": opened.tr_s, "mask_sha256": opened.mask_sha256}
    extra |= {"subjects_sha256": [subject_hash(subject) for subject in subjects]} if subjects else {}
    extra |= {} if normalise is None else {"normalise": normalise}
    save_pretrained(MaskedAutoencoder(swin, brain=torch.from_numpy(opened.mask)), folder, extra)
    return folder


def _rest(number: int, rng: np.random.Generator, own: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(T, V): left against or with right, the front a share of the left by age, one's own pattern, and noise."""
    left, front, personal = (_course(rng, REST_FRAMES) for _ in range(3))
    sign = 1.0 if sex_of(number) == "F" else -1.0
    share = (age_of(number) - 20) / 60
    front = share * left + np.sqrt(1 - share**2) * front
    signal = 2 * left[:, None] * np.where(x < -0.1, 1, np.where(x > 0.1, sign, 0)) * (y < 0.2)
    signal += 2 * front[:, None] * (y > 0.4)
    return signal + personal[:, None] * own + 0.7 * rng.standard_normal(signal.shape)


def _active(rng: np.random.Generator, y: np.ndarray, voxels: int) -> np.ndarray:
    signal = 0.7 * rng.standard_normal((TASK_FRAMES, voxels))
    for kind, onset_s in EVENTS:
        first = round(onset_s / TR_S) + DELAY_FRAMES
        signal[first : first + round(EVENT_S / TR_S)] += 2.0 * ((y > 0) == (kind == "left"))
    return signal


def _course(rng: np.random.Generator, frames: int) -> np.ndarray:
    course = gaussian_filter(rng.standard_normal(frames), 1)
    return (course - course.mean()) / course.std()


def _write(
    path: Path, number: int, session: str, task: str, name: str, rng: np.random.Generator, signal: np.ndarray,
    events: list[list[float | str]],
) -> None:  # fmt: skip
    mean, std = signal.mean(0), signal.std(0)
    moved = 0.4 if diagnosis_of(number) == "patient" else 0.1
    write_run(
        path,
        run_path("people", f"sub-{number:03d}", name),
        frames=INT8_16.encode((signal - mean) / std),
        mean=(100 + mean).astype(np.float32),
        std=std.astype(np.float32),
        attributes={
            "session": session, "task": task, "run_label": "", "entities": {"task": task, "session": session},
            "source": f"sub-{number:03d}_{name}.nii", "source_sha256": f"{number:032x}{session}{task:>31}",
            "source_tr_s": TR_S, "source_frames": len(signal), "tsnr_median": 50.0 + float(rng.normal()),
            "clipped_fraction": 0.0, "coverage": 1.0, "global_mean": 100.0, "global_std": float(signal.std()),
            "fd_mean_mm": moved + 0.02 * float(rng.random()), "events": events,
        },
    )  # fmt: skip

"""A small model on the ball store, two NIfTI files with a store of them, the embedding job without Ray, examples."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from neurostorm.config import EmbedConfig
from neurostorm.downstream.cohort import CohortRun
from neurostorm.downstream.embed.embed_run import Embedder
from neurostorm.downstream.embed.inputs import open_input, remember
from neurostorm.downstream.embed.job import task_of
from neurostorm.downstream.embed.parts import Assembled, assemble, unfinished
from neurostorm.downstream.tasks.examples import Examples, build_examples
from neurostorm.ingest.convert import ingest_run
from neurostorm.ingest.layouts.discover import discover
from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.hub.pretrained import save_pretrained
from neurostorm.store import FrameStore, create_store, write_manifest

FRAMES = 10  # a clip of the model; a run of the ball store has 48: four clips, and 8 frames left out


def extra_of(store: FrameStore, normalise: str) -> dict[str, Any]:
    """What pretraining writes beside a model."""
    grid = {"name": store.grid.name, "shape": list(store.grid.shape), "affine": store.grid.affine.tolist()}
    return {"normalise": normalise, "grid": grid, "tr_s": store.tr_s, "mask_sha256": store.mask_sha256}


def make_model_at(folder: Path, store: Path, *, normalise: str = "voxel", tokens: str = "dense", seed: int = 0) -> Path:
    """A saved model of two stages on the store's grid."""
    opened = FrameStore.open(store)
    torch.manual_seed(seed)
    swin = SwinConfig((*opened.grid.shape, FRAMES), embed_dim=8, depths=(1, 1), heads=(1, 2), tokens=tokens)
    model = MaskedAutoencoder(swin, brain=torch.from_numpy(opened.mask))
    save_pretrained(model, folder, extra_of(opened, normalise))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, ball_store: Path) -> Path:
    return make_model_at(tmp_path_factory.mktemp("model"), ball_store)


@pytest.fixture
def files(tmp_path: Path, ball_store: Path) -> tuple[Path, Path]:
    """Two BIDS runs of 23 and 7 frames as NIfTI files on the ball store's grid, and a store of them."""
    opened, root, store = FrameStore.open(ball_store), tmp_path / "bids", tmp_path / "of-files"
    generator = np.random.default_rng(0)
    for subject, frames in (("1", 23), ("2", 7)):
        image = nibabel.Nifti1Image(
            generator.normal(100, 10, (*opened.grid.shape, frames)).astype(np.float32), opened.grid.affine
        )
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = 0.8
        path = root / f"sub-{subject}/func/sub-{subject}_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(image, path)
    create_store(store, grid=opened.grid, mask=opened.mask, tr_s=0.8, recipe="test")
    for source in discover(root):
        ingest_run(source, store)
    write_manifest(store)
    return root, store


def embed_here(out: Path, **settings: Any) -> Assembled:
    """The whole job in this process, without Ray."""
    config = EmbedConfig(out=out, **settings)
    given = open_input(config)
    remember(out, given)
    embedder = Embedder(task_of(config, given, out))
    for run in unfinished(out, given.runs):
        embedder.embed(run)
    return assemble(out, given.runs, given.tr_s, "no part")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """`make_model_at`."""
    return make_model_at


@pytest.fixture(scope="session")
def here() -> Callable[..., Assembled]:
    """`embed_here`."""
    return embed_here


def subjects_of(targets: Sequence[float], *, clips: int = 3, classes: tuple[str, ...] = ()) -> Examples:
    """Examples whose units are subjects: one for each target, with one run and so many clips of 5 frames."""
    people = [f"d/sub-{number:03d}" for number in range(len(targets))]
    runs = [CohortRun(f"runs/{name}/rest", name, "", "rest", 5 * clips, f"sha of {name}") for name in people]
    cut = [(number, 5 * clip, name) for number, name in enumerate(people) for clip in range(clips)]
    same = dict(zip(people, people, strict=True))
    return build_examples(runs, 5, cut, same, dict(zip(people, targets, strict=True)), classes)


def runs_of(people: int, *, sessions: int = 2, clips: int = 3) -> Examples:
    """Examples whose units are runs: one of each session of each of the people, who are to be told apart."""
    names = [f"d/sub-{number:03d}" for number in range(people)]
    runs = [
        CohortRun(f"runs/{name}/ses-{session}", name, str(session), "rest", 5 * clips, f"sha of {name} {session}")
        for name in names
        for session in range(sessions)
    ]
    cut = [(number, 5 * clip, run.path) for number, run in enumerate(runs) for clip in range(clips)]
    subject_of = {run.path: run.subject for run in runs}
    target_of = {run.path: float(names.index(run.subject)) for run in runs}
    return build_examples(runs, 5, cut, subject_of, target_of, tuple(names))


@pytest.fixture(scope="session")
def make_subjects() -> Callable[..., Examples]:
    """`subjects_of`."""
    return subjects_of


@pytest.fixture(scope="session")
def make_runs() -> Callable[..., Examples]:
    """`runs_of`."""
    return runs_of


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small matrices on many threads take longer, and much longer where other processes have the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

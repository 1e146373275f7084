"""A small corpus for feeding and training: six subjects of smooth, slowly changing signal in a ball of voxels."""

import itertools
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# For every Ray that a test starts, here or in another process: a token of ours, nobody else's cluster, no reports. Ray
# reads these when it is imported and keeps the token for the life of a process, so no fixture can set them.
os.environ.pop("RAY_ADDRESS", None)
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}

import boto3
import numpy as np
import pytest
import ray
from moto.server import ThreadedMotoServer
from scipy.ndimage import gaussian_filter

from neurostorm.config import Config
from neurostorm.session import start_local
from neurostorm.store import Grid, create_store, quantise, run_path, write_manifest, write_run
from tests.people_store import write_people

SHAPE = (24, 24, 24)
_BUCKETS = itertools.count(1)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on loopback; the environment leads every process that starts later to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    os.environ |= settings | {"AWS_ENDPOINT_URL": address}
    yield address
    for name in (*settings, "AWS_ENDPOINT_URL"):
        os.environ.pop(name, None)
    server.stop()


@pytest.fixture
def make_bucket(s3_server: str) -> Callable[[], str]:
    """Makes empty buckets: `make_bucket()` -> "s3://bucket-3". Ask for it before a Ray, whose workers inherit it."""

    def make() -> str:
        name = f"bucket-{next(_BUCKETS)}"
        boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket=name)
        return f"s3://{name}"

    return make


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A local Ray with two cores, for one module."""
    start_local(num_cpus=2, logging_level=logging.ERROR, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def ball_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 24^3 voxels (4 x 4 x 4 patches of 6) with one run of 48 frames for each of six subjects."""
    path = tmp_path_factory.mktemp("corpus") / "ball.zarr"
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    mask = sum(axis**2 for axis in axes) < 0.9
    create_store(path, grid=Grid("ball", SHAPE, 8.0, (-92.0, -92.0, -92.0)), mask=mask, tr_s=0.8, recipe="test")
    for subject in range(6):
        rng = np.random.default_rng(subject)
        signal = gaussian_filter(rng.standard_normal((48, *SHAPE)), (2, 3, 3, 3))[:, mask]
        mean, std = signal.mean(0), signal.std(0)
        write_run(
            path,
            run_path("balls", f"sub-{subject}", "task-rest"),
            frames=quantise((signal - mean) / std),
            mean=(100 + mean).astype(np.float32),
            std=std.astype(np.float32),
            attributes={
                "session": "", "task": "rest", "run_label": "", "entities": {"task": "rest"},
                "source": f"sub-{subject}.nii", "source_sha256": f"{subject:064x}", "source_tr_s": 0.8,
                "source_frames": 48, "tsnr_median": 50.0, "clipped_fraction": 0.0, "coverage": 1.0,
                "global_mean": 100.0, "global_std": float(signal.std()),
            },
        )  # fmt: skip
    write_manifest(path)
    return path


@pytest.fixture(scope="session")
def people_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of sixteen people with planted effects, see people_store.py; not to be changed."""
    return write_people(tmp_path_factory.mktemp("study") / "people.zarr")


@pytest.fixture(scope="session")
def ball_config_in(ball_store: Path) -> Callable[..., Config]:
    """Builds a small configuration on the ball store; sections are overridden by keyword, `train={"lr": 1}`."""

    def make(output: Path, **overrides: dict[str, Any]) -> Config:
        tree: dict[str, dict[str, Any]] = {
            "run": {"output": output, "name": "test"},
            "data": {"store": ball_store, "clip_frames": 4, "held_out": 0.34, "val_clips": 6},
            "model": {"embed_dim": 8, "depths": (2, 1), "heads": (1, 2)},
            "mask": {"window": (2, 2, 2, 2)},
            "strd": {"enabled": True},
            "train": {"global_batch": 4, "micro_batch": 1, "lr": 3e-3, "epochs": 1, "log_every": 2},
            "scale": {"workers": 2, "cpus_per_worker": 0.5},
            "tracking": {"clip_ledger": True},
        }
        for section, fields in overrides.items():
            tree.setdefault(section, {}).update(fields)
        return Config.model_validate(tree)

    return make


@pytest.fixture
def ball_config(ball_config_in: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """`ball_config_in` this test's own folder."""
    return partial(ball_config_in, tmp_path / "outputs")

"""A small corpus for feeding and training: six subjects of smooth, slowly changing signal in a ball of voxels.

The process that hands out the tests loads this file too and runs none of them: what takes seconds is loaded by whoever
asks for it.
"""

import itertools
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

# For every Ray that a test starts, here or in another process: a token of ours, nobody else's cluster, no reports. Ray
# reads these when it is imported and keeps the token for the life of a process, so no fixture can set them.
os.environ.pop("RAY_ADDRESS", None)
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}

import pytest

if TYPE_CHECKING:
    from neurostorm.config import Config

_BUCKETS = itertools.count(1)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on loopback; the environment leads every process that starts later to it."""
    from moto.server import ThreadedMotoServer

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
    import boto3

    def make() -> str:
        name = f"bucket-{next(_BUCKETS)}"
        boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket=name)
        return f"s3://{name}"

    return make


@pytest.fixture(scope="module")
def local_ray(s3_server: str) -> None:
    """A local Ray with two cores, which the modules of a folder share; one that needs its own shuts it down.

    Its workers inherit where the S3 server is.
    """
    import ray

    from neurostorm.runtime.session import start_local

    if not ray.is_initialized():
        start_local(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        logging.getLogger("ray.data").setLevel(logging.ERROR)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends Ray after a folder's last test: while nobody uses it, it takes a tenth of a core."""
    if (nextitem is None or nextitem.path.parent != item.path.parent) and "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture(scope="session")
def ball_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 24^3 voxels (4 x 4 x 4 patches of 6) with one run of 48 frames for each of six subjects."""
    from chaos.job import make_store

    return make_store(tmp_path_factory.mktemp("corpus") / "ball.zarr")


@pytest.fixture(scope="session")
def people_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of sixteen people with planted effects, see people_store.py; not to be changed."""
    from tests.people_store import write_people

    return write_people(tmp_path_factory.mktemp("study") / "people.zarr")


@pytest.fixture(scope="session")
def ball_config_in(ball_store: Path) -> Callable[..., "Config"]:
    """Builds a small configuration on the ball store; sections are overridden by keyword, `train={"lr": 1}`."""
    from chaos.job import make_config

    return partial(make_config, ball_store)


@pytest.fixture
def ball_config(ball_config_in: Callable[..., "Config"], tmp_path: Path) -> Callable[..., "Config"]:
    """`ball_config_in` this test's own folder."""
    return partial(ball_config_in, tmp_path / "outputs")

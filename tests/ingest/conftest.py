"""A phantom that is a function of world mm and seconds, written as NIfTI; a small store for it; a bad line to S3."""

import http.client
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from neurostorm.ingest.convert import RECIPE
from neurostorm.ingest.layouts.discover import Source
from neurostorm.store import Grid, create_store

SMALL = Grid("small", (20, 24, 20), 8.0, (-76.0, -110.0, -70.0))
PERIOD_S = 20.0


def brain(points_mm: np.ndarray) -> np.ndarray:
    """Whether points (N, 3) lie in an ellipsoid the size of a brain."""
    return (((points_mm - (0, -18, 6)) / (66, 82, 60)) ** 2).sum(axis=1) < 1


def mean_of(points_mm: np.ndarray) -> np.ndarray:
    """A smooth mean image without any symmetry, (N,)."""
    x, y, z = points_mm.T
    return 1000 + 3 * x - 2 * y + 1.5 * z + 150 * np.sin(x / 25 + y / 40) + 100 * np.cos(z / 30 - x / 60)


def course_of(points_mm: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """A slow wave that travels from left to right, (T, N); amplitude 20."""
    return 20 * np.sin(2 * np.pi * times_s[:, None] / PERIOD_S + points_mm[:, 0] / 40)


def voxel_centres(shape: Iterable[int], affine: np.ndarray) -> np.ndarray:
    """World mm of every voxel, (N, 3), the array's first axis fastest."""
    index = np.indices(tuple(shape)).reshape(3, -1, order="F").T
    return index @ affine[:3, :3].T + affine[:3, 3]


def phantom(shape: tuple[int, int, int], affine: np.ndarray, frames: int, tr_s: float) -> np.ndarray:
    """The phantom on a grid, (X, Y, Z, T) float32."""
    points = voxel_centres(shape, affine)
    values = mean_of(points) + course_of(points, tr_s * np.arange(frames))
    return values.T.reshape(*shape, frames, order="F").astype(np.float32)


def save_nifti(
    path: Path,
    data: np.ndarray,
    affine: np.ndarray,
    *,
    tr_s: float = 0.8,
    units: tuple[str, str] = ("mm", "sec"),
    codes: tuple[int, int] = (4, 4),
    slope: float | None = None,
) -> Path:
    """Write an image; `tr_s` goes into the header as it is, whatever `units` says."""
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_xyzt_units(*units)
    if data.ndim > 3:
        image.header["pixdim"][4] = tr_s
    image.set_sform(affine, codes[0])
    image.set_qform(affine, codes[1])
    if slope is not None:
        image.header.set_slope_inter(slope, 5.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def affine_of(axes: str, step_mm: float, shape: tuple[int, int, int], centre_mm: tuple[float, ...]) -> np.ndarray:
    """An affine by orientation code ("LAS", "AIL", ...), the array's middle at `centre_mm`."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, letter in enumerate(axes):
        row = next(row for row, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        affine[row, column] = step_mm * (1 if letter in "RAS" else -1)
    affine[:3, 3] = np.asarray(centre_mm) - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return affine


@pytest.fixture(scope="session")
def kit() -> Any:
    """The helpers of this file, as one object (test modules cannot import a conftest)."""

    class Kit:
        small, period_s = SMALL, PERIOD_S
        brain, mean_of, course_of = staticmethod(brain), staticmethod(mean_of), staticmethod(course_of)
        voxel_centres, phantom = staticmethod(voxel_centres), staticmethod(phantom)
        save, affine_of = staticmethod(save_nifti), staticmethod(affine_of)

    return Kit


@pytest.fixture(scope="session")
def small_mask() -> np.ndarray:
    """The brain on the small grid, bool (X, Y, Z)."""
    index = np.argwhere(np.ones(SMALL.shape, bool))
    return brain(index * SMALL.voxel_mm + SMALL.origin_mm).reshape(SMALL.shape)


@pytest.fixture
def store(tmp_path: Path, small_mask: np.ndarray) -> Path:
    """An empty store on the small grid, TR .8 s."""
    path = tmp_path / "store"
    create_store(path, grid=SMALL, mask=small_mask, tr_s=0.8, recipe=RECIPE)
    return path


@pytest.fixture(scope="session")
def source_of() -> Callable[..., Source]:
    """Builds the Source of a file, as `discover` would."""

    def make(path: Path, **facts: Any) -> Source:
        known = {"dataset": "test", "subject": f"sub-{path.name.split('.')[0]}", "session": "", "task": "rest"}
        return Source(path, **(known | {"run_label": "", "stem": "task-rest", "format": "plain"} | facts))

    return make


class Proxy(ThreadingHTTPServer):
    """Stands before the S3 server and misbehaves: `plan(method, key)` says how for each request.

    "" passes it on; "503" refuses it; "stall" sends half of the answer, and the rest never; "swallow" takes the request
    and neither passes it on nor answers.
    """

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server = server.removeprefix("http://")
        self.plan: Callable[[str, str], str] = lambda method, key: ""
        self.seen: list[tuple[str, str]] = []
        self.sent_bytes = 0
        self.closing = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def count(self, method: str, part: str) -> int:
        """Requests of a method whose key holds `part`."""
        return sum(one == method and part in key for one, key in self.seen)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path))
        how = self.server.plan(self.command, self.path)
        if how == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if how == "swallow":
            self.server.closing.wait(20)
            self.close_connection = True
            return
        there = http.client.HTTPConnection(self.server.server, timeout=30)
        there.request(self.command, self.path, body, dict(self.headers))
        got = there.getresponse()
        data = got.read()
        self.server.sent_bytes += len(data)
        self.send_response(got.status)
        for name, value in got.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                self.send_header(name, value)
        length = got.getheader("Content-Length") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if how == "stall" else data)
        if how == "stall":
            self.server.closing.wait(20)
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at `seen`."""


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that clients of buckets made from now on go through, with short pauses and few retries."""
    server = Proxy(s3_server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    monkeypatch.setattr("neurostorm.io.object_requests.RETRY_S", 3.0)
    monkeypatch.setattr("neurostorm.io.object_requests.REQUEST_TIMEOUT_S", 1.0)
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()

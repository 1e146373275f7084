"""Faults of the storage under the store: it is gone for a while, or refuses what it let in before.

store-away     the store's folder is gone for 20 s, as a file system that is not mounted    the run waits for it
store-denied   an object store answers 403 for 20 s, as when credentials have expired       the run waits for it

No clip is lost, no step is done again and no failure is used up. The object store is a server on loopback that gives
the files of the store's folder.
"""

import re
import shutil
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from chaos.faults import Fault
from chaos.scene import Scene
from neurostorm.io.paths import to_path

AWAY_S = 20.0
BUCKET = "chaos"
WAITS = "waiting for it"  # what a worker says when its storage is away


class FolderServer:
    """The files of a folder as an S3 bucket to read from; `refused` makes it answer 403."""

    def __init__(self, folder: Path) -> None:
        self.refused = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._answer(self, folder)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Ends it."""
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, folder: Path) -> None:
        file = folder / unquote(urlsplit(request.path).path).removeprefix(f"/{BUCKET}").lstrip("/")
        if self.refused:
            return _send(request, 403, _error("ExpiredToken", "The provided token has expired."))
        if not file.is_file():
            return _send(request, 404, _error("NoSuchKey", "The specified key does not exist."))
        data = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if wanted is None:
            return _send(request, 200, data)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        return _send(request, 206, data[first : last + 1], f"bytes {first}-{last}/{len(data)}")


def _error(code: str, message: str) -> bytes:
    return f"<?xml version='1.0'?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


def _send(request: BaseHTTPRequestHandler, status: int, data: bytes, part: str = "") -> None:
    request.send_response_only(status)
    request.send_header("Content-Length", str(len(data)))
    request.send_header("Last-Modified", "Tue, 01 Dec 2026 00:00:00 GMT")
    request.send_header("ETag", '"1"')
    if part:
        request.send_header("Content-Range", part)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)


def own_store(scene: Scene) -> Callable[[], None]:
    """A store of its own, as it is moved."""
    store = scene.setting.folder / f"{scene.config.run.name}-store"
    shutil.copytree(scene.setting.store, store)
    _use(scene, store)
    return lambda: None


def served_store(scene: Scene) -> Callable[[], None]:
    """The store as it is served by an object store."""
    server = scene.server = FolderServer(scene.setting.store)
    _use(scene, to_path(f"s3://{BUCKET}"))
    scene.environment |= {
        "AWS_ENDPOINT_URL": server.address, "AWS_ACCESS_KEY_ID": "chaos", "AWS_SECRET_ACCESS_KEY": "chaos",
        "AWS_REGION": "us-east-1",
    }  # fmt: skip
    return server.stop


def move_store(scene: Scene) -> None:
    store = Path(str(scene.config.data.store))
    aside = store.with_name(f"{store.name}-aside")
    store.rename(aside)
    try:
        _wait(scene)
    finally:
        aside.rename(store)


def refuse_store(scene: Scene) -> None:
    scene.server.refused = True
    try:
        _wait(scene)
    finally:
        scene.server.refused = False


def _wait(scene: Scene) -> None:
    """Until the run stands and says why, and a while more."""
    began_s = time.monotonic()
    before = scene.job.output().count(WAITS)
    scene.struck(at_s=began_s)
    scene.job.wait_for(lambda: scene.job.output().count(WAITS) > before, "a word that the store is waited for")
    time.sleep(max(0.0, began_s + AWAY_S - time.monotonic()))


def _use(scene: Scene, store: Any) -> None:
    scene.config = scene.config.model_copy(update={"data": scene.config.data.model_copy(update={"store": store})})


def nothing_failed(scene: Scene) -> None:
    """No worker group was started again."""
    scene.note("[FailurePolicy]" not in scene.job.output(), "a failure was used up")


OF_STORAGE: dict[str, Fault] = {
    "store-away": Fault(move_store, allowed=0, prepare=own_store, check=nothing_failed),
    "store-denied": Fault(refuse_store, allowed=0, prepare=served_store, check=nothing_failed),
}

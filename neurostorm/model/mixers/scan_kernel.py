"""The selective scan in C: `scan.c`, compiled once per machine and called from threads.

    scan.c --C compiler, for this processor--> CACHE/neurostorm/scan-<hash>.so --ctypes--> windows shared by threads

In plain torch every token of a scan is an operation of its own, and every state is read and written from memory several
times; here states stay in registers and a scan is one pass. Without a compiler, or with NEUROSTORM_SCAN=torch in the
environment, ``scan.py`` does the same in torch, in about four times as long.
"""

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from neurostorm.model.ops.dispatch import SCAN, on

STATES = 16  # per channel, fixed in scan.c
_SOURCE = Path(__file__).with_name("scan.c")
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-w")
_COMPILE_S = 120

_log = logging.getLogger(__name__)


def applies_to(u: Tensor, states: int) -> bool:
    """Whether the kernel scans tensors like ``u``: float32 on a CPU, and a compiler was found."""
    return u.device.type == "cpu" and u.dtype == torch.float32 and states == STATES and _library() is not None


def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y (L, W, D); the arguments are those of ``scan.ScanInputs``."""
    inputs = [tensor.contiguous() for tensor in (u, delta, A, B, C)]
    y = torch.empty_like(inputs[0])
    _over_windows("scan_forward", y.shape, [*inputs, y])
    return y


def backward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y again, and the gradients of the five inputs. MemoryError where a window's states find no room."""
    inputs = [tensor.contiguous() for tensor in (u, delta, A, B, C)]
    y, du, ddelta, dB, dC = (torch.empty_like(inputs[i]) for i in (0, 0, 1, 3, 4))
    dA = A.new_empty(u.shape[1], *A.shape)  # of each window, so that the sum is the same for any number of threads
    _over_windows("scan_backward", y.shape, [*inputs, dy.contiguous(), y, du, ddelta, dA, dB, dC])
    return y, [du, ddelta, dA.sum(0), dB, dC]


def _over_windows(name: str, shape: torch.Size, tensors: list[Tensor]) -> None:
    """Call a function of the library on all windows, shared by as many threads as torch has."""
    tokens, windows, channels = shape
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    function: Callable[..., int] = getattr(_library(), name)

    def call(first: int, last: int) -> None:
        if function(*map(ctypes.c_int64, (tokens, windows, channels, first, last)), *pointers):
            raise MemoryError(f"selective scan of {tokens} tokens: no memory for the states of a window")

    threads = max(1, min(torch.get_num_threads(), windows))
    ends = [windows * i // threads for i in range(threads + 1)]
    others = [_threads(os.getpid()).submit(call, *ends[i : i + 2]) for i in range(1, threads)]
    call(*ends[:2])
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _threads(_process: int) -> ThreadPoolExecutor:
    """The other threads of this process; a forked one starts its own."""
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), thread_name_prefix="scan")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The compiled kernel, or None: switched off, no compiler, or it failed (said once)."""
    if not on(SCAN):
        return None
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        _log.info("no C compiler (cc, gcc, clang): Mamba scans in plain torch, which takes several times as long")
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        _log.warning("%s could not compile %s (%s): Mamba scans in plain torch", compiler, _SOURCE.name, said)
        return None
    library.scan_forward.restype = None
    library.scan_backward.restype = ctypes.c_int
    return library


def _compiled(compiler: str) -> Path:
    """The shared library of this source, compiler and processor; compiled if it is not in the cache."""
    made_of = [_SOURCE.read_text(), compiler, *_FLAGS, platform.machine(), _processor()]
    name = f"scan-{hashlib.sha256('|'.join(made_of).encode()).hexdigest()[:16]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neurostorm"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # no home folder
        writable = False
    if not writable:
        folder = Path(tempfile.mkdtemp(prefix="neurostorm-"))  # this process's alone
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / name
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [compiler, *_FLAGS, "-o", str(unfinished), str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S)
        unfinished.replace(library)  # workers of a machine may compile at the same time
    return library


def _processor() -> str:
    """What tells processors apart for which a compiler writes different code: a home folder may serve many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))

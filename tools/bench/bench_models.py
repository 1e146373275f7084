"""The models that `bench/step.py` times, each in a process of its own.

    Worker(build, ...) --pipe--> a process: build(...) -> Step or Side;  ask("round") -> seconds of the parts of a step

A Step is a training step as a run takes it: packed patches, autocast, redundancy dropout, AdamW. A Side is one side of
the comparison: an encoder, forward and backward from a volume.
"""

import multiprocessing
import platform
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baseline_swin import BaselineEncoder
from torch import Tensor, nn

from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.cost import clip_cost, copy_rate, measured_peak
from neurostorm.model.encoder import SwinEncoder, compile_blocks
from neurostorm.model.masking.masks import MaskConfig
from neurostorm.model.strd.dropout import StrdConfig

MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """What a process builds, and how it runs; of plain values, so that no process loads what makes them."""

    shape: SwinConfig
    brain: np.ndarray  # bool (X, Y, Z)
    mask: MaskConfig
    strd: StrdConfig
    loss_on: str
    decoder: str = "paper"  # or "light"
    model: str = "mae"  # or "encoder"
    device: str = "cpu"
    threads: int = 1
    dtype: str = "fp32"  # or "bf16"
    batch: int = 1
    compiled: bool = False  # torch.compile of every block


class Step:
    """A training step of the preset's model on random clips."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, start(setting)
        shape, brain = setting.shape, torch.from_numpy(setting.brain)
        torch.manual_seed(0)
        if setting.model == "mae":
            built: SwinEncoder = MaskedAutoencoder(
                shape, setting.mask, setting.strd, setting.loss_on, brain, decoder=setting.decoder
            )
        else:
            built = SwinEncoder(shape, setting.strd, brain)
        self.model = built.to(self.device).train()
        if setting.compiled:
            compile_blocks(built)
        self.optimizer = torch.optim.AdamW(built.parameters(), lr=1e-4, fused=True)
        rows = built.tokens_per_frame * shape.frames
        self.patches = torch.randn(setting.batch, rows, shape.patch_voxels, device=self.device)
        self.cast = setting.dtype == "bf16"
        self.before_mib = peak_mib(self.device)

    def round(self) -> tuple[float, float, float]:
        """Seconds of forward pass, backward pass and optimizer."""
        self.optimizer.zero_grad()
        lap = Laps(self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if self.cast else nullcontext():
            loss = self.loss()
        lap()
        loss.backward()
        lap()
        self.optimizer.step()
        lap()
        return lap.seconds[0], lap.seconds[1], lap.seconds[2]

    def loss(self) -> Tensor:
        if isinstance(self.model, MaskedAutoencoder):
            return self.model.forward_patches(self.patches).loss
        return self.model.feature_tokens(self.patches).float().square().mean()

    def figures(self) -> dict[str, Any]:
        """What does not come from the clock of a step; memory is read before the machine's rates are measured."""
        dtype, cost = DTYPES[self.setting.dtype], clip_cost(self.model)
        return {
            "mixer": self.model.config.mixer, "layout": self.model.config.layout, "tokens": self.model.config.tokens,
            "decoder": self.setting.decoder if self.setting.model == "mae" else "no",
            "parameters": cost.parameters, "tokens_per_clip": cost.tokens,
            "peak_mib": self.peak_mib(),
            "train_flops_per_clip": cost.train_flops, "forward_flops_per_clip": asdict(cost.forward),
            "moved_bytes": cost.moved_bytes(self.setting.batch, dtype.itemsize),
            "matmul_flops_per_s": measured_peak(self.device, dtype), "copy_bytes_per_s": copy_rate(self.device),
            "device_name": device_name(self.device),
        }  # fmt: skip

    def peak_mib(self) -> float:
        return peak_mib(self.device)

    def step_mib(self) -> float:
        """Peak memory above what the process held with the model and its clip, before the first step."""
        return peak_mib(self.device) - self.before_mib


class Side:
    """One side of the comparison, "baseline", "dense" or "brain": an encoder and a clip, the same for all sides."""

    def __init__(self, setting: Setting, side: str) -> None:
        self.device = start(setting)
        shape, brain = setting.shape, torch.from_numpy(setting.brain)
        torch.manual_seed(0)
        self.clip = (torch.randn(1, 1, *shape.img_size) * brain[..., None]).to(self.device)
        encoder = SwinEncoder(shape, brain=brain)
        with torch.no_grad():
            for parameter in encoder.parameters():  # no bias is zero any more, so that the check sees them all
                parameter.add_(0.02 * torch.randn_like(parameter))
        sides: dict[str, Callable[[], nn.Module]] = {
            "baseline": lambda: BaselineEncoder(shape),
            "dense": lambda: SwinEncoder(shape, brain=brain),
            "brain": lambda: SwinEncoder(replace(shape, tokens="brain"), brain=brain),
        }
        self.model = sides[side]()
        self.model.load_state_dict(encoder.state_dict())
        self.model.to(self.device)
        self.features = self.clip

    def round(self) -> tuple[float, float]:
        """Seconds of forward and backward pass."""
        self.model.zero_grad()
        lap = Laps(self.device)
        features = self.model(self.clip)
        lap()
        features.square().mean().backward()
        lap()
        self.features = features.detach()
        return lap.seconds[0], lap.seconds[1]

    def outcome(self) -> dict[str, Tensor]:
        """Features and all gradients of a round."""
        self.round()
        gradients = [p.grad.flatten() for _, p in sorted(self.model.named_parameters()) if p.grad is not None]
        return {"features": self.features.cpu(), "gradients": torch.cat(gradients).cpu()}

    def peak_mib(self) -> float:
        return peak_mib(self.device)

    def device_name(self) -> str:
        return device_name(self.device)


class Laps:
    """A stopwatch: each call notes the seconds since the last one, once the device has done its work."""

    def __init__(self, device: torch.device) -> None:
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.seconds: list[float] = []
        self.wait()
        self.since = time.perf_counter()

    def __call__(self) -> None:
        self.wait()
        now = time.perf_counter()
        self.seconds.append(now - self.since)
        self.since = now


class Worker:
    """A process that builds one model and answers questions about it: the names of methods without arguments."""

    def __init__(self, build: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, build, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, question: str) -> Any:
        """The answer. RuntimeError when the process has ended, having said why on stderr."""
        try:
            self.pipe.send(question)
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            raise RuntimeError(f"a model's process ended with status {self.process.exitcode}") from error

    def close(self) -> None:
        """Ends the process."""
        self.pipe.close()
        self.process.join()


def serve(pipe: Connection, build: Callable[..., Any], *arguments: Any) -> None:
    """Build and answer until the other end closes."""
    work = build(*arguments)
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(work, question)())


def start(setting: Setting) -> torch.device:
    """The setting's device, with the setting's threads."""
    torch.set_num_threads(setting.threads)
    return torch.device(setting.device)


def peak_mib(device: torch.device) -> float:
    """Peak memory so far: of the CUDA allocator, else of the whole process with torch and all its libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure would start with that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())

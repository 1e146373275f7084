"""DeepSpeed behind the five things that the loop needs: call, backward, step, save and load, full weights.

    model, optimizer -> Engine (ZeRO 0-3, fp32 or autocast to bf16) -> engine(patches) -> backward -> step(lr)

A step whose gradients are not finite on any rank changes no parameter on all of them: with ZeRO 1-3 DeepSpeed compares
the global gradient norm before it steps, for ZeRO 0 `step` does the same here. With ZeRO 1-3, which part the gradients,
that norm is added up in float64, so that any number of workers clips alike. Parameters stay fp32, with bf16 through
autocast at every stage: bf16 parameters with stage 0 train wrongly in this DeepSpeed, and save little at this size.
Gradients are accumulated over micro-batches and reduced over ranks in fp32.
"""

import math
import os
import pickle
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neurostorm.config import TrainConfig
from neurostorm.train.checkpoint.restored_state import write_state
from neurostorm.train.checkpoint.saved_state import read_state
from neurostorm.train.checkpoint.unpickle import tensors_only
from neurostorm.train.optimizer import WHOLE, build_optimizer, parameter_groups


@dataclass(frozen=True)
class StepOutcome:
    """Whether the parameters changed, and the global gradient norm before clipping (inf when they did not)."""

    applied: bool
    gradient_norm: float


def deepspeed_settings(train: TrainConfig, clips_per_worker: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for ours."""
    bf16 = train.dtype == "bf16"
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": clips_per_worker // train.micro_batch,
        "gradient_clipping": train.clip_norm,
        "zero_optimization": {"stage": train.zero_stage, "reduce_bucket_size": 50_000_000},
        "zero_allow_untested_optimizer": True,
        # Of the modules in the list DeepSpeed accumulates and reduces gradients in bf16; its default names linear and
        # convolutional layers. In fp32 a reduction moves twice the bytes, and so does gathering weights at stage 3.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 10**9,
        "checkpoint": {"use_node_local_storage": False},
    }


def import_deepspeed() -> Any:
    """deepspeed, prepared for the device: on the CPU its shared-memory op is not compiled (only inference needs it).

    It would load MLflow, for an autotuner that nobody here starts: 2 s of every worker's start.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    modules: dict[str, Any] = sys.modules
    hidden = modules.setdefault("mlflow", None) is None
    try:
        import deepspeed
    finally:
        if hidden:
            del modules["mlflow"]

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def norm_over_ranks(device: torch.device, gradients: Iterable[Tensor], _: Any) -> Tensor:
    """The L2 norm (fp32 scalar) of gradients that are parted among the ranks; a collective call, of DeepSpeed's form.

    DeepSpeed's own adds the ranks' squares in fp32: its last bit depends on where the parts are cut, and a clipped run
    that changes its number of workers would leave the path of a run that does not. In float64 it is lost when the norm
    is rounded.
    """
    none = torch.zeros((), dtype=torch.float64, device=device)  # a rank may have no part
    norms = [torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64) for gradient in gradients]
    total = torch.stack([none, *norms]).square().sum()
    dist.all_reduce(total)
    return total.sqrt().float()


class Engine:
    """A model under DeepSpeed; needs an initialised torch.distributed process group."""

    def __init__(self, model: nn.Module, train: TrainConfig, clips_per_worker: int, device: torch.device) -> None:
        deepspeed = import_deepspeed()
        groups = parameter_groups(model, train.weight_decay)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._trained = [names[parameter] for group in groups for parameter in group["params"]]
        self._converts = train.optimizer not in WHOLE  # such a state is whole on every rank, and of its own form
        optimizer = build_optimizer(train.optimizer, groups, lr=train.lr, betas=train.betas, fused=True)
        self._stage = train.zero_stage
        self._engine, *_ = deepspeed.initialize(
            model=model.to(device),
            optimizer=optimizer,
            config=deepspeed_settings(train, clips_per_worker),
            dist_init_required=False,
        )
        if self._stage > 0:
            self._engine.optimizer.get_grad_norm_direct = partial(norm_over_ranks, device)

    @property
    def module(self) -> nn.Module:
        """The model inside; with ZeRO 3 its parameters are shards."""
        module: nn.Module = self._engine.module
        return module

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The model's forward pass."""
        return self._engine(*arguments, **named)

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of the model."""
        self._engine.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of `loss` / accumulation, added to those of the step's earlier micro-batches.

        Between micro-batches DeepSpeed's own step only counts, so it is called here; the last one is left to `step`.
        """
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, lr: float) -> StepOutcome:
        """One optimizer step at learning rate `lr`, or none on any rank if a gradient is not finite."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            norm = self._gradient_norm()
            if not math.isfinite(norm):
                self._engine.zero_grad()
                self._engine.micro_steps += 1  # all that the engine's own step would have kept
                return StepOutcome(False, norm)
            self._engine.step()
            return StepOutcome(True, norm)
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        return StepOutcome(applied, float(self._engine.get_global_grad_norm()) if applied else float("inf"))

    def _gradient_norm(self) -> float:
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def save(self, folder: Path) -> None:
        """Every rank's shard of parameters and optimiser state into `folder`; a collective call."""
        self._engine.save_checkpoint(str(folder), tag="state", save_latest=False)

    def load(self, folder: Path, convert: bool = False) -> None:
        """Restores what `save` wrote; a collective call.

        Args:
            folder: that of `save`.
            convert: it was saved at another ZeRO stage or by another number of ranks; then every rank needs the files
                of all ranks.

        Raises:
            RuntimeError: there is nothing of this rank, or of this model; or a file holds anything but what `save`
                writes, which is refused before any of it runs.
        """
        try:
            with tensors_only():
                if convert and self._converts:
                    write_state(self._engine, self._stage, read_state(folder / "state", self._trained))
                else:
                    self._load(folder)
        except pickle.UnpicklingError as error:
            raise RuntimeError(
                f"{folder}: refused, a file holds more than tensors and plain values, so this run did not write it; "
                f"remove the checkpoint and its copy to resume from the one before. ({str(error).splitlines()[0]})"
            ) from error

    def _load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag="state")
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no state of this rank; was it saved with as many workers?")

    def full_weights(self) -> dict[str, torch.Tensor]:
        """The model's state dict with whole fp32 tensors on the CPU, at every stage; a collective call."""
        state = {name: value.detach().to("cpu", copy=True) for name, value in self.module.state_dict().items()}
        if self._stage == 3:
            from deepspeed.utils import safe_get_full_fp32_param

            for name, parameter in self.module.named_parameters():
                whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else self._gathered(parameter)
                state[name] = whole.detach().float().to("cpu", copy=True)
        return state

    @staticmethod
    def _gathered(parameter: nn.Parameter) -> torch.Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

"""Optimizers by name: what `train.optimizer` chooses, for pretraining, contrastive pretraining and fine-tuning alike.

    build_optimizer("adamw", groups, lr) -> torch.optim.AdamW
    build_optimizer("muon", groups, lr)  -> Muon for the hidden matrices, AdamW for all else, as one optimizer

A new optimizer is a function and its entry in OPTIMIZERS. One that needs whole parameters is named in WHOLE: it goes
with ZeRO stage 0 alone, as other stages give each worker a part of every parameter.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Group = dict[str, Any]
_ENDS = ("patch_embed", "pred.")  # in names of the first and last layers, which Muon leaves to AdamW


def decayed(name: str, parameter: Tensor) -> bool:
    """Weight decay acts on matrices only: not on norms, biases, embeddings, mask tokens, prompts, filters and rates."""
    return parameter.ndim == 2 and not name.endswith(("mask_token", "A_log"))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Two groups: decayed matrices and the rest; frozen parameters are in neither.

    Each has `params`, `weight_decay`, and `hidden`: which of its parameters are matrices of hidden layers.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for matrices, decay in ((True, weight_decay), (False, 0.0)):
        chosen = [(name, parameter) for name, parameter in named if decayed(name, parameter) == matrices]
        hidden = [matrices and not any(end in name for end in _ENDS) for name, _ in chosen]
        groups.append({"params": [parameter for _, parameter in chosen], "weight_decay": decay, "hidden": hidden})
    return groups


def build_optimizer(
    name: str,
    groups: Iterable[Group],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """The optimizer `name` over `parameter_groups`, which may have settings of their own, such as `lr`.

    Args:
        name: key in `OPTIMIZERS`.
        groups: see `parameter_groups`.
        lr: peak learning rate of groups that have none.
        betas: of AdamW.
        fused: AdamW's fused kernels.
    """
    return OPTIMIZERS[name](list(groups), lr, betas, fused)


def _adamw(groups: list[Group], lr: float, betas: tuple[float, float], fused: bool | None) -> torch.optim.Optimizer:
    plain = [{key: value for key, value in group.items() if key != "hidden"} for group in groups]
    return torch.optim.AdamW(plain, lr=lr, betas=betas, fused=fused)


def _muon(groups: list[Group], lr: float, betas: tuple[float, float], fused: bool | None) -> torch.optim.Optimizer:
    matrices: list[Group] = []
    rest: list[Group] = []
    for group in groups:
        for wanted, target in ((True, matrices), (False, rest)):
            chosen = [p for p, hidden in zip(group["params"], group["hidden"], strict=True) if hidden == wanted]
            if chosen:
                target.append({**{key: value for key, value in group.items() if key != "hidden"}, "params": chosen})
    return MuonWithAdamW(matrices, rest, lr=lr, betas=betas, fused=fused)


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon (Jordan et al. 2024) for matrices of hidden layers and AdamW for the rest, as one optimizer.

    Updates of Muon are scaled to the size of AdamW's (`match_rms_adamw`, Liu et al. 2025), so that both go by one
    learning rate. Groups and state are those of both, in that order.

    Args:
        matrices: groups of 2-D parameters.
        rest: groups of all others.
        lr: learning rate of groups that have none.
        betas, fused: of AdamW.
    """

    def __init__(
        self, matrices: list[Group], rest: list[Group], *, lr: float, betas: tuple[float, float], fused: bool | None
    ) -> None:
        self._parts = [
            torch.optim.Muon(matrices or [torch.zeros(1, 1)], lr=lr, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest or [torch.zeros(1)], lr=lr, betas=betas, fused=fused),
        ]
        if not matrices:
            self._parts[0].param_groups.clear()
        if not rest:
            self._parts[1].param_groups.clear()
        self._counts = [len(part.param_groups) for part in self._parts]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            if part.param_groups:
                part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Both parts work on the groups and the state of the whole."""
        first = 0
        for part, count in zip(self._parts, self._counts, strict=True):
            part.param_groups = self.param_groups[first : first + count]
            part.state = self.state
            first += count


Build = Callable[[list[Group], float, tuple[float, float], bool | None], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {"adamw": _adamw, "muon": _muon}
WHOLE = ("muon",)

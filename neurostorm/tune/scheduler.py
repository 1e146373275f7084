"""Early stopping within a cell: trials of one task, method, fraction and seed compete with each other and nobody else.

    result of a trial -> its cell's ASHA (Li et al. 2020) -> go on | stop

Ray Tune's ASHA compares all trials of an experiment; a sweep holds several tasks, whose metrics have nothing in common.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

EPOCH, SCORE = "epoch", "score"  # what trials report; a higher score is better


class CellScheduler(FIFOScheduler):
    """First in, first out, with an ASHA of its own for each cell of two trials or more.

    Args:
        cells: the cell of each trial, by the trial's `index` in its configuration.
        grace_epochs: epochs before a trial may be stopped.
        max_epochs: epochs of the longest trial.
    """

    def __init__(self, cells: Sequence[Any], *, grace_epochs: int, max_epochs: int) -> None:
        super().__init__()
        several = {cell for cell in cells if cells.count(cell) > 1}
        self._cells = list(cells)
        self._asha: Mapping[Any, AsyncHyperBandScheduler] = {
            cell: AsyncHyperBandScheduler(
                time_attr=EPOCH, metric=SCORE, mode="max", grace_period=min(grace_epochs, max_epochs),
                max_t=max_epochs + 1, reduction_factor=2,
            )
            for cell in several
        }  # fmt: skip

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        asha = self._of(trial)
        if asha is not None:
            asha.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        asha = self._of(trial)
        return str(self.CONTINUE if asha is None else asha.on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        asha = self._of(trial)
        if asha is not None and SCORE in (result or {}):
            asha.on_trial_complete(tune_controller, trial, result)

    def _of(self, trial: Any) -> AsyncHyperBandScheduler | None:
        return self._asha.get(self._cells[trial.config["index"]])

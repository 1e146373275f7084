"""NeuroSTORM on Ray: pretrain a masked autoencoder on 4D fMRI, from NIfTI files to a model in MLflow.

    from neurostorm import NeuroStorm, FrameStore

    model = NeuroStorm.from_pretrained("outputs/pretrain/model")
    vector = model.embed("sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    frames = FrameStore.open("stores/mine").frames("runs/hcp/sub-100307/ses-REST1_task-rest_run-LR")

The names below are loaded when they are first used: importing the package loads neither torch nor Ray. README.md,
beside this file, says what lies where.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neurostorm.config import Config as Config
    from neurostorm.downstream.tasks.task import Classification as Classification
    from neurostorm.downstream.tasks.task import Regression as Regression
    from neurostorm.downstream.tasks.task import Task as Task
    from neurostorm.model.hub.pretrained import NeuroStorm as NeuroStorm
    from neurostorm.store import FrameStore as FrameStore

__version__ = "0.1.0"
_HOMES = {
    "Classification": "neurostorm.downstream.tasks.task",
    "Config": "neurostorm.config",
    "FrameStore": "neurostorm.store",
    "NeuroStorm": "neurostorm.model.hub.pretrained",
    "Regression": "neurostorm.downstream.tasks.task",
    "Task": "neurostorm.downstream.tasks.task",
}
__all__ = ["Classification", "Config", "FrameStore", "NeuroStorm", "Regression", "Task", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

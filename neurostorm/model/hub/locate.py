"""Where a saved model is: in the folder that was named, or in the `model/` of a pretraining run's folder."""

import os
from pathlib import Path

from neurostorm.io.errors import UserError
from neurostorm.io.paths import AnyPath, to_path

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class HubError(UserError, ValueError):
    """A saved model, or what it is given, cannot be used: the message names the file, the field and the fix."""


def place_of(address: str | os.PathLike[str]) -> AnyPath:
    """`neurostorm.io.paths.to_path`, with a HubError for an address that is not understood."""
    try:
        return to_path(address)
    except ValueError as error:
        raise HubError(str(error)) from error


def find_model(folder: AnyPath) -> AnyPath:
    """``folder`` or its ``model/``, whichever holds a model. HubError, with what to do, when neither does."""
    try:
        found = [home for home in (folder, folder / "model") if (home / CONFIG).is_file()]
        unfinished = not found and (folder / "checkpoints").is_dir()
    except OSError as error:  # an object store that does not answer
        raise HubError(f"{folder}: cannot be read ({error})") from error
    if found:
        return found[0]
    if isinstance(folder, Path) and folder.is_file():
        convert = f"python -m neurostorm.model.hub.reference {folder} OUT"
        raise HubError(
            f"{folder} is a file: give the folder that holds {CONFIG} and {WEIGHTS}, or convert a released checkpoint "
            f"first: {convert}"
        )
    if unfinished:
        raise HubError(
            f"{folder} is a pretraining run that has not ended, and only then writes its model: start it again with "
            "the command that began it"
        )
    if isinstance(folder, Path) and not folder.is_dir():
        raise HubError(f"there is no folder {folder.absolute()}: give that of a pretraining run, OUTPUT/NAME")
    raise HubError(
        f"no model in {folder}: neither {folder / CONFIG} nor {folder / 'model' / CONFIG} is there. Give the folder of "
        "a pretraining run (OUTPUT/NAME) or of a model"
    )

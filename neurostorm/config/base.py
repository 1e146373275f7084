"""What every section of the configuration tree is made of: a frozen model that refuses unknown keys, and its types."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

from neurostorm.io.errors import UserError
from neurostorm.io.object_store import ObjectPath
from neurostorm.io.paths import AnyPath, path_component, to_path, without_credentials

SQLITE = "sqlite:///"
Four = tuple[int, int, int, int]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
# Workers and trials run in folders of their own, where a relative path names something else. So a path becomes absolute
# when a configuration is built, which the driver does in the directory where its command was typed.
Location = Annotated[
    Path | ObjectPath, PlainValidator(lambda value: absolute(to_path(value))), PlainSerializer(str, when_used="json")
]
LocalPath = Annotated[Path, AfterValidator(lambda path: absolute(path.expanduser()))]
Name = Annotated[str, AfterValidator(path_component)]  # of a folder
Address = Annotated[str, AfterValidator(lambda uri: absolute_sqlite(without_credentials(uri)))]  # logged with the run
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def absolute(path: AnyPath) -> AnyPath:
    """`path` against the working directory, without `..` where that names the same file, as it does without links."""
    whole = path.absolute()
    if isinstance(whole, Path) and ".." in whole.parts:
        plain = Path(os.path.normpath(whole))
        return plain if os.path.realpath(plain) == os.path.realpath(whole) else whole
    return whole


def absolute_sqlite(uri: str) -> str:
    """`uri`, with the file of an `sqlite:///FILE` as an absolute path; other URIs as they are."""
    file = uri.removeprefix(SQLITE)
    return f"{SQLITE}{Path(file).expanduser().absolute()}" if file != uri else uri


class ConfigError(UserError, ValueError):
    """A setting that cannot be used; the message names the field and the fix."""


class Section(BaseModel):
    """A branch of the tree: frozen, and unknown keys are refused; a refused value, maybe a secret, is not repeated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)

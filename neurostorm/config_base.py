"""What every section of the configuration tree is made of: a frozen model that refuses unknown keys, and its types."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

from neurostorm.object_store import ObjectPath
from neurostorm.places import no_secret, one_step, place

Four = tuple[int, int, int, int]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Location = Annotated[
    Path | ObjectPath, PlainValidator(lambda value: place(value)), PlainSerializer(str, when_used="json")
]
Name = Annotated[str, AfterValidator(one_step)]  # of a folder
Address = Annotated[str, AfterValidator(no_secret)]  # of a server; logged with the run
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the field and the fix."""


class Section(BaseModel):
    """A branch of the tree: frozen, and unknown keys are refused; a refused value, maybe a secret, is not repeated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)

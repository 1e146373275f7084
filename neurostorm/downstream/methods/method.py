"""The methods that are compared: what each sees, what is fitted on it, and where its weights come from.

    sees          fitted on it                          methods
    nothing       the training mean or class shares     constant
    attributes    ridge | logistic                      motion
    regions       ridge | logistic                      fc (connectivity), roi (mean activity)
    tokens        ridge | logistic on a unit's vector   linear, random_linear
    tokens        attention pool and head, by gradient  attention, random_attention
    clips         prompts | the whole network, from     tpt, full, random_tpt, random_full, swift, swift_scratch
                  a linear probe of it
    matrices      a network on connectivity             brainnetcnn, bnt

For identification, ridge and logistic give way to a map that shrinks what differs within a subject (`vectors.py`).
"""

from dataclasses import dataclass
from typing import Literal

from neurostorm.config import ConfigError
from neurostorm.io.errors import did_you_mean

Sees = Literal["nothing", "attributes", "regions", "tokens", "clips", "matrices"]
Weights = Literal["", "pretrained", "random", "contrastive"]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: as `--method` takes it.
        sees: what it is given of a unit or clip.
        adaptation: what `model.adapt.adapt` is told; or the kind of vector or network on connectivity.
        weights: of the backbone; "" where there is none.
        mixer: of the backbone, if another than the model's.
    """

    name: str
    sees: Sees
    adaptation: str
    weights: Weights = ""
    mixer: str | None = None

    @property
    def by_gradient(self) -> bool:
        """Whether it is trained in epochs, by gradient."""
        return self.adaptation in ("attention", "tpt", "full", "brainnetcnn", "bnt")

    @property
    def needs_model(self) -> bool:
        """Whether a model says which network this is."""
        return self.weights != ""


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("constant", "nothing", "constant"),
        Method("motion", "attributes", "linear"),
        Method("fc", "regions", "connectivity"),
        Method("roi", "regions", "mean"),
        Method("linear", "tokens", "linear", "pretrained"),
        Method("attention", "tokens", "attention", "pretrained"),
        Method("tpt", "clips", "tpt", "pretrained"),
        Method("full", "clips", "full", "pretrained"),
        Method("random_linear", "tokens", "linear", "random"),
        Method("random_attention", "tokens", "attention", "random"),
        Method("random_tpt", "clips", "tpt", "random"),
        Method("random_full", "clips", "full", "random"),
        Method("brainnetcnn", "matrices", "brainnetcnn"),
        Method("bnt", "matrices", "bnt"),
        Method("swift", "clips", "full", "contrastive", mixer="attention"),
        Method("swift_scratch", "clips", "full", "random", mixer="attention"),
    )
}


def find_method(name: str) -> Method:
    """The method with this name; ConfigError with the nearest one."""
    if name not in METHODS:
        meant = did_you_mean(name, METHODS)
        raise ConfigError(f"adapt.method={name}: no such method{meant} (methods: {', '.join(METHODS)})")
    return METHODS[name]

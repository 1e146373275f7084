"""Names, order, looks and references of the methods, the same in every table and figure.

    method --look--> label, colour, marker, hatch
    method --reference_of--> its network with random weights, which pretraining has to beat

Colours are those of Okabe and Ito (2008) and, beyond these, of Tol, which people with colour-blindness tell apart. A
network without pretraining has the colour of its pretrained twin, hatched and dashed; what sees no image is grey.
"""

from collections.abc import Collection
from dataclasses import dataclass

CONNECTIVITY = "fc"


@dataclass(frozen=True)
class Look:
    """How a method is named and drawn.

    Attributes:
        label: for tables and legends.
        short: below a bar.
        colour: hexadecimal RGB.
        marker: Matplotlib's name.
        untrained: hatched bars, dashed lines.
    """

    label: str
    short: str
    colour: str
    marker: str = "o"
    untrained: bool = False


_LOOKS = {
    "full": Look("Full fine-tuning", "Full", "#d55e00", "o"),
    "tpt": Look("Prompt tuning (TPT)", "TPT", "#cc79a7", "s"),
    "attention": Look("Attention probe", "Attention", "#0072b2", "D"),
    "linear": Look("Linear probe", "Linear", "#56b4e9", "^"),
    "random_full": Look("Random weights, full", "Random full", "#d55e00", "o", True),
    "random_tpt": Look("Random weights, TPT", "Random TPT", "#cc79a7", "s", True),
    "random_attention": Look("Random weights, attention", "Random attention", "#0072b2", "D", True),
    "random_linear": Look("Random weights, linear", "Random linear", "#56b4e9", "^", True),
    "swift": Look("SwiFT, contrastive", "SwiFT", "#009e73", "v"),
    "swift_scratch": Look("SwiFT from scratch", "SwiFT scratch", "#009e73", "v", True),
    "bnt": Look("Brain Network Transformer", "BNT", "#882255", "P"),
    "brainnetcnn": Look("BrainNetCNN", "BrainNetCNN", "#e69f00", "X"),
    CONNECTIVITY: Look("Functional connectivity", "FC", "#3d3d3d", "h"),
    "roi": Look("Mean activity of regions", "Regions", "#5f6b3a", "H"),
    "motion": Look("Motion and acquisition", "Motion", "#8a8a8a", "<"),
    "constant": Look("Mean or majority", "Constant", "#bcbcbc", ">"),
}
_OTHERS = (("#7a4fa3", "p"), ("#999933", "d"), ("#44aa99", "*"), ("#332288", "H"))
_TWINS = {
    "full": ("random_full", "random_linear"),
    "tpt": ("random_tpt", "random_linear", "random_full"),
    "attention": ("random_attention", "random_linear", "random_full"),
    "linear": ("random_linear", "random_full"),
    "swift": ("swift_scratch",),
}
# Not asked whether they beat connectivity: floors, and connectivity itself.
_FLOORS = (
    "random_full", "random_tpt", "random_attention", "random_linear", CONNECTIVITY, "roi", "motion", "constant",
)  # fmt: skip


def look(method: str) -> Look:
    """How a method is drawn; one that the report does not know keeps its name and has a colour that follows from it."""
    if method in _LOOKS:
        return _LOOKS[method]
    colour, marker = _OTHERS[sum(method.encode()) % len(_OTHERS)]
    return Look(method, method, colour, marker)


def ordered(methods: Collection[str]) -> tuple[str, ...]:
    """In the report's order: ours, without pretraining, other networks, baselines; unknown ones first, by name."""
    known = list(_LOOKS)
    return tuple(sorted(methods, key=lambda one: (known.index(one) if one in known else -1, one)))


def twin_of(method: str, present: Collection[str]) -> str:
    """The method's network without pretraining, of those `present`; "" if it has none."""
    return next((twin for twin in _TWINS.get(method, ()) if twin in present), "")


def references_of(method: str, present: Collection[str]) -> tuple[str, ...]:
    """What a method has to beat, of those `present`: its twin without pretraining, and functional connectivity.

    Floors (random weights, motion, the constant, connectivity itself) have no references.
    """
    if method in _FLOORS:
        return ()
    return tuple(one for one in (twin_of(method, present), CONNECTIVITY if CONNECTIVITY in present else "") if one)

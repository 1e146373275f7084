"""How the datasets of a store are mixed: the share of each in an epoch.

    clips of one pass, weight and temperature of each dataset -> share of each -> whole clips per epoch of each

Share of dataset d: weight_d * clips_d ** (1 / temperature), as in multilingual language models (Conneau et al. 2019,
arXiv:1911.02116, with alpha = 1 / temperature). Temperature 1 takes the datasets as they are, a high one makes small
datasets count as much as large ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from neurostorm.io.errors import did_you_mean


@dataclass(frozen=True)
class Origin:
    """Where the manifest's runs come from.

    datasets  names of the datasets, in any order
    dataset   int16 (runs): index into `datasets`
    subject   int32 (runs): a number for each subject, not shared between datasets
    """

    datasets: tuple[str, ...]
    dataset: NDArray[np.int16]
    subject: NDArray[np.int32]

    @classmethod
    def one_dataset(cls, runs: int) -> "Origin":
        """`runs` runs of as many subjects in one dataset without a name."""
        return cls(("",), np.zeros(runs, np.int16), np.arange(runs, dtype=np.int32))


@dataclass(frozen=True)
class Sampling:
    """How clips are drawn from the segments; the fields are those of the configuration's section `data`.

    weights                relative weight by dataset, 1 if not named; 0 leaves a dataset out
    temperature            flattens the shares of large and small datasets when above 1
    max_clips_per_subject  clips of one subject in one pass over its dataset, None: all
    clips_per_read         neighbouring clips of a segment that stay together in the order
    masks_per_clip         times that each clip stands in a row in the stream
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    max_clips_per_subject: int | None = None
    clips_per_read: int = 1
    masks_per_clip: int = 1

    def weight_of(self, datasets: Sequence[str]) -> NDArray[np.float64]:
        """The weight of each dataset. ValueError: a weight names none of them, or all are left out."""
        for name in sorted(set(self.weights) - set(datasets)):
            meant, known = did_you_mean(name, datasets), ", ".join(sorted(datasets))
            raise ValueError(f"data.weights: there is no dataset {name!r}{meant} (the datasets are {known})")
        weights = np.array([float(self.weights.get(name, 1.0)) for name in datasets])
        if len(weights) and not weights.any():
            raise ValueError("data.weights leaves every dataset out: give at least one a weight above 0")
        return weights


def epoch_counts(clips: NDArray[np.int64], weights: NDArray[np.float64], temperature: float) -> NDArray[np.int64]:
    """Clips of each dataset in one epoch of N clips, N = the clips of one pass over the datasets with a weight.

    clips    int64 (D): clips of one pass over each dataset
    weights  float64 (D): relative weights, >= 0

    Shares of N that are not whole are rounded by largest remainder, so the counts sum up to N; with equal weights and
    temperature 1 they are one pass of each dataset.
    """
    used = (weights > 0) & (clips > 0)
    counts = np.zeros(len(clips), np.int64)
    if not used.any():
        return counts
    # In logarithms: a count to the power of 1 / temperature would overflow at low temperatures.
    logs = np.array([math.log(w) + math.log(n) / temperature for w, n in zip(weights[used], clips[used], strict=True)])
    shares = np.exp(logs - logs.max())
    total = int(clips[used].sum())
    exact = total * shares / shares.sum()
    whole = np.floor(exact).astype(np.int64)
    # Rounded, so that ties fall to the first dataset on every machine, whatever the last digit of its logarithms.
    largest = np.argsort(np.round(whole - exact, 6), kind="stable")[: total - int(whole.sum())]
    whole[largest] += 1
    counts[used] = whole
    return counts

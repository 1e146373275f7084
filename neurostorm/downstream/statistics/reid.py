"""Is this person found again, in another session?

    vectors of runs --draw: a subject's one session--> gallery --+
                    --draw: its other session-------> query   --+--cosine--> rank of the right one --> Rank-1, mAP

A clip is found by its neighbours in the same scan without any knowledge of the person: same head position, same
preprocessing, overlapping frames. So gallery and query never share a session here, and copies of a file are refused.
`same_scan_released` is the metric of the released code, for comparison with its published figures only.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neurostorm.downstream.statistics.metrics import chance_of
from neurostorm.io.errors import UserError

Real = NDArray[np.float64]
Index = NDArray[np.int64]

TIE = 1e-12  # difference of two cosines that is rounding, not evidence
_BLOCK_ROWS = 256  # queries of the released metric that are ranked at a time: bounds what is held


class ReidError(UserError, ValueError):
    """The runs do not allow an honest re-identification; says which and what to do."""


@dataclass(frozen=True)
class RunEmbeddings:
    """The vectors of R runs and where they come from.

    Attributes:
        run: the runs' paths in the store, all different.
        subject: `dataset/sub-001`.
        session: within the subject; "" for a dataset without sessions.
        source: SHA-256 of the file that each run was made of; "" where unknown.
        vectors: (R, D).
    """

    run: tuple[str, ...]
    subject: tuple[str, ...]
    session: tuple[str, ...]
    source: tuple[str, ...]
    vectors: Real

    def __post_init__(self) -> None:
        """Raises ReidError for lengths that differ and for a run that is there twice."""
        count = len(self.run)
        if {len(self.subject), len(self.session), len(self.source)} != {count} or self.vectors.shape[:-1] != (count,):
            raise ReidError(
                f"{count} run(s), {len(self.subject)} subject(s), {len(self.session)} session(s), {len(self.source)} "
                f"source(s) and vectors {self.vectors.shape}: give one of each for every run, vectors as (R, D)"
            )
        if len(set(self.run)) < count:
            twice = next(run for run in self.run if self.run.count(run) > 1)
            raise ReidError(f"run {twice} is there twice: give each run once")


def across_sessions(runs: RunEmbeddings, *, gallery: int = 100, repeats: int = 20, seed: int = 0) -> dict[str, float]:
    """Rank-1 and mAP of finding a subject of one session among runs of another.

    In each repeat up to `gallery` subjects with two sessions or more are drawn. One run of one session of each makes
    the gallery, one run of another session is the query. All of the gallery is ranked by cosine. With one relevant item
    per query, average precision is 1/rank. A tie counts against the model: the right one is first only when it is
    strictly nearest, or else a model that gives everybody one vector would be perfect.

    The repeats share subjects, so their standard deviation tells how much the draw matters; it is no standard error.

    Args:
        runs: subjects with one session only are left out.
        gallery: subjects drawn per repeat; fewer when there are fewer.
        repeats: how often.
        seed: the draws follow from it and the names of the runs, not from their order.

    Returns:
        `rank1`, `map` (means over the repeats), `rank1_sd`, `map_sd` (ddof 1; nan for one repeat), `chance` of Rank-1,
        `gallery` (subjects that it really had), `queries` (of each repeat, one per subject), `repeats`.

    Raises:
        ReidError: a vector is zero or not finite; a query might meet a copy of itself; fewer than two subjects with two
            sessions; `gallery` below 2 or `repeats` below 1.
    """
    if gallery < 2 or repeats < 1:
        raise ReidError(f"gallery {gallery} must be at least 2 and repeats {repeats} at least 1")
    vectors = _normalised(runs)
    sessions = _sessions(runs)
    _refuse_copies(runs, [run for subject in sessions for session in subject for run in session])
    size = min(gallery, len(sessions))
    draws = _draws(sessions, size, repeats, seed)
    ranks = np.stack([ranks_of(vectors[shown], vectors[asked]) for shown, asked in draws])  # repeats, subjects
    found = {"rank1": (ranks == 1).mean(axis=1), "map": (1 / ranks).mean(axis=1)}
    return {
        **{name: float(values.mean()) for name, values in found.items()},
        **{f"{name}_sd": float(values.std(ddof=1)) if repeats > 1 else float("nan") for name, values in found.items()},
        "chance": chance_of("rank1", gallery=size),
        "gallery": size,
        "queries": size,
        "repeats": repeats,
    }


def ranks_of(gallery: Real, query: Real) -> Index:
    """The rank of each query's own gallery item, from 1; all that are as near count as nearer.

    Args:
        gallery: unit vectors (G, D).
        query: unit vectors (G, D); row i is the subject of the gallery's row i.
    """
    cosine = query @ gallery.T  # queries, gallery
    return np.asarray((cosine >= np.diagonal(cosine)[:, None] - TIE).sum(axis=1), np.int64)


def same_scan_released(features: ArrayLike, subjects: Sequence[str], *, gallery: int | None = None) -> dict[str, float]:
    """`rank1` and `map` as the released code computes them (NeuroSTORM, models/lightning_model.py, `_evaluate_reid`).

    Every clip is a query and all clips are ranked for it by cosine. Kept for comparison, it does four things wrong:

    * The gallery holds other clips of the query's own scan, so it measures whether clips of a scan look alike.
    * Without `gallery`, the query itself stays in its own ranking, in the last place, and counts as a relevant item:
      with P others of the subject among N clips, AP = (sum of the P precisions + (P + 1) / N) / (P + 1).
    * `gallery` keeps the most similar clips instead of drawing some, and AP is over the relevant ones that are left.
    * A query with none left has 0/0, so one such query makes the mAP of all nan.

    Equal cosines are ranked by row here; the released order of them is arbitrary.

    Args:
        features: (N, D) of clips, finite.
        subjects: (N).
        gallery: how many of the most similar clips are kept; None for all.

    Raises:
        ReidError: fewer than two clips, other shapes, values that are not finite, `gallery` below 1.
    """
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or len(rows) != len(subjects) or len(rows) < 2 or not np.isfinite(rows).all():
        raise ReidError(f"features {rows.shape} must be finite (N, D), N at least 2, for {len(subjects)} subjects")
    if gallery is not None and gallery < 1:
        raise ReidError(f"gallery {gallery} must be at least 1, or None for all clips")
    count = len(rows)
    kept = count if gallery is None else min(gallery, count - 1)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    labels = np.unique(np.asarray(subjects), return_inverse=True)[1]
    first, precision = np.zeros(count, bool), np.zeros(count)
    for start in range(0, count, _BLOCK_ROWS):
        block = np.arange(start, min(start + _BLOCK_ROWS, count))
        cosine = rows[block] @ rows.T
        cosine[np.arange(len(block)), block] = -np.inf
        ranked = np.argsort(-cosine, axis=1, kind="stable")[:, :kept]
        relevant = labels[ranked] == labels[block, None]  # queries, ranks
        precisions = np.cumsum(relevant, axis=1) / np.arange(1, kept + 1)
        first[block] = relevant[:, 0]
        with np.errstate(invalid="ignore"):
            precision[block] = (precisions * relevant).sum(axis=1) / relevant.sum(axis=1)
    return {"rank1": float(first.mean()), "map": float(precision.mean())}


def _normalised(runs: RunEmbeddings) -> Real:
    """Unit vectors (R, D)."""
    vectors = np.asarray(runs.vectors, np.float64)
    finite = np.isfinite(vectors).all(axis=1)
    largest = np.abs(vectors).max(axis=1, initial=0)
    for run, good in zip(runs.run, finite & (largest > 0), strict=True):
        if not good:
            raise ReidError(f"the vector of run {run} is zero or not finite: embed it again or leave it out")
    scaled = vectors / largest[:, None]  # the square of a tiny or huge component would leave the range of float64
    return scaled / np.linalg.norm(scaled, axis=1, keepdims=True)


def _sessions(runs: RunEmbeddings) -> list[list[list[int]]]:
    """For each subject with two sessions or more: for each session, the indices of its runs; all ordered by name."""
    tree: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index in sorted(range(len(runs.run)), key=lambda i: (runs.subject[i], runs.session[i], runs.run[i])):
        tree[runs.subject[index]][runs.session[index]].append(index)
    several = [list(sessions.values()) for sessions in tree.values() if len(sessions) > 1]
    if len(several) < 2:
        raise ReidError(
            f"{len(several)} of {len(tree)} subject(s) have two sessions or more: at least 2 are needed. Within a "
            "session a scan is found, not a person; embed further sessions"
        )
    return several


def _refuse_copies(runs: RunEmbeddings, used: Sequence[int]) -> None:
    """Raises ReidError for two runs that might meet as gallery and query and are of one file or have one vector.

    Two runs of one session of one subject never meet.
    """
    seen: dict[tuple[str, str | bytes], int] = {}
    for index in used:
        keys: list[tuple[str, str | bytes]] = [("vectors", (runs.vectors[index] + 0.0).tobytes())]
        keys += [("source_sha256", runs.source[index])] if runs.source[index] else []
        for kind, key in keys:
            other = seen.setdefault((kind, key), index)
            if (runs.subject[other], runs.session[other]) != (runs.subject[index], runs.session[index]):
                raise ReidError(
                    f"runs {runs.run[other]} and {runs.run[index]} have equal {kind}: one would be found as a copy of "
                    "the other. Leave one out (or, if many runs have one vector, the model has collapsed)"
                )


def _draws(
    sessions: Sequence[Sequence[Sequence[int]]], size: int, repeats: int, seed: int
) -> Iterator[tuple[Index, Index]]:
    """For each repeat the runs (size) of the gallery and, subject by subject, of the queries."""
    for repeat in range(repeats):
        generator = np.random.default_rng([seed, repeat])
        pairs = []
        for subject in generator.choice(len(sessions), size, replace=False):
            two = generator.choice(len(sessions[subject]), 2, replace=False)
            pairs.append([generator.choice(sessions[subject][session]) for session in two])
        shown, asked = np.array(pairs, np.int64).T
        yield shown, asked

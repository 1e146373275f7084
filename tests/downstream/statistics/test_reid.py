"""Re-identification: against double loops, at chance for noise, and the copies that it refuses."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.downstream.statistics import reid
from neurostorm.downstream.statistics.metrics import chance_of
from neurostorm.downstream.statistics.reid import (
    ReidError,
    RunEmbeddings,
    across_sessions,
    ranks_of,
    same_scan_released,
)

GOLDEN = json.loads((Path(__file__).parent.parent / "golden_reid.json").read_text())


def cohort(
    seed: int, subjects: int = 12, sessions: int = 2, per_session: int = 1, width: int = 6, trait: float = 1.0
) -> RunEmbeddings:
    """Runs that are a vector of the subject, times `trait`, and noise."""
    generator = np.random.default_rng(seed)
    rows = [
        (f"runs/ds/sub-{s:03d}/ses-{e}_run-{r}", f"ds/sub-{s:03d}", f"ses-{e}", f"sha-{s}-{e}-{r}")
        for s in range(subjects)
        for e in range(sessions)
        for r in range(per_session)
    ]
    own = np.repeat(generator.normal(size=(subjects, width)), sessions * per_session, axis=0)
    run, subject, session, source = zip(*rows, strict=True)
    return RunEmbeddings(run, subject, session, source, trait * own + generator.normal(size=own.shape))


def taken(runs: RunEmbeddings, order: np.ndarray) -> RunEmbeddings:
    names = [tuple(getattr(runs, field)[i] for i in order) for field in ("run", "subject", "session", "source")]
    return RunEmbeddings(*names, runs.vectors[order])


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 15), st.integers(1, 4))
def test_ranks_are_those_of_a_double_loop(seed: int, count: int, width: int) -> None:
    """Coarse vectors, so that there are ties: they count against the query."""
    generator = np.random.default_rng(seed)
    gallery, query = (unit(generator.integers(1, 3, size=(count, width)).astype(float)) for _ in range(2))
    expected = []
    for i in range(count):
        own = sum(query[i, d] * gallery[i, d] for d in range(width))
        cosines = [sum(query[i, d] * gallery[j, d] for d in range(width)) for j in range(count) if j != i]
        expected.append(1 + sum(cosine > own - 1e-9 for cosine in cosines))
    assert ranks_of(gallery, query).tolist() == expected


def test_two_sessions_of_one_run_are_those_of_a_double_loop() -> None:
    """Only which session is asked differs between repeats: each is one of 2^3 outcomes, and all of them occur."""
    runs = cohort(4, subjects=3, width=3, trait=0.3)
    vectors = unit(runs.vectors).reshape(3, 2, -1)
    outcomes = set()
    for choice in np.ndindex(2, 2, 2):
        ranks = []
        for i in range(3):
            cosines = [vectors[i, 1 - choice[i]] @ vectors[j, choice[j]] for j in range(3)]
            ranks.append(1 + sum(cosines[j] > cosines[i] for j in range(3) if j != i))
        rank1, precision = np.mean([rank == 1 for rank in ranks]), np.mean([1 / rank for rank in ranks])
        outcomes.add((round(float(rank1), 9), round(float(precision), 9)))
    found = [across_sessions(runs, repeats=1, seed=seed) for seed in range(40)]
    assert len(outcomes) > 2
    assert {(round(one["rank1"], 9), round(one["map"], 9)) for one in found} == outcomes


def test_each_draw_pairs_runs_of_one_subject_in_two_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run has a vector of its own, so that what is ranked tells what was drawn."""
    runs = cohort(0, subjects=5, sessions=3, per_session=2)
    runs = replace(runs, vectors=np.eye(30))
    seen = []

    def recorded(gallery: np.ndarray, query: np.ndarray) -> np.ndarray:
        seen.append((gallery.argmax(axis=1), query.argmax(axis=1)))
        return ranks_of(gallery, query)

    monkeypatch.setattr(reid, "ranks_of", recorded)
    across_sessions(runs, gallery=4, repeats=60)
    for shown, asked in seen:
        assert [runs.subject[i] for i in shown] == [runs.subject[i] for i in asked]
        assert len({runs.subject[i] for i in shown}) == 4
        assert all(runs.session[i] != runs.session[j] for i, j in zip(shown, asked, strict=True))
    for side in zip(*seen, strict=True):
        assert set(np.concatenate(side)) == set(range(30))


def test_gallery_and_query_are_of_different_sessions() -> None:
    """All that a vector knows is its session: that must not help, though each scan resembles itself perfectly."""
    generator = np.random.default_rng(0)
    runs = cohort(0, subjects=40, sessions=2, per_session=3, width=20)
    of_session = np.repeat(generator.normal(size=(80, 20)), 3, axis=0)
    runs = replace(runs, vectors=of_session + 1e-3 * generator.normal(size=of_session.shape))
    honest = across_sessions(runs, repeats=10)
    assert same_scan_released(runs.vectors, runs.subject)["rank1"] == 1
    assert honest["rank1"] < 0.15


def test_a_strong_trait_is_found_and_the_result_says_of_how_many() -> None:
    runs = cohort(1, subjects=30, sessions=3, per_session=2, width=40, trait=5.0)
    found = across_sessions(runs, gallery=100, repeats=4)
    assert found["rank1"] == found["map"] == 1
    assert (found["gallery"], found["queries"], found["repeats"], found["chance"]) == (30, 30, 4, 1 / 30)
    assert found["rank1_sd"] == found["map_sd"] == 0
    assert across_sessions(runs, gallery=7, repeats=4)["gallery"] == 7


def test_mean_and_spread_are_those_of_the_repeats() -> None:
    """A repeat does not depend on how many there are, so three repeats give the first of them by difference."""
    runs = cohort(2, subjects=9, sessions=3)
    one, two = (across_sessions(runs, gallery=6, repeats=n, seed=5) for n in (1, 2))
    second = 2 * two["map"] - one["map"]
    assert second != pytest.approx(one["map"])
    assert two["map_sd"] == pytest.approx(np.std([one["map"], second], ddof=1))
    assert np.isnan(one["map_sd"]) and np.isnan(one["rank1_sd"])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_order_of_runs_and_length_of_vectors_change_nothing(seed: int) -> None:
    runs, generator = cohort(seed, subjects=8, sessions=3, per_session=2), np.random.default_rng(seed)
    expected = across_sessions(runs, gallery=5, repeats=3, seed=seed)
    longer = replace(runs, vectors=runs.vectors * 10 ** generator.uniform(-200, 200, (len(runs.run), 1)))
    moved = taken(longer, generator.permutation(len(runs.run)))
    assert across_sessions(moved, gallery=5, repeats=3, seed=seed) == pytest.approx(expected, nan_ok=True)


def test_noise_is_at_chance() -> None:
    """Within four standard errors over 200 independent cohorts of ten."""
    found = defaultdict(list)
    for seed in range(200):
        for name, value in across_sessions(cohort(seed, subjects=10, trait=0.0), repeats=1).items():
            found[name].append(value)
    for name in ("rank1", "map"):
        error = np.std(found[name], ddof=1) / np.sqrt(200)
        assert np.mean(found[name]) == pytest.approx(chance_of(name, gallery=10), abs=4 * error)
    assert error < 0.02  # or the check would be idle


def test_a_collapsed_model_is_not_perfect() -> None:
    """Vectors that differ by their length only are ties, and ties are misses."""
    runs = cohort(0, subjects=6)
    flat = replace(runs, vectors=np.outer(np.arange(1.0, 13.0), [0.3, 0.1, 0.7, 0.2, 0.9, 0.4]))
    found = across_sessions(flat)
    assert found["rank1"] == 0
    assert found["map"] == pytest.approx(1 / 6)


def with_source(runs: RunEmbeddings, one: int, other: int) -> RunEmbeddings:
    source = list(runs.source)
    source[one] = source[other]
    return replace(runs, source=tuple(source))


def with_vector(runs: RunEmbeddings, one: int, other: int) -> RunEmbeddings:
    vectors = runs.vectors.copy()
    vectors[one] = vectors[other]
    return replace(runs, vectors=vectors)


@pytest.mark.parametrize(("copied", "kind"), [(with_source, "source_sha256"), (with_vector, "vectors")])
@pytest.mark.parametrize("other", [2, 4])  # another session of the same subject; another subject
def test_a_copy_that_might_be_found_is_refused_with_both_names(copied, kind: str, other: int) -> None:
    runs = cohort(0, subjects=3, sessions=2, per_session=2)
    with pytest.raises(ReidError, match=f"equal {kind}") as refused:
        across_sessions(copied(runs, 0, other))
    assert runs.run[0] in str(refused.value)
    assert runs.run[other] in str(refused.value)


@pytest.mark.parametrize("copied", [with_source, with_vector])
def test_a_copy_that_cannot_be_found_is_no_matter(copied) -> None:
    """Within one session, and of a subject that is not used."""
    runs = cohort(0, subjects=3, sessions=2, per_session=2)
    across_sessions(copied(runs, 0, 1))
    single = taken(runs, np.array([0, 1, 2, 3, 4, 5, 6, 7, 8]))  # the third subject has one session left
    across_sessions(copied(single, 8, 0))


def test_an_unknown_source_is_no_copy() -> None:
    runs = cohort(0, subjects=4)
    assert across_sessions(replace(runs, source=("",) * 8)) == across_sessions(runs)


def test_subjects_with_one_session_are_left_out() -> None:
    runs = cohort(0, subjects=5, sessions=2)
    some = taken(runs, np.array([0, 1, 2, 4, 5, 6, 7]))
    assert across_sessions(some)["gallery"] == 3
    with pytest.raises(ReidError, match=r"1 of 2 subject\(s\) have two sessions"):
        across_sessions(taken(runs, np.array([0, 1, 2])))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_bad_vector_is_refused_with_its_run(value: float) -> None:
    runs = cohort(0, subjects=4)
    runs.vectors[3] = value
    with pytest.raises(ReidError, match="sub-001/ses-1_run-0 is zero or not finite"):
        across_sessions(runs)


def test_bad_settings_and_tables_are_refused() -> None:
    runs = cohort(0, subjects=4)
    for bad in ({"gallery": 1}, {"repeats": 0}):
        with pytest.raises(ReidError, match="at least"):
            across_sessions(runs, **bad)
    with pytest.raises(ReidError, match=r"7 subject\(s\)"):
        replace(runs, subject=runs.subject[:-1])
    with pytest.raises(ReidError, match=r"\(8,\)"):
        replace(runs, vectors=runs.vectors[:, 0])
    with pytest.raises(ReidError, match="twice"):
        replace(runs, run=(runs.run[1], *runs.run[1:]))


@pytest.mark.parametrize("case", GOLDEN, ids=["20 clips", "36 clips", "36 clips, gallery of 10"])
def test_the_released_metric_is_that_of_the_released_code(case) -> None:
    found = same_scan_released(case["features"], case["subjects"], gallery=case["gallery"])
    assert np.float32(found["rank1"]) == np.float32(case["rank1"])
    assert found["map"] == pytest.approx(np.nan if case["map"] is None else case["map"], abs=1e-6, nan_ok=True)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 20), st.none() | st.integers(1, 25))
def test_the_released_metric_is_that_of_a_loop(seed: int, count: int, gallery: int | None) -> None:
    generator = np.random.default_rng(seed)
    features, subjects = generator.normal(size=(count, 5)), [f"s{n}" for n in generator.integers(4, size=count)]
    first, precisions = [], []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        others.sort(key=lambda j: -(unit(features)[i] @ unit(features)[j]))
        ranked = [*others, i] if gallery is None else others[:gallery]
        hits = [subjects[j] == subjects[i] for j in ranked]
        first.append(hits[0])
        of_hits = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits)) if hits[k]]
        precisions.append(np.mean(of_hits) if of_hits else np.nan)
    found = same_scan_released(features, subjects, gallery=gallery)
    assert found["rank1"] == pytest.approx(np.mean(first))
    assert found["map"] == pytest.approx(np.mean(precisions), nan_ok=True)


def test_the_released_metric_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = GOLDEN[1]
    whole = same_scan_released(case["features"], case["subjects"])
    monkeypatch.setattr("neurostorm.downstream.statistics.reid._BLOCK_ROWS", 7)
    assert same_scan_released(case["features"], case["subjects"]) == pytest.approx(whole)


def test_the_released_metric_refuses_what_it_cannot_rank() -> None:
    good = np.eye(3)
    for features, subjects in ((good[:1], ["a"]), (good, ["a", "b"]), (good[0], ["a"]), (good * np.nan, ["a"] * 3)):
        with pytest.raises(ReidError, match="must be finite"):
            same_scan_released(features, subjects)
    with pytest.raises(ReidError, match="gallery 0"):
        same_scan_released(good, ["a", "b", "a"], gallery=0)

"""Splits: nobody twice, nobody lost, whole groups, balanced classes, the same ids from the same seed."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from neurostorm.downstream.splits import (
    Split,
    SplitError,
    combine_strata,
    holdout,
    kfold,
    leave_one_out,
    load_split,
    nested_fractions,
    save_split,
    strata_of,
)
from neurostorm.io.paths import to_path

CASES = settings(deadline=None, max_examples=35)
KNOWN = {
    "holdout": "11105d49dc062a08",
    "kfold": "936102a7070e2012",
    "leave_one_out": "77403435236a9a0c",
    "nested_fractions": "5140f0fe140204cd",
}
SMALL = Split(("d/sub-3", "d/sub-1"), ("d/sub-2",), ("d/sub-4",), {"scheme": "made"})


@st.composite
def studies(draw: st.DrawFn, least: int = 3) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Subjects, classes of some and groups of some of them, with a spare group for each part."""
    count = draw(st.integers(least, 50))
    subjects = [f"d/sub-{number:02d}" for number in range(count)]
    some = st.sampled_from([None, "a", "b", "c"])
    strata = {subject: name for subject in subjects if (name := draw(some))}
    families = st.one_of(st.none(), st.integers(0, count // 2).map(str))
    groups = {subject: name for subject in subjects[least:] if (name := draw(families))}
    return subjects, strata, groups


def names(count: int) -> list[str]:
    return [f"d/sub-{number:03d}" for number in range(count)]


def everybody(split: Split) -> list[str]:
    return sorted([*split.train, *split.validation, *split.test])


@CASES
@given(studies(), st.floats(0.05, 0.45), st.floats(0.05, 0.45), st.integers(0, 99))
def test_holdout_loses_nobody_parts_no_group_and_keeps_the_shares(study, test, validation, seed) -> None:
    subjects, strata, groups = study
    split = holdout(subjects, test=test, validation=validation, seed=seed, strata=strata, groups=groups)
    assert everybody(split) == subjects
    assert split.train and split.validation and split.test
    parts = (split.train, split.validation, split.test)
    for one, two in ((0, 1), (0, 2), (1, 2)):
        families = [{groups.get(subject, f"own {subject}") for subject in parts[number]} for number in (one, two)]
        assert not families[0] & families[1]
    largest = max(Counter(groups.get(subject, subject) for subject in subjects).values())
    asked = [share * len(subjects) for share in (1 - test - validation, validation, test)]
    if min(asked) >= largest:
        assert all(abs(len(part) - size) <= largest for part, size in zip(parts, asked, strict=True))


@CASES
@given(studies(), st.integers(0, 99), st.randoms(use_true_random=False))
def test_the_order_of_subjects_and_of_the_mappings_does_not_matter(study, seed, shuffler) -> None:
    subjects, strata, groups = study
    split = holdout(subjects, test=0.3, validation=0.2, seed=seed, strata=strata, groups=groups)
    mixed = [dict(shuffler.sample(sorted(mapping.items()), len(mapping))) for mapping in (strata, groups)]
    order = shuffler.sample(subjects, len(subjects))
    again = holdout([*order, order[0]], test=0.3, validation=0.2, seed=seed, strata=mixed[0], groups=mixed[1])
    assert again == split and again.sha256 == split.sha256


@CASES
@given(studies(least=6), st.integers(2, 5), st.integers(0, 99))
def test_folds_part_the_subjects_and_keep_groups_whole(study, folds, seed) -> None:
    subjects, strata, groups = study
    options = {"folds": folds, "validation": 0.2, "seed": seed, "strata": strata, "groups": groups}
    tested: list[str] = []
    for fold in range(folds):
        split = kfold(subjects, fold=fold, **options)
        assert everybody(split) == subjects
        split.check(groups)
        tested += split.test
    assert sorted(tested) == subjects


def test_folds_of_single_subjects_are_even_and_validate_different_ones() -> None:
    made = [kfold(names(52), folds=5, fold=n, validation=0.25, seed=1, strata=None, groups=None) for n in range(5)]
    assert sorted(len(split.test) for split in made) == [10, 10, 10, 11, 11]
    assert {len(split.validation) for split in made} <= {10, 11}
    assert len({split.validation for split in made}) == 5


@CASES
@given(st.lists(st.integers(2, 12), min_size=1, max_size=5), st.integers(0, 99), st.sampled_from([0.1, 0.2, 0.3]))
def test_a_class_that_is_large_enough_trains_and_tests(sizes, seed, share) -> None:
    classes = [str(number) for number, size in enumerate(sizes) for _ in range(size)]
    subjects = names(len(classes))
    assume(share * len(subjects) >= 1)  # else one subject is forced into a part that asked for less
    strata = dict(zip(subjects, classes, strict=True))
    split = holdout(subjects, test=share, validation=0.2, seed=seed, strata=strata, groups=None)
    assert {strata[subject] for subject in split.train} == set(classes)
    enough = {str(number) for number, size in enumerate(sizes) if share * size >= 1}
    assert enough <= {strata[subject] for subject in split.test}


def imbalance(split: Split, strata: dict[str, str]) -> float:
    """Sum over parts and classes of the squared distance to the class's proportional count."""
    total = Counter(strata.values())
    parts = (split.train, split.validation, split.test)
    counts = [Counter(strata[subject] for subject in part) for part in parts]
    return sum(
        (count[name] - total[name] * len(part) / len(strata)) ** 2
        for count, part in zip(counts, parts, strict=True)
        for name in total
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_strata_balance_far_better_than_chance(grouped: bool) -> None:
    generator = random.Random(0)
    subjects = names(200)
    strata = {subject: generator.choice("aaaabbc") for subject in subjects}
    groups = {subject: str(generator.randrange(120)) for subject in subjects} if grouped else None
    sums = {True: 0.0, False: 0.0}
    for seed in range(10):
        for stratified in sums:
            split = holdout(
                subjects, test=0.2, validation=0.1, seed=seed, strata=strata if stratified else None, groups=groups
            )
            sums[stratified] += imbalance(split, strata)
    assert sums[True] < 0.1 * sums[False]


def test_many_small_classes_do_not_shift_the_sizes() -> None:
    """Each pair alone would rather train, both of it."""
    subjects = names(100)
    strata = {subject: str(number // 2) for number, subject in enumerate(subjects)}
    split = holdout(subjects, test=0.2, validation=0.1, seed=0, strata=strata, groups=None)
    assert (len(split.train), len(split.validation), len(split.test)) == (70, 10, 20)


def test_seeds_differ_and_a_split_stays_what_it_was() -> None:
    made = [holdout(names(30), test=0.2, validation=0.2, seed=n, strata=None, groups=None) for n in range(6)]
    assert len({split.sha256 for split in made}) == 6
    assert made[0].test == ("d/sub-006", "d/sub-008", "d/sub-022", "d/sub-024", "d/sub-028", "d/sub-029")


def test_every_scheme_assigns_the_subjects_that_it_always_did() -> None:
    """A sweep that goes on makes its splits again from the seed: another assignment would mix two studies."""
    subjects = names(120)
    strata = {subject: "aaabbc"[number * number % 6] for number, subject in enumerate(subjects[:110])}
    groups = {subject: str(number * 7 % 50) for number, subject in enumerate(subjects[20:])}
    sites = {subject: "AB"[number % 5 == 0] for number, subject in enumerate(subjects)}
    common: dict[str, Any] = {"validation": 0.2, "seed": 3, "strata": strata, "groups": groups}
    split = holdout(subjects, test=0.2, **common)
    made = {
        "holdout": split,
        "kfold": kfold(subjects, folds=5, fold=2, **common),
        "leave_one_out": leave_one_out(subjects, columns=sites, value="B", **common),
        "nested_fractions": nested_fractions(split, 0.25, seed=3, strata=strata, groups=groups),
    }
    assert {name: one.sha256[:16] for name, one in made.items()} == KNOWN


def test_one_site_tests_and_its_relatives_are_left_out() -> None:
    subjects = names(20)
    sites = {subject: "AB"[number % 2] for number, subject in enumerate(subjects[:19])}  # nobody knows the last one's
    groups = {subjects[0]: "twins", subjects[1]: "twins", subjects[3]: "pair", subjects[5]: "pair"}
    split = leave_one_out(subjects, columns=sites, value="A", validation=0.3, seed=0, strata=None, groups=groups)
    assert split.test == tuple(subject for subject in subjects if sites.get(subject) == "A")
    assert split.facts["left_out"] == [subjects[1], subjects[19]]
    assert everybody(split) == sorted(set(subjects) - {subjects[1], subjects[19]})
    split.check(groups)
    with pytest.raises(SplitError, match="no subject has the value C; there are A, B"):
        leave_one_out(subjects, columns=sites, value="C", validation=0.3, seed=0, strata=None, groups=groups)


@CASES
@given(studies(least=8), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 99))
def test_fractions_are_nested_and_keep_who_validates_and_tests(study, one, two, seed) -> None:
    subjects, strata, groups = study
    split = holdout(subjects, test=0.2, validation=0.2, seed=3, strata=strata, groups=groups)
    less, more = (
        nested_fractions(split, share, seed=seed, strata=strata, groups=groups) for share in sorted((one, two))
    )
    assert set(less.train) <= set(more.train) <= set(split.train)
    assert (less.validation, less.test) == (split.validation, split.test)
    assert len(less.train) == max(1, round(min(one, two) * len(split.train)))
    classes = {strata.get(subject, "") for subject in split.train}
    if len(more.train) >= len(classes):
        assert {strata.get(subject, "") for subject in more.train} == classes
    whole = nested_fractions(split, 1.0, seed=seed, strata=strata, groups=groups)
    assert whole.sha256 == split.sha256 and whole.facts["train_share"] == 1.0


def test_a_fraction_keeps_the_proportions_and_takes_relatives_last() -> None:
    train = names(200)
    strata = {subject: "a" if number < 150 else "b" for number, subject in enumerate(train)}
    groups = {subject: str(number // 2) for number, subject in enumerate(train)}
    split = Split(tuple(train), ("d/v",), ("d/t",), {})
    for share in (0.1, 0.25, 0.5):
        part = nested_fractions(split, share, seed=5, strata=strata, groups=groups).train
        assert abs(sum(strata[subject] == "a" for subject in part) - 0.75 * len(part)) <= 1
        assert len({groups[subject] for subject in part}) == len(part)
    chosen = {nested_fractions(split, 0.1, seed=n, strata=strata, groups=groups).train for n in range(5)}
    assert len(chosen) == 5


def test_too_few_groups_and_impossible_shares_are_refused() -> None:
    groups = {subject: "AB"[number % 2] for number, subject in enumerate(names(10))}
    common = {"seed": 0, "strata": None}
    with pytest.raises(SplitError, match=r"10 subject\(s\) in 2 group\(s\).*too few for 3 parts"):
        holdout(names(10), test=0.2, validation=0.2, groups=groups, **common)
    with pytest.raises(SplitError, match=r"0 subject\(s\)"):
        holdout([], test=0.2, validation=0.2, groups=None, **common)
    with pytest.raises(SplitError, match="too few for 12 parts"):
        kfold(names(10), folds=12, fold=0, validation=0.2, groups=None, **common)
    with pytest.raises(SplitError, match="fold 3 of 3"):
        kfold(names(10), folds=3, fold=3, validation=0.2, groups=None, **common)
    with pytest.raises(SplitError, match=r"test \+ validation=1\.1"):
        holdout(names(10), test=0.6, validation=0.5, groups=None, **common)
    with pytest.raises(SplitError, match="share 0 of the training subjects"):
        nested_fractions(SMALL, 0.0, groups=None, **common)


def test_check_finds_what_is_in_two_parts_or_in_none() -> None:
    SMALL.check({"d/sub-1": "f", "d/sub-3": "f"})
    with pytest.raises(SplitError, match="group f is in train and its d/sub-4 in test"):
        SMALL.check({"d/sub-1": "f", "d/sub-4": "f"})
    with pytest.raises(SplitError, match="d/sub-2 stand"):
        SMALL.with_train(["d/sub-1", "d/sub-2"])
    with pytest.raises(SplitError, match="train part is empty"):
        SMALL.with_train([])
    assert SMALL.with_train(["d/sub-9", "d/sub-1"]).train == ("d/sub-1", "d/sub-9")


def test_a_file_gives_the_split_back_and_shows_what_was_edited(tmp_path: Path) -> None:
    file = tmp_path / "new/split.json"
    save_split(file, SMALL)
    assert load_split(file, {"d/sub-1", "d/sub-2", "d/sub-3", "d/sub-4", "d/sub-5"}) == SMALL
    tree = json.loads(file.read_text())
    assert (tree["format"], tree["sha256"], tree["train"]) == (1, SMALL.sha256, ["d/sub-1", "d/sub-3"])
    with pytest.raises(SplitError, match=r"split\.json.*1 of train \(d/sub-3\), 1 of test \(d/sub-4\)"):
        load_split(file, {"d/sub-1", "d/sub-2"})
    moved = tree | {"train": ["d/sub-1"], "test": ["d/sub-3", "d/sub-4"]}
    for text, said in (
        (json.dumps(moved), "was edited"),
        (json.dumps(tree | {"format": 2}), "no split file of format 1"),
        (json.dumps(tree | {"facts": None}), "no split file of format 1 with facts"),
        (json.dumps(tree | {"test": "d/sub-4"}), "test is no list of ids"),
        ("{", "cannot be read as JSON"),
        ("[]", "no split file"),
    ):
        file.write_text(text)
        with pytest.raises(SplitError, match=rf"split\.json: .*{said}"):
            load_split(file, SMALL.train)
    with pytest.raises(SplitError, match=r"none\.json: cannot be read"):
        load_split(tmp_path / "none.json", SMALL.train)
    with pytest.raises(SplitError, match="test part is empty"):
        save_split(file, Split(("d/sub-1",), ("d/sub-2",), (), {}))


def test_a_split_lies_in_an_object_store_as_well(make_bucket) -> None:
    file = to_path(f"{make_bucket()}/runs/split.json")
    save_split(file, SMALL)
    assert load_split(file, everybody(SMALL)) == SMALL


def test_the_hash_is_of_the_ids_alone() -> None:
    assert SMALL.sha256 == SMALL.with_facts(seed=3).sha256
    assert SMALL.with_facts(seed=3).facts == {"scheme": "made", "seed": 3}
    assert SMALL.sha256 != Split(SMALL.train, SMALL.test, SMALL.validation, {}).sha256
    listed = '[["d/sub-1", "d/sub-3"], ["d/sub-2"], ["d/sub-4"]]'  # a saved file must stay readable
    assert SMALL.sha256 == hashlib.sha256(listed.encode()).hexdigest()


@given(st.lists(st.integers(-3, 3) | st.floats(-1e6, 1e6), max_size=40), st.integers(1, 6))
def test_bins_follow_the_order_and_ties_stay_together(numbers, bins) -> None:
    values = dict(zip(names(len(numbers)), map(float, numbers), strict=True))
    binned = {subject: int(name.split("/")[0]) for subject, name in strata_of(values, bins=bins).items()}
    assert binned.keys() == values.keys() and len(set(binned.values())) <= bins
    for one in values:
        for two in values:
            assert binned[one] <= binned[two] if values[one] <= values[two] else binned[one] >= binned[two]


def test_bins_are_quartiles_unless_there_are_few_or_many_ties() -> None:
    spread = strata_of(dict(zip(names(40), np.arange(40.0), strict=True)))
    assert Counter(spread.values()) == {"1/4": 10, "2/4": 10, "3/4": 10, "4/4": 10}
    assert set(strata_of(dict(zip(names(5), range(5), strict=True))).values()) == {"1/1"}
    mostly = [0.0] * 90 + [5.0] * 10
    assert len(set(strata_of(dict(zip(names(100), mostly, strict=True))).values())) == 2
    assert len(set(strata_of(dict(zip(names(100), [-x for x in mostly], strict=True))).values())) == 2
    with pytest.raises(SplitError, match="d/sub-001 has the value nan"):
        strata_of({"d/sub-000": 1.0, "d/sub-001": float("nan")})
    with pytest.raises(SplitError, match="0 bins"):
        strata_of({"d/sub-000": 1.0}, bins=0)


def test_classes_are_strata_and_join() -> None:
    assert strata_of({"a": "F", "b": "M"}) == {"a": "F", "b": "M"}
    assert combine_strata({"a": "F", "b": "M"}, {"b": "site"}) == {"a": "F | ?", "b": "M | site"}

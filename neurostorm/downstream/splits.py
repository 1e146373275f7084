"""Who trains, who validates, who tests: pure functions of (subjects, strata, groups, seed), and the file of ids.

    subjects + strata + groups --holdout | kfold | leave_one_out--> Split --save_split--> ids, facts and their hash
                                                                      |
                                                                      '--nested_fractions--> fewer training subjects

Groups (families, sites) stay whole. They are placed one by one, the large ones first and those of one size by a hash of
(seed, name), each in the part that lacks most of what it brings; then the sizes are evened out. scikit-learn's
splitters do not serve: GroupShuffleSplit does not stratify, StratifiedGroupKFold has no shares and refuses a class with
fewer subjects than folds. Both would assign other subjects to a known seed.

A split follows from the set of subjects, strata, groups and the seed, whatever their order. When subjects are added,
others may change sides for the balance: a study that grows keeps its split file.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from neurostorm.io import atomic
from neurostorm.io.errors import UserError
from neurostorm.io.paths import AnyPath

JSON = str | int | float | bool | None | Sequence["JSON"] | Mapping[str, "JSON"]
Names = Mapping[str, str] | None  # subject -> class or group
Array = NDArray[np.float64]
PARTS = ("train", "validation", "test")
FORMAT = 1
MIN_PER_BIN = 3
TIE_DIGITS = 9  # gains that are equal to so many decimals are a tie, so that no processor's rounding decides
_Group = tuple[str, str]  # ("group", its name) or ("subject", who has none)


class SplitError(UserError, ValueError):
    """A split cannot be made or used; the message says what is there and the fix."""


@dataclass(frozen=True)
class Split:
    """Subjects ("dataset/sub-001") of the three parts, kept sorted, and in `facts` how they were parted."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    facts: Mapping[str, JSON]

    def __post_init__(self) -> None:
        for name in PARTS:
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))

    @property
    def sha256(self) -> str:
        """Of the three lists of ids alone, in hex: the same subjects have it, however they were chosen."""
        return hashlib.sha256(json.dumps([self.train, self.validation, self.test]).encode()).hexdigest()

    def check(self, groups: Names = None) -> None:
        """SplitError if a part is empty, or a subject, or a group of `groups` (subject -> name), is in two parts."""
        empty = [name for name in PARTS if not getattr(self, name)]
        if empty:
            raise SplitError(f"the {empty[0]} part is empty: add subjects or change its share")
        entries = [(subject, name) for name in PARTS for subject in getattr(self, name)]
        twice = [subject for subject, count in Counter(subject for subject, _ in entries).items() if count > 1]
        if twice:
            raise SplitError(f"{_examples(twice)} stand(s) in the split twice: list every subject once")
        part_of: dict[_Group, str] = {}
        for subject, name in entries:
            group = _group(subject, groups)
            first = part_of.setdefault(group, name)
            if first != name:
                raise SplitError(f"group {group[1]} is in {first} and its {subject} in {name}: split with these groups")

    def with_train(self, train: Iterable[str]) -> "Split":
        """The same validation and test with other training subjects. SplitError as `check`."""
        changed = replace(self, train=tuple(train))
        changed.check()
        return changed

    def with_facts(self, **facts: JSON) -> "Split":
        """The same ids with more said about them (the column of the groups, the share that trains)."""
        return replace(self, facts={**self.facts, **facts})

    def to_json(self) -> str:
        """The split's file: format, sha256, facts, and an id a line."""
        head = {"format": FORMAT, "sha256": self.sha256, "facts": dict(self.facts)}
        return json.dumps(head | {name: getattr(self, name) for name in PARTS}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "the split") -> "Split":
        """The split of a file's text. SplitError with the file's `name`: another format, or edited by hand."""
        try:
            found = json.loads(text)
        except ValueError as error:
            raise SplitError(f"{name}: cannot be read as JSON ({error}); make the split anew") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("facts"), dict):
            raise SplitError(f"{name}: is no split file of format {FORMAT} with facts; make the split anew")
        for part in PARTS:
            ids = found.get(part)
            if not isinstance(ids, list) or not all(isinstance(subject, str) for subject in ids):
                raise SplitError(f"{name}: {part} is no list of ids (dataset/sub-001); make the split anew")
        split = cls(tuple(found["train"]), tuple(found["validation"]), tuple(found["test"]), found["facts"])
        if split.sha256 != found.get("sha256"):
            raise SplitError(f"{name}: was edited, its ids have another sha256; restore it, or make the split anew")
        return split


def save_split(file: AnyPath, split: Split) -> None:
    """Check a split and write its file in one step, with the folders above it. OSError when it cannot be written."""
    split.check()
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.atomic_write(file, split.to_json().encode())


def load_split(file: AnyPath, subjects: Collection[str]) -> Split:
    """Read a split's file for a store of `subjects`; the store may have more.

    SplitError: no such file, not the file of a split, edited, or an id that is not in the store.
    """
    try:
        split = Split.from_json(file.read_bytes(), str(file))
    except OSError as error:
        raise SplitError(f"{file}: cannot be read ({error}); give the file of a split") from error
    unknown = {part: sorted({*getattr(split, part)}.difference(subjects)) for part in PARTS}
    found = [f"{len(ids)} of {part} ({_examples(ids)})" for part, ids in unknown.items() if ids]
    if found:
        raise SplitError(
            f"{file}: names subjects that the store lacks: {', '.join(found)}; ingest them, or make the split anew"
        )
    return split


def holdout(
    subjects: Iterable[str], *, test: float, validation: float, seed: int, strata: Names, groups: Names
) -> Split:
    """One split by shares of all subjects.

    Args:
        subjects: ids, in any order.
        test, validation: shares in (0, 1), their sum below 1; a part is within one group's size of its share, unless
            that is less than a group: each part gets one.
        seed: of the order of groups of one size.
        strata: subject -> class; each part has about its share of each, as well as whole groups allow. Who has none are
            a class.
        groups: subject -> family or site, kept whole; who has none is alone.
    SplitError: a share out of range, or fewer than three groups.
    """
    _check_shares({"test": test, "validation": validation, "test + validation": test + validation})
    parts = _assign(subjects, (1 - test - validation, validation, test), f"{seed}", strata, groups)
    facts: dict[str, JSON] = {"scheme": "holdout", "seed": seed, "test": test, "validation": validation}
    return _made(parts, facts, strata, groups)


def kfold(
    subjects: Iterable[str], *, folds: int, fold: int, validation: float, seed: int, strata: Names, groups: Names
) -> Split:
    """Split `fold` (0 to folds - 1) of a cross-validation: its fold tests, and the folds part all subjects.

    `validation` is the share of those outside the fold who validate, drawn anew for each fold; the rest as `holdout`.
    SplitError: `fold` or a share out of range, or too few groups for that many folds.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise SplitError(f"fold {fold} of {folds}: give 2 folds or more, and a fold from 0 to folds - 1")
    _check_shares({"validation": validation})
    tested = _assign(subjects, (1 / folds,) * folds, f"{seed}", strata, groups)
    rest = [subject for number, part in enumerate(tested) if number != fold for subject in part]
    train, held = _assign(rest, (1 - validation, validation), f"{seed}/fold {fold}", strata, groups)
    facts: dict[str, JSON] = {"scheme": "kfold", "seed": seed, "folds": folds, "fold": fold, "validation": validation}
    return _made([train, held, tested[fold]], facts, strata, groups)


def leave_one_out(
    subjects: Iterable[str],
    *,
    columns: Mapping[str, str],
    value: str,
    validation: float,
    seed: int,
    strata: Names,
    groups: Names,
) -> Split:
    """Everybody with `value` in `columns` (subject -> site) tests; `validation` is the share of the others.

    Left out, and listed in the facts as `left_out`: subjects without a value, who may be of that site, and those of a
    group that has a member there. The rest as `holdout`.
    SplitError: nobody has the value, or too few groups are left.
    """
    _check_shares({"validation": validation})
    everybody = sorted(set(subjects))
    test = [subject for subject in everybody if columns.get(subject) == value]
    if not test:
        there = sorted({columns[subject] for subject in everybody if subject in columns})
        raise SplitError(f"no subject has the value {value}; there are {_examples(there, 10)}")
    taken = {_group(subject, groups) for subject in test}
    rest = [subject for subject in everybody if subject in columns and _group(subject, groups) not in taken]
    train, held = _assign(rest, (1 - validation, validation), f"{seed}/without {value}", strata, groups)
    facts: dict[str, JSON] = {"scheme": "leave_one_out", "seed": seed, "value": value, "validation": validation}
    return _made([train, held, test], {**facts, "left_out": sorted({*everybody} - {*test, *rest})}, strata, groups)


def nested_fractions(split: Split, share: float, *, seed: int, strata: Names, groups: Names) -> Split:
    """The split with `share` of its training subjects, in (0, 1]; one at least. Validation and test stay.

    All shares of one seed begin one order of the subjects, so the smaller is always inside the larger. The order deals
    out seats by Adams' divisor method (Balinski and Young, Fair Representation, 1982): each class has its first
    subject before any has its second, and then its proportion. Inside a class different groups come before relatives.
    """
    if not 0 < share <= 1:
        raise SplitError(f"the share {share:g} of the training subjects is not in (0, 1]")
    relatives: Counter[_Group] = Counter()
    classes: dict[str, list[tuple[int, str]]] = {}
    for subject in sorted(split.train, key=lambda subject: _digest(f"{seed}", subject)):
        group = _group(subject, groups)
        classes.setdefault(_stratum(subject, strata), []).append((relatives[group], subject))
        relatives[group] += 1
    order = [
        (rank / len(members), -len(members), stratum, subject)
        for stratum, members in classes.items()
        for rank, (_, subject) in enumerate(sorted(members, key=lambda member: member[0]))
    ]
    chosen = sorted(order)[: max(1, round(share * len(order)))]
    return split.with_train(subject for *_, subject in chosen).with_facts(train_share=share, train_seed=seed)


def strata_of(values: Mapping[str, float | str], *, bins: int = 4) -> dict[str, str]:
    """Classes to balance: text as it is, numbers by quantile.

    A bin follows from the rank, equal numbers sharing their mean rank, so that ties stay together; there are fewer bins
    when they would hold less than `MIN_PER_BIN` subjects. If one value is text, all are. SplitError: a number that is
    not finite, or `bins` below 1.
    """
    if bins < 1:
        raise SplitError(f"{bins} bins: give 1 or more")
    if any(isinstance(value, str) for value in values.values()):
        return {subject: str(value) for subject, value in values.items()}
    numbers = np.asarray(list(values.values()), np.float64)
    bad = [subject for subject, number in zip(values, numbers, strict=True) if not np.isfinite(number)]
    if bad:
        raise SplitError(f"{bad[0]} has the value {values[bad[0]]}: leave out who has no finite number")
    used = max(1, min(bins, len(numbers) // MIN_PER_BIN))
    bin_of = ((rankdata(numbers) - 0.5) / len(numbers) * used).astype(int)
    return {subject: f"{number + 1}/{used}" for subject, number in zip(values, bin_of, strict=True)}


def combine_strata(*mappings: Mapping[str, str]) -> dict[str, str]:
    """Classes of several columns at once, joined by " | "; a column that a subject lacks reads "?"."""
    subjects = sorted({subject for mapping in mappings for subject in mapping})
    return {subject: " | ".join(mapping.get(subject, "?") for mapping in mappings) for subject in subjects}


def _assign(
    subjects: Iterable[str], shares: Sequence[float], salt: str, strata: Names, groups: Names
) -> list[list[str]]:
    """The subjects of each part, P parts with `shares` of all; SplitError when there are fewer groups than parts."""
    everybody = sorted(set(subjects))
    members: dict[_Group, list[str]] = {}
    for subject in everybody:
        members.setdefault(_group(subject, groups), []).append(subject)
    if len(members) < len(shares):
        raise SplitError(
            f"{len(everybody)} subject(s) in {len(members)} group(s) ({_examples(everybody)}) are too few for "
            f"{len(shares)} parts of whole groups: add subjects, ask for fewer folds, or group by a finer column"
        )
    order = sorted(members, key=lambda group: (-len(members[group]), _digest(salt, *group)))
    names = sorted({_stratum(subject, strata) for subject in everybody})
    column_of = {name: column for column, name in enumerate(names, 1)}
    counts = np.zeros((len(order), 1 + len(names)))
    for row, group in enumerate(order):
        for subject in members[group]:
            counts[row, [0, column_of[_stratum(subject, strata)]]] += 1
    wanted = np.outer(shares, counts.sum(axis=0))
    part, lack = _fill(counts, wanted)
    _even_out(counts, wanted, lack, part)
    return [
        [subject for group, at in zip(order, part, strict=True) if at == number for subject in members[group]]
        for number in range(len(shares))
    ]


def _fill(counts: Array, wanted: Array) -> tuple[NDArray[np.int64], Array]:
    """Each group's part (K), and what the parts lack then (P, 1 + S) of `wanted`; no part is left empty.

    `counts` (K, 1 + S) is what each group brings: subjects in all, then of each of the S classes. A group goes where
    the sum of lack^2 / wanted falls most; for single subjects of one class this is Webster's divisor method.
    """
    lack, part, empty = wanted.copy(), np.zeros(len(counts), np.int64), np.ones(len(wanted), bool)
    for row, count in enumerate(counts):
        gain = (count * (2 * lack - count) / wanted).sum(axis=1).round(TIE_DIGITS)
        if empty.sum() == len(counts) - row:
            gain[~empty] = -np.inf
        part[row] = chosen = gain.argmax()
        lack[chosen] -= count
        empty[chosen] = False
    return part, lack


def _even_out(counts: Array, wanted: Array, lack: Array, part: NDArray[np.int64]) -> None:
    """Move groups, in place, to the part that lacks most subjects while that brings two parts' sizes nearer.

    Many small classes, each rounded on its own, can leave a part short. At the end no part lacks more than another by
    over the other's smallest group, unless that is all it has. Of the groups that may move the classes choose.
    """
    rows, squares = np.arange(len(counts)), counts**2 @ (1 / wanted).T
    while True:
        target = lack[:, 0].argmax()
        nearer = counts[:, 0] < lack[target, 0] - lack[part, 0] - 10.0**-TIE_DIGITS
        movable = nearer & (np.bincount(part, minlength=len(wanted))[part] > 1)
        if not movable.any():
            return
        slopes = counts @ (2 * lack / wanted).T
        gain = slopes[:, target] - squares[:, target] - slopes[rows, part] - squares[rows, part]
        moved = np.where(movable, gain.round(TIE_DIGITS), -np.inf).argmax()
        lack[part[moved]] += counts[moved]
        lack[target] -= counts[moved]
        part[moved] = target


def _made(parts: Sequence[Sequence[str]], facts: Mapping[str, JSON], strata: Names, groups: Names) -> Split:
    """The checked split of train, validation and test, its facts completed."""
    said = {**facts, "stratified": strata is not None, "grouped": groups is not None}
    split = Split(tuple(parts[0]), tuple(parts[1]), tuple(parts[2]), said)
    split.check(groups)
    return split


def _check_shares(shares: Mapping[str, float]) -> None:
    for name, share in shares.items():
        if not 0 < share < 1:
            raise SplitError(f"the share {name}={share:g} is not between 0 and 1")


def _group(subject: str, groups: Names) -> _Group:
    name = None if groups is None else groups.get(subject)
    return ("subject", subject) if name is None else ("group", name)


def _stratum(subject: str, strata: Names) -> str:
    return "" if strata is None else strata.get(subject, "")


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("/".join(parts).encode()).digest()


def _examples(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")

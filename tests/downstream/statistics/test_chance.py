"""Selection and test as a whole: on labels that mean nothing no method beats chance, on labels that do it does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from neurostorm.config import AdaptConfig
from neurostorm.downstream.cohort import CohortRun
from neurostorm.downstream.methods import fitting
from neurostorm.downstream.methods.method import find_method
from neurostorm.downstream.methods.objective import objective_of
from neurostorm.downstream.splits import holdout, strata_of
from neurostorm.downstream.tasks.examples import Examples, build_examples

SUBJECTS, FEATURES, SEEDS = 90, 30, 10
METRIC = {"regression": "r", "classification": "balanced_accuracy"}


def people(labels: NDArray[Any], classes: tuple[str, ...]) -> Examples:
    """A clip, and a label, of each subject."""
    runs = [
        CohortRun(f"runs/a/sub-{n:03d}/rest", f"a/sub-{n:03d}", "", "rest", 8, f"{n:x}") for n in range(len(labels))
    ]
    names = [run.subject for run in runs]
    clips = [(index, 0, name) for index, name in enumerate(names)]
    targets = dict(zip(names, labels.tolist(), strict=True))
    return build_examples(runs, 8, clips, dict(zip(names, names, strict=True)), targets, classes)


def measured_on_test(
    kind: str, labels: NDArray[Any], features: NDArray[np.float64], seed: int, patch: pytest.MonkeyPatch
) -> Any:
    """Metrics on the test subjects of a ridge or logistic whose strength was chosen on validation."""
    classes = ("a", "b", "c") if kind == "classification" else ()
    examples = people(labels, classes)
    patch.setattr(fitting, "_vectors", lambda problem, train: features)
    strata = strata_of(dict(zip(examples.units, labels.tolist(), strict=True)))
    split = holdout(examples.subjects, test=0.3, validation=0.2, seed=seed, strata=strata, groups=None)
    subject = np.array(examples.subjects)
    train, validation, test = (
        np.flatnonzero(np.isin(subject, part)) for part in (split.train, split.validation, split.test)
    )
    objective = objective_of(kind, examples.take(train), embedding=8, temperature=0.1, gallery=10, repeats=2, seed=seed)
    problem: Any = fitting.FitData(
        find_method("fc"), AdaptConfig(), METRIC[kind], None, examples, objective, None, Path("."), seed, "cpu"
    )  # type: ignore[arg-type]
    chosen = fitting.fit(problem, train, validation, lambda *_: None)
    predicted = fitting.predict(problem, train, test, chosen.setting, chosen.state)
    return objective.measure(examples.take(test), predicted)


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("informative", [False, True])
def test_only_labels_that_mean_something_are_predicted(
    kind: str, informative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for seed in range(SEEDS):
        rng = np.random.default_rng([seed, informative])
        features = rng.standard_normal((SUBJECTS, FEATURES))
        signal = features[:, 0] if informative else rng.standard_normal(SUBJECTS)
        labels = signal if kind == "regression" else np.argsort(np.argsort(signal)) * 3 // SUBJECTS
        measured = measured_on_test(kind, labels, features, seed, monkeypatch)
        found.append(measured[METRIC[kind]] - measured["chance"])
    error = np.std(found, ddof=1) / np.sqrt(SEEDS)
    if informative:
        assert np.mean(found) > 5 * error
    else:
        assert abs(np.mean(found)) < 2 * error

"""The cohort's people: balanced, and different in ways that their networks' correlations show."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.synthetic.people import (
    AGE_PATTERN,
    BLOCK,
    DIAGNOSES,
    NAMES,
    PHENOTYPES,
    SEX_NETWORKS,
    SEX_PATTERN,
    coupling,
    make_subject,
    participant_row,
    site_of,
)
from neurostorm.synthetic.signal import Recording
from neurostorm.synthetic.sites import SITES


@pytest.fixture(scope="module")
def population():
    """Eighty people with the sample correlations (2, N, K, K) and amplitudes (2, N, K) of two 5-minute sessions."""
    people = [make_subject(0, index) for index in range(80)]
    times_s = np.arange(0.0, 300.0)
    sessions = [[Recording(p, s, "rest", 300.0).network_courses(times_s) for p in people] for s in (1, 2)]
    correlations = np.array([[np.corrcoef(courses) for courses in session] for session in sessions])
    return people, correlations, np.array(sessions).std(axis=-1)


def score(correlations, pattern) -> np.ndarray:
    """Mean signed correlation (N) over a pattern's network pairs, both sessions."""
    pairs = [(NAMES.index(a), NAMES.index(b), sign) for (a, b), sign in pattern.items()]
    return np.mean([sign * correlations[:, :, i, j] for i, j, sign in pairs], axis=(0, 1))


def effect_size(values, group) -> float:
    """Cohen's d of a group against the rest."""
    one, other = values[group], values[~group]
    return (one.mean() - other.mean()) / np.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 2)


def test_age_shows_in_coupling_and_amplitude(population):
    people, correlations, amplitudes = population
    age = np.array([person.age_years for person in people])
    assert np.corrcoef(score(correlations, AGE_PATTERN), age)[0, 1] > 0.6
    assert np.corrcoef(np.log(amplitudes).mean(axis=(0, 2)), age)[0, 1] < -0.6


def test_sex_shows_in_coupling_and_amplitude(population):
    people, correlations, amplitudes = population
    female = np.array([person.sex == "F" for person in people])
    networks = [NAMES.index(name) for name in SEX_NETWORKS]
    assert effect_size(score(correlations, SEX_PATTERN), female) > 1.5
    assert effect_size(np.log(amplitudes).mean(axis=0)[:, networks].mean(axis=1), female) > 0.6


@pytest.mark.parametrize("diagnosis", [name for name in DIAGNOSES if name != "control"])
def test_each_diagnosis_shows_in_its_own_coupling(population, diagnosis):
    people, correlations, _ = population
    has_it = np.array([person.diagnosis == diagnosis for person in people])
    assert effect_size(score(correlations, DIAGNOSES[diagnosis]), has_it) > 1.2


@pytest.mark.parametrize("number, phenotype", list(enumerate(PHENOTYPES)))
def test_phenotypes_follow_their_couplings(population, number, phenotype):
    people, correlations, _ = population
    strength = score(correlations, PHENOTYPES[phenotype][2])
    recorded = [float(participant_row(person, SITES[0])[phenotype]) for person in people]
    assert np.corrcoef(strength, [person.traits[number] for person in people])[0, 1] > 0.5
    assert np.corrcoef(strength, recorded)[0, 1] > 0.4


def test_a_person_is_more_like_themselves_in_the_other_session(population):
    people, correlations, _ = population
    upper = correlations[:, :, *np.triu_indices(len(NAMES), 1)]
    across = np.corrcoef(upper[0], upper[1])[: len(people), len(people) :]
    within, between = np.diag(across), across[~np.eye(len(people), dtype=bool)]
    assert within.mean() > between.mean() + 0.2
    assert np.mean(across.argmax(axis=1) == np.arange(len(people))) > 0.3  # chance is .0125


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), index=st.integers(0, 9998), session=st.integers(1, 99))
def test_couplings_are_always_valid_correlations(seed, index, session):
    matrix = coupling(make_subject(seed, index), session)
    np.testing.assert_allclose(np.diag(matrix), 1)
    np.testing.assert_allclose(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > 0.01


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), block=st.integers(0, 100))
def test_blocks_of_subjects_are_balanced(seed, block):
    indices = range(BLOCK * block, BLOCK * (block + 1))
    people = [make_subject(seed, index) for index in indices]
    assert len({(person.sex, person.diagnosis) for person in people}) == BLOCK
    visits = [site_of(seed, index, SITES).name for index in indices]
    assert all(visits.count(site.name) == BLOCK // len(SITES) for site in SITES)


def test_label_noise_is_the_sites():
    careless = replace(SITES[0], label_noise=0.2)
    people = [make_subject(0, index) for index in range(600)]
    wrong = np.mean([participant_row(person, careless)["diagnosis"] != person.diagnosis for person in people])
    assert 0.15 < wrong < 0.25
    assert all(participant_row(person, SITES[0])["diagnosis"] == person.diagnosis for person in people)


def test_families_are_pairs_and_siblings_alike():
    people = [make_subject(0, index) for index in range(400)]
    offsets = np.array([coupling(person, 1)[np.triu_indices(len(NAMES), 1)] for person in people])
    offsets -= offsets.mean(axis=0)
    alike = {True: [], False: []}
    for one, other in zip(people[::2], people[1::2], strict=True):
        likeness = np.corrcoef(offsets[one.index], offsets[other.index])[0, 1]
        alike[one.family == other.family].append(likeness)
    assert 0.15 < len(alike[True]) / 200 < 0.35
    assert np.mean(alike[True]) > np.mean(alike[False]) + 0.1

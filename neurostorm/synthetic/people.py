"""Who is in the synthetic cohort, and how each person's networks differ: the cohort's ground truth.

    (seed, k) -> Subject k: age, sex, diagnosis, traits, family
                    |-> coupling (K, K)      correlation of the networks' time courses
                    |-> amplitude (K)        how strongly each network fluctuates
                    |-> centres (R, 3)       where its regions lie
                    '-> participants.tsv     what the site wrote down, label noise included

All effect sizes stand here, as constants. They are chosen to be learnable, not taken from the literature: the cohort is
a positive control, so connectivity with a linear model finds each of them in 40 subjects with four minutes of rest.
Nothing about people should be concluded from them. Subject k depends on (seed, k) alone, however many there are.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from neurostorm.synthetic.sites import Site

Float64 = NDArray[np.float64]

# Ten bilateral networks by the right-hemisphere centres (MNI mm, rounded) of their regions; the left side mirrors them.
NETWORKS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "visual": ((10, -84, 4), (42, -76, 2), (28, -62, -12)),
    "somatomotor": ((40, -24, 56), (6, -18, 62), (56, -6, 30)),
    "auditory": ((56, -22, 8), (54, 4, -14)),
    "attention": ((28, -60, 54), (28, -4, 56)),
    "salience": ((38, 18, -2), (5, 24, 32), (60, -36, 30)),
    "limbic": ((20, 38, -18), (36, 8, -36), (26, -22, -22)),
    "control": ((42, 36, 22), (46, -52, 46)),
    "default": ((6, 54, 8), (6, -52, 28), (50, -64, 26), (60, -18, -20), (20, 34, 46)),
    "subcortical": ((12, -18, 8), (22, 6, 2)),
    "cerebellar": ((16, -52, -22), (36, -70, -40), (4, -30, -36)),
}
NAMES = tuple(NETWORKS)
NETWORK_OF_REGION = np.array([k for k, name in enumerate(NAMES) for _ in NETWORKS[name]])
CENTRES_MM = np.array([centre for name in NAMES for centre in NETWORKS[name]], dtype=np.float64)

# Group coupling: loadings of each network on a sensory, a task and an internal mode.
LOADINGS = np.array(
    [
        (0.65, 0.10, -0.05),
        (0.70, 0.05, -0.10),
        (0.65, 0.10, 0.05),
        (0.35, 0.50, -0.35),
        (0.20, 0.45, -0.20),
        (0.00, 0.05, 0.45),
        (0.00, 0.60, 0.20),
        (-0.10, 0.00, 0.65),
        (0.20, 0.30, 0.10),
        (0.25, 0.35, 0.05),
    ]
)

# Effect sizes. Couplings are offsets of the matrix logarithm of the coupling matrix, close to changes of correlation
# on the listed network pairs; amplitudes are offsets of the log amplitude; "per SD" is per standard deviation.
AGE_COUPLING = 0.18  # per SD of age
AGE_AMPLITUDE = -0.08  # per SD of age: networks fluctuate less with age
SEX_COUPLING = 0.40  # female minus male
SEX_AMPLITUDE = 0.14  # female minus male, on the networks of SEX_NETWORKS
DIAGNOSIS_COUPLING = 0.60  # against control, each diagnosis on its own pairs
PHENOTYPE_COUPLING = 0.25  # per SD of the trait behind each phenotype
FINGERPRINT_COUPLING = 0.13  # SD over subjects, every pair, the same in all sessions
FINGERPRINT_AMPLITUDE = 0.08  # SD over subjects, every network
FINGERPRINT_SHIFT_MM = 6.0  # SD over subjects of each region's position along each axis
SESSION_COUPLING = 0.04  # SD over a subject's sessions, every pair
SESSION_SHIFT_MM = 0.7  # SD over a subject's sessions
SIBLING_SHARE = 0.25  # share of consecutive pairs of subjects that are siblings
SIBLING_LIKENESS = 0.5  # share of a sibling's fingerprint variance that is the family's
RESTLESSNESS_SD = 0.3  # SD over subjects of the log of head motion
RESTLESSNESS_AGE = 0.1  # per SD of age, log of head motion: what a motion-only baseline can find
RESTLESSNESS_ADHD = 0.3  # against the other diagnoses, log of head motion
PHENOTYPE_RELIABILITY = 0.85  # correlation of a recorded phenotype with its trait, before the site's label noise

Pattern = Mapping[tuple[str, str], float]
AGE_PATTERN: Pattern = {
    ("default", "attention"): 1, ("default", "control"): 1, ("visual", "somatomotor"): -1,
    ("salience", "control"): -1, ("limbic", "default"): -1, ("visual", "attention"): -1,
}  # fmt: skip
SEX_PATTERN: Pattern = {
    ("auditory", "limbic"): 1, ("somatomotor", "subcortical"): -1, ("visual", "cerebellar"): -1,
    ("limbic", "salience"): 1, ("control", "cerebellar"): 1,
}  # fmt: skip
SEX_NETWORKS = ("limbic", "auditory", "default")
DIAGNOSES: dict[str, Pattern] = {
    "control": {},
    "adhd": {("attention", "salience"): -1, ("default", "salience"): 1, ("attention", "subcortical"): 1,
             ("somatomotor", "control"): 1},
    "bipolar": {("limbic", "subcortical"): 1, ("limbic", "control"): -1, ("limbic", "visual"): 1,
                ("subcortical", "auditory"): -1},
    "schizophrenia": {("subcortical", "somatomotor"): 1, ("cerebellar", "somatomotor"): -1,
                      ("auditory", "default"): 1, ("control", "visual"): -1},
}  # fmt: skip
PHENOTYPES: dict[str, tuple[float, float, Pattern]] = {  # name: population mean, SD, pairs
    "cognition_score": (100.0, 15.0, {("control", "attention"): 1, ("control", "salience"): 1,
                                      ("default", "visual"): -1, ("cerebellar", "default"): 1}),
    "distress_score": (50.0, 10.0, {("salience", "limbic"): 1, ("salience", "subcortical"): 1,
                                    ("limbic", "attention"): 1, ("default", "subcortical"): -1}),
}  # fmt: skip
AGE_YEARS = (18.0, 80.0)  # ages are uniform in this range
BLOCK = 8  # subjects k // 8 together hold each combination of sex and diagnosis once


@dataclass(frozen=True)
class Subject:
    """One person: what is true of them, whatever their site writes down.

    Attributes:
        seed, index: the cohort's seed and k; they determine everything else.
        age_years, sex ("F" or "M"), diagnosis (a key of DIAGNOSES).
        traits: one standard normal value per entry of PHENOTYPES.
        family: index of the first member of the family.
        restlessness: factor on head motion, about 1; higher with age and in ADHD.
    """

    seed: int
    index: int
    age_years: float
    sex: str
    diagnosis: str
    traits: tuple[float, ...]
    family: int
    restlessness: float

    @property
    def label(self) -> str:
        """The BIDS folder and participant_id, `sub-001` for k = 0."""
        return f"sub-{self.index + 1:03d}"

    @property
    def age_sd(self) -> float:
        """Age in standard deviations of the cohort's uniform distribution."""
        low, high = AGE_YEARS
        return (self.age_years - (low + high) / 2) / ((high - low) / np.sqrt(12))

    @property
    def sex_contrast(self) -> float:
        """+1/2 for female, -1/2 for male."""
        return 0.5 if self.sex == "F" else -0.5


def stream(seed: int, *keys: int | str) -> np.random.Generator:
    """A generator of its own for each (seed, keys): nobody's draws depend on anybody else's."""
    return np.random.default_rng([seed, *(zlib.crc32(key.encode()) if isinstance(key, str) else key for key in keys)])


def make_subject(seed: int, index: int) -> Subject:
    """Subject `index` (from 0) of the cohort with this seed."""
    block, place = divmod(index, BLOCK)
    cells = list(product(("F", "M"), DIAGNOSES))
    sex, diagnosis = cells[stream(seed, "block", block).permutation(BLOCK)[place]]
    rng = stream(seed, "subject", index)
    age_years = round(float(rng.uniform(*AGE_YEARS)), 1)
    traits = tuple(float(value) for value in rng.standard_normal(len(PHENOTYPES)))
    family = index - index % 2 if _has_sibling(seed, index) else index
    calm = Subject(seed, index, age_years, sex, diagnosis, traits, family, restlessness=1.0)
    log_restlessness = RESTLESSNESS_SD * rng.standard_normal() + RESTLESSNESS_AGE * calm.age_sd
    log_restlessness += RESTLESSNESS_ADHD if diagnosis == "adhd" else 0.0
    return replace(calm, restlessness=float(np.exp(log_restlessness)))


def site_of(seed: int, index: int, sites: tuple[Site, ...]) -> Site:
    """The site that scans subject `index`: balanced over each block of subjects, at random within it."""
    block, place = divmod(index, BLOCK)
    return sites[stream(seed, "site", block).permutation(BLOCK)[place] % len(sites)]


def participant_row(subject: Subject, site: Site) -> dict[str, str]:
    """The subject's line of `participants.tsv`, as this site recorded it."""
    rng = stream(subject.seed, "labels", subject.index)
    mistaken, other = rng.random() < site.label_noise, int(rng.integers(1, len(DIAGNOSES)))
    names = list(DIAGNOSES)
    recorded = names[(names.index(subject.diagnosis) + other) % len(names)] if mistaken else subject.diagnosis
    row = {
        "participant_id": subject.label,
        "age": f"{subject.age_years:.1f}",
        "sex": subject.sex,
        "site": site.name,
        "diagnosis": recorded,
    }
    for (name, (centre, spread, _)), trait in zip(PHENOTYPES.items(), subject.traits, strict=True):
        own, error = rng.standard_normal(2)
        score = PHENOTYPE_RELIABILITY * trait + np.sqrt(1 - PHENOTYPE_RELIABILITY**2) * own + site.label_noise * error
        row[name] = f"{centre + spread * score:.1f}"
    return row | {"family_id": f"fam-{subject.family + 1:03d}"}


def coupling(subject: Subject, session: int) -> Float64:
    """Correlation matrix (K, K) of the networks' time courses for a subject in a session (from 1).

    Effects are added to the matrix logarithm of the group's matrix and mapped back (the log-Euclidean tangent space
    of Arsigny et al. 2006, doi:10.1002/mrm.20965), so that any sum of effects is a valid correlation matrix.
    """
    tangent = _matrix_function(group_coupling(), np.log)
    tangent += AGE_COUPLING * subject.age_sd * _pairs(AGE_PATTERN)
    tangent += SEX_COUPLING * subject.sex_contrast * _pairs(SEX_PATTERN)
    tangent += DIAGNOSIS_COUPLING * _pairs(DIAGNOSES[subject.diagnosis])
    for trait, (_, _, pattern) in zip(subject.traits, PHENOTYPES.values(), strict=True):
        tangent += PHENOTYPE_COUPLING * trait * _pairs(pattern)
    size = (len(NAMES), len(NAMES))
    today = stream(subject.seed, "session coupling", subject.index, session).normal(size=size)
    tangent += FINGERPRINT_COUPLING * _symmetric(_fingerprint(subject, "coupling", size))
    tangent += SESSION_COUPLING * _symmetric(today)
    matrix = _matrix_function(tangent, np.exp)
    scale = np.sqrt(np.diag(matrix))
    return matrix / np.outer(scale, scale)


def amplitude(subject: Subject) -> Float64:
    """Factor (K) on each network's fluctuation."""
    log_amplitude = FINGERPRINT_AMPLITUDE * _fingerprint(subject, "amplitude", (len(NAMES),))
    log_amplitude += AGE_AMPLITUDE * subject.age_sd
    log_amplitude[[NAMES.index(name) for name in SEX_NETWORKS]] += SEX_AMPLITUDE * subject.sex_contrast
    return np.exp(log_amplitude)


def centres_mm(subject: Subject, session: int) -> Float64:
    """Right-hemisphere centres (R, 3) of the subject's regions in MNI mm: the group's, shifted."""
    shape = CENTRES_MM.shape
    shift_mm = FINGERPRINT_SHIFT_MM * _fingerprint(subject, "topography", shape)
    shift_mm += SESSION_SHIFT_MM * stream(subject.seed, "session topography", subject.index, session).normal(size=shape)
    return CENTRES_MM + shift_mm


def group_coupling() -> Float64:
    """The cohort's average correlation matrix (K, K), from the networks' loadings."""
    matrix = LOADINGS @ LOADINGS.T
    np.fill_diagonal(matrix, 1.0)
    return matrix


def _fingerprint(subject: Subject, what: str, shape: tuple[int, ...]) -> Float64:
    """Standard normal offsets that are the subject's own in every session, shared in part with a sibling."""
    own = stream(subject.seed, what, subject.index).normal(size=shape)
    shared = stream(subject.seed, "family " + what, subject.index // 2).normal(size=shape)
    likeness = SIBLING_LIKENESS if _has_sibling(subject.seed, subject.index) else 0.0
    return np.sqrt(1 - likeness) * own + np.sqrt(likeness) * shared


def _has_sibling(seed: int, index: int) -> bool:
    """Whether subjects 2i and 2i + 1, one of whom is `index`, are siblings."""
    return bool(stream(seed, "family", index // 2).random() < SIBLING_SHARE)


def _pairs(pattern: Pattern) -> Float64:
    """A pattern over network pairs as a symmetric matrix (K, K) with a zero diagonal."""
    matrix = np.zeros((len(NAMES), len(NAMES)))
    for (one, other), weight in pattern.items():
        i, j = NAMES.index(one), NAMES.index(other)
        matrix[i, j] = matrix[j, i] = weight
    return matrix


def _symmetric(values: Float64) -> Float64:
    """The upper triangle of (K, K) mirrored, the diagonal zero."""
    upper = np.triu(values, 1)
    return upper + upper.T


def _matrix_function(matrix: Float64, function: np.ufunc) -> Float64:
    """A function of a symmetric matrix through its eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * function(values)) @ vectors.T

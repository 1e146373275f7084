"""Where the synthetic cohort is scanned: sites with their grids, and the anatomy as each grid sees it.

    ICBM template (nilearn, 1 mm): T1, grey, white
        -> mean signal, grey share, brain share    smoothed once, so that every grid samples the same world
            -> anatomy(voxel_mm, space)            values at one grid's voxel centres, kept per process

A site is a scanner with its habits: voxel size, repetition time, template space, storage orientation, noise and how
carefully labels are written down. Everything is defined in world millimetres (RAS+), so that a subject scanned on
two grids has the same brain in the same place.
"""

import functools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

# First voxel centre and the distance between the first and last centres (mm) of the 2 mm templates: FSL's
# MNI152NLin6Asym (91x109x91) and TemplateFlow's MNI152NLin2009cAsym (97x115x97, half a millimetre off the lattice).
SPACES = {
    "MNI152NLin6Asym": ((-90.0, -126.0, -72.0), (180.0, 216.0, 180.0)),
    "MNI152NLin2009cAsym": ((-96.5, -132.5, -78.5), (192.0, 228.0, 192.0)),
}
SIGNAL = 10_000.0  # mean signal of grey matter, arbitrary units (fMRIPrep's usual grand mean)
TISSUE_SIGNAL = {"grey": 1.0, "white": 0.9, "fluid": 1.12}  # T2*-weighted contrast, relative to grey matter
SPREAD_FWHM_MM = 4.0  # smoothness of the anatomy in every site: acquisition and spatial normalisation together
BRAIN_SHARE = 0.6  # a voxel is brain when at least this much of it is


@dataclass(frozen=True)
class Site:
    """One scanner of the cohort.

    Attributes:
        name: how `participants.tsv` calls it.
        voxel_mm: edge of its isotropic voxels.
        tr_s: repetition time.
        space: template space of its preprocessed runs, a key of SPACES.
        orientation: how its files store x: "RAS" (left to right) or "LAS" (right to left).
        noise: thermal noise relative to the cohort's usual level.
        gain: scanner units per SIGNAL.
        label_noise: share of wrong diagnoses, and error of phenotypes in standard deviations.
    """

    name: str
    voxel_mm: float
    tr_s: float
    space: str = "MNI152NLin6Asym"
    orientation: str = "RAS"
    noise: float = 1.0
    gain: float = 1.0
    label_noise: float = 0.0

    def at(self, voxel_mm: float) -> "Site":
        """The same scanner with other voxels."""
        return replace(self, voxel_mm=float(voxel_mm))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along x, y, z."""
        return grid_shape(self.voxel_mm, self.space)

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4) voxel index -> world mm of the stored array, x running as `orientation` says."""
        affine = grid_affine(self.voxel_mm, self.space)
        if self.orientation == "LAS":
            affine[0, 3] += affine[0, 0] * (self.shape[0] - 1)
            affine[0, 0] *= -1
        return affine


# Voxels, TR and storage as in HCP (LAS, .72 s), UKB/ABCD, and two older scanners; noise and gain are invented.
SITES = (
    Site("alpine", 2.0, 0.72, "MNI152NLin6Asym", "LAS", noise=1.10, gain=1.0, label_noise=0.00),
    Site("boreal", 2.4, 0.80, "MNI152NLin2009cAsym", "RAS", noise=1.05, gain=0.6, label_noise=0.05),
    Site("coastal", 3.0, 1.50, "MNI152NLin6Asym", "RAS", noise=1.00, gain=1.4, label_noise=0.10),
    Site("desert", 4.0, 2.00, "MNI152NLin2009cAsym", "LAS", noise=0.90, gain=0.8, label_noise=0.15),
)


def choose_sites(names: str, voxel_mm: float | None = None) -> tuple[Site, ...]:
    """The sites a flag names: "all", "4mm" (all of them with 4 mm voxels) or names joined by commas.

    Args:
        names: the flag's text.
        voxel_mm: isotropic voxel edge for every chosen site, or None for each site's own.

    Raises:
        ValueError: an unknown site, or voxels outside 2-8 mm.
    """
    known = {site.name: site for site in SITES}
    wanted = list(known) if names in ("all", "4mm") else names.split(",")
    for name in wanted:
        if name not in known:
            raise ValueError(f"sites: no site {name!r}; use all, 4mm or names joined by commas: {', '.join(known)}")
    if names == "4mm" and voxel_mm is None:
        voxel_mm = 4.0
    if voxel_mm is not None and not 2 <= voxel_mm <= 8:
        raise ValueError(f"voxel_mm: {voxel_mm:g} is outside 2-8 mm")
    return tuple(known[name] if voxel_mm is None else known[name].at(voxel_mm) for name in wanted)


def grid_shape(voxel_mm: float, space: str) -> tuple[int, int, int]:
    """Voxels along x, y, z of a template space at a voxel size: its 2 mm extents, as many centres as fit."""
    x, y, z = (int(extent_mm / voxel_mm + 1e-6) + 1 for extent_mm in SPACES[space][1])
    return x, y, z


def grid_affine(voxel_mm: float, space: str) -> NDArray[np.float64]:
    """(4, 4) float64, RAS+ voxel index -> world mm; the first centre is the same at every voxel size."""
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = SPACES[space][0]
    return affine


@dataclass(frozen=True)
class Anatomy:
    """The template on one grid; V brain voxels in the C order of the RAS box.

    Attributes:
        mask: bool (X, Y, Z), RAS order.
        coordinates_mm: float32 (V, 3), world position of each brain voxel.
        mean: float32 (V), mean T2*-like signal, units of SIGNAL.
        grey: float32 (V), share of grey matter, 0 to 1.
        gradient: float32 (V, 3), change of `mean` per mm along x, y, z: what a head movement does.
    """

    mask: NDArray[np.bool_]
    coordinates_mm: Float32
    mean: Float32
    grey: Float32
    gradient: Float32


@functools.lru_cache(maxsize=8)
def anatomy(voxel_mm: float, space: str) -> Anatomy:
    """The template's anatomy on a grid (cached per process)."""
    shape, affine = grid_shape(voxel_mm, space), grid_affine(voxel_mm, space)
    axes = [affine[axis, 3] + affine[axis, axis] * np.arange(shape[axis]) for axis in range(3)]
    box_mm = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float32)  # (X, Y, Z, 3)
    mask = _sample("brain", box_mm) >= BRAIN_SHARE
    coordinates_mm = box_mm[mask]
    steps_mm = np.eye(3, dtype=np.float32)
    slopes = [_sample("mean", coordinates_mm + step) - _sample("mean", coordinates_mm - step) for step in steps_mm]
    return Anatomy(
        mask=mask,
        coordinates_mm=coordinates_mm,
        mean=_sample("mean", coordinates_mm),
        grey=np.clip(_sample("grey", coordinates_mm), 0, 1),
        gradient=(np.stack(slopes, axis=-1) / 2).astype(np.float32),  # central difference over 2 mm
    )


@functools.lru_cache(maxsize=1)
def _world() -> tuple[dict[str, Float32], NDArray[np.float64]]:
    """The smoothed 1 mm maps "brain", "grey" and "mean", and the affine's inverse (world mm -> index)."""
    from nilearn import datasets  # two seconds of imports that only rendering needs
    from scipy.ndimage import gaussian_filter

    image = datasets.load_mni152_template(resolution=1)
    brain = (np.asarray(image.dataobj) > 0).astype(np.float32)  # the packaged template is skull-stripped
    grey = np.asarray(datasets.load_mni152_gm_template(resolution=1).dataobj, dtype=np.float32) * brain
    white = np.asarray(datasets.load_mni152_wm_template(resolution=1).dataobj, dtype=np.float32) * brain
    fluid = np.clip(brain - grey - white, 0, 1)
    shares = {"grey": grey, "white": white, "fluid": fluid}
    mean = sum(SIGNAL * TISSUE_SIGNAL[tissue] * share for tissue, share in shares.items())
    sigma_voxels = SPREAD_FWHM_MM / np.sqrt(8 * np.log(2))  # voxels are 1 mm
    maps = {"brain": brain, "grey": grey, "mean": np.asarray(mean, dtype=np.float32)}
    return {name: gaussian_filter(values, sigma_voxels) for name, values in maps.items()}, np.linalg.inv(image.affine)


def _sample(name: str, points_mm: Float32) -> Float32:
    """A world map at points (..., 3) in mm, trilinear, zero outside the template's box -> float32 (...)."""
    from scipy.ndimage import map_coordinates

    maps, to_index = _world()
    index = [to_index[axis, axis] * points_mm[..., axis] + to_index[axis, 3] for axis in range(3)]  # 1 mm, RAS+
    return map_coordinates(maps[name], index, order=1, mode="constant", cval=0.0, output=np.float32)

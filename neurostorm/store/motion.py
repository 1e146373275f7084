"""How far a head moved from frame to frame, and what of that is kept with a run.

rigid motion (6, T) in mm and radians ─ framewise_displacement ─> mm (T) ─ motion_facts ─> mean, maximum, spikes
"""

import math

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

PARAMETERS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")  # as fMRIPrep calls them; mm and radians
HEAD_RADIUS_MM = 50.0  # turns rotations into displacements (Power et al. 2012, doi:10.1016/j.neuroimage.2011.10.018)
SPIKE_MM = 0.5  # more than this is a spike (Power et al. 2012)
DIGITS = 6  # kept after the point, so that machines which round sums differently store the same bytes


def framewise_displacement(motion: Float64) -> Float64:
    """Framewise displacement (T) in mm of rigid motion (6, T), nan for the first frame (Power et al. 2012).

    Sum over the six parameters of the change since the previous frame, rotations as arcs on a 50 mm sphere.
    """
    arcs_mm = np.concatenate([motion[:3], HEAD_RADIUS_MM * motion[3:]])
    return np.concatenate([[np.nan], np.abs(np.diff(arcs_mm, axis=1)).sum(axis=0)])


def motion_facts(displacement_mm: Float64) -> dict[str, float]:
    """What a run's attributes say of its framewise displacement (T) in mm; frames that are nan do not count.

    Returns:
        `fd_mean_mm`, `fd_max_mm`, and `fd_spike_fraction`, the share of the frames that moved more than SPIKE_MM.

    Raises:
        ValueError: a negative or infinite displacement, or none at all.
    """
    known = displacement_mm[~np.isnan(displacement_mm)]
    if not len(known) or not np.isfinite(known).all() or (known < 0).any():
        raise ValueError("no framewise displacement, or an impossible one")
    return {
        "fd_mean_mm": round(math.fsum(known) / len(known), DIGITS),
        "fd_max_mm": round(float(known.max()), DIGITS),
        "fd_spike_fraction": round(float((known > SPIKE_MM).mean()), DIGITS),
    }

"""BIDS derivatives: `sub-1_ses-1_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz`, as fMRIPrep names them."""

from pathlib import PurePosixPath

from neurostorm.ingest.layouts.layout import EXTENSIONS, VERSION_ENTITIES, Name, entities_of, safe_label, stem_of

# fMRIPrep writes the first two; others of the MNI family have the same millimetres to a voxel or so.
PREFERRED_SPACES = ("MNI152NLin6Asym", "MNI152NLin2009cAsym")
PREFERRED_RESOLUTIONS = ("2", "02", "2mm", "")
_CONFOUNDS = ("_desc-confounds_timeseries.tsv", "_desc-confounds_regressors.tsv")  # of fMRIPrep now, and of old


class BidsDerivatives:
    """`*_desc-preproc_bold`; a run that is not in MNI space has its reason in `refused`."""

    name = "bids"
    looks_for = "BIDS derivatives (sub-*_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz)"

    def parse(self, path: PurePosixPath) -> Name | None:
        """A preprocessed run; one that is not in MNI space has its reason in `refused`."""
        parsed = entities_of(stem_of(path) or "")
        if parsed is None or parsed[1] != "bold" or parsed[0].get("desc") != "preproc":
            return None
        entities = parsed[0]
        kept = {key: value for key, value in entities.items() if key not in VERSION_ENTITIES}
        space, resolution = entities.get("space", ""), entities.get("res", "")
        refused = ""
        if not space.startswith("MNI"):
            where = f"space-{space}" if space else "the scanner's own space (no space- in the name)"
            refused = (
                f"is in {where}, not in MNI space: rerun fMRIPrep with --output-spaces {PREFERRED_SPACES[0]}:res-2"
            )
        rank = (bool(refused), _rank(space, PREFERRED_SPACES), _rank(resolution, PREFERRED_RESOLUTIONS), path.name)
        return Name(
            subject=f"sub-{safe_label(entities['sub'])}",
            session=entities.get("ses", ""),
            task=entities.get("task", ""),
            run_label=entities.get("run", ""),
            stem=safe_label("_".join(f"{key}-{value}" for key, value in kept.items() if key != "sub") or "run"),
            key=(path.parent.as_posix(), *(f"{key}-{value}" for key, value in kept.items())),
            rank=rank,
            entities=entities,
            refused=refused,
        )

    def mask_names(self, path: PurePosixPath) -> list[str]:
        """fMRIPrep's mask in the space of the run."""
        stem = (stem_of(path) or "").replace("_desc-preproc_bold", "_desc-brain_mask")
        return [stem + extension for extension in EXTENSIONS]

    def motion_names(self, path: PurePosixPath) -> list[str]:
        """fMRIPrep's table of confounds."""
        parsed = entities_of(stem_of(path) or "")
        if parsed is None:
            return []
        run = "_".join(f"{key}-{value}" for key, value in parsed[0].items() if key not in VERSION_ENTITIES)
        return [run + ending for ending in _CONFOUNDS]

    def is_motion(self, name: str) -> bool:
        """Whether a file is a table of confounds."""
        return name.endswith(_CONFOUNDS)


def _rank(value: str, preferred: tuple[str, ...]) -> int:
    return preferred.index(value) if value in preferred else len(preferred)

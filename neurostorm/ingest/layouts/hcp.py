"""The Human Connectome Project: `100307/MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR_hp2000_clean.nii.gz`."""

import re
from pathlib import PurePosixPath

from neurostorm.ingest.layouts.layout import EXTENSIONS, Name, safe_label, stem_of

_MOTION = "Movement_Regressors.txt"
_RUN = re.compile(r"(?P<kind>[rt]fMRI)_(?P<task>[A-Za-z]+)(?P<number>\d*)(?:_(?P<label>[A-Za-z0-9_]+))?")
_CLEANED = re.compile(r"(?:_hp\d+)?_clean(?:_[rt]clean)*")
_VISIT = re.compile(r"(?P<subject>[A-Za-z]+\d+)_(?P<visit>V\d+)(?:_\w+)?")


class Hcp:
    """Volume runs of the HCP pipelines; cleaned versions first."""

    name = "hcp"
    looks_for = "HCP names (<subject>/MNINonLinear/Results/rfMRI_*/rfMRI_*.nii.gz, tfMRI_*)"

    def parse(self, path: PurePosixPath) -> Name | None:
        """A volume run, `<subject>/MNINonLinear/Results/<run>/<run>[_hp2000_clean]`; cleaned ones first.

        A numbered run (REST1, REST2) was acquired on its own day and becomes a session of its own.
        """
        stem, parts = stem_of(path) or "", path.parts
        if len(parts) < 4 or parts[-4:-2] != ("MNINonLinear", "Results") or not stem.startswith(parts[-2]):
            return None
        run, ending = _RUN.fullmatch(parts[-2]), stem.removeprefix(parts[-2])
        if run is None or not (ending == "" or _CLEANED.fullmatch(ending)):
            return None
        folder = parts[-5] if len(parts) > 4 else ""
        visit = _VISIT.fullmatch(folder)
        subject = visit["subject"] if visit else folder
        session = (visit["visit"] if visit else "") + (f"{run['task']}{run['number']}" if run["number"] else "")
        entities = {
            "ses": session,
            "task": "rest" if run["kind"] == "rfMRI" else run["task"].lower(),
            "run": (run["label"] or "").replace("_", ""),
        }
        return Name(
            subject=f"sub-{safe_label(subject)}",
            session=session,
            task=entities["task"],
            run_label=entities["run"],
            stem="_".join(f"{key}-{value}" for key, value in entities.items() if value),
            key=(path.parent.as_posix(),),
            rank=(-len(ending), path.name),
            entities={"sub": subject, **{key: value for key, value in entities.items() if value}},
        )

    def mask_names(self, path: PurePosixPath) -> list[str]:
        """The pipelines' mask at the resolution of functional runs."""
        return [stem + extension for stem in ("brainmask_fs.2", "brainmask_fs.*") for extension in EXTENSIONS]

    def motion_names(self, path: PurePosixPath) -> list[str]:
        """The pipelines' movement regressors."""
        return [_MOTION]

    def is_motion(self, name: str) -> bool:
        """Whether a file is the table of movement regressors."""
        return name == _MOTION

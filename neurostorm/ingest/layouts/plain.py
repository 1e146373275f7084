"""Any other tree of NIfTI files: the first folder below the source is the subject, else the file's own name."""

import re
from pathlib import PurePosixPath

from neurostorm.ingest.layouts.layout import EXTENSIONS, Name, entities_of, safe_label, stem_of

_HELPER = re.compile(r"(?i)(?:^|[_-])(?:brain)?[_-]?(?:mask|sbref|boldref|T1w|T2w|dseg|probseg|atlas)$")


class Plain:
    """The layout of trees in which no other finds a run."""

    name = "plain"
    looks_for = "any *.nii or *.nii.gz"

    def parse(self, path: PurePosixPath) -> Name | None:
        """Any other NIfTI file, `path` relative to the source.

        The subject is the `sub-` of the file's name, else the first folder, else the file's name. Masks, references and
        anatomy by their usual endings are no runs.
        """
        stem = stem_of(path)
        if stem is None or _HELPER.search(stem):
            return None
        parsed = entities_of(stem) or entities_of(f"{stem}_bold")
        entities = parsed[0] if parsed else {}
        folders = path.parts[:-1]
        subject = entities.get("sub") or (folders[0].removeprefix("sub-") if folders else stem)
        rest = stem.removeprefix(f"sub-{subject}").lstrip("_") if parsed else "" if not folders else stem
        label = "-".join(
            [*(folder for folder in folders if folder.removeprefix("sub-") != subject), *([rest] if rest else [])]
        )
        return Name(
            subject=f"sub-{safe_label(subject)}",
            session=entities.get("ses", ""),
            task=entities.get("task", ""),
            run_label=label,
            stem=safe_label(label or "run"),
            key=(path.parent.as_posix(), stem),
            rank=(path.name,),
            entities=entities,
        )

    def mask_names(self, path: PurePosixPath) -> list[str]:
        """The file's own mask, or one for the folder."""
        stem = stem_of(path) or ""
        stems = [f"{stem}_mask", f"{stem}_brain_mask", f"{stem}_brainmask", "brain_mask", "brainmask", "mask"]
        return [found + extension for found in stems for extension in EXTENSIONS]

    def motion_names(self, path: PurePosixPath) -> list[str]:
        """No names are agreed upon."""
        return []

    def is_motion(self, name: str) -> bool:
        """No names are agreed upon."""
        return False

"""What a path says about a run: three naming schemes, read without touching a file.

    BIDS derivatives   sub-01/ses-1/func/sub-01_ses-1_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz
    HCP                100307/MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR_hp2000_clean.nii.gz
    plain              anything.nii.gz; the first folder below the source is the subject, else the file's own name

Each parser answers with a `Name` or with None when the path is not of its scheme. Several files may be versions of
one run (template spaces, resolutions, with and without cleaning): they share `key`, and the lowest `rank` is taken.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from neurostorm.io.paths import Place

EXTENSIONS = (".nii.gz", ".nii")
# fMRIPrep writes the first two; others of the MNI family have the same millimetres to a voxel or so.
PREFERRED_SPACES = ("MNI152NLin6Asym", "MNI152NLin2009cAsym")
PREFERRED_RESOLUTIONS = ("2", "02", "2mm", "")
_VERSION_ENTITIES = ("space", "cohort", "res", "den", "desc")  # they tell versions of a run apart, not runs
_DERIVATIVES = "derivatives"
_EVENTS = "events.tsv"
_CONFOUNDS = ("_desc-confounds_timeseries.tsv", "_desc-confounds_regressors.tsv")  # of fMRIPrep now, and of old
_HCP_MOTION = "Movement_Regressors.txt"
_CIFTI = re.compile(r"\.[dp](tseries|scalar|label|conn)$")
_HCP_RUN = re.compile(r"(?P<kind>[rt]fMRI)_(?P<task>[A-Za-z]+)(?P<number>\d*)(?:_(?P<label>[A-Za-z0-9_]+))?")
_HCP_CLEANED = re.compile(r"(?:_hp\d+)?_clean(?:_[rt]clean)*")
_HCP_VISIT = re.compile(r"(?P<subject>[A-Za-z]+\d+)_(?P<visit>V\d+)(?:_\w+)?")
_HELPER = re.compile(r"(?i)(?:^|[_-])(?:brain)?[_-]?(?:mask|sbref|boldref|T1w|T2w|dseg|probseg|atlas)$")


@dataclass(frozen=True)
class Name:
    """What one path says.

    Attributes:
        subject: `sub-<label>`, as in participants.tsv.
        session, task, run_label: as the scheme has them, "" for none.
        entities: every key and value of the name, space and desc included.
        stem: name of the run in the store, below dataset and subject.
        key: equal for the versions of one run.
        rank: the lowest of the versions is taken.
        refused: why the file cannot be used whatever it holds, or "".
    """

    subject: str
    session: str
    task: str
    run_label: str
    stem: str
    key: tuple[str, ...]
    rank: tuple[int | str, ...]
    entities: dict[str, str] = field(default_factory=dict, hash=False)
    refused: str = ""


def stem_of(path: PurePosixPath) -> str | None:
    """The file name without `.nii` or `.nii.gz`; None for other files and for CIFTI, which only borrows the ending."""
    for extension in EXTENSIONS:
        if path.name.endswith(extension):
            stem = path.name.removesuffix(extension)
            return None if not stem or _CIFTI.search(stem) else stem
    return None


def entities_of(stem: str) -> tuple[dict[str, str], str] | None:
    """The `key-value` pairs of a BIDS name and its suffix; None unless it reads `sub-<label>_..._<suffix>`."""
    *pairs, suffix = stem.split("_")
    split = [pair.split("-", 1) for pair in pairs]
    if not split or split[0][0] != "sub" or any(len(pair) != 2 or not all(pair) for pair in split):
        return None
    return {key: value for key, value in split}, suffix


def is_bids_bold(path: PurePosixPath) -> bool:
    """Whether a path is BOLD in BIDS names, preprocessed or raw: then the tree is BIDS and other files are no runs."""
    parsed = entities_of(stem_of(path) or "")
    return parsed is not None and parsed[1] == "bold"


def bids_name(path: PurePosixPath) -> Name | None:
    """A run of BIDS derivatives, `*_desc-preproc_bold`. One that is not in MNI space has its reason in `refused`."""
    parsed = entities_of(stem_of(path) or "")
    if parsed is None or parsed[1] != "bold" or parsed[0].get("desc") != "preproc":
        return None
    entities = parsed[0]
    kept = {key: value for key, value in entities.items() if key not in _VERSION_ENTITIES}
    space, resolution = entities.get("space", ""), entities.get("res", "")
    refused = ""
    if not space.startswith("MNI"):
        where = f"space-{space}" if space else "the scanner's own space (no space- in the name)"
        refused = f"is in {where}, not in MNI space: rerun fMRIPrep with --output-spaces {PREFERRED_SPACES[0]}:res-2"
    rank = (bool(refused), _place(space, PREFERRED_SPACES), _place(resolution, PREFERRED_RESOLUTIONS), path.name)
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


def hcp_name(path: PurePosixPath) -> Name | None:
    """A volume run of the HCP pipelines, `<subject>/MNINonLinear/Results/<run>/<run>[_hp2000_clean]`; cleaned first.

    A numbered run (REST1, REST2) was acquired on its own day and becomes a session of its own.
    """
    stem, parts = stem_of(path) or "", path.parts
    if len(parts) < 4 or parts[-4:-2] != ("MNINonLinear", "Results") or not stem.startswith(parts[-2]):
        return None
    run, ending = _HCP_RUN.fullmatch(parts[-2]), stem.removeprefix(parts[-2])
    if run is None or not (ending == "" or _HCP_CLEANED.fullmatch(ending)):
        return None
    folder = parts[-5] if len(parts) > 4 else ""
    visit = _HCP_VISIT.fullmatch(folder)
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


def plain_name(path: PurePosixPath) -> Name | None:
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


def mask_names(path: PurePosixPath, scheme: str) -> list[str]:
    """Names that the brain mask beside a run may have, best first; `*` stands for anything."""
    stem = stem_of(path) or ""
    if scheme == "bids":
        stems = [stem.replace("_desc-preproc_bold", "_desc-brain_mask")]
    elif scheme == "hcp":
        stems = ["brainmask_fs.2", "brainmask_fs.*"]
    else:
        stems = [f"{stem}_mask", f"{stem}_brain_mask", f"{stem}_brainmask", "brain_mask", "brainmask", "mask"]
    return [found + extension for found in stems for extension in EXTENSIONS]


def motion_names(path: PurePosixPath, scheme: str) -> list[str]:
    """Names that the table of a run's head motion beside it may have, best first."""
    if scheme == "hcp":
        return [_HCP_MOTION]
    parsed = entities_of(stem_of(path) or "")
    if scheme != "bids" or parsed is None:
        return []
    run = "_".join(f"{key}-{value}" for key, value in parsed[0].items() if key not in _VERSION_ENTITIES)
    return [run + ending for ending in _CONFOUNDS]


def is_events(name: str) -> bool:
    """Whether a file's name is that of a BIDS table of events; at a dataset's top it may name no subject."""
    return name.rpartition("_")[2] == _EVENTS


def is_motion(name: str) -> bool:
    """Whether a file's name is that of a table of head motion, of fMRIPrep or the HCP."""
    return name == _HCP_MOTION or name.endswith(_CONFOUNDS)


def applying(names: Iterable[str], entities: Mapping[str, str]) -> list[str]:
    """Of one folder's files those that hold for a run by BIDS inheritance, the most specific first.

    A file holds for every run that has all the entities of its name; `task-rest_bold.json` need not name a subject.
    """
    fitting = [(pairs, name) for name in names if (pairs := _pairs(name)).items() <= entities.items()]
    return [name for _, name in sorted(fitting, key=lambda entry: (-len(entry[0]), entry[1]))]


def raw_folders(run: Place) -> tuple[Place, ...]:
    """Folders of the raw dataset that may describe a run below its `derivatives/`, the nearest first; () elsewhere.

    `raw/derivatives/fmriprep/sub-1/func/x.nii.gz` -> `raw/sub-1/func`, `raw/sub-1`.
    """
    parts = run.parts
    if _DERIVATIVES not in parts:
        return ()
    top = len(parts) - 1 - parts[::-1].index(_DERIVATIVES)
    subject = next((at for at in range(top + 1, len(parts) - 1) if parts[at].startswith("sub-")), None)
    if subject is None:
        return ()
    raw = run.parents[len(parts) - 1 - top]
    return tuple(raw / "/".join(parts[subject:end]) for end in range(len(parts) - 1, subject, -1))


def safe_label(text: str) -> str:
    """`text` if it can stand in a path of the store; else cleaned, with digits of its hash so that names stay apart."""
    clean = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).lstrip(".") or "x"
    if clean == text:
        return text
    return f"{clean}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def slug(text: str) -> str:
    """A readable dataset name for the store from free text: at most 64 letters, digits and . _ + -."""
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text).strip("-.")[:64].strip("-.") or "dataset"


def _pairs(name: str) -> dict[str, str]:
    """Entities of the name of a file that is no image; unlike an image's, it need not begin with a subject."""
    split = [pair.split("-", 1) for pair in name.split("_")[:-1]]
    return {pair[0]: pair[-1] for pair in split}


def _place(value: str, preferred: tuple[str, ...]) -> int:
    return preferred.index(value) if value in preferred else len(preferred)

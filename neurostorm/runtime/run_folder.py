"""A run's folder: one job with one set of settings lives in it, and it can be written before anything is computed.

    OUTPUT/NAME/config.yaml      --refuse_other-->   the same job and settings, or a refusal that says what differs
    OUTPUT/NAME/checkpoints/...  --differing_keys--> settings that differ and change the result

A second start with the same settings resumes; anything else would overwrite results that were made otherwise.
"""

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from neurostorm.config import AugmentConfig, Config, ConfigError
from neurostorm.config.renamed import with_new_names
from neurostorm.io.atomic import atomic_write
from neurostorm.io.paths import AnyPath
from neurostorm.tracking.tracker import RUN_FILE

CONFIG_FILE = "config.yaml"
CHECKPOINTS, MANIFEST = "checkpoints", "manifest.parquet"  # of a pretraining run
_HEADER = "# written by jobs/"  # of config.yaml, followed by the job's name and .py
# The same run at another place, or on other resources.
PLACED = frozenset({"run.output", "task.store", "adapt.cache", "adapt.gpus", "adapt.cpus", "adapt.threads"})
# What may differ between a checkpoint and the run that resumes it: everything else changes the result.
RESUMABLE = frozenset(
    {
        "run.output", "run.name", "data.store", "data.max_bad_fraction", "data.read_in", "data.read_threads",
        "data.prefetch_steps", "data.batch_timeout_s", "data.unavailable_s", "data.verify", "train.micro_batch",
        "train.zero_stage", "train.compile", "train.max_skipped_steps", "train.log_every", "train.validate_every",
    }
)  # fmt: skip


# What versions without a setting did.
BEFORE: dict[str, Any] = {
    "train.optimizer": "adamw", "model.decoder": "paper", "model.decoder_depth": 2, "model.predicted": 1.0,
    **{f"augment.{name}": field.default for name, field in AugmentConfig.model_fields.items()},
}  # fmt: skip


def refuse_other(config: Config, job: str, sections: tuple[str, ...], may_change: Collection[str] = PLACED) -> None:
    """Check that `run.folder` is new, or holds this job with these settings.

    Args:
        config: the settings of this start.
        job: "pretrain", "finetune" or "sweep".
        sections: of the configuration that are compared; none for pretraining, whose checkpoints tell.
        may_change: settings, as `section.field`, that may differ.

    Raises:
        ConfigError: the folder holds another job, or other settings, with each that differs.
    """
    folder, other = config.run.folder, "choose another --name"
    held = _job_of(folder)
    if held not in (None, job):
        raise ConfigError(f"run.name={config.run.name}: {folder} holds a run of jobs/{held}.py; {other}")
    file = folder / CONFIG_FILE
    if not sections or not file.is_file():
        return
    try:
        saved = Config.model_validate(yaml.safe_load(file.read_text())).flat(*sections)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} is of another version or damaged ({error}); {other}") from error
    now = config.flat(*sections)
    changed = [f"{key}: {saved[key]} -> {now[key]}" for key in now if key not in may_change and saved[key] != now[key]]
    if changed:
        raise ConfigError(
            f"run.name={config.run.name}: {folder} holds a {job} with other settings: {'; '.join(changed)}; {other}, "
            "or use the earlier settings to resume it"
        )


def saved_store(folder: AnyPath) -> str | None:
    """The `data.store` in the folder's config.yaml; None without a readable one."""
    try:
        return str(yaml.safe_load((folder / CONFIG_FILE).read_text())["data"]["store"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None


def changed_settings(config: Config) -> list[str]:
    """What differs, of what changes the result, from the config.yaml in the folder; empty without a readable one."""
    try:
        saved = yaml.safe_load((config.run.folder / CONFIG_FILE).read_text())
        return differing_keys(saved, config)
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return []


def keep_config(config: Config, job: str) -> None:
    """Write config.yaml, which says what the folder holds from now on."""
    config.run.folder.mkdir(parents=True, exist_ok=True)
    atomic_write(config.run.folder / CONFIG_FILE, f"{_HEADER}{job}.py\n{config.to_yaml()}".encode())


def require_writable(folder: AnyPath, setting: str) -> None:
    """Check that files can be created in a local `folder`, or where it will be made; leaves nothing behind.

    Raises:
        ConfigError: they cannot, with the `setting` (section.field=value) and the reason of the system.
    """
    if not isinstance(folder, Path):
        return  # an object store answers for itself, by name
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"{setting}: cannot be written ({existing}: {error.strerror}); choose a folder that you may write"
        ) from error


def differing_keys(saved: dict[str, Any], current: Config) -> list[str]:
    """Settings that change the mathematics of a run and differ: `field: saved -> current`, empty when resumable.

    `saved` is the plain tree that a run was kept with. A setting that it lacks, because the version that wrote it had
    none, differs too, unless it is known what that version did. Raises ValidationError for an unknown one.
    """
    sections = ("run", "data", "model", "mask", "strd", "augment", "train")
    saved = with_new_names(saved)
    before, after = Config.model_validate(saved).flat(*sections), current.flat(*sections)
    for key in before:
        section, field = key.split(".")
        if field not in saved.get(section, {}):
            before[key] = BEFORE.get(key, "not known to the version that saved it")
    return [
        f"{key}: {before[key]} -> {after[key]}" for key in before if key not in RESUMABLE and before[key] != after[key]
    ]


def _job_of(folder: AnyPath) -> str | None:
    """The job that a folder holds a run of: "pretrain", "finetune", "sweep"; None if it holds none."""
    if (folder / CHECKPOINTS).is_dir() or (folder / MANIFEST).is_file():
        return "pretrain"
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    first = file.read_text().partition("\n")[0]
    if first.startswith(_HEADER):
        return first.removeprefix(_HEADER).removesuffix(".py")
    return "sweep" if (folder / RUN_FILE).is_file() else "finetune"  # written by a version without the header

"""A run's folder: one job with one set of settings lives in it, and it can be written before anything is computed.

    OUTPUT/NAME/config.yaml --refuse_other--> the same job and settings, or a refusal that says what differs

A second start with the same settings resumes; anything else would overwrite results that were made otherwise.
"""

import tempfile
from collections.abc import Collection
from pathlib import Path

import yaml

from neurostorm.config import Config, ConfigError
from neurostorm.places import Place, replace
from neurostorm.tracking import RUN_FILE

CONFIG_FILE, CHECKPOINTS = "config.yaml", "checkpoints"
_HEADER = "# written by jobs/"  # of config.yaml, followed by the job's name and .py
# The same run at another place, or on other resources.
PLACED = frozenset({"run.output", "task.store", "adapt.cache", "adapt.gpus", "adapt.cpus", "adapt.threads"})


def refuse_other(config: Config, job: str, sections: tuple[str, ...], may_change: Collection[str] = PLACED) -> None:
    """Check that `run.folder` is new, or holds this job with these settings.

    Args:
        config: the settings of this start.
        job: "finetune" or "sweep".
        sections: of the configuration that are compared.
        may_change: settings, as `section.field`, that may differ.

    Raises:
        ConfigError: the folder holds another job, or other settings, with each that differs.
    """
    folder, other = config.run.folder, "choose another --name"
    held = _job_of(folder)
    if held not in (None, job):
        raise ConfigError(f"run.name={config.run.name}: {folder} holds a {held} run; {other}")
    file = folder / CONFIG_FILE
    if not file.is_file():
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


def keep_config(config: Config, job: str) -> None:
    """Write config.yaml, which says what the folder holds from now on."""
    config.run.folder.mkdir(parents=True, exist_ok=True)
    replace(config.run.folder / CONFIG_FILE, f"{_HEADER}{job}.py\n{config.to_yaml()}".encode())


def require_writable(folder: Place, setting: str) -> None:
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


def _job_of(folder: Place) -> str | None:
    """The job that a folder holds a run of: "pretraining", "finetune", "sweep"; None if it holds none."""
    if (folder / CHECKPOINTS).is_dir():
        return "pretraining"
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    first = file.read_text().partition("\n")[0]
    if first.startswith(_HEADER):
        return first.removeprefix(_HEADER).removesuffix(".py")
    return "sweep" if (folder / RUN_FILE).is_file() else "finetune"  # written by a version without the header

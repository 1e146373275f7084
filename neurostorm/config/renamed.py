"""Settings that have another name now: the old one is accepted for one more version, with a word on the new one.

saved config.yaml, checkpoints, --config FILE, --section.field -> new names -> Config
"""

import logging
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "adapt.normalise": "adapt.normalize",
    "checkpoint.notice_every": "checkpoint.preemption_check_every",
    "data.normalise": "data.normalize",
    "data.steps_ahead": "data.prefetch_steps",
    "embed.normalise": "embed.normalize",
    "ingest.codec": "ingest.compression",
    "ingest.readmit": "ingest.allow_removed",
    "model.normalise_targets": "model.normalize_targets",
}
logger = logging.getLogger(__name__)


def with_new_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a partial tree of settings, `section -> field -> value`, with the names of this version.

    Where both names are there, the old one stays and is refused as unknown.
    """
    changed = dict(tree)
    for old, new in RENAMED.items():
        section, field = old.split(".")
        fields = changed.get(section)
        if isinstance(fields, Mapping) and field in fields and new.partition(".")[2] not in fields:
            kept = {name: value for name, value in fields.items() if name != field}
            changed[section] = {**kept, new.partition(".")[2]: fields[field]}
    return changed


def old_names(tree: Mapping[str, Any]) -> list[str]:
    """Old names that a partial tree of settings uses."""
    return [old for old in RENAMED if old.split(".")[1] in (tree.get(old.split(".")[0]) or {})]


def say_renamed(old: str) -> None:
    """Warns that somebody typed the old name of a setting."""
    logger.warning("--%s is called --%s now; the old name is accepted for one more version", old, RENAMED[old])

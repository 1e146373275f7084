"""The option that somebody meant: by its name, its usual synonyms, or the words of its description.

"lerning_rate" -> "learning rate", a synonym of train.lr -> --train.lr
"""

import difflib
import re
from collections.abc import Mapping

from neurostorm.io.errors import nearest_names

# Last part of an option -> what other tools call it.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "lr": ("learning rate",),
    "global_batch": ("batch size", "global batch size", "total batch size"),
    "micro_batch": ("micro batch size", "per device batch size"),
    "batch_clips": ("batch size",),
    "epochs": ("num epochs", "max epochs", "passes"),
    "max_steps": ("steps", "num steps", "iterations"),
    "workers": ("num workers", "nodes", "world size", "processes", "ranks"),
    "gpus_per_worker": ("gpu", "gpus", "num gpus", "use gpu", "device"),
    "gpus": ("gpu", "num gpus", "device"),
    "cpus_per_worker": ("cpus", "cores", "num cpus"),
    "cpus": ("cores", "num cpus"),
    "weight_decay": ("wd", "l2"),
    "clip_norm": ("grad clip", "gradient clipping", "max grad norm"),
    "warmup_fraction": ("warmup", "warmup steps"),
    "dtype": ("precision", "bf16", "amp", "fp16"),
    "output": ("out", "output dir", "outdir", "save dir"),
    "out": ("output", "output dir", "outdir"),
    "name": ("run name", "experiment name"),
    "seed": ("random seed",),
    "every": ("save every", "save interval", "checkpoint interval"),
    "clip_frames": ("frames", "num frames", "sequence length"),
    "tr_s": ("tr", "repetition time"),
    "embed_dim": ("hidden size", "width", "channels"),
    "mixer": ("mamba", "attention", "backbone", "architecture"),
    "ratio": ("mask ratio", "masking ratio"),
    "uri": ("mlflow", "mlflow uri", "tracking uri"),
    "source": ("input", "bids dir", "data dir", "input dir"),
    "store": ("data", "dataset dir"),
}
_CLOSE = 0.8  # difflib's ratio from which two names are the same one, misspelled
_FAR = 0.65  # the least that is worth a guess


def nearest_option(typed: str, descriptions: Mapping[str, str]) -> str | None:
    """The option that was most likely meant by `typed`, or None.

    Args:
        typed: as on the command line, with or without dashes: `--lerning_rate`, `train.lerning-rate`.
        descriptions: option -> its description, in the order in which equals win.
    """
    wanted = _words(typed.partition("=")[0])
    if not wanted:
        return None
    leaf = _words(typed.partition("=")[0].rpartition(".")[2])
    score = {option: max(_likeness(leaf, option), _whole(wanted, option)) for option in descriptions}
    best = max(score, key=lambda option: score[option], default=None)
    if best is not None and score[best] >= _CLOSE:
        return best
    described = _described(leaf, descriptions)
    if described is not None:
        return described
    return best if best is not None and score[best] >= _FAR else None


def _likeness(leaf: str, option: str) -> float:
    """How much `leaf` is like an option's last part or a synonym of it, 0 to 1; a synonym wins by little less."""
    last = option.rpartition(".")[2].lstrip("-").replace("-", "_")
    names = [_words(last), *SYNONYMS.get(last, ())]
    return max(_ratio(leaf, name) - 0.01 * (place > 0) for place, name in enumerate(names))


def _whole(words: str, option: str) -> float:
    return _ratio(words, _words(option))


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.replace(" ", ""), other.replace(" ", "")).ratio()


def _described(words: str, descriptions: Mapping[str, str]) -> str | None:
    """The first option whose description has all of the words, spelled nearly so."""
    wanted = [word for word in words.split() if len(word) > 3]
    for option, text in descriptions.items():
        known = _words(text).split()
        if wanted and all(nearest_names(word, known, cutoff=_CLOSE) for word in wanted):
            return option
    return None


def _words(name: str) -> str:
    """`--train.warmup_fraction` -> "train warmup fraction"."""
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))

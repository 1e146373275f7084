"""DeepSpeed's universal form of a checkpoint, parameter by parameter, which any number of workers can load.

    make_universal(STATE, UNIVERSAL)  -->  a process: DeepSpeed's own conversion  -->  one file per parameter and moment

It is a process of its own because DeepSpeed's converter is a program: it prints, and keeps all ranks' parts in memory.
Whoever wrote the checkpoint wrote what it reads, so the program here holds it to tensors, which nobody can do from
another process, and to names that stay in UNIVERSAL, for it makes folders of them.
"""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from neurostorm.places import one_step
from neurostorm.train.unpickle import tensors_only

_REFUSED = 3  # its exit status; 1 and 2 are Python's own


def make_universal(state: Path, universal: Path) -> None:
    """Brings the parts of all ranks in the folder `state` into the new folder `universal`.

    Raises pickle.UnpicklingError when a file holds more than tensors and plain values, nothing of which has then run;
    RuntimeError with the converter's last words when it fails otherwise.
    """
    options = {
        "--input_folder": state,
        "--output_folder": universal,
        "--num_extract_workers": 1,
        "--num_merge_workers": 1,
    }
    flags = [str(part) for option in options.items() for part in option]
    command = [sys.executable, "-m", "neurostorm.train.universal", "--inject_missing_state", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == _REFUSED:
        raise pickle.UnpicklingError(done.stdout.splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"{state}: cannot be regrouped for another number of workers:\n{done.stdout[-2000:]}")


def main() -> int:
    """DeepSpeed's converter with its own options; when a file is refused, the last line says why."""
    from neurostorm.train.engine import import_deepspeed

    import_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    options = ds_to_universal.parse_arguments()
    try:
        with tensors_only():  # with more than one worker DeepSpeed starts processes that know nothing of this
            for file in sorted(Path(options.input_folder).glob("*.pt")):
                check_names(file)
            ds_to_universal.main(options)
    except pickle.UnpicklingError as error:
        print(f"\n{str(error).splitlines()[0]}", flush=True)
        return _REFUSED
    return 0


def check_names(file: Path) -> None:
    """ValueError when a name in one of DeepSpeed's files, of which the converter makes folders, is not one of a folder.

    Experts of a mixture, whose names it takes from elsewhere, are none of ours.
    """
    from deepspeed.checkpoint.constants import AUTOEP_LAYERS_KEY, AUTOEP_LAYERS_KEY_LEGACY

    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # the numbers stay on disk
    if any(content.get(key) is not None for key in (AUTOEP_LAYERS_KEY, AUTOEP_LAYERS_KEY_LEGACY)):
        raise ValueError(f"{file}: experts of a mixture, which no model here has")
    for key in _keys(content):
        try:
            one_step(key)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def _keys(content: Any) -> Iterator[str]:
    """The names in dictionaries, however deep."""
    if isinstance(content, dict):
        yield from (key for key in content if isinstance(key, str))
        content = list(content.values())
    if isinstance(content, list | tuple):
        for value in content:
            yield from _keys(value)


if __name__ == "__main__":
    sys.exit(main())

"""Python runs this at its start when this folder is on PYTHONPATH: a run can then be changed from outside.

    CHAOS_POISON names a file    --> whoever is the first to remove it returns NaN as the loss of that training step
    CHAOS_LEAVE_OUT names a file --> plan rows, a JSON list, whose clips are left out as those of a removed participant

Modules are changed as they are imported, in whichever process that is; the product knows nothing of it.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
from pathlib import Path


class Changer(importlib.abc.MetaPathFinder):
    """Finds a module as the others do, and changes it once it is loaded."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                self.change(module)

            spec.loader.exec_module = exec_module
        return spec


def poison(module):
    """Wraps `MaskedAutoencoder.forward_patches`."""
    model = module.MaskedAutoencoder
    forward = model.forward_patches

    @functools.wraps(forward)
    def forward_patches(self, *arguments, **named):
        out = forward(self, *arguments, **named)
        if self.training and taken():
            return out._replace(loss=out.loss * float("nan"))
        return out

    model.forward_patches = forward_patches


def taken():
    """Whether the file was there and this process removed it."""
    try:
        os.unlink(os.environ["CHAOS_POISON"])
    except OSError:
        return False
    return True


def leave_out(module):
    """Wraps `ClipReader._prepare`, which says what is to be read."""
    rows = set(json.loads(Path(os.environ["CHAOS_LEAVE_OUT"]).read_text()))
    prepare = module.ClipReader._prepare

    @functools.wraps(prepare)
    def prepared(self, *arguments, **named):
        columns, reads, *others = prepare(self, *arguments, **named)
        gone = [read for read in reads if int(columns["row"][read.first]) in rows]
        for read in gone:
            module._leave_out(columns, read)
        return columns, [read for read in reads if read not in gone], *others

    module.ClipReader._prepare = prepared


for variable, name, change in (
    ("CHAOS_POISON", "neurostorm.model.autoencoder", poison),
    ("CHAOS_LEAVE_OUT", "neurostorm.data.clips", leave_out),
):
    if os.environ.get(variable):
        sys.meta_path.insert(0, Changer(name, change))

"""Python runs this at its start when this folder is on PYTHONPATH: losses can then be made not finite from outside.

    CHAOS_POISON names a file --> whoever is the first to remove it returns NaN as the loss of that training step

The model's module is changed as it is imported, in whichever process that is; the product knows nothing of it.
"""

import functools
import importlib.abc
import importlib.machinery
import os
import sys

MODULE = "neurostorm.model.mae"


class Poisoner(importlib.abc.MetaPathFinder):
    """Finds the model's module as the others do, and changes it once it is loaded."""

    def find_spec(self, fullname, path, target=None):
        if fullname != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                poison(module.MaskedAutoencoder)

            spec.loader.exec_module = exec_module
        return spec


def poison(model):
    """Wraps `forward_patches`."""
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


if os.environ.get("CHAOS_POISON"):
    sys.meta_path.insert(0, Poisoner())

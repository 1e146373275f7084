"""How the tokens of a window meet: one module for each mixer, found by name in MIXERS.

A new mixer is a class that derives from `mixer.Mixer` in a module of its own, its line here, and its name among the
values of `model.mixer` in the configuration.
"""

from collections.abc import Callable

from neurostorm.model.mixers.attention import WindowAttention
from neurostorm.model.mixers.mamba import Mamba
from neurostorm.model.mixers.mixer import Mixer

# mixer -> (name of its parameters in the released models, constructor of (width, heads, qkv_bias))
MIXERS: dict[str, tuple[str, Callable[[int, int, bool], Mixer]]] = {
    "attention": ("attn", WindowAttention),
    "mamba": ("mamba", Mamba),
}

"""How corpora lie on disk: one module for each layout, found by name in LAYOUTS.

A new layout is a class like `layout.Layout` in a module of its own, and its line here. The first that finds a run in a
tree is that of the tree; `FALLBACK` comes last, and only where no file is named like BOLD in BIDS.
"""

from neurostorm.ingest.layouts.bids import BidsDerivatives
from neurostorm.ingest.layouts.hcp import Hcp
from neurostorm.ingest.layouts.layout import Layout
from neurostorm.ingest.layouts.plain import Plain

FALLBACK = Plain()
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (BidsDerivatives(), Hcp(), FALLBACK)}

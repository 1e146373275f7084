#!/usr/bin/env python3
"""Looks after a frame store: `neurostorm store`, without an installation."""

import sys

from neurostorm.commands.store import main

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Makes the synthetic cohort: `neurostorm cohort`, without an installation."""

import sys

from neurostorm.commands.cohort import main

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Injects faults into a pretraining run and reports what each one cost: see `python tools/chaos.py --help`."""

import sys

from chaos.main import main

if __name__ == "__main__":
    sys.exit(main())

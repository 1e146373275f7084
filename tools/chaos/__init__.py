"""Faults injected into pretraining runs, and what each one costs: `python tools/chaos.py --help`."""

"""STRD, Spatiotemporal Redundancy Dropout."""

"""Which clips a run sees and in which order: pure functions of (manifest, seed), no I/O."""

"""From a run's own grid and clock to those of a store."""

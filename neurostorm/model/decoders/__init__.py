"""From encoded tokens to predicted patches."""

"""What ends or spares a run: limits, timeouts, the barrier, stopping, the failure policy."""

"""MLflow: what a run logs, sent from a thread; pictures."""

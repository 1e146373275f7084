"""Checks, repairs, merges, exports and summaries of stores; removing a participant."""

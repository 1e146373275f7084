"""The synthetic cohort: people, brains, sites and scans with known ground truth."""

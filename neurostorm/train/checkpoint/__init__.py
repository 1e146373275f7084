"""Checkpoints: committed folders, and their content for any ZeRO stage and number of workers."""

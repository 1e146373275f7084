"""Losses that keep nothing as large as their input."""

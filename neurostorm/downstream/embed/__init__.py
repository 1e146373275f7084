"""Runs to vectors by a frozen model, over Ray Data."""

"""Paths, local or in an object store: atomic writes, locks, tables; and errors for people."""

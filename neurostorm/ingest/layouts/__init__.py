"""How corpora lie on disk: which files are runs, and whose."""

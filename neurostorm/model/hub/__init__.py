"""Models as files: saved, loaded, found; released weights in our modules."""

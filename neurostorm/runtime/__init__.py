"""The Ray session, what a job needs of it, and the folder that a run lives in."""

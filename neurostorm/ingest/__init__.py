"""From NIfTI files to the frame store.

    tree, discover (find runs) -> nifti, stream (read) -> standardize (grid, TR, z, bytes) -> target (a run's bytes)
        -> convert (one run into the store) -> survey (what is left to do) -> spread, fanout (all runs on a cluster)
    names: what a path says    template: the store's brain mask    estimate: a dry run    tables, report: what is kept
    synthetic*: a cohort to try everything on

Import what is needed from the module that has it: only `spread` works with Ray.
"""

"""From NIfTI files to the frame store.

    discover (find runs) -> nifti (read) -> standardize (grid, TR, z, bytes) -> convert (one run) -> fanout (all runs)
    names: what a path says    template: the store's brain mask    synthetic*: a cohort to try everything on

Import what is needed from the module that has it: only `fanout` starts Ray.
"""

"""Many downstream trials at once, on Ray Tune.

space (which trials) -> sweep (prepare, run, select, test, record)
                          |-> scheduler (ASHA within a cell)   '-> logbook (MLflow, from the driver alone)
"""

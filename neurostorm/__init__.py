"""NeuroSTORM on Ray: pretrain a masked autoencoder on 4D fMRI, from NIfTI files to a model in MLflow.

The package reads in the direction of the data:

    ingest -> store -> data -> model -> train

`config`, `tracking`, `pictures`, `store` and `model` import none of each other; below them lies what finds and moves
files, on disks and in object stores (`places`, `object_store`, `staging`). `jobs/` assembles the rest.
"""

__version__ = "0.1.0"

"""What a pretrained model is for: vectors of clips, runs and subjects, and tasks on which it has to prove itself.

Embedding    embed (the whole job, over Ray): embed_input (what is given, checked) -> embed_run (one run, on a worker)
                                              -> embed_parts (one file per run, then the tables)
A task       cohort (runs) + labels -> tasks -> examples (clips, units, targets) -> splits: all in evaluation
A method     methods -> pretrained, backbone (weights), features (frozen, kept) -> fitting
                        closed form: vectors (tokens, connectivity in parcels, motion) -> simple
                        by gradient: inputs -> training with an objective
A trial      prepare (what trials share) -> trial (train, choose on validation, test once) -> record (MLflow)
             finetune runs one; neurostorm.tune many
Figures      metrics, reid (across sessions), stats (replicates, paired tests, bootstrap, Holm)
"""

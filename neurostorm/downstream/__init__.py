"""What a pretrained model is for: vectors of clips, runs and subjects.

embed (the whole job, over Ray): embed_input (what is given, checked) -> embed_run (one run, on a worker)
                                 -> embed_parts (one file per run, then the tables)
"""

"""Parts that all blocks share: the MLP, and which kernels and dtypes act here."""

"""The network in plain torch: 4D Swin encoder, masked autoencoder, redundancy dropout, released weights, files.

    volume (B, C, X, Y, Z, T) -> patches -> packed tokens (B, P, C) -> stages of window mixers -> features

It takes plain values (no configuration tree) and imports neither Ray nor Zarr, DeepSpeed or MLflow.
"""

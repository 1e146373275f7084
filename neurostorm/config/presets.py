"""Named starting points of the configuration tree.

    tiny   two cores and no GPU: 4 mm store, two stages, minutes; what the quickstart and CI run
    paper  the released NeuroSTORM: 96^3 x 20, widths 36-288, Mamba mixer with its quirks, global z, every voxel counts
    base   ours: visible brain tokens, light decoder, head dimension 16, voxel z, loss in the brain, bf16
    large  ours, wider and deeper: head dimension 32

A preset is a partial tree; what it does not name keeps the default of `config.py`.
"""

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "ingest": {"grid": "4mm"},
        "data": {"clip_frames": 8, "held_out": 0.2, "val_clips": 32},
        "model": {"embed_dim": 32, "depths": (2, 2), "heads": (2, 4)},
        "mask": {"ratio": 0.5, "window": (2, 2, 2, 4)},
        "strd": {"enabled": True},
        "train": {
            "epochs": 100.0, "max_steps": 120, "global_batch": 8, "micro_batch": 4, "lr": 2e-3, "warmup_fraction": 0.1,
            "validate_every": 40, "log_every": 5,
        },
        "checkpoint": {"every": 40},
        "scale": {"workers": 2},
    },
    "paper": {
        "data": {"normalize": "global"},
        "model": {"mixer": "mamba", "layout": "paper", "loss_on": "all", "full_last": True},
        "train": {"lr": 5e-5, "clip_norm": 0.0, "min_lr_fraction": 1.0, "warmup_fraction": 0.0},
        "scale": {"workers": 4, "gpus_per_worker": 1, "cpus_per_worker": 8},
    },
    "base": {
        "model": {"embed_dim": 48, "heads": (3, 6, 12, 24), "tokens": "brain", "decoder": "light"},
        "strd": {"enabled": True},
        "train": {"lr": 3e-4, "global_batch": 128, "micro_batch": 16, "dtype": "bf16"},
        "scale": {"workers": 4, "gpus_per_worker": 1, "cpus_per_worker": 8},
    },
    "large": {
        "model": {"embed_dim": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24), "drop_path": 0.1,
                  "tokens": "brain", "decoder": "light"},
        "strd": {"enabled": True},
        "train": {"lr": 2e-4, "global_batch": 256, "micro_batch": 8, "dtype": "bf16", "zero_stage": 2},
        "scale": {"workers": 8, "gpus_per_worker": 1, "cpus_per_worker": 8},
    },
}  # fmt: skip

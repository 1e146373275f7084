"""What a finished pretraining run says of its held-out loss: what it is compared with, what it means, what to do."""

import math

NOBODY_HELD_OUT = (
    "Everybody who was held out withdrew: from now on there is no held-out loss. The run goes on; to have one, start a "
    "run under another --name, which holds out others."
)


def held_out(
    loss: float | None, baseline: float | None, *, normalise_targets: bool, longer: str = "--train.epochs"
) -> list[str]:
    """One to three lines on the held-out masked loss of a pretraining run.

    Args:
        loss: `loss/validation`, the squared error averaged over hidden voxels of held-out clips; None without one.
        baseline: `loss/validation_predicting_mean`, the same of predicting the mean.
        normalise_targets: the run's `model.normalise_targets`: the mean is then each patch's own (baseline 1), else
            each voxel's over its run.
        longer: the option that makes the run longer.
    """
    if loss is None or baseline is None:
        return [NOBODY_HELD_OUT]
    if not math.isfinite(loss):
        return [
            f"Held-out masked loss {loss}: training has diverged.",
            "  Lower --train.lr, or raise --train.warmup_fraction, and start again under another --name.",
        ]
    if baseline <= 0:
        return [
            f"Held-out masked loss {loss:.4f}, and no held-out voxel varies, so there is nothing to compare it with: "
            "check the store with `python tools/store.py verify STORE`."
        ]
    mean = "each patch's own mean (model.normalise_targets)" if normalise_targets else "each voxel's mean over its run"
    if loss < baseline:
        return [
            f"Held-out masked loss {loss:.4f}: {100 * (1 - loss / baseline):.1f} % below the {baseline:.4f} of "
            f"predicting {mean}."
        ]
    return [
        f"Held-out masked loss {loss:.4f}: not below the {baseline:.4f} of predicting {mean}.",
        "  The model cannot fill in what is hidden yet: it needs more steps, another learning rate or more data.",
        f"  Train longer ({longer} N), check that loss/train falls in MLflow (else change --train.lr), or ingest "
        "more runs; then start again under another --name.",
    ]

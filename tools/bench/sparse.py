"""The comparison of training steps that `bench/step.py --compare` makes: visible brain tokens beside all of them.

    for both mixers: dense | sparse, half hidden | sparse, three quarters hidden --in turns--> ratios, peak memory

A step is everything: the mask and its tables, encoder, decoder, loss, backward pass, AdamW; fp32, one clip. A dense
step does the same work whatever is hidden, so one stands beside both ratios.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from bench_models import Setting, Step, Worker

MIXERS, RATIOS = ("attention", "mamba"), (0.5, 0.75)
SIDES = {"dense": ("dense", RATIOS[0])} | {f"sparse_{ratio * 100:g}": ("sparse", ratio) for ratio in RATIOS}
SPARSE = [side for side in SIDES if side != "dense"]


def compare(options: argparse.Namespace, setting: Callable[[argparse.Namespace], Setting]) -> dict[str, Any]:
    """Seconds and MiB of every side, and how many times as fast and as small the sparse ones are.

    Args:
        options: of the command line; preset, device, rounds and threads count.
        setting: makes what a process builds of options.
    """
    common = {**vars(options), "dtype": "fp32", "batch": 1, "model": "mae", "compile": False}
    seconds, mib, faster = {}, {}, {}
    for mixer in MIXERS:
        chosen = {
            side: argparse.Namespace(**{**common, "mixer": mixer, "geometry": geometry, "ratio": ratio})
            for side, (geometry, ratio) in SIDES.items()
        }
        workers = {side: Worker(Step, setting(own)) for side, own in chosen.items()}
        try:
            for worker in workers.values():
                worker.ask("round")
            rounds = [{side: sum(workers[side].ask("round")) for side in SIDES} for _ in range(options.rounds)]
            # At least 1: the steps of a small model may fit into what building it took.
            mib[mixer] = {side: max(1.0, workers[side].ask("step_mib")) for side in SIDES}
        finally:
            for worker in workers.values():
                worker.close()
        seconds[mixer] = {side: statistics.median(times[side] for times in rounds) for side in SIDES}
        faster[mixer] = {side: statistics.median(times["dense"] / times[side] for times in rounds) for side in SPARSE}
    smaller = {mixer: {side: mib[mixer]["dense"] / mib[mixer][side] for side in SPARSE} for mixer in MIXERS}
    means = {
        f"{side.replace('_', f'_vs_dense{what}_')}": statistics.fmean(of[mixer][side] for mixer in MIXERS)
        for what, of in (("", faster), ("_memory", smaller))
        for side in SPARSE
    }
    return {**means, "step_seconds": seconds, "step_mib": mib, "step_faster": faster, "step_smaller": smaller}


def lines(r: dict[str, Any]) -> Iterator[str]:
    """The table of `compare`, as part of all that `bench/step.py --compare` found."""
    yield f"{r['preset']}, a training step of one clip, fp32, {r['threads']} CPU threads"
    yield ""
    yield f"{'mixer':<12}{'side':<12}{'seconds':>9}{'MiB':>8}{'faster':>9}{'smaller':>9}"
    for mixer in MIXERS:
        for side in SIDES:
            ratios = [f"{r[name][mixer].get(side, 1.0):.2f}" for name in ("step_faster", "step_smaller")]
            measured = f"{r['step_seconds'][mixer][side]:>9.3f}{r['step_mib'][mixer][side]:>8,.0f}"
            yield f"{mixer:<12}{side:<12}{measured}{ratios[0]:>9}{ratios[1]:>9}"
    yield ""
    for side in SPARSE:
        hidden = side.removeprefix("sparse_")
        yield (
            f"{hidden} % hidden: {r[f'sparse_vs_dense_{hidden}']:.2f} times as fast, in 1/"
            f"{r[f'sparse_vs_dense_memory_{hidden}']:.1f} of the memory (means of both mixers)"
        )
    yield ""

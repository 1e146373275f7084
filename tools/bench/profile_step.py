#!/usr/bin/env python3
"""Where the time of a training step goes: a trace for chrome://tracing or Perfetto, and the largest operations.

profile_step.py --preset base --geometry sparse --out trace.json
profile_step.py --preset paper --mixer attention --device cuda --dtype bf16 --out trace.json

The step and its options are those of `bench/step.py`; one step warms up, the traced ones follow.
"""

import argparse
import os
import sys
from pathlib import Path

from bench_models import DTYPES, Step
from step import GEOMETRIES, refuse_impossible, refuse_missing_folder, setting
from torch.profiler import ProfilerActivity, profile

from neurostorm.config.presets import PRESETS

SHOWN = 15  # operations in the table


def main() -> int:
    """Trace, write, print."""
    options = parse()
    step = Step(setting(options))
    step.round()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device == "cuda" else [])
    with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        for _ in range(options.steps):
            step.round()
    profiler.export_chrome_trace(str(options.out))
    order = f"self_{options.device}_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=SHOWN, max_name_column_width=44))
    print(f"{options.out}: open it in https://ui.perfetto.dev or chrome://tracing")
    return 0


def parse() -> argparse.Namespace:
    """The command line; exits with status 2 and the reason when it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="paper", help="shape of model, clip and mask (default: paper)")
    add("--model", choices=("mae", "encoder"), default="mae", help="what is trained (default: mae)")
    add("--mixer", choices=("attention", "mamba"), help="default: the preset's")
    add("--geometry", choices=tuple(GEOMETRIES), help="default: the preset's")
    add("--ratio", type=float, help="share of the patches that is hidden (default: the preset's)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=DTYPES, default="fp32")
    add("--compile", action="store_true", help="torch.compile of every block, as train.compile does")
    add("--batch", type=int, default=1, help="clips per step (default: 1)")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads of torch (default: the cores)")
    add("--steps", type=int, default=1, help="steps traced (default: 1)")
    add("--out", type=Path, default=Path("trace.json"), help="the trace (default: trace.json)")
    options = parser.parse_args()
    refuse_impossible(parser, options, ("batch", "threads", "steps"))
    refuse_missing_folder(parser, "--out", options.out)
    return options


if __name__ == "__main__":
    sys.exit(main())

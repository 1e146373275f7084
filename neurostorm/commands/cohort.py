"""Makes the synthetic cohort: `neurostorm cohort OUT` (see --help for its size and what is in it)."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from neurostorm.commands import program
from neurostorm.synthetic.cohort import CohortError, CohortPlan, make_cohort
from neurostorm.synthetic.sites import SITES

SIZES = """size and time:
  A 4 mm run takes about 28 kB per frame, a 3 mm run 65 kB, a 2 mm run 220 kB: the noise hardly compresses. The default
  (24 subjects, two rest runs and a task run of 48 frames each) is just under 100 MB and takes about 20 seconds on
  2 cores. A cohort with enough signal for downstream tasks wants longer runs: --subjects 120 --frames 200 is 2 GB.

The same flags give the same bytes, whatever --jobs is; a larger --subjects adds to a cohort that is there already.

sites:
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    plan = CohortPlan()
    sites = "".join(
        f"  {site.name:<8} {site.voxel_mm:g} mm, TR {site.tr_s:g} s, {site.orientation}, {site.space}, "
        f"label noise {site.label_noise:g}\n"
        for site in SITES
    )
    parser = argparse.ArgumentParser(
        prog=program("cohort", "python tools/make_cohort.py"),
        description="Make a deterministic synthetic fMRI cohort: BIDS derivatives of real NIfTI files.",
        epilog=SIZES + sites,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the dataset: new, or to be completed")
    for name, kind, text in (
        ("subjects", int, "number of people"),
        ("sites", str, "4mm (every site with 4 mm voxels), all (their own voxels), or names joined by commas"),
        ("voxel-mm", float, "edge of the isotropic voxels at every site, mm, 2-8 (default: what --sites says)"),
        ("sessions", int, "sessions per subject, one rest run in each"),
        ("frames", int, "frames per run, whatever the site's TR"),
        ("seed", int, "seed of everything"),
    ):
        default = getattr(plan, name.replace("-", "_"))
        shown = "" if default is None else " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=default, help=text + shown)
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes, one subject at a time each (default: %(default)s)"
    )
    parser.add_argument("--no-task", dest="task", action="store_false", help="leave out the run of five task states")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the cohort and says what to do with it; returns 2, with the reason on stderr, when it cannot be made."""
    options = vars(parser().parse_args(argv))
    folder, jobs = options.pop("out"), options.pop("jobs")
    began_s = time.monotonic()
    try:
        plan = CohortPlan(**options)
        with tqdm(total=plan.subjects, unit="subject", desc="synthetic cohort", file=sys.stderr) as bar:
            summary = make_cohort(folder, plan, jobs=jobs, on_subject=lambda label: bar.update())
    except (CohortError, OSError) as error:
        print(f"make_cohort: {error}", file=sys.stderr)
        return 2
    made = "was there already" if not summary.made else f"{summary.made} made in {time.monotonic() - began_s:.0f} s"
    print(
        f"{folder}: {summary.subjects} subjects ({made}), {summary.runs} runs, {summary.size_bytes / 1e6:.0f} MB. "
        f"Next: {program('ingest', 'python jobs/ingest.py')} --source {folder} --store STORE"
    )
    return 0

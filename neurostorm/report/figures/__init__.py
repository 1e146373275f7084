"""All figures of a report, in the order of the page; one is made only if its data exist.

Results, Comparisons --> task bars, phenotypes, re-identification, label efficiency, radar, confusion, scatter
"""

from collections.abc import Sequence

import matplotlib

from neurostorm.downstream.statistics.uncertainty import Comparison
from neurostorm.report.figures.curves import label_efficiency, radar
from neurostorm.report.figures.drawing import STYLE, Drawn
from neurostorm.report.figures.predictions import confusions, scatters
from neurostorm.report.figures.scores import identification_bars, phenotype_bars, task_bars
from neurostorm.report.results import Results


def all_figures(results: Results, made: Sequence[Comparison]) -> tuple[Drawn, ...]:
    """The figures of a sweep; `made` are its comparisons, for the brackets."""
    with matplotlib.rc_context(STYLE):
        return (
            *task_bars(results, made),
            *phenotype_bars(results),
            *identification_bars(results),
            *label_efficiency(results),
            *radar(results),
            *confusions(results),
            *scatters(results),
        )

"""What a run measured, and what follows from it.

Run reports are here; tables, plots, the learning curve and advice are in modules of those names,
so that commands that only write a report do not load them.
"""

from featcache.results.runs import (
    EpochRecord,
    Predictions,
    Row,
    RunReport,
    benchmark_rows,
    report_marks,
)

__all__ = [
    "EpochRecord",
    "Predictions",
    "Row",
    "RunReport",
    "benchmark_rows",
    "report_marks",
]

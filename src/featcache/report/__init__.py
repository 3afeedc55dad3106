"""What a run measured, and what follows from it: run files, tables, advice, plots."""

from featcache.report.advice import advice, beats, beside_top1, best_of
from featcache.report.plots import plot_accuracy_against_seconds
from featcache.report.run import (
    Predictions,
    Row,
    RunReport,
    benchmark_rows,
    config_json,
    report_marks,
)
from featcache.report.tables import break_even, markdown_table, speedups, text_table

__all__ = [
    "Predictions",
    "Row",
    "RunReport",
    "advice",
    "beats",
    "benchmark_rows",
    "beside_top1",
    "best_of",
    "break_even",
    "config_json",
    "markdown_table",
    "plot_accuracy_against_seconds",
    "report_marks",
    "speedups",
    "text_table",
]

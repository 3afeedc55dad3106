"""What a run measured, and what follows from it: run files, tables, advice, plots."""

from featcache.results.advice import advice, beats, beside_top1, best_of
from featcache.results.curve_advice import curve_advice, size_text
from featcache.results.curve_json import points_from_json, points_json
from featcache.results.curve_runs import cell_of
from featcache.results.curve_tables import curve_cells, curve_header, curve_text
from featcache.results.learning_curve import (
    Cell,
    Crossing,
    Mode,
    Point,
    Side,
    crossing,
    curve_points,
)
from featcache.results.plots import plot_accuracy_against_seconds
from featcache.results.runs import (
    Predictions,
    Row,
    RunReport,
    benchmark_rows,
    config_json,
    report_marks,
)
from featcache.results.tables import break_even, markdown_table, speedups, text_table

__all__ = [
    "Cell",
    "Crossing",
    "Mode",
    "Point",
    "Predictions",
    "Row",
    "RunReport",
    "Side",
    "advice",
    "beats",
    "benchmark_rows",
    "beside_top1",
    "best_of",
    "break_even",
    "cell_of",
    "config_json",
    "crossing",
    "curve_advice",
    "curve_cells",
    "curve_header",
    "curve_points",
    "curve_text",
    "markdown_table",
    "plot_accuracy_against_seconds",
    "points_from_json",
    "points_json",
    "report_marks",
    "size_text",
    "speedups",
    "text_table",
]

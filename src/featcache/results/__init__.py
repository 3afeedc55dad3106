"""What a run measured, and what follows from it: run files, tables, advice, plots."""

from featcache.results.advice import advice, beside_top1, best_of
from featcache.results.curve_advice import Crossing, crossing, curve_advice
from featcache.results.curve_json import curve_from_json, curve_to_json
from featcache.results.forecast import Forecast, forecasts
from featcache.results.learning_curve import (
    CurveMode,
    CurvePoint,
    CurveRun,
    ModeScores,
    curve_points,
    size_text,
)
from featcache.results.plots import plot_accuracy_against_seconds
from featcache.results.runs import (
    Predictions,
    Row,
    RunReport,
    benchmark_rows,
    break_even,
    config_json,
    report_marks,
    speedups,
)
from featcache.results.tables import (
    CURVE_HEADER,
    curve_cells,
    curve_header,
    curve_text,
    markdown_table,
    text_table,
)

__all__ = [
    "CURVE_HEADER",
    "Crossing",
    "CurveMode",
    "CurvePoint",
    "CurveRun",
    "Forecast",
    "ModeScores",
    "Predictions",
    "Row",
    "RunReport",
    "advice",
    "benchmark_rows",
    "beside_top1",
    "best_of",
    "break_even",
    "config_json",
    "crossing",
    "curve_advice",
    "curve_cells",
    "curve_from_json",
    "curve_header",
    "curve_points",
    "curve_text",
    "curve_to_json",
    "forecasts",
    "markdown_table",
    "plot_accuracy_against_seconds",
    "report_marks",
    "size_text",
    "speedups",
    "text_table",
]

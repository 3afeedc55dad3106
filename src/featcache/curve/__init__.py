"""A learning curve of two modes, the cached head and the full fine-tune, and what follows."""

from featcache.curve.as_json import points_from_json, points_json
from featcache.curve.kept import cell_of
from featcache.curve.points import Cell, Crossing, Mode, Point, Side, crossing, curve_points
from featcache.curve.sentences import curve_advice, size_text
from featcache.curve.tables import curve_cells, curve_header, curve_text

__all__ = [
    "Cell",
    "Crossing",
    "Mode",
    "Point",
    "Side",
    "cell_of",
    "crossing",
    "curve_advice",
    "curve_cells",
    "curve_header",
    "curve_points",
    "curve_text",
    "points_from_json",
    "points_json",
    "size_text",
]

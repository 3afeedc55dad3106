"""Datasets: from a name, a folder or a manifest to labelled pictures and their pixels."""

from featcache.data.batches import (
    DecodedSplit,
    bad_image_error,
    decode_split,
    iterate_batches,
)
from featcache.data.copies import copies_lines, find_copies
from featcache.data.dataset import ImageDataset, ImageSplit
from featcache.data.describe import describe
from featcache.data.images import EXTENSIONS, REASONS, BadImage
from featcache.data.load import load_dataset
from featcache.data.loader import Decoded, chunks, iterate_pixels, pixel_task, run_ahead
from featcache.data.names import is_clutter
from featcache.data.pixels import normalize, to_pixels, view_pixels

__all__ = [
    "EXTENSIONS",
    "REASONS",
    "BadImage",
    "Decoded",
    "DecodedSplit",
    "ImageDataset",
    "ImageSplit",
    "bad_image_error",
    "chunks",
    "copies_lines",
    "decode_split",
    "describe",
    "find_copies",
    "is_clutter",
    "iterate_batches",
    "iterate_pixels",
    "load_dataset",
    "normalize",
    "pixel_task",
    "run_ahead",
    "to_pixels",
    "view_pixels",
]

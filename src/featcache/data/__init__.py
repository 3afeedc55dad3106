"""Datasets: from a name, a folder or a manifest to labeled images and their pixels.

`load_dataset` reads digits, a torchvision dataset, a folder, a manifest or tar shards as an
`ImageDataset` of `ImageSplit`s, whose sources read single images; `iterate_pixels` and
`iterate_batches` decode them.
"""

from featcache.data.dataset import ImageDataset, ImageSplit
from featcache.data.datasets import load_dataset, load_test_folder
from featcache.data.images import EXTENSIONS, REASONS, BadImage
from featcache.data.listing import is_clutter
from featcache.data.pixels import normalize, to_pixels, view_pixels
from featcache.data.prefetch import (
    Decoded,
    DecodedSplit,
    bad_image_error,
    chunks,
    decode_split,
    iterate_batches,
    iterate_pixels,
    pixel_task,
    run_ahead,
)
from featcache.data.sampling import (
    Copies,
    CopiesReport,
    copies_lines,
    find_copies,
    find_shared_groups,
    shared_groups_lines,
)

__all__ = [
    "EXTENSIONS",
    "REASONS",
    "BadImage",
    "Copies",
    "CopiesReport",
    "Decoded",
    "DecodedSplit",
    "ImageDataset",
    "ImageSplit",
    "bad_image_error",
    "chunks",
    "copies_lines",
    "decode_split",
    "find_copies",
    "find_shared_groups",
    "is_clutter",
    "iterate_batches",
    "iterate_pixels",
    "load_dataset",
    "load_test_folder",
    "normalize",
    "pixel_task",
    "run_ahead",
    "shared_groups_lines",
    "to_pixels",
    "view_pixels",
]

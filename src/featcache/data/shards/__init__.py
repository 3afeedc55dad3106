"""Tar shards: labeled images in WebDataset's layout, read where they lie, without unpacking."""

from featcache.data.shards.dataset import load_shards
from featcache.data.shards.places import is_remote, names_shards, shards_in

__all__ = ["is_remote", "load_shards", "names_shards", "shards_in"]

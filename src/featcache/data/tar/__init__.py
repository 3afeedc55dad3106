"""Tar shards: labeled images in WebDataset's layout, read where they lie, without unpacking.

`dataset.load_shards` is imported when there are shards, since tarfile and its decompressors take as
long to import as listing a small folder.
"""

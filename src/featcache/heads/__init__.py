"""Heads on cached features: solvers, honest choice of settings, head files."""

from featcache.heads.files import Head, check_head_fits, load_head, save_head
from featcache.heads.linear import Decision, LinearHead, softmax
from featcache.heads.solvers.knn import KnnHead
from featcache.heads.summary import summary_lines
from featcache.heads.train import train_head, train_head_report

__all__ = [
    "Decision",
    "Head",
    "KnnHead",
    "LinearHead",
    "check_head_fits",
    "load_head",
    "save_head",
    "softmax",
    "summary_lines",
    "train_head",
    "train_head_report",
]

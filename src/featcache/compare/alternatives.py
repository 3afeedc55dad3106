"""A head on the best of several caches of the same images: held-out train rows choose.

Whether adapted BatchNorm statistics help depends on the images, so a head is fitted on the features
of either network. All are fitted to the same rows and choose on the same held-out rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from featcache.config import JsonObject, TrainHeadConfig
from featcache.heads.features import Ints
from featcache.heads.train import fit_and_score, write_head
from featcache.results import RunReport

Network = Literal["frozen", "adapt"]
"""What `--batchnorm` was when the features were computed."""


def train_best_head(
    configs: Mapping[Network, TrainHeadConfig], rows: Ints | None = None
) -> RunReport:
    """Fit a head on each cache, and write the one with the best held-out accuracy.

    Among equals the first wins. Test scores of the others are dropped.

    Args:
        configs: The settings of `train-head` for each cache.
        rows: See `train_head_report`.

    Returns:
        The winner's report. It has `network`, the winner's key; `features`, what the head learned
        from, in words; and `alternatives`: for every cache `features`, `val_top1`, `seconds_total`
        and `fit_seconds`.

    Raises:
        UserError: A cache or the settings are wrong.
        StorageError: The head cannot be written.
    """
    fitted = {network: fit_and_score(config, rows) for network, config in configs.items()}
    best = max(fitted, key=lambda network: fitted[network][0].more["val_top1"] or 0.0)
    report, head = fitted[best]
    alternatives = [_alternative(network, each) for network, (each, _) in fitted.items()]
    chosen = {"network": best, "features": features_text(best, report)}
    more = report.more | chosen | {"alternatives": alternatives}
    report = dataclasses.replace(report, more=more)
    write_head(report, head)
    return report


def features_text(network: Network, report: RunReport) -> str:
    """What a head learned from, in words: "all stages, adapted BatchNorm"."""
    has_stages = report.provenance["backbone"].get("stages") is not None
    everything = has_stages and report.more["chosen"].get("columns", "all") == "all"
    text = "all stages" if everything else "last layer"
    return f"{text}, adapted BatchNorm" if network == "adapt" else text


def _alternative(network: Network, report: RunReport) -> JsonObject:
    return {
        "features": features_text(network, report),
        "val_top1": report.more["val_top1"],
        "seconds_total": report.seconds_total,
        "fit_seconds": report.more["fit_seconds"],
    }

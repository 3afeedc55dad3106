"""What a run scores without the test images that are also among its train images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.results import metrics


def without_leaks(
    labels: ArrayLike, predicted: ArrayLike, leaked: NDArray[np.bool_]
) -> dict[str, Any] | None:
    """Score the test images that train does not have.

    Args:
        labels: True classes of all test images [N].
        predicted: Predicted classes [N].
        leaked: Which images train has too, [N].

    Returns:
        Counts, accuracy and its 95 % interval (None where no image is left); None without leaks.
    """
    if not leaked.any():
        return None
    correct = (np.asarray(labels) == np.asarray(predicted))[~leaked]
    right, num = int(correct.sum()), len(correct)
    return {
        "num_leaked": int(leaked.sum()),
        "num_test": num,
        "test_top1": right / num if num else None,
        "test_interval": metrics.wilson_interval(right, num) if num else None,
    }


def leak_lines(report: dict[str, Any]) -> list[str]:
    """The same of a report as JSON, as a sentence; nothing of one without leaks.

    Args:
        report: `RunReport.to_json`, of any version.
    """
    found = report.get("without_leaks")
    if not found:
        return []
    if not found["num_test"]:
        return [f"all {found['num_leaked']} test images are also in train: the accuracy is no test"]
    low, high = found["test_interval"]
    return [
        f"without the {found['num_leaked']} test images that are also in train: test accuracy "
        f"{found['test_top1']:.3f} (95 % interval {low:.3f} to {high:.3f}) on "
        f"{found['num_test']} images"
    ]

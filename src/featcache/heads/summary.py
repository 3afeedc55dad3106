"""What `train-head` prints for people."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from featcache.config import JsonObject
from featcache.heads.features import Ints
from featcache.results.runs import RunReport
from featcache.results.tables import leak_lines, score_lines

# The level that the summary shows.
REJECT = 0.05


def summary_lines(report: JsonObject) -> list[str]:
    """What `train-head` prints for people.

    Args:
        report: What `train_head` returned.
    """
    if report["test_top1"] is None:
        return target_lines(report)
    lines = [
        f"epoch {epoch['epoch']}: train loss {epoch['train_loss']:.4f}, "
        f"test accuracy {epoch['test_top1']:.3f}, {epoch['seconds']:.3f} s"
        for epoch in report["epochs"]
    ]
    low, high = report["test_interval"]
    chosen = report["chosen"]
    for row in chosen.get("solvers", ()):
        lines.append(
            f"{row['solver']:<8} {settings_text(row)}: best held-out accuracy {row['score']:.3f}, "
            f"{row['seconds']:.2f} s"
        )
    chosen_on = f"chosen on {report['chosen_on']}" if report["val_top1"] is not None else "as given"
    lines.append(f"{report['solver']} ({report['backend']}): {settings_text(chosen)}; {chosen_on}")
    if report["val_top1"] is not None:
        lines.append(f"held-out accuracy {report['val_top1']:.3f}")
    lines.append(
        f"test accuracy {report['test_top1']:.3f} (95% interval {low:.3f} to {high:.3f}), "
        f"balanced {report['balanced_top1']:.3f}, on {report['scored_on']}"
    )
    lines += leak_lines(report)
    lines += score_lines(RunReport.from_dict(report)) + _threshold_lines(report)
    lines += _rejection_lines(report)
    if shots := report.get("shots"):
        spread = "" if shots["std"] is None else f", standard deviation {shots['std']:.3f}"
        lines.append(
            f"{shots['shots']} rows per class, {shots['num_seeds']} samples: mean test accuracy "
            f"{shots['mean']:.3f}{spread}; the lines above and the head are the first sample's"
        )
        if shots["short_classes"]:
            lines.append(f"classes with fewer rows: {', '.join(shots['short_classes'])}")
    return [*lines, _last_line(report)]


def target_lines(report: JsonObject) -> list[str]:
    """The summary where images have several labels or a number."""
    scores, of_value = report["target_scores"], report["task"] == "regression"
    if of_value:
        what = "R squared"
        (low, high), (least, most) = scores["r2_interval"], scores["mae_interval"]
        lines = [
            f"ridge: {settings_text(report['chosen'])}; chosen on {report['chosen_on']}",
            f"test R squared {scores['r2']:.3f} (95% interval {low:.3f} to {high:.3f}), mean "
            f"absolute error {scores['mae']:.4g} ({least:.4g} to {most:.4g}; always the median of "
            f"train: {scores['baseline_mae']:.4g}), on {report['scored_on']}",
        ]
    else:
        what = "mean average precision"
        low, high = scores["interval"]
        lines = [
            f"logistic, one per label; settings and thresholds chosen on {report['chosen_on']}",
            *(_label_line(name, label) for name, label in list(scores["per_label"].items())),
            f"test mean average precision {scores['mean_average_precision']:.3f} (95% interval "
            f"{low:.3f} to {high:.3f}), macro F1 {scores['macro_f1']:.3f}, all labels right in "
            f"{scores['exact_match']:.3f}, on {report['scored_on']}",
        ]
    if report["val_score"] is not None:
        lines.insert(1, f"held-out {what} {report['val_score']:.3f}")
    return [*lines, _last_line(report)]


def _label_line(name: str, label: JsonObject) -> str:
    if label["average_precision"] is None:
        return f"  {name}: no test image has it"
    return (
        f"  {name}: average precision {label['average_precision']:.3f}, precision "
        f"{label['precision']:.3f}, recall {label['recall']:.3f}, {label['support']} test images"
    )


def _last_line(report: JsonObject) -> str:
    return (
        f"{report['trainable_params']:,} trainable parameters, {report['num_train']:,} rows, "
        f"fitted in {report['fit_seconds']:.3f} s; head in {report['head']}"
    )


def _rejection_lines(report: JsonObject) -> list[str]:
    """What rejecting strange rows would do on the test split."""
    for row in report.get("rejections") or ():
        if row["level"] == REJECT and row["answered_top1"] is not None:
            return [
                f"predict --reject {REJECT:g} would call {row['unknown']:.1%} of the test rows "
                f"unknown; accuracy on the others {row['answered_top1']:.3f}"
            ]
    return []


def _threshold_lines(report: JsonObject) -> list[str]:
    """The threshold of a head that has one, and what it reaches on the test split."""
    threshold = report.get("threshold")
    if threshold is None:
        return []
    name = threshold["class"]
    test = report["scores"]["classes"][name]
    reached = [
        f"{score} {threshold[score]:.3f} on held-out rows, {test[score] or 0:.3f} on test"
        for score in ("precision", "recall")
    ]
    return [f"{name} from a probability of {threshold['probability']:.3f}: {'; '.join(reached)}"]


def settings_text(values: JsonObject) -> str:
    """What a head was fitted with, for people."""
    # "strength" is the name of C and alpha in reports of version 0.1.
    named = [
        "C",
        "alpha",
        "strength",
        "k",
        "metric",
        "lr",
        "weight_decay",
        "standardize",
        "columns",
    ]
    return ", ".join(f"{name} {_text(values[name])}" for name in named if name in values)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


class ShotScore(TypedDict):
    """What the head of one sample scored."""

    seed: int
    test_top1: float
    val_top1: float | None


class ShotsSummary(TypedDict):
    """Test accuracy over the samples.

    `std` is the sample standard deviation, None for one sample; `short_classes` are those with
    fewer than `shots` rows.
    """

    shots: int
    num_seeds: int
    mean: float
    std: float | None
    seeds: list[ShotScore]
    short_classes: list[str]


def shots_summary(
    shots: int, y: Ints, class_names: list[str], scores: list[ShotScore]
) -> ShotsSummary:
    """Mean and spread over the samples.

    Args:
        shots: Rows per class.
        y: Class indices of all train rows [N].
        class_names: Names of the C classes.
        scores: One per sample.
    """
    top1 = np.array([score["test_top1"] for score in scores])
    counts = np.bincount(y, minlength=len(class_names))
    return {
        "shots": shots,
        "num_seeds": len(scores),
        "mean": float(top1.mean()),
        "std": float(top1.std(ddof=1)) if len(top1) > 1 else None,
        "seeds": scores,
        "short_classes": [n for n, k in zip(class_names, counts, strict=True) if k < shots],
    }

"""What `train-head` prints for people."""

from __future__ import annotations

from typing import Any

from featcache.results.leaks import leak_lines
from featcache.results.runs import RunReport
from featcache.results.tables import score_lines

# The level that the summary shows.
REJECT = 0.05


def summary_lines(report: dict[str, Any]) -> list[str]:
    """What `train-head` prints for people.

    Args:
        report: What `train_head` returned.
    """
    lines = [
        f"epoch {epoch['epoch']}: train loss {epoch['train_loss']:.4f}, "
        f"test accuracy {epoch['test_top1']:.3f}, {epoch['seconds']:.3f} s"
        for epoch in report["epochs"]
    ]
    low, high = report["test_interval"]
    chosen = report["chosen"]
    for row in chosen.get("solvers", ()):
        lines.append(
            f"{row['solver']:<8} {_settings(row)}: best held-out accuracy {row['score']:.3f}, "
            f"{row['seconds']:.2f} s"
        )
    chosen_on = f"chosen on {report['chosen_on']}" if report["val_top1"] is not None else "as given"
    lines.append(f"{report['solver']} ({report['backend']}): {_settings(chosen)}; {chosen_on}")
    if report["val_top1"] is not None:
        lines.append(f"held-out accuracy {report['val_top1']:.3f}")
    lines.append(
        f"test accuracy {report['test_top1']:.3f} (95 % interval {low:.3f} to {high:.3f}), "
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
    lines.append(
        f"{report['trainable_params']:,} trainable parameters, {report['num_train']:,} rows, "
        f"fitted in {report['fit_seconds']:.3f} s; head in {report['head']}"
    )
    return lines


def _rejection_lines(report: dict[str, Any]) -> list[str]:
    """What rejecting strange rows would do on the test split."""
    for row in report.get("rejections") or ():
        if row["level"] == REJECT and row["answered_top1"] is not None:
            return [
                f"predict --reject {REJECT:g} would call {row['unknown']:.1%} of the test rows "
                f"unknown; accuracy on the others {row['answered_top1']:.3f}"
            ]
    return []


def _threshold_lines(report: dict[str, Any]) -> list[str]:
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


def _settings(values: dict[str, Any]) -> str:
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

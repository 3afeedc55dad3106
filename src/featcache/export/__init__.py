"""Trained classifiers as files for other runtimes: ONNX and torch.export."""

from featcache.export.command import ExportReport, export, summary_lines

__all__ = ["ExportReport", "export", "summary_lines"]

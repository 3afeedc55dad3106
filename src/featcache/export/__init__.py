"""LoadedClassifier classifiers as files for other runtimes: ONNX and torch.export."""

from featcache.export.command import export, summary_lines

__all__ = ["export", "summary_lines"]

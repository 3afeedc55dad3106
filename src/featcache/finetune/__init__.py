"""Full fine-tuning, and the uncached linear probe, on the same data and scores as cached heads."""

from featcache.finetune.training import finetune, finetune_report, summary_lines

__all__ = ["finetune", "finetune_report", "summary_lines"]

"""The settings of compare and report: a field is a flag, its docstring the help."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Optional

from featcache.config.checks import check_positive, check_range, check_types
from featcache.config.commands import BackboneConfig, DataConfig, OutputConfig, PlaceConfig, Solver
from featcache.config.python import settings
from featcache.errors import UserError


@settings
class CompareConfig(OutputConfig, BackboneConfig, DataConfig):
    """Draw the learning curve: cached head against full fine-tune on the same samples.

    Every finished run is kept, so the same command goes on after an interruption.
    """

    sizes: str = "5,20,50,all"
    """Train images per class to try, separated by commas; all means the whole train split."""
    num_seeds: int = 3
    """Draws of train images per size, as far as --budget allows."""
    budget: float = 10.0
    """Minutes to spend on runs, those of earlier starts included. The largest size comes first, and
    all sizes before second seeds; one size is made in both modes however long it takes."""
    solver: Solver = "logistic"
    """What fits the cached head, as in train-head."""
    recipe: Literal["notebook", "good"] = "good"
    """How to fine-tune, as in finetune."""
    epochs: Optional[int] = None
    """Passes over train of a fine-tune; the recipe's unless given."""
    lr: Optional[float] = None
    """Learning rate of a fine-tune; the recipe's unless given."""
    min_steps: int = 60
    """Fine-tune small train sets for more epochs, until so many steps are made."""
    workers: Optional[int] = None
    """Threads that read and decode; chosen from the number of cores unless given."""
    output: Optional[Path] = None
    """The folder for the runs and the report; one in --cache-dir unless given."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        BackboneConfig.__post_init__(self)
        self.wanted_sizes()
        check_range("num_seeds", self.num_seeds, 1, 1000)
        check_positive("budget", self.budget)
        check_range("epochs", self.epochs, 1, 100_000)
        check_positive("lr", self.lr)
        check_range("min_steps", self.min_steps, 0, 1_000_000)
        check_range("workers", self.workers, 0, 1024)

    def wanted_sizes(self) -> tuple[int | None, ...]:
        """Train images per class, ascending, None for all of them.

        Raises:
            UserError: `sizes` is no such list.
        """
        words = [word.strip() for word in self.sizes.split(",")]
        numbers = {int(w) for w in words if w.isascii() and w.isdigit() and len(w) < 10}
        good = all(w == "all" or (w.isascii() and w.isdigit() and len(w) < 10) for w in words)
        if not good or 0 in numbers:
            raise UserError(
                f"--sizes {self.sizes!r:.80}: give numbers of train images per class, separated by "
                "commas, and all for all of them, for example 5,20,50,all"
            )
        return (*sorted(numbers), *((None,) if "all" in words else ()))


@settings
class ReportConfig(OutputConfig, PlaceConfig):
    """Make one HTML page, and the same in Markdown beside it, from the reports of runs."""

    runs: tuple[Path, ...]
    """Report files (.json) of train-head, finetune, compare or benchmark.py, or folders of them."""
    output: Path = Path("report.html")
    """The page; the Markdown goes beside it as .md."""
    title: Optional[str] = None
    """The page's heading; made from the dataset's name unless given."""
    dataset: Optional[str] = None
    """The dataset of the runs, for pictures of confidently wrong test images."""
    cache_dir: Path = Path("cache")
    """Where hashes of the dataset's files are remembered."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.runs:
            raise UserError("no runs given: name report files or a folder of them")
        if self.output.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"--output {self.output}: the page's name ends in .html")

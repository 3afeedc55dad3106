"""The settings of each command: a field is a flag, the string below it its help text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Optional

from featcache.config.cache_commands import CACHE_SUFFIXES
from featcache.config.checks import check_positive, check_range, check_types
from featcache.config.options import (
    BackboneConfig,
    DataConfig,
    FeatureConfig,
    ImagePathsConfig,
    OutputConfig,
)
from featcache.config.records import Pool, Views
from featcache.config.settings import settings
from featcache.errors import UserError
from featcache.ranks import parse_shard

Solver = Literal["logistic", "ridge", "adam", "sgd", "knn", "auto"]
Backend = Literal["auto", "numpy", "sklearn", "torch"]


@settings
class ExtractConfig(OutputConfig, FeatureConfig, DataConfig):
    """Run the frozen backbone once over every split and cache its features in one HDF5 file.

    Rerun the same command to resume an interrupted run; if the cache is complete, it does no work.
    """

    views: str = "none"
    """Versions of each image to cache besides view 0, the plain image: none, flip (its mirror
    image), or a number N (N random crops, resized and flipped at random; seeded)."""
    dtype: Optional[Literal["float32", "float16"]] = None
    """The type that features are stored as. By default float32, or float16 with --layers stages or
    --from-stage."""
    engine: Literal["auto", "torch", "openvino"] = "auto"
    """What runs the network; auto measures those installed and takes the fastest."""
    precision: Literal["float32", "int8", "amp"] = "float32"
    """The precision that the network computes in: int8 needs --engine openvino, amp a GPU."""
    batch_size: Optional[int] = None
    """Images per forward pass. By default chosen by measuring. Does not change the features."""
    workers: Optional[int] = None
    """Threads that read and decode images. By default chosen from the number of cores."""
    output: Optional[Path] = None
    """The cache file (.h5). By default a file in --cache-dir, named after the settings."""
    force: bool = False
    """Extract again and replace the cache if there is one."""
    update: bool = False
    """Update the cache after the dataset changed: compute the images that are new, changed or were
    skipped, and keep the other rows."""
    shard: Optional[str] = None
    """I/N: compute only part I of N, counted from 0, whatever torchrun or Slurm say; 0/1 is one
    process. By default each rank of torchrun, srun or a Slurm array computes its part."""
    write: Literal["auto", "direct", "shards"] = "auto"
    """How several ranks write: direct (one file in place; ranks on one machine only) or shards (a
    file each, merged at the end). auto takes shards on network file systems."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        FeatureConfig.__post_init__(self)
        if self.shard is not None:
            parse_shard(self.shard)
        Views.parse(self.views, self.seed)
        check_range("batch_size", self.batch_size, 1, 65536)
        check_range("workers", self.workers, 0, 1024)
        if self.force and self.update:
            raise UserError("--force starts over and --update keeps rows: give one of them")
        if self.output is not None and self.output.suffix.lower() not in CACHE_SUFFIXES:
            raise UserError(f"--output {self.output}: a cache's name ends in .h5")
        if self.precision == "int8" and self.engine == "torch":
            raise UserError("--precision int8 needs --engine openvino (or leave --engine out)")
        if self.from_stage is not None and self.layers not in ("last", "stages"):
            raise UserError(
                f"--layers {self.layers:.80}: with --from-stage, which caches activations, give "
                "stages, or leave --layers out"
            )

    @property
    def stored_dtype(self) -> Literal["float32", "float16"]:
        """What `dtype` means when it is not given."""
        rounded = "stages" in self.asked_layers or self.from_stage is not None
        return self.dtype or ("float16" if rounded else "float32")


@settings
class TrainHeadConfig(OutputConfig):
    """Fit a head on cached features; hyper-parameters are chosen without the test split."""

    cache: Path
    """A file written by extract-features."""
    solver: Solver = "logistic"
    """logistic (multinomial, L2, to convergence), ridge (closed form), adam or sgd (the notebook's
    loop), knn, or auto (try several, keep the best by the selection score)."""
    backend: Backend = "auto"
    """What solves logistic: numpy, sklearn or torch; auto takes the fastest to start."""
    epochs: int = 3
    """Passes over train (adam, sgd)."""
    lr: Optional[float] = None
    """Learning rate of adam and sgd. By default 1e-3 for adam, 1e-2 for sgd."""
    batch_size: int = 32
    """Rows per step (adam, sgd)."""
    weight_decay: float = 0.0
    """L2 penalty of the step (adam, sgd)."""
    sweep: bool = False
    """Train many learning rates and decays together and choose among them (adam, sgd)."""
    C: Optional[float] = None
    """Use this inverse strength of the regularization instead of choosing one, as in scikit-learn's
    LogisticRegression (logistic)."""
    alpha: Optional[float] = None
    """Use this strength of the regularization instead of choosing one, as in scikit-learn's Ridge
    (ridge)."""
    k: Optional[int] = None
    """Use this number of neighbors instead of choosing one (knn)."""
    strength: Optional[float] = None
    """The old name of --C, --alpha and --k; give the one of your solver."""
    select: Literal["holdout", "cv"] = "holdout"
    """Choose settings on a held-out part of train, or by k-fold cross-validation on train."""
    holdout: float = 0.2
    """Fraction of train to hold out for choosing settings, stratified and seeded."""
    folds: int = 5
    """Folds of --select cv."""
    standardize: Literal["auto", "on", "off"] = "auto"
    """Scale every feature to unit variance on train; auto chooses on the held-out part."""
    columns: str = "auto"
    """With a cache of several layers, learn from the columns of one (last, layer3, layer3.mean) or
    from all; auto chooses on the held-out part: between last and all, or, in a cache without last,
    among every layer and all (knn and streamed training take all)."""
    class_weight: Literal["none", "balanced"] = "none"
    """balanced weights every class by the inverse of its frequency."""
    threshold_for: Optional[str] = None
    """For two classes, precision=LEVEL or recall=LEVEL: choose, on held-out rows, the probability
    from which an image counts as --positive, so that this much is reached. It is stored with the
    head, and predict uses it."""
    positive: Optional[str] = None
    """The class that --threshold-for is about. By default the second one."""
    shots: Optional[int] = None
    """Use only K train rows of each class, and repeat with --num-seeds samples."""
    num_seeds: int = 5
    """How many samples --shots draws."""
    tta: bool = False
    """Average the test prediction over the cached views instead of using view 0 alone."""
    stream: Literal["auto", "on", "off"] = "auto"
    """Train in bounded memory; auto does so when the cache is too large for the free memory."""
    seed: int = 42
    """Seed of the held-out part, of shuffling and of initial weights."""
    cache_dir: Optional[Path] = None
    """The folder for a head that --output does not name. By default the cache's folder."""
    output: Optional[Path] = None
    """The head file (.safetensors); its report is written beside it as .json."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range("epochs", self.epochs, 1, 1_000_000)
        check_positive("lr", self.lr)
        check_range("batch_size", self.batch_size, 1)
        check_range("weight_decay", self.weight_decay, 0)
        check_positive("C", self.C)
        check_positive("alpha", self.alpha)
        check_range("k", self.k, 1)
        check_positive("strength", self.strength)
        check_range("folds", self.folds, 2, 100)
        check_range("shots", self.shots, 1)
        check_range("num_seeds", self.num_seeds, 1, 1000)
        check_range("seed", self.seed, 0, 2**32 - 1)
        if not 0 < self.holdout < 1:
            raise UserError(f"--holdout {self.holdout} is out of range: between 0 and 1, say 0.2")
        if self.wanted_threshold() is None and self.positive is not None:
            raise UserError("--positive is for --threshold-for: leave it out, or give both")

    def wanted_threshold(self) -> tuple[Literal["precision", "recall"], float] | None:
        """What `threshold_for` asks for, if it is given.

        Raises:
            UserError: It is neither precision nor recall, or the level is not between 0 and 1.
        """
        if self.threshold_for is None:
            return None
        name, _, text = self.threshold_for.partition("=")
        level = float(text) if re.fullmatch(r"[01]?\.?\d{1,9}", text) else 0.0
        for wanted in ("precision", "recall"):
            if name == wanted and 0 < level <= 1:
                return wanted, level
        raise UserError(
            f"--threshold-for {self.threshold_for!r:.80}: give precision=LEVEL or recall=LEVEL "
            "with a level from 0 to 1, for example precision=0.95"
        )


@settings
class FinetuneConfig(OutputConfig, BackboneConfig, DataConfig):
    """Train the whole network (or, with --freeze-backbone, its head) on the images."""

    recipe: Optional[Literal["notebook", "good"]] = None
    """notebook: Adam with one constant learning rate. good: a linear probe first, then a lower rate
    for the backbone, warm-up, a cosine schedule and weight decay. By default notebook, or good with
    --from-stage. Other flags override the recipe."""
    epochs: Optional[int] = None
    """Passes over the train split. By default 3 with the notebook recipe, 5 with the good one, 8
    with the good one and --from-stage, 4 with --layers stages as well."""
    lr: Optional[float] = None
    """Learning rate. By default 1e-3, 2e-4 with --layers stages, or 1e-2 with --optimizer sgd."""
    backbone_lr: Optional[float] = None
    """Learning rate of everything but the head. By default --lr, or a tenth of it with the good
    recipe, a fifth with --from-stage, --lr with --layers stages."""
    batch_size: int = 32
    """Images per step, of all processes together where torchrun starts several."""
    optimizer: Optional[Literal["adam", "adamw", "sgd"]] = None
    """The optimizer. By default adam with the notebook recipe, adamw with the good one."""
    weight_decay: Optional[float] = None
    """Weight decay. By default 0 with the notebook recipe, 0.05 with the good one."""
    schedule: Optional[Literal["constant", "cosine"]] = None
    """Learning rate schedule; cosine warms up for the first tenth of the steps. By default constant
    with the notebook recipe, cosine with the good one."""
    freeze_backbone: bool = False
    """Train only the head, running the frozen network each step: a linear probe without cache."""
    unfreeze: Optional[str] = None
    """Train only the head and the modules whose names start with this, for example layer4."""
    from_stage: Optional[str] = None
    """Train only this stage and what follows it, for example layer4, from its cached input: the
    network before it runs once over every image and its mirror image instead of in every epoch."""
    layers: Literal["last", "stages"] = "last"
    """With --from-stage, what the head sees: the last layer, or all stages, as train-head does
    with extract-features --layers stages; those before --from-stage stay as they are."""
    pool: Pool = "avg+std"
    """With --layers stages, how a stage's output becomes columns, as in extract-features."""
    dtype: Literal["float16", "float32"] = "float16"
    """The type that the cached input of --from-stage is stored as."""
    bn_eval: Optional[bool] = None
    """Keep BatchNorm statistics fixed; those of frozen parts always are. By default True with the
    good recipe."""
    init_head: Optional[Path] = None
    """Start from this head (a file that train-head wrote) instead of a random one."""
    flip: Optional[bool] = None
    """Mirror train images at random. On by default."""
    patience: Optional[int] = None
    """Stop after this many epochs without improvement on a held-out part of the train split."""
    holdout: float = 0.1
    """Fraction of the train split that --patience holds out."""
    score: Literal["epoch", "end"] = "epoch"
    """When to score the test split: after every epoch, as the notebook does, or once at the end."""
    workers: Optional[int] = None
    """Threads that read and decode images. By default chosen from the number of cores."""
    resume: bool = True
    """Start over instead of resuming an interrupted run of the same command (in Python:
    resume=False)."""
    output: Optional[Path] = None
    """The model file (.safetensors); its report is written beside it as .json."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        BackboneConfig.__post_init__(self)
        if self.recipe is None:
            recipe = "notebook" if self.from_stage is None else "good"
            object.__setattr__(self, "recipe", recipe)
        check_range("epochs", self.epochs, 1, 100_000)
        check_positive("lr", self.lr)
        check_range("backbone_lr", self.backbone_lr, 0)
        check_range("batch_size", self.batch_size, 1)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("patience", self.patience, 1)
        check_range("workers", self.workers, 0, 1024)
        if not 0 < self.holdout < 1:
            raise UserError(f"--holdout {self.holdout} is out of range: between 0 and 1, say 0.1")
        if self.freeze_backbone and self.unfreeze:
            raise UserError("--freeze-backbone and --unfreeze contradict each other: give one")
        if self.freeze_backbone and self.backbone_lr is not None:
            raise UserError("--freeze-backbone trains the head alone: leave --backbone-lr out")
        if self.from_stage is not None and (self.freeze_backbone or self.unfreeze):
            raise UserError(
                "--from-stage says what trains: leave --freeze-backbone and --unfreeze out"
            )
        if self.layers == "stages" and (self.from_stage is None or self.recipe != "good"):
            raise UserError(
                "--layers stages needs --from-stage and --recipe good: give them, or for a head on "
                "all stages of the frozen network extract-features --layers stages"
            )
        if self.layers == "stages" and self.init_head is not None:
            raise UserError(
                "--layers stages starts from a linear probe of all stages: leave --init-head out"
            )

    @property
    def asked_layers(self) -> tuple[str, ...]:
        """See `BackboneConfig.asked_layers`."""
        return (self.layers,)

    @property
    def stage_pool(self) -> Pool | None:
        """See `BackboneConfig.stage_pool`."""
        return None if self.layers == "last" else self.pool


@settings
class CompareConfig(OutputConfig, BackboneConfig, DataConfig):
    """Plot the learning curve: cached head against full fine-tuning on the same samples.

    Rerun the same command to resume after an interruption: finished runs are kept.
    """

    layers: Literal["auto", "last", "stages"] = "auto"
    """The features of the cached head, as in extract-features; auto caches all stages where the
    network has them, and held-out train images choose between the last layer and all."""
    pool: Pool = "avg+std"
    """With all stages, how a stage's output becomes columns, as in extract-features."""
    batchnorm: Literal["auto", "frozen", "adapt"] = "auto"
    """BatchNorm statistics of the cached head's network, as in extract-features; auto extracts with
    both, if the second takes at most a quarter of --budget, and held-out train images choose."""
    sizes: str = "5,20,50,all"
    """Train images per class to try, separated by commas; all is the whole train split."""
    num_seeds: int = 3
    """Random samples of train images per size, as far as --budget allows."""
    budget: float = 10.0
    """Minutes to spend on runs, including those of interrupted commands. The largest size runs
    first, and every size before a second seed. One size always runs in both modes."""
    solver: Solver = "logistic"
    """The solver for the cached head, as in train-head."""
    recipe: Literal["notebook", "good"] = "good"
    """The fine-tuning recipe, as in finetune."""
    epochs: Optional[int] = None
    """Epochs of fine-tuning. By default the recipe's."""
    lr: Optional[float] = None
    """Learning rate of fine-tuning. By default the recipe's."""
    tail: str = "auto"
    """Train the tail of the network as a third way: this stage and what follows it (for example
    layer4), from its cached input, as finetune --from-stage does. auto takes the last stage, if
    caching its input takes at most a quarter of --budget and 2 GB; none leaves it out."""
    test_shifted: Optional[Path] = None
    """A second test set from other conditions: a folder of class folders with the same names. Both
    ways are scored on it too; it chooses nothing."""
    min_steps: int = 60
    """Fine-tune small train sets for more epochs, up to at least this many steps."""
    workers: Optional[int] = None
    """Threads that read and decode images. By default chosen from the number of cores."""
    output: Optional[Path] = None
    """The folder for the runs and the report. By default a folder in --cache-dir."""
    price_per_hour: Optional[float] = None
    """What an hour of this machine costs, to say what each way costs in money."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        BackboneConfig.__post_init__(self)
        self.wanted_sizes()
        check_positive("price_per_hour", self.price_per_hour)
        check_range("num_seeds", self.num_seeds, 1, 1000)
        check_positive("budget", self.budget)
        check_range("epochs", self.epochs, 1, 100_000)
        check_positive("lr", self.lr)
        check_range("min_steps", self.min_steps, 0, 1_000_000)
        check_range("workers", self.workers, 0, 1024)

    def wanted_sizes(self) -> tuple[int | None, ...]:
        """Train images per class, ascending, None for all of them.

        Raises:
            UserError: `sizes` is not such a list.
        """
        words = [word.strip() for word in self.sizes.split(",")]
        numbers = {int(w) for w in words if w.isascii() and w.isdigit() and len(w) < 10}
        good = all(w == "all" or (w.isascii() and w.isdigit() and len(w) < 10) for w in words)
        if not good or 0 in numbers:
            raise UserError(
                f"--sizes {self.sizes!r:.80}: give numbers of train images per class, separated by "
                "commas, and all for the whole train split, for example 5,20,50,all"
            )
        return (*sorted(numbers), *((None,) if "all" in words else ()))


@settings
class ReportConfig(OutputConfig, ImagePathsConfig):
    """Make one HTML page from the reports of runs, and the same in Markdown beside it."""

    runs: tuple[Path, ...]
    """Report files (.json) of train-head, finetune, compare or benchmark.py, or their folders."""
    output: Path = Path("report.html")
    """The HTML page; the Markdown goes beside it as .md."""
    title: Optional[str] = None
    """The page's heading. By default made from the dataset's name."""
    dataset: Optional[str] = None
    """The dataset of the runs, to show test images that were misclassified with high confidence."""
    map: Literal["pca", "tsne"] = "pca"
    """What draws the map of the test images' features, if a head's cache is beside its report: the
    first two principal components, or t-SNE (shows clusters; 10 s for 2,000 images)."""
    cache_dir: Path = Path("cache")
    """The folder that keeps the map and hashes of the dataset's files between runs."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.runs:
            raise UserError("no runs given: name report files or a folder of them")
        if self.output.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"--output {self.output}: the page's name ends in .html")

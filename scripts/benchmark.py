"""Heads and full fine-tuning on your data, the notebook's settings and good ones.

    python scripts/benchmark.py                       # scikit-learn's digits, offline
    python scripts/benchmark.py path/to/folder --weights bundled

The notebook's four modes: a head with the frozen network in the loop, the same head on cached
features (the two must agree), and full fine-tuning at two rates. Beside them, both at
their best: the head as `train-head` fits it by default, the head on every stage of the network with
and without adapted BatchNorm statistics, and fine-tuning with `--recipe good`. The advice compares
the best head with the best fine-tune.

Every mode trains on the same images from the same seed and is scored on the same test images; the
notebook's modes also see them in the same order. A mode's time is wall time from the start:
building the network, reading and decoding, training, and scoring the test split after every epoch.
A cached mode's time has the extraction in it, computed afresh. Before the clock starts, libraries
are loaded and the images are listed and hashed once, so that the first mode does not pay for the
others.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from featcache import cli
from featcache.compare.alternatives import Network
from featcache.config import (
    BackboneConfig,
    BackboneInfo,
    DataConfig,
    ExtractConfig,
    FinetuneConfig,
    OutputConfig,
    TrainHeadConfig,
    config_json,
)
from featcache.display import say
from featcache.errors import UserError
from featcache.files import write_atomically, write_json
from featcache.results import Row, RunReport, benchmark_rows, runs
from featcache.results.advice import advice, best_of, speedups
from featcache.results.plots import plot_accuracy_against_seconds
from featcache.results.runs import Approach
from featcache.results.tables import markdown_table, text_table
from featcache.runtime import environment, load_optimizers

# Mirroring turns these into something else, so the default leaves them as they are.
NEVER_MIRRORED = ("digits", "mnist", "emnist", "kmnist", "qmnist", "usps", "svhn", "gtsrb")
LOOP, CACHED = "head only (network in the loop)", "head only (cached features)"
DEFAULT_HEAD = "head only (cached, as train-head fits it)"
STAGES_HEAD = "head only (cached, all stages)"
GOOD_TUNE = "full fine-tune (good recipe)"
TAIL = "tail from cached activations"


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(OutputConfig, BackboneConfig, DataConfig):
    """Compare a head on cached features with the same head uncached and with full fine-tuning."""

    dataset: tyro.conf.Positional[str] = "digits"
    """digits, a torchvision dataset's name, a folder of class folders, or a CSV manifest."""
    weights: str | None = None
    """As in extract-features; bundled for digits and imagenet for anything else unless given."""
    epochs: int = 3
    """Passes over train in the notebook's modes; the good recipe has its own number."""
    lr: float = 1e-3
    """Learning rate of the notebook's modes; one of them fine-tunes at a tenth of it."""
    batch_size: int = 32
    """Images per step, in every mode."""
    flip: Literal["auto", "on", "off"] = "auto"
    """Mirror train images at random, for which the cache holds a second view; auto does unless the
    dataset is one of characters or signs."""
    workers: int | None = None
    """Threads that read and decode; chosen from the number of cores unless given."""
    output: Path | None = None
    """The folder for caches, models and benchmark.json, .md and .png; benchmark-DATASET in
    --cache-dir unless given."""

    def __post_init__(self) -> None:
        # The commands' own checks, before anything runs.
        for make in (self.extract_config, self.notebook_head, self.finetune_config):
            make()

    @property
    def short_name(self) -> str:
        """The dataset's name as part of a file name."""
        from featcache.data.dataset import short_name

        return short_name(Path(self.dataset).stem)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.output or self.cache_dir / f"benchmark-{self.short_name}"

    @property
    def chosen_weights(self) -> str:
        """The weights with their default resolved."""
        return self.weights or ("bundled" if self.short_name == "digits" else "imagenet")

    @property
    def flips(self) -> bool:
        """Whether train images are mirrored at random."""
        if self.flip == "auto":
            return self.short_name.replace("-", "") not in NEVER_MIRRORED
        return self.flip == "on"

    @property
    def last_stage(self) -> str:
        """The stage from which the tail trains."""
        from featcache.backbone.tail import last_stage

        return last_stage(self.backbone)

    def _shared(self) -> dict[str, Any]:
        """Settings that every mode has."""
        bases = (DataConfig, BackboneConfig)
        names = [field.name for base in bases for field in dataclasses.fields(base)]
        values = {name: getattr(self, name) for name in names}
        return values | {"weights": self.chosen_weights, "workers": self.workers}

    def extract_config(self, name: str = "features", **changes: Any) -> ExtractConfig:
        """How features are cached; always anew, so that their time is measured."""
        values = {"views": "flip" if self.flips else "none", **changes}
        output = self.folder / f"{name}.h5"
        return ExtractConfig(**self._shared(), **values, output=output, force=True)

    def head_config(self, name: str, cache: str = "features", **changes: Any) -> TrainHeadConfig:
        """How a head on a cache is trained: as `train-head` does, but for the changes."""
        output = self.folder / f"{name}.safetensors"
        path = self.folder / f"{cache}.h5"
        return TrainHeadConfig(cache=path, seed=self.seed, output=output, **changes)

    def stages_alternatives(self) -> Alternatives:
        """Features of every stage, of the network as it is and with adapted BatchNorm."""
        networks: tuple[Network, ...] = ("frozen", "adapt")
        return {
            network: (
                self.extract_config(f"stages-{network}", layers="stages", batchnorm=network),
                self.head_config("stages-head", f"stages-{network}"),
            )
            for network in networks
        }

    def notebook_head(self) -> TrainHeadConfig:
        """The head on the cache, trained as the one in the loop, raw features included."""
        return self.head_config(
            "cached-head",
            solver="adam",
            standardize="off",
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
        )

    def finetune_config(self, name: str = "finetune", **changes: Any) -> FinetuneConfig:
        """How the network, or its head in the loop, is trained on images."""
        values = {"epochs": self.epochs, "lr": self.lr, **changes}
        return FinetuneConfig(
            **self._shared(),
            **values,
            batch_size=self.batch_size,
            flip=self.flips,
            resume=False,
            output=self.folder / f"{name}.safetensors",
        )


MeasuredRun = tuple[str, Approach, RunReport, float]
Alternatives = dict[Network, tuple[ExtractConfig, TrainHeadConfig]]


def run_modes(config: BenchmarkConfig) -> list[MeasuredRun]:
    """Run the modes, one after another: name, kind, report, seconds of extraction.

    The head in the loop comes first and its twin on the cache second. All cached heads share one
    extraction, whose seconds count for each.
    """
    modes: list[MeasuredRun] = []
    extraction = 0.0
    planned = plan_modes(config)
    for number, (mode, approach, settings) in enumerate(planned, start=1):
        say(f"{number}/{len(planned)} {mode}")
        if isinstance(settings, dict):
            modes.append((mode, approach, *run_best(settings)))
            continue
        if approach == "cached" and not extraction:
            extraction = run_extraction(config)
        seconds = extraction if approach == "cached" else 0.0
        modes.append((mode, approach, run_training(settings), seconds))
    return modes


Settings = TrainHeadConfig | FinetuneConfig | Alternatives


def plan_modes(config: BenchmarkConfig) -> list[tuple[str, Approach, Settings]]:
    """Every mode by name, kind and settings, in the order in which they run."""
    from featcache.backbone.tail import tail_layers

    tune = config.finetune_config
    tunes: list[tuple[str, Approach, Settings]] = [
        (f"full fine-tune (lr {lr:g})", "finetune", tune(f"finetune-{lr:g}", lr=lr))
        for lr in (config.lr, config.lr / 10)
    ]
    good = tune("finetune-good", recipe="good", epochs=None, lr=None)
    tail = tune(
        "finetune-tail",
        from_stage=config.last_stage,
        layers=tail_layers(config.backbone),
        epochs=None,
        lr=None,
    )
    return [
        (LOOP, "loop", tune("head-in-loop", freeze_backbone=True)),
        (CACHED, "cached", config.notebook_head()),
        (DEFAULT_HEAD, "cached", config.head_config("default-head")),
        (STAGES_HEAD, "cached", config.stages_alternatives()),
        *tunes,
        (GOOD_TUNE, "finetune", good),
        (TAIL, "finetune", tail),
    ]


def run_best(alternatives: Alternatives) -> tuple[RunReport, float]:
    """The alternative with the best held-out accuracy, and the seconds that come before its fit.

    These are the extractions of all alternatives and the fits of those that lost.
    """
    from featcache.compare.alternatives import train_best_head
    from featcache.extract import extract

    heads, seconds = {}, 0.0
    for network, (extraction, head) in alternatives.items():
        try:
            seconds += float(extract(extraction)["seconds_total"])
        except UserError as error:  # there is no BatchNorm to adapt
            say(f"left out: {error}")
            continue
        heads[network] = head
    best = train_best_head(heads)
    seconds += sum(each["seconds_total"] for each in best.more["alternatives"])
    return best, seconds - best.seconds_total


def run_training(settings: TrainHeadConfig | FinetuneConfig) -> RunReport:
    """One mode, its features being cached where it needs them."""
    from featcache.finetune import finetune_report
    from featcache.heads import train_head_report

    if isinstance(settings, TrainHeadConfig):
        return train_head_report(settings)
    return finetune_report(settings)


def run_extraction(config: BenchmarkConfig) -> float:
    """Cache the features afresh; returns the seconds that it took."""
    from featcache.extract import extract

    return float(extract(config.extract_config())["seconds_total"])


def warm_up(config: BenchmarkConfig) -> BackboneInfo:
    """Load libraries and weights and hash the images, outside the time of the first mode."""
    import torch

    import featcache.engine
    import featcache.extract
    import featcache.finetune
    import featcache.heads  # noqa: F401
    from featcache.backbone import identify, load_backbone
    from featcache.data import load_dataset

    settings = config.extract_config()
    dataset = load_dataset(settings)
    sizes = " and ".join(f"{len(split):,} {name}" for name, split in dataset.splits.items())
    say(f"{dataset.name}: {sizes} images, {len(dataset.class_names)} classes")
    dataset.fingerprint  # noqa: B018 - computed on first use, then remembered on disk
    info = identify(settings, config.seed, config.cache_dir)
    side = info.preprocessing.image_px
    load_optimizers()
    with torch.inference_mode():
        load_backbone(settings, config.seed)(torch.zeros(1, 3, side, side))
    return info


def p_values(modes: list[MeasuredRun]) -> dict[str, float]:
    """By mode, the paired test of it against the best cached head on the same test images."""
    from featcache.results.metrics import mcnemar

    best = best_of(benchmark_rows(modes), "cached")
    assert best is not None
    cached = next(run.test for mode, _, run, _ in modes if mode == best.mode)
    values = {}
    for mode, _, run, _ in modes:
        assert run.test is not None
        assert cached is not None
        if mode != best.mode:
            assert run.test.ids == cached.ids, "all modes are scored on the same images"
            values[mode] = mcnemar(run.test.correct(), cached.correct())
    return values


def make_result(
    config: BenchmarkConfig, info: BackboneInfo, modes: list[MeasuredRun]
) -> dict[str, Any]:
    """Everything measured and what follows from it, as JSON."""
    rows = benchmark_rows(modes)
    tests = p_values(modes)
    best = {kind: best_of(rows, kind) for kind in ("cached", "finetune")}
    return {
        "command": "benchmark",
        "dataset": config.short_name,
        "rows": [
            dataclasses.asdict(row) | {"epochs": run.epochs, "later_seconds": row.later_seconds}
            for row, (_, _, run, _) in zip(rows, modes, strict=True)
        ],
        "speedup": speedups(rows),
        "break_even": break_even(rows),
        "p_values": tests,
        "best": {kind: row.mode for kind, row in best.items() if row is not None},
        "baseline_top1": rows[0].baseline_top1,
        "same_predictions": same_predictions(modes),
        "advice": advice(rows, tests),
        "notes": notes(config, info),
        "config": config_json(config),
        "backbone": dataclasses.asdict(info),
        "environment": environment(),
        "typed": typed(),
    }


def break_even(rows: list[Row]) -> dict[str, int | None]:
    """After how many epochs of one run, or runs of this many epochs, the cache has paid."""
    loop, cached = rows[0], rows[1]
    epoch = {row.approach: row.seconds_per_epoch + row.eval_seconds_per_epoch for row in rows[:2]}
    # What does not recur with every epoch: extraction there; reading and building in both.
    once = cached.seconds_total - loop.seconds_total
    once += cached.num_epochs * (epoch["loop"] - epoch["cached"])
    return {
        "epochs": runs.break_even(once, epoch["cached"], epoch["loop"]),
        "trials": runs.break_even(cached.extract_seconds, cached.later_seconds, loop.seconds_total),
    }


def same_predictions(modes: list[MeasuredRun]) -> int:
    """On how many test images the cached head and the head in the loop say the same."""
    one, two = modes[0][2].test, modes[1][2].test
    assert one is not None
    assert two is not None
    return sum(a == b for a, b in zip(one.predicted, two.predicted, strict=True))


def notes(config: BenchmarkConfig, info: BackboneInfo) -> list[str]:
    """What a reader of the table has to know."""
    from featcache.backbone import own_preprocessing

    own = own_preprocessing(config.extract_config())
    prep = info.preprocessing
    lines = [
        "Total time is wall time from the start: building the network, reading and decoding, "
        "training, and scoring the test split after every epoch; that of a cached mode includes "
        "the extraction. Time per epoch is the training pass alone.",
        "Speed-up is against the slowest mode's total. Accuracy is on "
        "the test split, with its 95 % interval; no mode used the test split to choose anything.",
    ]
    if config.chosen_weights == "random":
        lines.append("Random weights: read the times, not the accuracies.")
    elif prep.image_px != own.image_px:
        lines.append(
            f"The {info.weights} weights were trained at {own.image_px} px and are used at "
            f"{prep.image_px} px here, where they score low: read the times, not the accuracies."
        )
    return lines


def typed() -> str:
    """The command line that made the result."""
    return shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])


def reading(result: dict[str, Any], rows: list[Row]) -> list[str]:
    """The lines under the table."""
    num_test, same = rows[0].num_test, result["same_predictions"]
    epochs, trials = result["break_even"]["epochs"], result["break_even"]["trials"]
    if epochs is None or trials is None:
        paid = "The cache does not pay for itself here: the head in the loop is no slower."
    else:
        paid = (
            f"The cache pays for itself after {counted(epochs, 'epoch')} of one run, or after "
            f"{counted(trials, 'run')} of {counted(rows[1].num_epochs, 'epoch')}."
        )
    agree = f"Cached and uncached heads give the same answer on {same} of {num_test} test images."
    return [paid, agree, "", *result["advice"]]


def counted(number: int, what: str) -> str:
    """A number with its noun: 1 epoch, 3 epochs."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def title_of(
    config: BenchmarkConfig, info: BackboneInfo, rows: list[Row], modes: list[MeasuredRun]
) -> str:
    """One line that says what was compared."""
    network = f"{info.backbone} ({info.weights}) at {info.preprocessing.image_px} px"
    num_train, num_test = modes[0][2].more["num_train"], rows[0].num_test
    return f"{config.short_name}: {network}, {num_train:,} train and {num_test:,} test images"


def markdown(title: str, result: dict[str, Any], rows: list[Row]) -> str:
    """The result as a page."""
    environment_ = result["environment"]
    machine = f"{environment_['processor']}, {environment_['num_cores']} cores"
    versions = f"torch {environment_['torch']}, torchvision {environment_['torchvision']}"
    return "\n".join(
        [
            f"# {title}",
            "",
            markdown_table(rows),
            "",
            *(f"{line}\n" for line in reading(result, rows) if line),
            "![Accuracy against seconds](benchmark.png)",
            "",
            *(f"- {line}" for line in result["notes"]),
            f"- Made by `{result['typed']}` on {machine}; {versions}.",
            "",
        ]
    )


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Run the comparison and write benchmark.json, benchmark.md and benchmark.png.

    Returns:
        The result as JSON.
    """
    folder = config.folder
    try:
        info = warm_up(config)
        modes = run_modes(config)
    except KeyboardInterrupt:
        say("benchmark: interrupted; its times cannot be resumed, so the same command starts over")
        raise SystemExit(cli.EXIT_INTERRUPTED) from None
    rows = benchmark_rows(modes)
    result = make_result(config, info, modes)
    title = title_of(config, info, rows, modes)
    paths = {kind: folder / f"benchmark.{kind}" for kind in ("json", "md", "png")}
    result["files"] = {kind: str(path) for kind, path in paths.items()}
    write_json(paths["json"], result)
    write_atomically(paths["md"], markdown(title, result, rows).encode())
    plot_accuracy_against_seconds(rows, paths["png"], title)
    lines = ["", title, "", text_table(rows), "", *reading(result, rows), ""]
    lines += [f"note: {line}" for line in result["notes"][2:]]
    lines += [f"written: {', '.join(result['files'].values())}"]
    print("\n".join(lines), file=sys.stderr if config.json else sys.stdout)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return cli.run("benchmark", BenchmarkConfig, benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())

"""One fine-tuning run: epochs, scores, checkpoints, report.

The test split is scored after every epoch because people want to watch it; nothing is chosen by
it. What is chosen (the epoch to keep, the probe's regularization) is chosen on held-out images, and
the report says which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featcache.backbone import file_sha256
from featcache.cache import sole_writer
from featcache.config import FinetuneConfig, JsonObject, config_json
from featcache.data import ImageDataset
from featcache.display import say
from featcache.errors import FeatcacheError, UserError
from featcache.files import check_writable, remove_temporaries
from featcache.finetune.checkpoint import (
    Progress,
    check_same_run,
    checkpoint_path,
    load_checkpoint,
    load_moving,
    remove_checkpoint,
    run_key,
    save_checkpoint,
)
from featcache.finetune.loop import Scores, score, train_epoch
from featcache.finetune.parallel import ALONE, joined
from featcache.finetune.probe import fit_probe, set_head
from featcache.finetune.setup import FinetuneRun, check_files, prepare
from featcache.groups import is_copy
from featcache.results import EpochRecord, RunReport
from featcache.results.metrics import without_leaks
from featcache.results.runs import evaluate
from featcache.results.tables import leak_lines, score_lines
from featcache.results.targets import TargetPredictions, multilabel_scores
from featcache.runtime import environment, freed_memory_kept
from featcache.tensor_files import LABEL_THRESHOLD, ModelCard, write_model

if TYPE_CHECKING:
    import torch


def finetune(config: FinetuneConfig) -> JsonObject:
    """Do the work of the command `finetune`, as `finetune_report` does.

    Returns:
        The command's JSON report.
    """
    return finetune_report(config).to_json()


def finetune_report(
    config: FinetuneConfig,
    dataset: ImageDataset | None = None,
    checkpoint_s: float = 0.0,
    *,
    replace: bool = False,
    activations: Path | None = None,
) -> RunReport:
    """Train a whole network, or parts of it, on the images themselves.

    Args:
        config: The command's settings.
        dataset: What to train and score on; what the settings name unless given.
        checkpoint_s: Least seconds between checkpoints; 0 writes one after every epoch.
        replace: Write over a run with other settings, as `resume=False` does.
        activations: For `from_stage`, a cache of the input of that stage that holds these images
            and perhaps others; extracted, or found by the settings, unless given.

    Returns:
        What the run measured; the model file and the report file are written.

    Raises:
        UserError: Wrong input, or an unreadable image under `on_error="fail"`.
        FeatcacheError: The loss is no longer finite, or the GPU's memory is too small.
        StorageError: A file could not be written, or another run is writing it.
    """
    import torch

    start = time.perf_counter()
    try:
        with (
            contextlib.ExitStack() as stack,
            freed_memory_kept(),
            # Same seed, same weights, on GPUs too.
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        ):
            # Runs on a dataset in memory (compare) are those of one process.
            team = stack.enter_context(joined(config)) if dataset is None else ALONE
            with team.together():
                run = prepare(config, dataset, activations, team)
                run.checkpoint_s = checkpoint_s
                check_files(config, run.output)
            with team.together():  # all have found the output unlocked
                if team.leads:
                    stack.enter_context(sole_writer(run.output))
                if config.resume and not replace:
                    check_same_run(run.output, run.decisive)
                report = _finished(run)
            if run.stage_cache is not None:  # what it cost is added at the end
                start += run.stage_cache.wall_s
            team.agree(int(report is not None), "finished runs")
            return report or _execute(run, start)
    except torch.OutOfMemoryError as error:
        raise FeatcacheError(
            f"the memory of the GPU is too small for --batch-size {config.batch_size}: use a "
            "lower one, or --device cpu"
        ) from error


def _execute(run: FinetuneRun, start: float) -> RunReport:
    """Train from the beginning or from the checkpoint, score, write model and report."""
    team = run.placement.team
    if team.leads:
        state = run.trainable.model.state_dict().values()
        check_writable(run.output, sum(tensor.nbytes for tensor in state))
        for path in (run.output, checkpoint_path(run.output)):
            remove_temporaries(path)
    optimizer = run.trainable.make_optimizer()
    frozen = run.trainable.frozen_sha256()
    checkpoint = checkpoint_path(run.output)
    progress = None
    if run.config.resume:
        progress = load_checkpoint(checkpoint, run_key(run.decisive), run.trainable, optimizer)
    num_resumed = team.agree(len(progress.epochs) if progress else 0, "checkpoints")
    if progress is None:
        progress = Progress()
        _initialize_head(run)
    else:
        say(f"resuming after epoch {num_resumed} of {run.recipe.epochs} from {checkpoint}")
    start -= progress.seconds
    run.trainable.training_network = team.data_parallel(run.trainable.network)
    scores = _train(run, optimizer, progress, start)
    assert run.trainable.frozen_sha256() == frozen, "a frozen part of the network changed"
    report = _report(run, progress, scores, num_resumed)
    key = run_key(run.decisive)
    report.more.update(hit=False, key=key, run=key[:16])
    if not team.leads:
        return report
    _write_model(run, report)
    report.more["model_sha256"] = file_sha256(run.output)
    seconds = time.perf_counter() - start + (run.stage_cache.cost_s if run.stage_cache else 0.0)
    report = dataclasses.replace(report, seconds_total=seconds)
    report.save(run.output.with_suffix(".json"))
    remove_checkpoint(checkpoint)
    return report


def _finished(run: FinetuneRun) -> RunReport | None:
    """The report of the same run, if its model is there as it was written."""
    path = run.output.with_suffix(".json")
    if not (run.config.resume and run.output.is_file() and path.is_file()):
        return None
    try:
        report = RunReport.load(path)
    except UserError:
        return None  # it is trained again
    same = (
        report.more.get("key") == run_key(run.decisive)
        and report.config.get("score") == run.config.score
    )
    if not same or report.more.get("model_sha256") != file_sha256(run.output):
        return None
    remove_checkpoint(checkpoint_path(run.output))
    return dataclasses.replace(report, more={**report.more, "hit": True})


def _initialize_head(run: FinetuneRun) -> None:
    if run.init_head is not None:
        set_head(run.trainable.head, run.init_head.weight, run.init_head.bias)
    elif run.recipe.probe:
        num_classes = len(run.dataset.class_names)
        run.probe = fit_probe(run.trainable, run.train, run.placement, num_classes)


def _train(
    run: FinetuneRun, optimizer: torch.optim.Optimizer, progress: Progress, start: float
) -> Scores:
    """Train the remaining epochs; returns the test scores of the model that is kept."""
    recipe, trainable, scores = run.recipe, run.trainable, None
    for epoch in range(len(progress.epochs), recipe.epochs):
        if recipe.patience and progress.stale_epochs >= recipe.patience:
            say(f"stopped early: no gain since epoch {progress.best_epoch}")
            break
        loss, seconds, wait = train_epoch(trainable, optimizer, run.train, run.placement, epoch)
        record: EpochRecord = {
            "epoch": epoch + 1,
            "train_loss": loss,
            "seconds": seconds,
            "wait_seconds": wait,
        }
        if run.held is not None:
            _score_held_out(run, progress, record)
        record["eval_seconds"] = record.get("val_seconds", 0.0)
        if run.config.score == "epoch" or epoch + 1 == recipe.epochs:
            scores = score(trainable, run.test, run.placement)
            record["test_map" if scores.of_labels else "test_top1"] = scores.metric
            record["test_loss"] = scores.loss
            record["eval_seconds"] += scores.seconds
        progress.epochs.append(record)
        if "test_loss" in record or run.config.verbose:
            say(epoch_line(record, recipe.epochs))
        elapsed = time.perf_counter() - start
        due = run.placement.team.leads and epoch + 1 < recipe.epochs
        if due and elapsed - progress.seconds >= run.checkpoint_s:
            progress.seconds = elapsed
            save_checkpoint(
                checkpoint_path(run.output), run.decisive, progress, trainable, optimizer
            )
    if progress.best and progress.best_epoch != len(progress.epochs):
        load_moving(trainable, progress.best)
        scores = None
    return scores or score(trainable, run.test, run.placement)


def _score_held_out(run: FinetuneRun, progress: Progress, record: EpochRecord) -> None:
    """Score the held-out images, and keep the epoch if it is the best so far."""
    assert run.held is not None
    held = score(run.trainable, run.held, run.placement)
    record["val_map" if held.of_labels else "val_top1"] = held.metric
    record["val_loss"], record["val_seconds"] = held.loss, held.seconds
    if (held.metric, -held.loss) > progress.best_score:
        progress.best_score, progress.best_epoch = (held.metric, -held.loss), record["epoch"]
        progress.best = {n: t.detach().clone() for n, t in run.trainable.moving_state().items()}


def epoch_line(record: EpochRecord, num_epochs: int) -> str:
    """One epoch for people."""
    val, tested = (record.get(f"{n}_top1", record.get(f"{n}_map")) for n in ("val", "test"))
    held = "" if val is None else f"  held-out {val:.3f}"
    test = "" if tested is None else f"  test {tested:.3f}"
    return (
        f"epoch {record['epoch']}/{num_epochs}  loss {record['train_loss']:.3f}{held}{test}"
        f"  {record['seconds']:.1f} s"
        f" + {record['eval_seconds']:.1f} s scoring"
    )


def _report(run: FinetuneRun, progress: Progress, scores: Scores, num_resumed: int) -> RunReport:
    num_test = len(run.test)
    seconds = sum(e["seconds"] for e in progress.epochs) / len(progress.epochs)
    return RunReport(
        command="finetune",
        trainable_params=run.trainable.trainable_params,
        seconds_total=0.0,  # known once the model is written
        epochs=progress.epochs,
        scored_on=f"test split ({num_test} images)",
        chosen_on=run.chosen_on,
        config=config_json(run.config),
        provenance=_provenance(run),
        environment=environment() | run.placement.describe(),
        more={
            "model": str(run.output),
            "seconds_per_epoch": seconds,
            "images_per_s": len(run.train) / seconds,
            "num_train": len(run.train),
            "num_test": num_test,
            "without_leaks": _without_leaks(run, scores),
            "num_skipped": run.num_skipped,
            "num_resumed_epochs": num_resumed,
            "kept_epoch": progress.best_epoch or len(progress.epochs),
            "read_seconds": run.read_seconds,
            "recipe": run.recipe.to_dict(),
            "probe": run.probe,
            **({} if run.dataset.task == "multiclass" else {"task": run.dataset.task}),
            **_tail_fields(run),
        },
        class_names=run.dataset.class_names,
        **_evaluated(run, scores),
    )


def _without_leaks(run: FinetuneRun, scores: Scores) -> JsonObject | None:
    """The score without test images that train or val has too."""
    others = [split.content for name, split in run.dataset.splits.items() if name != "test"]
    test = run.test.split
    if test.targets is not None:
        return None
    return without_leaks(test.labels, scores.predicted, is_copy(test.content, others))


def _evaluated(run: FinetuneRun, scores: Scores) -> JsonObject:
    """The report's fields of what was scored."""
    split, names = run.test.split, run.dataset.class_names
    if split.targets is not None:
        truth, probabilities = split.targets > 0, scores.probabilities.astype(np.float64)
        predicted = probabilities >= LABEL_THRESHOLD
        return {
            "test_top1": None,
            "test_interval": None,
            "target_scores": multilabel_scores(
                truth,
                probabilities,
                predicted,
                names,
                groups=split.groups,
                seed=run.config.seed,
            ),
            "targets": TargetPredictions.of_labels(split.ids, truth, predicted),
        }
    found = evaluate(
        split.labels,
        scores.predicted,
        scores.probabilities,
        ids=split.ids,
        class_names=names,
        confidence=scores.probabilities.max(axis=1),
        groups=split.groups,
        seed=run.config.seed,
    )
    return {
        "test_top1": scores.metric,
        "test_interval": found.interval,
        "scores": found.scores,
        "calibration": found.calibration,
        "test": found.test,
    }


def _provenance(run: FinetuneRun) -> JsonObject:
    return {
        "backbone": run.info.to_dict(),
        "dataset": dataclasses.asdict(run.dataset.info(run.config)),
        "cache": run.stage_cache.cache.path.name if run.stage_cache else None,
    }


def _tail_fields(run: FinetuneRun) -> JsonObject:
    """What a report says of a run from cached activations only."""
    if run.stage_cache is None:
        return {}
    return {
        "mode": f"tail from {run.recipe.from_stage}"
        + (", all stages" if run.recipe.all_stages else ""),
        "activations": run.stage_cache.describe(),
    }


def _write_model(run: FinetuneRun, report: RunReport) -> None:
    scores: JsonObject = {
        "test_top1": report.test_top1,
        "test_interval": list(report.test_interval or ()),
    }
    if report.target_scores is not None:
        scores = dataclasses.asdict(report.target_scores)
    scores |= {
        "num_test": len(run.test),
        "chosen_on": report.chosen_on,
    }
    card = ModelCard(
        backbone=run.info.backbone,
        class_names=run.dataset.class_names,
        preprocessing=run.info.preprocessing,
        provenance={**report.provenance, "recipe": report.more["recipe"]},
        scores=scores,
        task=run.dataset.task,
        stages=run.info.stages,
    )
    write_model(run.output, run.trainable.final_state(), card)


def _main_score(report: JsonObject) -> tuple[str, float, tuple[float, float]]:
    if (scores := report.get("target_scores")) is not None:
        return "mean average precision", scores["mean_average_precision"], scores["interval"]
    return "accuracy", report["test_top1"], report["test_interval"]


def summary_lines(report: JsonObject) -> list[str]:
    """The report for people."""
    skipped = sum(report["num_skipped"].values())
    left_out = f"; {skipped} unreadable images left out" if skipped else ""
    done = ["already trained, nothing to do; --no-resume trains again"] if report["hit"] else []
    tail = f" ({report['mode']})" if "mode" in report else ""
    extraction = report.get("activations", {}).get("extract_seconds")
    once = "" if extraction is None else f", {extraction:.1f} s of it once for the activations"
    name, score, (low, high) = _main_score(report)
    return [
        *done,
        f"test {name} {score:.3f} [{low:.3f}, {high:.3f}] on "
        f"{report['num_test']} images, {report['trainable_params']:,} trainable parameters{tail}",
        *leak_lines(report),
        *score_lines(RunReport.from_dict(report)),
        f"{report['seconds_per_epoch']:.1f} s per epoch, {report['images_per_s']:.0f} images/s, "
        f"{report['seconds_total']:.1f} s in all{once}{left_out}",
        f"model: {report['model']}",
    ]

"""Extraction: right rows, resumed, refused when stale, nothing moved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from data_helpers import encoded, make_folder, number_in, picture
from featcache import extract as ex
from featcache.backbone import load_backbone, state_sha256
from featcache.cache import FeatureCache, part_path
from featcache.config import ExtractConfig, VerifyConfig
from featcache.data import BadImage, load_dataset, normalize, to_pixels
from featcache.engine import Engine, EngineSettings
from featcache.engine.base import relative_error
from featcache.errors import CacheError, UserError

Interrupt = Callable[[ExtractConfig, int], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 train pictures (three blocks) and 10 test pictures whose number is in their pixels."""
    return make_folder(tmp_path_factory.mktemp("set") / "pets", train=75, test=5)


def settings(dataset: Path | str, tmp_path: Path, **changes: object) -> ExtractConfig:
    options = {"weights": "random", "image_px": 32, "cache_dir": tmp_path / "cache", **changes}
    return ExtractConfig(dataset=str(dataset), **options)


@pytest.fixture
def mean_colour(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the network by one whose first two features are the picture's red and green.

    Returns:
        The sizes of the batches that it was given.
    """
    import featcache.engine

    sizes: list[int] = []

    def run(pixels: np.ndarray) -> np.ndarray:
        sizes.append(len(pixels))
        out = np.zeros((len(pixels), 512), np.float32)
        out[:, :2] = pixels[:, 5, 5, :2]
        return out

    def choose(settings: EngineSettings, *args: object, **work: object) -> Engine:
        return Engine(
            name="torch",
            precision="float32",
            device="cpu",
            batch_size=settings.batch_size or 8,
            threads=2,
            workers=2 if settings.workers is None else settings.workers,
            run=run,
            timings={},
            max_error=0.0,
        )

    monkeypatch.setattr(featcache.engine, "choose_engine", choose)
    return sizes


def numbers(X: np.ndarray) -> list[int]:
    return [int(row[0]) + 256 * int(row[1]) for row in X]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_rows_labels_and_ids_stay_aligned(
    folder: Path, tmp_path: Path, mean_colour: list[int], workers: int, batch_size: int
) -> None:
    config = settings(folder, tmp_path, workers=workers, batch_size=batch_size)
    report = ex.extract(config)
    cache, dataset = FeatureCache(Path(report["cache"])), load_dataset(config)
    for name, split in dataset.splits.items():
        cached = cache.split(name)
        X, y = cached
        wanted = [number_in(np.asarray(split.load(i))) for i in range(len(split))]
        assert numbers(X) == wanted
        assert cached.ids == split.ids
        assert y.tolist() == split.labels.tolist()
        assert [cache.class_names[label] for label in y] == [i.split("/")[1] for i in split.ids]


def test_features_are_the_plain_networks(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, tmp_path, views="flip", num_train=20)
    report = ex.extract(config)
    cache, split = FeatureCache(Path(report["cache"])), load_dataset(config).splits["train"]
    prep = cache.meta.backbone.preprocessing
    pixels = np.stack([to_pixels(split.load(i), prep) for i in range(len(split))])
    network = load_backbone(config, config.seed)
    with torch.inference_mode():
        plain, flipped = (
            network(normalize(torch.from_numpy(p.copy()), prep)).numpy()
            for p in (pixels, pixels[:, :, ::-1])
        )
    assert relative_error(cache.split("train").view(0), plain) < 1e-4
    assert relative_error(cache.split("train").view(1), flipped) < 1e-4


def test_the_frozen_network_does_not_move(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.extract import request

    loaded = []

    def load(*args: object) -> torch.nn.Module:
        loaded.append(load_backbone(*args))
        return loaded[0]

    monkeypatch.setattr(request, "load_backbone", load)
    config = settings(folder, tmp_path)
    ex.extract(config)
    assert state_sha256(loaded[0]) == state_sha256(load_backbone(config, config.seed))


def test_two_runs_agree_whatever_the_workers(folder: Path, tmp_path: Path) -> None:
    files = [
        ex.extract(settings(folder, tmp_path / str(n), workers=n, batch_size=8))["cache"]
        for n in (0, 3)
    ]
    one, two = (Path(file).read_bytes() for file in files)
    assert one == two


def test_a_hit_does_no_work_and_survives_a_move(
    folder: Path, tmp_path: Path, mean_colour: list[int]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "first" / "pets")
    first = ex.extract(settings(copy, tmp_path))
    assert not first["hit"]
    computed = len(mean_colour)
    moved = copy.rename(tmp_path / "renamed pets")
    for file in moved.rglob("*.png"):
        file.touch()
    second = ex.extract(settings(moved, tmp_path))
    assert second["hit"]
    assert second["cache"] == first["cache"]
    assert len(mean_colour) == computed
    assert second["splits"]["train"] == {
        "num_samples": 150,
        "num_resumed": 150,
        "num_skipped": 0,
        "seconds": 0.0,
        "images_per_s": None,
    }


def test_other_settings_make_another_cache(
    folder: Path, tmp_path: Path, mean_colour: list[int]
) -> None:
    changes = [{}, {"image_px": 48}, {"views": "flip"}, {"dtype": "float16"}, {"normalize": "half"}]
    files = {ex.extract(settings(folder, tmp_path, **c))["cache"] for c in changes}
    assert len(files) == len(changes)


def change(copy: Path, what: str) -> None:
    first = copy / "train" / "cat" / "000.png"
    if what == "changed":
        first.write_bytes(encoded(picture(4000)))
    elif what == "added":
        (copy / "train" / "cat" / "new.png").write_bytes(encoded(picture(4000)))
    elif what == "removed":
        first.unlink()
    else:
        first.rename(copy / "train" / "dog" / "moved.png")


@pytest.mark.parametrize("what", ["changed", "added", "removed", "relabeled"])
def test_stale_caches_are_refused_then_updated(
    folder: Path, tmp_path: Path, mean_colour: list[int], what: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "pets")
    path = ex.extract(settings(copy, tmp_path))["cache"]
    change(copy, what)
    with pytest.raises(CacheError) as caught:
        ex.extract(settings(copy, tmp_path))
    message = str(caught.value)
    assert f"{path} was made from different images: dataset.fingerprint is " in message
    assert "000.png" in message or "new.png" in message
    assert "--update" in message
    del mean_colour[:]
    report = ex.extract(settings(copy, tmp_path, update=True))
    assert sum(mean_colour) == {"changed": 1, "added": 1, "removed": 0, "relabeled": 0}[what]
    assert report["cache"] == path
    assert "of rows kept" in ex.summary_lines(report)[0]
    fresh = ex.extract(settings(copy, tmp_path / "fresh"))
    assert Path(path).read_bytes() == Path(fresh["cache"]).read_bytes()
    assert ex.extract(settings(copy, tmp_path))["hit"]


def test_an_explicit_output_refuses_other_settings(
    folder: Path, tmp_path: Path, mean_colour: list[int]
) -> None:
    out = tmp_path / "mine.h5"
    ex.extract(settings(folder, tmp_path, output=out))
    px = r"was made with different settings: .*preprocessing\.image_px is 32 in the cache, 48 now"
    with pytest.raises(CacheError, match=px):
        ex.extract(settings(folder, tmp_path, output=out, image_px=48))
    ex.extract(settings(folder, tmp_path, output=out, image_px=48, force=True))
    assert FeatureCache(out).meta.backbone.preprocessing.image_px == 48


def test_force_replaces_neither_strangers_nor_links(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    config = settings(folder, tmp_path, output=path, force=True)
    for stranger in (path, part_path(path)):
        with h5py.File(stranger, "w") as file:
            file["measurements"] = [1.0]
        before = stranger.read_bytes()
        with pytest.raises(UserError, match=f"{stranger.name} exists and was not written"):
            ex.extract(config)
        assert stranger.read_bytes() == before
        stranger.unlink()
    target = tmp_path / "elsewhere.h5"
    for there in (False, True):
        path.symlink_to(target)
        with pytest.raises(UserError, match=rf"x\.h5 is a link.*its target {target} as --output"):
            ex.extract(config)
        path.unlink()
        assert target.exists() == there
        target.touch()


def test_force_replaces_a_damaged_cache(
    folder: Path, tmp_path: Path, mean_colour: list[int]
) -> None:
    config = settings(folder, tmp_path, output=tmp_path / "x.h5")
    ex.extract(config)
    whole = config.output.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], bytes(4096) + whole[4096:], whole[:-99]):
        config.output.write_bytes(damaged)
        ex.extract(dataclasses.replace(config, force=True))
        assert config.output.read_bytes() == whole


def test_changed_weights_are_refused(folder: Path, tmp_path: Path, mean_colour: list[int]) -> None:
    from safetensors.torch import save_file

    network = load_backbone(settings(folder, tmp_path), 7)
    file = tmp_path / "w.safetensors"
    save_file(network.state_dict(), file)
    ex.extract(settings(folder, tmp_path, weights=str(file)))
    save_file(load_backbone(settings(folder, tmp_path), 8).state_dict(), file)
    with pytest.raises(CacheError, match=r"backbone\.weights_sha256"):
        ex.extract(settings(folder, tmp_path, weights=str(file)))


@pytest.mark.parametrize("module", ["request", "maintenance"])
def test_weights_replaced_during_the_run_are_refused(
    folder: Path,
    tmp_path: Path,
    mean_colour: list[int],
    monkeypatch: pytest.MonkeyPatch,
    module: str,
) -> None:
    from safetensors.torch import save_file

    import featcache.extract.maintenance
    import featcache.extract.request

    file = tmp_path / "w.safetensors"
    network = load_backbone(settings(folder, tmp_path), 7)
    save_file(network.state_dict(), file)
    config = settings(folder, tmp_path, weights=str(file))
    config = dataclasses.replace(config, output=tmp_path / "mine.h5")
    if module == "maintenance":
        ex.extract(config)
        damage(tmp_path / "mine.h5")

    def load(*args: object) -> torch.nn.Module:
        save_file({k: v + 1 for k, v in network.state_dict().items()}, file)
        return load_backbone(*args)

    monkeypatch.setattr(getattr(featcache.extract, module), "load_backbone", load)
    where = {"repair": True, "dataset": str(folder), "weights": str(file)}
    repair = VerifyConfig(cache=tmp_path / "mine.h5", **where)
    with pytest.raises(UserError, match=r"w\.safetensors changed during the run: run the same"):
        ex.extract(config) if module == "request" else ex.check(repair)
    assert (tmp_path / "mine.h5").exists() == (module == "maintenance")


def damage(path: Path) -> None:
    """Overwrite the first feature of train."""
    start = FeatureCache(path).file.layout.extents["train/features"].offset
    with path.open("rb+") as file:
        file.seek(start)
        file.write(b"damaged!")


def test_other_library_versions_are_named(
    folder: Path, tmp_path: Path, mean_colour: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import featcache.extract.request as request

    ex.extract(settings(folder, tmp_path))
    newer = {**request.numeric_versions("resnet18"), "pillow": "99.0"}
    monkeypatch.setattr(request, "numeric_versions", lambda _: newer)
    with pytest.raises(CacheError, match=r"versions\.pillow is .* in the cache, 99\.0 now"):
        ex.extract(settings(folder, tmp_path))


def test_an_interrupted_run_resumes(
    folder: Path, tmp_path: Path, mean_colour: list[int], interrupt_after: Interrupt
) -> None:
    interrupt_after(settings(folder, tmp_path), 2)
    assert not list((tmp_path / "cache").glob("*.h5"))
    wrote_for_100_seconds(tmp_path / "cache")
    del mean_colour[:]
    report = ex.extract(settings(folder, tmp_path))
    assert report["splits"]["train"]["num_resumed"] == 128
    assert sum(mean_colour) == 150 - 128 + 10
    whole = ex.extract(settings(folder, tmp_path / "other"))
    assert Path(report["cache"]).read_bytes() == Path(whole["cache"]).read_bytes()
    assert cost(report)["seconds_total"] == pytest.approx(100 + report["seconds_total"])
    assert not list((tmp_path / "cache").glob("*.part*"))


def wrote_for_100_seconds(folder: Path) -> None:
    """Date an unfinished cache's last write 100 seconds after its run began."""
    (part,) = folder.glob("*.part")
    begun_at = json.loads(Path(f"{part}.json").read_text())["begun_at"]
    os.utime(part, (begun_at + 100, begun_at + 100))


def cost(report: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(Path(f"{report['cache']}.json").read_text())
    return values


def test_the_cost_of_a_cache_lies_beside_it(
    folder: Path, tmp_path: Path, mean_colour: list[int]
) -> None:
    pets = shutil.copytree(folder, tmp_path / "pets")
    report = ex.extract(settings(pets, tmp_path))
    first = cost(report)
    assert first["cache_digest"] == FeatureCache(Path(report["cache"])).digest.hex()
    assert first["num_images"] == 160
    assert first["seconds_total"] == report["seconds_total"]
    assert first["config"]["image_px"] == 32
    assert ex.extract(settings(pets, tmp_path))["hit"]
    assert cost(report) == first
    next((pets / "test").rglob("*.png")).unlink()
    update = ex.extract(settings(pets, tmp_path, update=True))
    total = first["seconds_total"] + update["seconds_total"]
    assert cost(update)["seconds_total"] == pytest.approx(total)
    Path(f"{update['cache']}.json").unlink()
    next((pets / "test").rglob("*.png")).unlink()
    assert cost(ex.extract(settings(pets, tmp_path, update=True)))["seconds_total"] is None


def test_the_cost_replaces_no_file_of_others(
    folder: Path, tmp_path: Path, mean_colour: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "x.h5.json"
    theirs.write_text('{"shopping": ["milk"]}')
    ex.extract(settings(folder, tmp_path, output=tmp_path / "x.h5"))
    assert theirs.read_text() == '{"shopping": ["milk"]}'
    assert "x.h5.json is not a record of extract-features" in capsys.readouterr().err


def test_bad_pictures_stop_the_run_or_are_recorded(
    folder: Path, tmp_path: Path, mean_colour: list[int]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "pets")
    (copy / "train" / "cat" / "003.png").write_bytes(b"")
    (copy / "test" / "dog" / "001.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"train/cat/003\.png.*--on-error skip"):
        ex.extract(settings(copy, tmp_path))
    report = ex.extract(settings(copy, tmp_path, on_error="skip"))
    assert [s["num_skipped"] for s in report["splits"].values()] == [1, 1]
    cache = FeatureCache(Path(report["cache"]))
    assert cache.skipped == [("train", "train/cat/003.png", 2), ("test", "test/dog/001.png", 3)]
    X, y = cache.split("train")
    assert numbers(X) == [n for n in range(150) if n != 3]
    assert len(y) == 149
    with pytest.raises(UserError, match=r"leaves out 2 images.*train/cat/003\.png \(empty file"):
        ex.extract(settings(copy, tmp_path))
    again = ex.extract(settings(copy, tmp_path, on_error="skip"))
    assert again["hit"]
    assert again["splits"]["test"]["num_skipped"] == 1


def test_a_passing_failure_is_not_recorded(
    folder: Path, tmp_path: Path, mean_colour: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pictures' folder is away between hashing and reading, under --on-error skip."""
    import featcache.engine

    copy = shutil.copytree(folder, tmp_path / "pets")
    choose = featcache.engine.choose_engine

    def away(*args: object, **work: object) -> Engine:
        (copy / "train").rename(tmp_path / "away")
        return choose(*args, **work)

    config = settings(copy, tmp_path, on_error="skip")
    with monkeypatch.context() as patched:
        patched.setattr(featcache.engine, "choose_engine", away)
        with pytest.raises(UserError, match="could be read before and cannot be read now"):
            ex.extract(config)
    (tmp_path / "away").rename(copy / "train")
    report = ex.extract(config)
    assert [s["num_skipped"] for s in report["splits"].values()] == [0, 0]


def test_update_tries_pictures_again_that_were_left_out(
    folder: Path, tmp_path: Path, mean_colour: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import featcache.data.dataset

    config = settings(folder, tmp_path, on_error="skip")
    bad = (folder / "train" / "cat" / "003.png").read_bytes()
    decoded = featcache.data.dataset.decoded

    def failing(data: bytes, *args: object) -> contextlib.AbstractContextManager[Image.Image]:
        if data == bad:
            raise BadImage(4)
        return decoded(data, *args)

    with monkeypatch.context() as patched:
        patched.setattr(featcache.data.dataset, "decoded", failing)
        first = ex.extract(config)
        assert first["splits"]["train"]["num_skipped"] == 1
        still = ex.extract(dataclasses.replace(config, update=True))
        assert still["splits"]["train"]["num_skipped"] == 1
        with pytest.raises(UserError, match=r"train/cat/003\.png.*--on-error skip"):
            ex.extract(dataclasses.replace(config, update=True, on_error="fail"))
    assert ex.extract(config)["hit"]
    with pytest.raises(UserError, match=r"repair or remove them and add --update"):
        ex.extract(dataclasses.replace(config, on_error="fail"))
    del mean_colour[:]
    updated = ex.extract(dataclasses.replace(config, update=True, on_error="fail"))
    assert (sum(mean_colour), updated["splits"]["train"]["num_skipped"]) == (1, 0)
    fresh = ex.extract(settings(folder, tmp_path / "fresh"))
    assert Path(updated["cache"]).read_bytes() == Path(fresh["cache"]).read_bytes()
    assert ex.extract(dataclasses.replace(config, update=True))["hit"]


def test_an_unfinished_cache_that_leaves_pictures_out_advises_what_works(
    folder: Path, tmp_path: Path, mean_colour: list[int], interrupt_after: Interrupt
) -> None:
    copy = shutil.copytree(folder, tmp_path / "pets")
    bad = copy / "train" / "cat" / "003.png"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    interrupt_after(settings(copy, tmp_path, on_error="skip"), 1)
    with pytest.raises(UserError, match=r"leaves out 1 images.*repair or remove them and add --f"):
        ex.extract(settings(copy, tmp_path))
    bad.write_bytes(good)
    assert not ex.extract(settings(copy, tmp_path, force=True))["hit"]
    assert ex.extract(settings(copy, tmp_path))["hit"]


def test_features_that_are_not_finite_stop_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mean_colour: list[int]
) -> None:
    import featcache.engine

    choose = featcache.engine.choose_engine

    def broken(*args: object, **work: object) -> Engine:
        engine = choose(*args, **work)
        return dataclasses.replace(engine, run=lambda pixels: engine.run(pixels) * np.nan)

    monkeypatch.setattr(featcache.engine, "choose_engine", broken)
    with pytest.raises(UserError, match=r"train/cat/000\.png.*not finite"):
        ex.extract(settings(folder, tmp_path))


def test_random_views_are_seeded_and_differ(
    folder: Path, tmp_path: Path, mean_colour: list[int]
) -> None:
    report = ex.extract(settings(folder, tmp_path, views="3", num_train=70))
    split = FeatureCache(Path(report["cache"])).split("train")
    assert split.views.shape == (4, 70, 512)
    assert report["num_views"] == 4
    again = ex.extract(settings(folder, tmp_path / "again", views="3", num_train=70))
    assert Path(report["cache"]).read_bytes() == Path(again["cache"]).read_bytes()


def test_the_report_is_json_and_complete(
    folder: Path, tmp_path: Path, mean_colour: list[int]
) -> None:
    report = json.loads(json.dumps(ex.extract(settings(folder, tmp_path))))
    wanted = "command cache hit backbone weights weights_sha256 feature_dim precision splits"
    assert {*wanted.split(), "seconds_total"} <= report.keys()
    assert report["splits"]["train"]["images_per_s"] > 0
    lines = ex.summary_lines(report)
    assert "150 train, 10 test images of 2 classes, " in lines[0]
    assert report["identical_images"]["num_copies"] == 0
    assert len(lines) == 3
    assert lines[-1].startswith("next: train-head ")


def test_copies_in_train_and_test_are_said_on_every_run(
    folder: Path, tmp_path: Path, mean_colour: list[int]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "pets")
    shutil.copy(copy / "train" / "cat" / "003.png", copy / "test" / "cat" / "seen.png")
    for hit in (False, True):
        report = ex.extract(settings(copy, tmp_path))
        assert report["hit"] == hit
        assert report["identical_images"]["across_splits"][0]["num_images"] == 1
        assert ex.summary_lines(report)[1] == (
            "test images that are also in train: 1 of 11 (such as test/cat/seen.png and "
            "train/cat/003.png); remove them from one split, or test scores are too high"
        )


def test_odd_pictures_are_the_same_on_every_path(tmp_path: Path) -> None:
    """A gray, an alpha and a rotated picture go through the whole chain."""
    root = make_folder(tmp_path / "odd", train=2, test=1)
    Image.new("L", (40, 20), 200).save(root / "train" / "cat" / "gray.png")
    Image.new("RGBA", (20, 40), (255, 0, 0, 128)).save(root / "train" / "dog" / "alpha.png")
    report = ex.extract(settings(root, tmp_path))
    assert report["splits"]["train"]["num_samples"] == 6


def test_groups_are_cached_and_a_change_of_them_is_named(
    folder: Path, tmp_path: Path, mean_colour: list[int]
) -> None:
    lines = [f"{file.relative_to(folder)},{file.parent.name}" for file in folder.rglob("*.png")]
    manifest = tmp_path / "list.csv"

    def write(num_groups: int) -> ExtractConfig:
        rows = [f"{line},g{n % num_groups}" for n, line in enumerate(lines)]
        manifest.write_text("\n".join(["path,label,group", *rows]))
        return settings(manifest, tmp_path, image_root=folder, test_fraction=0.5)

    report = ex.extract(write(10))
    assert report["shared_groups"] == []
    cache = FeatureCache(report["cache"])
    groups = {name: cache.split(name).groups for name in ("train", "test")}
    assert groups["train"].tolist() == load_dataset(write(10)).splits["train"].groups
    assert not set(groups["train"]) & set(groups["test"])
    assert ex.extract(write(10))["hit"]
    with pytest.raises(CacheError, match=r"images: .*[0-9]+ regrouped \(t"):
        ex.extract(write(5))
    del mean_colour[:]
    assert ex.extract(dataclasses.replace(write(5), update=True))["cache"] == report["cache"]
    assert mean_colour == []
    assert len(set(FeatureCache(report["cache"]).split("train").groups)) < 5

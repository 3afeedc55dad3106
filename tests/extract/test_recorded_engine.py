"""Extraction with other engines: recorded, kept on resume, never mixed; batches on a device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_helpers import make_folder, number_in
from featcache import extract as ex
from featcache.cache import FeatureCache, begun_with, part_path, read_meta
from featcache.cache.lock import locked
from featcache.config import ExtractConfig
from featcache.data import load_dataset
from featcache.engine import Engine, int8, openvino_cpu
from featcache.engine.inference import decode_shortfall
from featcache.errors import CacheError, StorageError
from featcache.extract.request import differences

Interrupt = Callable[[ExtractConfig, int], None]
Interrupted = Callable[[ExtractConfig, str], Path]

needs_fast = pytest.mark.skipif(
    not openvino_cpu.is_installed("openvino", "nncf"), reason='needs pip install "featcache[fast]"'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("set") / "pets", train=50, test=5)


def settings(dataset: Path, tmp_path: Path, **changes: object) -> ExtractConfig:
    options = {"weights": "bundled", "image_px": 32, "cache_dir": tmp_path / "cache", **changes}
    return ExtractConfig(dataset=str(dataset), **options)


def red_green(pixels: np.ndarray) -> np.ndarray:
    out = np.zeros((len(pixels), 512), np.float32)
    out[:, :2] = pixels[:, 5, 5, :2]
    return out


def fake(name: str, **changes: object) -> Engine:
    engine = Engine(
        name=name,
        precision="float32",
        device="cpu",
        batch_size=8,
        threads=2,
        workers=2,
        run=red_green,
        timings={},
        max_error=0.0,
    )
    return dataclasses.replace(engine, **changes)


def always(engine: Engine) -> Callable[..., Engine]:
    """A `choose_engine` that gives this one."""
    return lambda *args, **work: engine


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Engines that `auto` had to keep; it does, or else takes torch."""
    import featcache.engine

    kept: list[str | None] = []

    def choose(*args: object, resumed: str | None, **work: object) -> Engine:
        kept.append(resumed)
        return fake("any", recorded=resumed or "torch")

    monkeypatch.setattr(featcache.engine, "choose_engine", choose)
    return kept


@pytest.fixture
def interrupt(
    interrupt_after: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> Callable[[ExtractConfig, str], Path]:
    """Leaves a .part started by an engine; returns the path that the cache would have."""
    import featcache.engine

    def run(config: ExtractConfig, engine: str) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(featcache.engine, "choose_engine", always(fake("x", recorded=engine)))
            interrupt_after(config, 0)
        (part,) = config.cache_dir.glob("*.part")
        return part.with_suffix("")

    return run


def test_a_resumed_run_keeps_the_engine_of_its_rows(
    folder: Path, tmp_path: Path, resumed: list[str | None], interrupt: Interrupted
) -> None:
    config = settings(folder, tmp_path)
    path = interrupt(config, "openvino-2026.4")
    assert begun_with(path).engine == "openvino-2026.4"
    report = ex.extract(config)
    assert resumed == ["openvino-2026.4"]
    assert read_meta(Path(report["cache"]))[0].engine == "openvino-2026.4"
    assert begun_with(path) is None


def test_force_and_fresh_runs_resume_nothing(
    folder: Path, tmp_path: Path, resumed: list[str | None], interrupt: Interrupted
) -> None:
    config = settings(folder, tmp_path)
    interrupt(config, "openvino-2026.4")
    ex.extract(dataclasses.replace(config, force=True))
    ex.extract(settings(folder, tmp_path / "fresh"))
    assert resumed == [None, None]


def test_update_keeps_the_engine_of_the_old_rows(
    tmp_path: Path, resumed: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import featcache.engine

    copy = make_folder(tmp_path / "pets", train=5, test=2)
    with monkeypatch.context() as patch:
        chosen = always(fake("x", recorded="openvino-2026.4"))
        patch.setattr(featcache.engine, "choose_engine", chosen)
        ex.extract(settings(copy, tmp_path))
    (copy / "train" / "cat" / "000.png").unlink()
    ex.extract(settings(copy, tmp_path, update=True))
    assert resumed == ["openvino-2026.4"]


def test_only_what_is_missing_counts_as_work_ahead(
    tmp_path: Path, interrupt_after: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    import featcache.engine

    passes: list[object] = []

    def choose(*args: object, num_images: int, **work: object) -> Engine:
        passes.append(num_images)
        return fake("torch")

    monkeypatch.setattr(featcache.engine, "choose_engine", choose)
    copy = make_folder(tmp_path / "pets", train=40, test=2)  # two classes: a block and 16 rows
    config = settings(copy, tmp_path, views="flip")
    interrupt_after(config, 1)
    ex.extract(config)
    (copy / "train" / "cat" / "000.png").unlink()
    ex.extract(dataclasses.replace(config, update=True))
    Image.new("RGB", (40, 40), "red").save(copy / "test" / "cat" / "000.png")
    ex.extract(dataclasses.replace(config, update=True))
    assert passes[0] == 84 * 2
    assert passes[1] < passes[0] - 30 * 2
    assert passes[2:] == [0, 2]


def test_a_cache_that_is_being_written_is_refused_before_any_work(
    folder: Path, tmp_path: Path, resumed: list[str | None]
) -> None:
    config = settings(folder, tmp_path, num_train=4, num_test=2, output=tmp_path / "x.h5")
    with locked(config.output) as lock:
        with pytest.raises(StorageError, match="being written"):
            ex.extract(config)
        assert resumed == []
        lock.release()
    ex.extract(config)
    assert resumed == [None]


def test_torch_has_its_threads_back_afterwards(folder: Path, tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ex.extract(settings(folder, tmp_path, num_train=4, num_test=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_rows_of_two_quantised_networks_never_mix(
    folder: Path, tmp_path: Path, interrupt: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If calibration ever gave another network, the unfinished cache would be refused."""
    import featcache.engine

    config = settings(folder, tmp_path, precision="int8")
    interrupt(config, "openvino-2026.4+nncf-3.4:aaaa")
    chosen = always(fake("x", recorded="openvino-2026.4+nncf-3.4:bbbb"))
    monkeypatch.setattr(featcache.engine, "choose_engine", chosen)
    with pytest.raises(CacheError, match=r"engine.*aaaa.*bbbb.*--force"):
        ex.extract(config)


@pytest.mark.parametrize(
    ("cached", "wanted", "fits"),
    [
        ("torch", "auto", True),
        ("openvino-2026.4", "auto", True),
        ("torch", "torch", True),
        ("openvino-2026.4", "torch", False),
        ("torch", "openvino-2026.4", False),
        ("openvino-2026.4", "openvino-2026.4", True),
        ("openvino-2025.1", "openvino-2026.4", False),
        ("openvino-2026.4+nncf-3.4:ab", "openvino-2026.4", True),
        ("openvino-2026.40", "openvino-2026.4", False),
        ("openvino-2026.4", "openvino", True),  # not installed here: any version will do
    ],
)
def test_which_engines_rows_fit_a_request(
    folder: Path,
    tmp_path: Path,
    resumed: list[str | None],
    cached: str,
    wanted: str,
    fits: bool,
) -> None:
    report = ex.extract(settings(folder, tmp_path, num_train=2, num_test=2))
    meta = read_meta(Path(report["cache"]))[0]
    here, there = (dataclasses.replace(meta, engine=name) for name in (cached, wanted))
    assert (differences(here, there) == []) == fits


def test_precisions_have_caches_of_their_own(
    folder: Path, tmp_path: Path, resumed: list[str | None]
) -> None:
    files = {
        ex.extract(settings(folder, tmp_path, precision=p))["cache"] for p in ("float32", "int8")
    }
    assert len(files) == 2
    assert {read_meta(Path(f))[0].precision for f in files} == {"float32", "int8"}


def on_device(order: list[str]) -> Engine:
    """A device that records when batches are started and fetched."""
    count = iter(range(10**6))

    def start(pixels: np.ndarray) -> Callable[[], tuple[np.ndarray, float]]:
        number, features = next(count), red_green(pixels)
        order.append(f"begin {number}")

        def finish() -> tuple[np.ndarray, float]:
            order.append(f"fetch {number}")
            return features, 0.5

        return finish

    return fake("torch", device="cuda", batch_size=16, start=start)


@pytest.mark.parametrize("views", ["none", "flip"])
def test_a_device_is_never_waited_for_while_there_is_more_to_begin(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: str
) -> None:
    import featcache.engine

    order: list[str] = []
    monkeypatch.setattr(featcache.engine, "choose_engine", always(on_device(order)))
    config = settings(folder, tmp_path, views=views)
    report = ex.extract(config)
    assert order[:5] == ["begin 0", "begin 1", "begin 2", "fetch 0", "begin 3"]
    begins = [w for w in order if w.startswith("begin")]
    assert len(begins) * 2 == len(order)
    assert report["stage_seconds"]["network"] == pytest.approx(0.5 * len(begins))
    cache, dataset = FeatureCache(Path(report["cache"])), load_dataset(config)
    for name, split in dataset.splits.items():
        rows = cache.split(name)
        wanted = [number_in(np.asarray(split.load(i))) for i in range(len(split))]
        for view in range(rows.num_views):
            X = rows.view(view)
            assert [int(r[0]) + 256 * int(r[1]) for r in X] == wanted


def test_slow_decoding_is_reported_with_the_workers_it_takes() -> None:
    busy = {"read": 1.0, "decode": 6.0, "resize": 1.0, "network": 2.0}
    assert decode_shortfall(busy, 4, 8) is None
    note = decode_shortfall(busy, 2, 8)
    assert "50% of the time" in note
    assert "4 workers would keep up, 2 are running" in note
    assert decode_shortfall({}, 2, 8) is None


@needs_fast
def test_int8_goes_through_extraction_and_resumes(
    folder: Path, tmp_path: Path, interrupt_after: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "NUM_CALIBRATION", 20)
    config = settings(folder, tmp_path, precision="int8")
    interrupt_after(config, 1)
    report = ex.extract(config)
    assert report["splits"]["train"]["num_resumed"] == 64
    engine = json.loads(json.dumps(report))["engine"]
    assert engine["name"] == "openvino"
    assert engine["int8"]["cosine"]["median"] > 0.99
    assert report["precision"] == "int8"
    meta = read_meta(Path(report["cache"]))[0]
    assert meta.engine == engine["recorded"]
    assert not part_path(Path(report["cache"])).exists()
    assert ex.extract(config)["hit"]
    exact = ex.extract(settings(folder, tmp_path))
    one, other = (FeatureCache(Path(r["cache"])).split("train").X for r in (report, exact))
    cosine = int8.cosine_stats(np.asarray(one), np.asarray(other))
    assert cosine["median"] > 0.99
    assert not np.array_equal(one, other)

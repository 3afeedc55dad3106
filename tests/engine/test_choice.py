"""The choice of engine, batch and threads, with timings that are made up."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from torch import nn

from featcache import engine as en
from featcache.backbone import load_backbone, own_preprocessing
from featcache.config import BackboneConfig
from featcache.engine import autotune, base, openvino_cpu
from featcache.engine.base import Implementation, Workload
from featcache.engine.choice import device_of
from featcache.errors import FeatcacheError, UserError

BUNDLED = BackboneConfig(weights="bundled")
PREP = own_preprocessing(BUNDLED)


def settings(**changes: object) -> en.EngineSettings:
    return en.EngineSettings(backbone="resnet18", **changes)


def nothing(pixels: np.ndarray) -> np.ndarray:
    return np.zeros((len(pixels), 2), np.float32)


def implementation(
    name: str, forward: Callable[[np.ndarray], np.ndarray] = nothing
) -> Implementation:
    return Implementation(name=name, forward=forward, max_error=0.0, recorded=f"{name}-1.0")


def candidate(name: str, batch_size: int = 2, threads: int = 3, forward=nothing):
    chosen = implementation(name, forward)
    return autotune.Candidate(implementation=chosen, batch_size=batch_size, threads=threads)


A_AND_B = [implementation("a"), implementation("b")]


def workload(threads: int = 2, num_images: int = 10, **changes: object) -> Workload:
    pixels = en.sample_pixels(PREP, 1)
    return Workload(
        settings=settings(**changes),
        network=nn.Identity(),
        prep=PREP,
        num_images=num_images,
        threads=threads,
        sample=pixels,
        reference=nothing(pixels),
    )


def rates(table: dict[str, float]):
    """A measure that reads rates from a table and keeps the order of the questions."""
    asked: list[str] = []

    def measure(candidate: autotune.Candidate) -> float:
        asked.append(candidate.label)
        return table[candidate.label]

    return measure, asked


def test_default_batches_shrink_as_images_grow() -> None:
    sizes = {px: base.default_batch(px) for px in (8, 32, 64, 96, 128, 224, 320, 512, 4096)}
    assert sizes == {8: 64, 32: 64, 64: 64, 96: 64, 128: 32, 224: 8, 320: 4, 512: 4, 4096: 4}


def test_the_fastest_implementation_and_batch_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "MAX_ROUNDS", 1)
    measure, asked = rates(
        {"a batch 64 × 2": 10, "b batch 64 × 2": 20, "b batch 128 × 2": 30},
    )
    best, timings = autotune.search(workload(), A_AND_B, measure, 60.0)
    assert (best.implementation.name, best.batch_size, best.threads) == ("b", 128, 2)
    assert timings == {"a batch 64 × 2": 10, "b batch 64 × 2": 20, "b batch 128 × 2": 30}
    # in turns, once to warm up and once to count
    assert asked[:4] == ["a batch 64 × 2", "b batch 64 × 2"] * 2
    assert len(asked) == 8


def test_nothing_is_measured_where_warming_up_costs_more_than_it_may() -> None:
    measure, asked = rates({"a batch 64 × 2": 10})
    best, timings = autotune.search(workload(batch_size=64), A_AND_B, measure, 0.0)
    assert (best.implementation.name, timings, asked) == ("a", {}, ["a batch 64 × 2"])


def test_an_interrupt_while_threads_gather_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    submit, calls = ThreadPoolExecutor.submit, []

    def interrupted(self: ThreadPoolExecutor, call: Callable[[], None]) -> object:
        calls.append(call)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return submit(self, call)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt), autotune.throughput(PREP, 3) as measure:
        measure(candidate("a"))


@pytest.mark.parametrize(
    ("asked", "resumed", "device"),
    [
        ({}, None, "cuda"),
        ({}, "torch", "cuda"),
        ({}, "openvino-2026.4", "cpu"),
        ({"engine": "openvino"}, None, "cpu"),
        ({"precision": "int8"}, None, "cpu"),
        ({"precision": "int8", "device": "cuda"}, None, "cuda"),
    ],
)
def test_auto_leaves_the_gpu_for_what_runs_on_the_cpu_only(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], resumed: str | None, device: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_of(settings(**asked), resumed) == device


def test_a_near_tie_goes_to_the_likelier_candidate() -> None:
    table = {"a batch 64 × 2": 100, "b batch 64 × 2": 102, "a batch 128 × 2": 102.9}
    best, _ = autotune.search(workload(), A_AND_B, rates(table)[0], 60.0)
    assert (best.implementation.name, best.batch_size) == ("a", 64)


def test_a_given_batch_and_given_workers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "physical_cores", lambda: 1)
    measure, asked = rates({})
    best, timings = autotune.search(workload(3, batch_size=5, workers=3), A_AND_B[:1], measure, 1.0)
    assert (best.batch_size, best.threads, timings, asked) == (5, 3, {}, [])


def test_fewer_threads_are_tried_where_two_share_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "physical_cores", lambda: 4)
    table = {"a batch 5 × 8": 10, "a batch 5 × 4": 12}
    best, timings = autotune.search(workload(8, batch_size=5), A_AND_B[:1], rates(table)[0], 60.0)
    assert best.threads == 4
    assert timings == table


def test_a_neighbours_disturbance_does_not_decide() -> None:
    """The best of several rounds counts."""
    given = {"a": iter([9, 1, 9, 1, 1, 1]), "b": iter([9, 5, 5, 5, 5, 5])}
    a, b = (candidate(name, batch_size=1, threads=1) for name in "ab")
    rate = lambda c: next(given[c.implementation.name])  # noqa: E731
    best, timings = autotune.pick_fastest([a, b], rate, 60.0)
    assert best is a
    assert timings == {"a batch 1 × 1": 9, "b batch 1 × 1": 5}


def test_all_threads_run_at_once() -> None:
    import threading

    together = threading.Barrier(3)  # breaks, and the test fails, unless three are inside

    def run(pixels: np.ndarray) -> np.ndarray:
        together.wait(timeout=30)
        return nothing(pixels)

    with autotune.throughput(PREP, 3) as measure:
        assert measure(candidate("a", forward=run)) > 0


def long_job(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> list[str]:
    """Make every job long, list the implementations that are measured, and let the last win."""
    entrants: list[str] = []

    def search(
        work: Workload, implementations: list[Implementation], measure: object, budget_s: float
    ):
        entrants.extend(each.name for each in implementations)
        assert budget_s <= autotune.SELF_TEST_S
        last = implementations[-1]
        best = autotune.Candidate(implementation=last, batch_size=7, threads=1)
        return best, {"made up": 1.0}

    monkeypatch.setattr(autotune, "expected_seconds", lambda *_: 1000.0)
    monkeypatch.setattr(autotune, "search", search)
    monkeypatch.setattr(openvino_cpu, "is_installed", lambda *_: installed)
    found = implementation("openvino"), None
    monkeypatch.setattr(openvino_cpu, "openvino_implementation", lambda work: found)
    return entrants


@pytest.mark.parametrize("installed", [True, False])
def test_auto_measures_what_is_installed(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    entrants = long_job(monkeypatch, installed=installed)
    engine = en.choose_engine(settings(), load_backbone(BUNDLED, 0), PREP, num_images=9999)
    assert entrants == ["torch", "winograd", *(["openvino"] if installed else [])]
    assert engine.name == entrants[-1]
    assert (engine.batch_size, engine.threads, engine.timings) == (7, 1, {"made up": 1.0})


@pytest.mark.parametrize("resumed", ["torch", "torch-winograd", "openvino-2026.3"])
def test_auto_keeps_the_engine_that_made_the_rows_there(
    resumed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entrants = long_job(monkeypatch, installed=True)
    network = load_backbone(BUNDLED, 0)
    engine = en.choose_engine(settings(), network, PREP, num_images=9999, resumed=resumed)
    kept = {"torch": "torch", "torch-winograd": "winograd", "openvino-2026.3": "openvino"}
    assert entrants == [kept[resumed]]
    assert engine.recorded in (resumed, "openvino-1.0")


def test_an_engine_that_fails_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entrants = long_job(monkeypatch, installed=True)

    def fail(work: Workload) -> None:
        raise FeatcacheError("OpenVINO cannot run this network")

    monkeypatch.setattr(openvino_cpu, "openvino_implementation", fail)
    en.choose_engine(settings(), load_backbone(BUNDLED, 0), PREP, num_images=9999)
    assert entrants == ["torch", "winograd"]
    assert "cannot run this network" in capsys.readouterr().err


def test_short_jobs_take_the_defaults() -> None:
    network = load_backbone(BUNDLED, 0)
    short = en.choose_engine(settings(), network, PREP, num_images=500)
    fixed = en.choose_engine(settings(batch_size=5, workers=3), network, PREP, num_images=500)
    inline = en.choose_engine(settings(workers=0), network, PREP, num_images=500)
    assert (short.name, short.batch_size, short.timings) == ("torch", 64, {})
    assert (fixed.batch_size, fixed.threads, fixed.timings) == (5, 3, {})
    assert (fixed.workers, inline.workers, inline.threads) == (3, 0, 1)


def test_what_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    hidden = ("openvino", "nncf")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in hidden else real(n, *a)
    )
    network = load_backbone(BUNDLED, 0)
    with pytest.raises(UserError, match=r'--engine openvino.*pip install "featcache\[fast\]"'):
        en.choose_engine(settings(engine="openvino"), network, PREP, num_images=10)
    with pytest.raises(UserError, match=r"started with openvino .*pip install.* or give --force"):
        en.choose_engine(settings(), network, PREP, num_images=10, resumed="openvino-2026.4")
    with pytest.raises(UserError, match=r"--precision int8 needs openvino and nncf"):
        en.choose_engine(settings(precision="int8"), network, PREP, num_images=10)


def test_the_choice_is_shown_and_is_json() -> None:
    engine = en.choose_engine(settings(), load_backbone(BUNDLED, 0), PREP, num_images=10)
    timed = dataclasses.replace(engine, timings={"torch batch 8 × 2": 88.4})
    assert "torch float32 on cpu, batch 64" in timed.sentence()
    assert "torch batch 8 × 2 88" in timed.sentence()
    report = timed.describe()
    assert report["recorded"] == "torch"
    assert report["max_error"] < base.TOLERANCE
    assert not {"run", "start", "workers", "int8"} & report.keys()


def test_physical_cores_are_some_of_all() -> None:
    assert 1 <= autotune.physical_cores() <= autotune.num_cores()

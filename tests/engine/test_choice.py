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
from featcache.config import BackboneConfig, ExtractConfig
from featcache.engine import autotune, choice, openvino_cpu
from featcache.errors import FeatcacheError, UserError

BUNDLED = BackboneConfig(weights="bundled")
PREP = own_preprocessing(BUNDLED)


def settings(**changes: object) -> ExtractConfig:
    return ExtractConfig(dataset="digits", weights="bundled", **changes)


def nothing(pixels: np.ndarray) -> np.ndarray:
    return np.zeros((len(pixels), 2), np.float32)


def form(name: str) -> choice.Form:
    return choice.Form(name=name, run=nothing, error=0.0, recorded=f"{name}-1.0")


def job(threads: int = 2, num_images: int = 10, **changes: object) -> choice.Job:
    pixels = en.sample_pixels(PREP, 1)
    return choice.Job(
        config=settings(**changes),
        backbone=nn.Identity(),
        prep=PREP,
        num_images=num_images,
        threads=threads,
        pixels=pixels,
        wanted=nothing(pixels),
    )


def rates(table: dict[str, float]):
    """A measure that reads rates from a table and keeps the order of the questions."""
    asked: list[str] = []

    def measure(candidate: autotune.Candidate) -> float:
        asked.append(candidate.label)
        return table[candidate.label]

    return measure, asked


def test_default_batches_shrink_as_images_grow() -> None:
    sizes = {px: en.default_batch(px) for px in (8, 32, 64, 96, 128, 224, 320, 512, 4096)}
    assert sizes == {8: 64, 32: 64, 64: 64, 96: 64, 128: 32, 224: 8, 320: 4, 512: 4, 4096: 4}


def test_the_fastest_form_and_batch_win_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "MAX_ROUNDS", 1)
    measure, asked = rates(
        {"a batch 64 × 2": 10, "b batch 64 × 2": 20, "b batch 128 × 2": 30},
    )
    best, timings = choice.choose_by(job(), [form("a"), form("b")], measure, 60.0)
    assert (best.engine, best.batch_size, best.threads) == ("b", 128, 2)
    assert timings == {"a batch 64 × 2": 10, "b batch 64 × 2": 20, "b batch 128 × 2": 30}
    # in turns, once to warm up and once to count
    assert asked[:4] == ["a batch 64 × 2", "b batch 64 × 2"] * 2
    assert len(asked) == 8


def test_no_race_where_warming_up_costs_more_than_it_may() -> None:
    measure, asked = rates({"a batch 64 × 2": 10})
    best, timings = choice.choose_by(job(batch_size=64), [form("a"), form("b")], measure, 0.0)
    assert (best.engine, timings, asked) == ("a", {}, ["a batch 64 × 2"])


def test_an_interrupt_while_threads_gather_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    submit, calls = ThreadPoolExecutor.submit, []

    def interrupted(self: ThreadPoolExecutor, call: Callable[[], None]) -> object:
        calls.append(call)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return submit(self, call)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    candidate = autotune.Candidate(engine="a", run=nothing, batch_size=2, threads=3)
    with pytest.raises(KeyboardInterrupt), autotune.all_at_once(PREP, 3) as measure:
        measure(candidate)


@pytest.mark.parametrize(
    ("settings", "begun", "device"),
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
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], begun: str | None, device: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = ExtractConfig(dataset="digits", **settings)
    assert en.device_of(config, begun) == device


def test_a_near_tie_goes_to_the_likelier_candidate() -> None:
    table = {"a batch 64 × 2": 100, "b batch 64 × 2": 102, "a batch 128 × 2": 102.9}
    best, _ = choice.choose_by(job(), [form("a"), form("b")], rates(table)[0], 60.0)
    assert (best.engine, best.batch_size) == ("a", 64)


def test_a_given_batch_and_given_workers_are_not_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "physical_cores", lambda: 1)
    measure, asked = rates({})
    best, timings = choice.choose_by(job(3, batch_size=5, workers=3), [form("a")], measure, 1.0)
    assert (best.batch_size, best.threads, timings, asked) == (5, 3, {}, [])


def test_fewer_threads_are_tried_where_two_share_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "physical_cores", lambda: 4)
    table = {"a batch 5 × 8": 10, "a batch 5 × 4": 12}
    best, timings = choice.choose_by(job(8, batch_size=5), [form("a")], rates(table)[0], 60.0)
    assert best.threads == 4
    assert timings == table


def test_a_neighbours_disturbance_does_not_decide() -> None:
    """The best of several rounds counts."""
    given = {"a": iter([9, 1, 9, 1, 1, 1]), "b": iter([9, 5, 5, 5, 5, 5])}
    a, b = (autotune.Candidate(engine=n, run=nothing, batch_size=1, threads=1) for n in "ab")
    best, timings = autotune.race([a, b], lambda c: next(given[c.engine]), 60.0)
    assert best is a
    assert timings == {"a batch 1 × 1": 9, "b batch 1 × 1": 5}


def test_all_threads_run_at_once() -> None:
    import threading

    together = threading.Barrier(3)  # breaks, and the test fails, unless three are inside

    def run(pixels: np.ndarray) -> np.ndarray:
        together.wait(timeout=30)
        return nothing(pixels)

    candidate = autotune.Candidate(engine="a", run=run, batch_size=2, threads=3)
    with autotune.all_at_once(PREP, 3) as measure:
        assert measure(candidate) > 0


def long_job(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> list[str]:
    """Make every job long, and the race a list of its entrants that the last one wins."""
    entrants: list[str] = []

    def choose(job: choice.Job, forms: list[choice.Form], measure: object, budget_s: float):
        entrants.extend(f.name for f in forms)
        assert budget_s <= choice.SELF_TEST_S
        last = forms[-1]
        best = autotune.Candidate(engine=last.name, run=last.run, batch_size=7, threads=1)
        return best, {"made up": 1.0}

    monkeypatch.setattr(choice, "_expected_seconds", lambda *_: 1000.0)
    monkeypatch.setattr(choice, "choose_by", choose)
    monkeypatch.setattr(openvino_cpu, "is_installed", lambda *_: installed)
    monkeypatch.setattr(choice, "_vino_form", lambda job: (form("openvino"), None))
    return entrants


@pytest.mark.parametrize("installed", [True, False])
def test_auto_measures_what_is_installed(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    entrants = long_job(monkeypatch, installed=installed)
    engine = en.choose_engine(settings(), load_backbone(BUNDLED, 0), PREP, "cpu", 9999)
    assert entrants == ["torch", "openvino"] if installed else ["torch"]
    assert engine.name == entrants[-1]
    assert (engine.batch_size, engine.threads, engine.timings) == (7, 1, {"made up": 1.0})


@pytest.mark.parametrize("begun", ["torch", "openvino-2026.3"])
def test_auto_goes_on_with_what_made_the_rows_there(
    begun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entrants = long_job(monkeypatch, installed=True)
    network = load_backbone(BUNDLED, 0)
    engine = en.choose_engine(settings(), network, PREP, "cpu", 9999, None, begun)
    assert entrants == [begun.partition("-")[0]]
    assert engine.recorded in ("torch", "openvino-1.0")


def test_an_engine_that_fails_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entrants = long_job(monkeypatch, installed=True)

    def fail(job: choice.Job) -> None:
        raise FeatcacheError("OpenVINO cannot run this network")

    monkeypatch.setattr(choice, "_vino_form", fail)
    en.choose_engine(settings(), load_backbone(BUNDLED, 0), PREP, "cpu", 9999)
    assert entrants == ["torch"]
    assert "cannot run this network" in capsys.readouterr().err


def test_short_jobs_take_the_defaults() -> None:
    network = load_backbone(BUNDLED, 0)
    short = en.choose_engine(settings(), network, PREP, "cpu", 500)
    fixed = en.choose_engine(settings(batch_size=5, workers=3), network, PREP, "cpu", 500)
    inline = en.choose_engine(settings(workers=0), network, PREP, "cpu", 500)
    assert (short.name, short.batch_size, short.timings) == ("torch", 64, {})
    assert (fixed.batch_size, fixed.threads, fixed.timings) == (5, 3, {})
    assert inline.threads == 1


def test_what_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    hidden = ("openvino", "nncf")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in hidden else real(n, *a)
    )
    network = load_backbone(BUNDLED, 0)
    with pytest.raises(UserError, match=r'--engine openvino.*pip install "featcache\[fast\]"'):
        en.choose_engine(settings(engine="openvino"), network, PREP, "cpu", 10)
    with pytest.raises(UserError, match=r"begun with openvino .*pip install.* or give --force"):
        en.choose_engine(settings(), network, PREP, "cpu", 10, None, "openvino-2026.4")
    with pytest.raises(UserError, match=r"--precision int8 needs openvino and nncf"):
        en.choose_engine(settings(precision="int8"), network, PREP, "cpu", 10)


def test_the_choice_is_said_and_is_json() -> None:
    engine = en.choose_engine(settings(), load_backbone(BUNDLED, 0), PREP, "cpu", 10)
    timed = dataclasses.replace(engine, timings={"torch batch 8 × 2": 88.4})
    assert "torch float32 on cpu, batch 64" in timed.sentence()
    assert "torch batch 8 × 2 88" in timed.sentence()
    told = timed.describe()
    assert told["recorded"] == "torch"
    assert told["max_error"] < en.TOLERANCE
    assert not {"run", "start", "int8"} & told.keys()


def test_physical_cores_are_some_of_all() -> None:
    assert 1 <= choice.physical_cores() <= choice.num_cores()

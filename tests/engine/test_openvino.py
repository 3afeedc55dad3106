"""OpenVINO computes the plain network's features, and its int8 is checked before use."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_helpers import make_folder
from featcache import engine as en
from featcache.backbone import load_backbone, own_preprocessing, state_sha256
from featcache.config import BackboneConfig, ExtractConfig, Preprocessing
from featcache.data import load_dataset
from featcache.engine import base, int8, openvino_cpu, torch_cpu
from featcache.errors import UserError

BUNDLED = BackboneConfig(weights="bundled")
PREP = own_preprocessing(BUNDLED)

needs_openvino = pytest.mark.skipif(
    not openvino_cpu.is_installed("openvino"), reason='needs pip install "featcache[fast]"'
)
needs_nncf = pytest.mark.skipif(
    not openvino_cpu.is_installed("openvino", "nncf"), reason='needs pip install "featcache[fast]"'
)


def settings(dataset: object = "digits", **changes: object) -> ExtractConfig:
    return ExtractConfig(dataset=str(dataset), weights="bundled", **changes)


def asked(**changes: object) -> en.EngineSettings:
    return en.EngineSettings(backbone="resnet18", **changes)


@needs_openvino
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", pytest.param("vit_b_16", marks=pytest.mark.slow)]
)
def test_features_are_the_plain_networks(name: str) -> None:
    config = BackboneConfig(backbone=name, weights="bundled" if name == "resnet18" else "random")
    network = load_backbone(config, 0)
    side = 224 if name == "vit_b_16" else 64
    prep = Preprocessing(image_px=side, resize="squash", resize_px=side, mean=(0.5, 0.4, 0.3))
    before = state_sha256(network)
    engine = en.choose_engine(asked(engine="openvino"), network, prep, num_images=10)
    pixels = en.sample_pixels(prep, 3, seed=1)
    assert (
        base.relative_error(engine.run(pixels), torch_cpu.torch_forward(network, prep)(pixels))
        < 1e-4
    )
    assert (engine.name, engine.precision) == ("openvino", "float32")
    assert engine.recorded.startswith("openvino-2")
    assert state_sha256(network) == before


@needs_openvino
def test_callers_on_several_threads_do_not_mix_their_batches() -> None:
    network = load_backbone(BUNDLED, 0)
    engine = en.choose_engine(asked(engine="openvino", workers=3), network, PREP, num_images=10)
    pixels = en.sample_pixels(PREP, 24)
    wanted = torch_cpu.torch_forward(network, PREP)(pixels)
    pieces = [slice(i, i + size) for i in range(0, 18) for size in (1, 3, 6)]
    with ThreadPoolExecutor(3) as pool:
        done = pool.map(lambda p: engine.run(pixels[p]), pieces)
        for piece, got in zip(pieces, done, strict=True):
            assert base.relative_error(got, wanted[piece]) < 1e-4


SIGNAL_AFTER_USE = """
import gc, os, signal, sys
from featcache.backbone import load_backbone
from featcache.config import BackboneConfig, Preprocessing
from featcache.engine import int8, sample_pixels, openvino_cpu

network = load_backbone(BackboneConfig(weights="bundled"), 0)
prep = Preprocessing(image_px=32, resize="squash", resize_px=32)
pixels, model = sample_pixels(prep, 4), openvino_cpu.convert(network, prep)
first = openvino_cpu.compiled_forward(model, 2)
first(pixels)
model = int8.quantize(model, pixels) if sys.argv[1:] else model
second = openvino_cpu.compiled_forward(model, 2)
second(pixels)
del first
gc.collect()
del second, model
gc.collect()
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
os.kill(os.getpid(), signal.SIGINT)
print(len(seen))
"""


@needs_openvino
@pytest.mark.parametrize(
    "words", [[], pytest.param(["int8"], marks=[needs_nncf, pytest.mark.slow])]
)
def test_a_signal_after_its_use_does_not_kill_the_process(words: list[str]) -> None:
    """Two cores of OpenVINO that do not end in reverse order leave no stack for signals."""
    command = [sys.executable, "-c", SIGNAL_AFTER_USE, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@needs_openvino
def test_its_telemetry_is_kept_out() -> None:
    import sys

    openvino_cpu.openvino()
    assert sys.modules["openvino_telemetry"] is None


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("few") / "set", train=20, test=2)


def train_of(folder: Path, **changes: object):
    return load_dataset(settings(folder, **changes)).splits["train"]


@needs_nncf
@pytest.mark.slow
def test_int8_is_calibrated_on_train_images_and_is_the_same_again(few: Path) -> None:
    network, train = load_backbone(BUNDLED, 0), train_of(few)
    prep = settings(image_px=32).preprocessing(PREP)
    first, second = (
        en.choose_engine(asked(precision="int8"), network, prep, num_images=10, train=train)
        for _ in range(2)
    )
    assert first.recorded == second.recorded
    assert "+nncf-" in first.recorded
    pixels = en.sample_pixels(prep, 5)
    assert np.array_equal(first.run(pixels), second.run(pixels))
    assert first.int8["num_calibrated"] == 20
    assert first.int8["num_checked"] == 20
    assert 0.99 < first.int8["cosine"]["median"] <= 1
    assert first.int8["cosine"]["worst"] <= first.int8["cosine"]["median"]
    assert "median" in first.sentence()


@needs_nncf
@pytest.mark.slow
def test_the_hash_tells_quantised_networks_apart_and_batches_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = load_backbone(BUNDLED, 0)
    prep = settings(image_px=32).preprocessing(PREP)

    def hash_after(seed: int, batch: int) -> str:
        monkeypatch.setattr(int8, "CALIBRATION_BATCH", batch)
        pixels = en.sample_pixels(prep, 3, seed)
        return int8.hash_of(int8.quantize(openvino_cpu.convert(network, prep), pixels))

    together = hash_after(seed=0, batch=8)
    assert hash_after(seed=0, batch=8) == together
    assert hash_after(seed=0, batch=2) == hash_after(seed=0, batch=1) == together
    assert hash_after(seed=1, batch=8) != together


def test_too_few_train_images_are_refused(few: Path) -> None:
    with pytest.raises(UserError, match="20 different train images are too few"):
        int8.pick_pixels(train_of(few, num_train=20), PREP, 1)


def test_calibration_and_check_share_no_image(few: Path) -> None:
    config = settings(few, image_px=16)
    calibration, others = int8.pick_pixels(train_of(few), config.preprocessing(PREP), 1)
    numbers = [int(p[0, 0, 0]) for p in (*calibration, *others)]
    assert len(calibration) == len(others) == 20
    assert len(set(numbers)) == 40


def test_the_choice_of_images_does_not_depend_on_their_order(few: Path) -> None:
    prep = settings(image_px=16).preprocessing(PREP)
    train = train_of(few)
    backwards = train.subset(np.arange(len(train))[::-1])
    for one, other in zip(
        int8.pick_pixels(train, prep, 0), int8.pick_pixels(backwards, prep, 0), strict=True
    ):
        assert np.array_equal(one, other)


def test_cosines_are_counted_by_hand_and_low_ones_refused() -> None:
    wanted = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
    got = np.array([[1, 0], [1, 0], [0, 0]], np.float32)
    cosine = int8.cosine_stats(got, wanted)
    assert cosine["median"] == pytest.approx(1)
    assert cosine["worst"] == pytest.approx(0.5**0.5)
    int8.refuse_if_far(cosine, 3)
    low = int8.cosine_stats(np.array([[1, 1]], np.float32), np.array([[1, 0]], np.float32))
    with pytest.raises(UserError, match=r"median cosine 0\.7071 .*on 1 .*--precision float32"):
        int8.refuse_if_far(low, 1)
    broken = int8.cosine_stats(np.array([[np.nan, 1]], np.float32), np.array([[1, 0]], np.float32))
    with pytest.raises(UserError, match="median cosine nan"):
        int8.refuse_if_far(broken, 1)


def test_missing_packages_are_found_without_importing_them() -> None:
    assert openvino_cpu.is_installed("json")
    assert not openvino_cpu.is_installed("json", "no_such_package_here")
    assert importlib.util.find_spec("no_such_package_here") is None

"""Backbones: weights by name and file, identity, freezing."""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from featcache import backbone as bb
from featcache.backbone import checkpoint, identity
from featcache.config import IMAGENET_MEAN, BackboneConfig, BackboneInfo
from featcache.errors import UserError

BUNDLED_SHA = "9ef04ded836621e09d9c91d88f5b4ededa694f938499ef2d95d7ffd8bbba8070"


def bundled(**changes: object) -> BackboneConfig:
    return BackboneConfig(weights="bundled", **changes)


def test_identity_of_the_bundled_backbone(tmp_path: Path) -> None:
    info = bb.identify(bundled(), 0, tmp_path)
    assert (info.backbone, info.weights, info.weights_sha256) == (
        "resnet18",
        "bundled",
        BUNDLED_SHA,
    )
    assert info.feature_dim == 512
    prep = info.preprocessing
    assert (prep.image_px, prep.resize, prep.resize_px) == (64, "crop", 64)
    assert prep.mean == IMAGENET_MEAN


def test_identity_is_remembered_and_a_changed_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = bb.read_state(bb.BUNDLED_FILE)
    save_file(state, path)
    config = BackboneConfig(weights=str(path))
    first = bb.identify(config, 0, tmp_path)
    state["conv1.weight"] = state["conv1.weight"] + 1
    save_file(state, path)
    second = bb.identify(config, 0, tmp_path)
    assert first.weights_sha256 != second.weights_sha256
    assert second.weights == "w.safetensors"


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({"image_px": 224, "resize": "squash", "normalize": "half"}, (224, "squash", 224, 0.5)),
        ({"image_px": 32}, (32, "crop", 32, IMAGENET_MEAN[0])),
        ({"normalize": "imagenet"}, (64, "crop", 64, IMAGENET_MEAN[0])),
    ],
)
def test_overrides_of_preprocessing(tmp_path: Path, overrides: dict, wanted: tuple) -> None:
    prep = bb.identify(bundled(**overrides), 0, tmp_path).preprocessing
    assert (prep.image_px, prep.resize, prep.resize_px, prep.mean[0]) == wanted


def test_fast_decoding_is_recorded_only_where_it_is_on(tmp_path: Path) -> None:
    assert "fast_decode" not in bb.identify(bundled(), 0, tmp_path).to_dict()["preprocessing"]
    info = bb.identify(bundled(fast_decode=True), 0, tmp_path)
    assert info.to_dict()["preprocessing"]["fast_decode"] is True
    assert BackboneInfo.from_dict(info.to_dict()) == info


def test_imagenet_crop_keeps_its_ratio() -> None:
    own = bb.own_preprocessing(BackboneConfig())
    assert (own.image_px, own.resize_px) == (224, 256)
    assert BackboneConfig(image_px=112).preprocessing(own).resize_px == 128


def test_parameter_counts_are_exact() -> None:
    model = bb.build_classifier(bundled(), 10, seed=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 11_181_642
    head = bb.head_of(model)[1]
    assert sum(p.numel() for p in head.parameters()) == 5_130
    frozen = bb.load_backbone(bundled(), 0)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training


def test_features_are_those_of_torchvision() -> None:
    from torchvision import models

    network = models.resnet18(weights=None)
    network.fc = torch.nn.Identity()
    state = {k: v.float() for k, v in load_file(bb.BUNDLED_FILE).items()}
    network.load_state_dict(state)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(network.eval()(images), bb.load_backbone(bundled(), 0)(images))


@pytest.mark.parametrize(
    ("name", "dim", "px"),
    [
        ("squeezenet1_1", 512, 64),
        ("mobilenet_v3_small", 1024, 64),
        ("googlenet", 1024, 64),
        ("densenet121", 1024, 64),
        ("vit_b_32", 768, 224),
    ],
)
def test_other_networks_lose_their_head(tmp_path: Path, name: str, dim: int, px: int) -> None:
    config = BackboneConfig(backbone=name, weights="random")
    network = bb.load_backbone(config, 1)
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, px, px)).shape == (2, dim)
    assert bb.identify(config, 1, tmp_path).feature_dim == dim


def test_a_classifier_of_squeezenet_has_a_convolution_for_head() -> None:
    config = BackboneConfig(backbone="squeezenet1_1", weights="random")
    model = bb.build_classifier(config, 7, seed=0).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_random_weights_follow_the_seed_and_leave_torch_alone() -> None:
    config = BackboneConfig(weights="random")
    before = torch.random.get_rng_state()
    one, again, other = (bb.state_sha256(bb.load_backbone(config, s)) for s in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


def wrapped_files(tmp_path: Path) -> list[Path]:
    state = bb.read_state(bb.BUNDLED_FILE)
    full = {**state, "fc.weight": torch.zeros(200, 512), "fc.bias": torch.zeros(200)}
    variants = {
        "plain.pth": state,
        "with_head.pth": full,
        "wrapped.pth": {"epoch": 3, "state_dict": full},
        "parallel.pt": {"model": {f"module.{k}": v for k, v in full.items()}},
        "lightning.pth": {"state_dict": {f"model.backbone.{k}": v for k, v in state.items()}},
    }
    for name, content in variants.items():
        torch.save(content, tmp_path / name)
    save_file(full, tmp_path / "with_head.safetensors")
    return [tmp_path / name for name in (*variants, "with_head.safetensors")]


def test_state_dicts_are_unwrapped(tmp_path: Path) -> None:
    wanted = bb.state_sha256(bb.load_backbone(bundled(), 0))
    for path in wrapped_files(tmp_path):
        assert bb.state_sha256(bb.load_backbone(BackboneConfig(weights=str(path)), 0)) == wanted


class Boom:
    def __reduce__(self):
        return (Path("/nonexistent/executed").touch, ())


def bad_weights(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    paths: dict[str, tuple[Path, str]] = {}

    def put(name: str, content: object, message: str) -> None:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        paths[name] = (path, message)

    put("empty.pth", b"", "cannot be read as weights")
    put("text.safetensors", b"hello", "cannot be read as weights|not a safetensors file")
    huge = (2**62).to_bytes(8, "little") + b"{}"
    put("huge.safetensors", huge, "cannot be read as weights|not a safetensors file")
    put("list.pth", [1, 2], "holds a list, not a state dict")
    put("none.pth", {"state_dict": {"a": 1}}, "holds no tensors")
    put("pickle.pth", {"x": Boom()}, "not tensors and are not loaded: .*touch|PosixPath")
    put("cut.pth", b"\x80\x02}", "cannot be read as weights \\(pickle exhausted before")
    put("other.pth", {"a": torch.zeros(1)}, "does not fit --backbone resnet18: bn1.bias is missing")
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**26))
    paths["bomb.pth"] = (bomb, "unpacks to")
    state = bb.read_state(bb.BUNDLED_FILE)
    put("shape.pth", {**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}, r"wanted \[64, 3, 7, 7\]")
    put("nan.pth", {**state, "bn1.bias": torch.full((64,), torch.nan)}, "bn1.bias.*not finite")
    return paths


def test_bad_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    for path, message in bad_weights(tmp_path).values():
        with pytest.raises(UserError) as caught:
            bb.load_backbone(BackboneConfig(weights=str(path)), 0)
        assert re.search(message, str(caught.value)), str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"backbone": "resnet81"}, "did you mean resnet18"),
        ({"backbone": "resnet34", "weights": "bundled"}, "--weights bundled is a resnet18"),
        ({"weights": "bundle"}, "did you mean bundled"),
        ({"weights": "gone.pth"}, "no such file"),
        ({"backbone": "resnet34", "weights": str(bb.BUNDLED_FILE)}, "does not fit --backbone"),
    ],
)
def test_wrong_names_say_what_is_accepted(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        bb.load_backbone(BackboneConfig(**{"weights": "random", **config}), 0)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_hang_is_refused(tmp_path: Path, legacy: bool) -> None:
    """A key of 60 tuples, each holding the one before twice, takes 2**60 steps to hash."""
    pickled = b"\x80\x02}" + b"K\x01\x85q\x00"
    for depth in range(60):
        pickled += b"h%ch%c\x86q%c" % (depth, depth, depth + 1)
    pickled += b"K\x01s."
    path = tmp_path / "hang.pth"
    if legacy:
        path.write_bytes(pickled)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match="built to keep the program busy"):
        bb.read_state(path)


def test_tuples_nested_too_deep_to_hash_are_refused(tmp_path: Path) -> None:
    """Hashing a chain of a million tuples overflows the C stack."""
    path = tmp_path / "deep.pth"
    path.write_bytes(b"\x80\x02}K\x01" + b"\x85" * 1_000_000 + b"K\x01s.")
    with pytest.raises(UserError, match="built to keep the program busy"):
        bb.read_state(path)


def test_a_checkpoint_with_an_optimizer_is_far_from_the_limit(tmp_path: Path) -> None:
    model = bb.build_network("resnet18", seed=None)
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pth"
        torch.save(
            {"epoch": 3, "net": model.state_dict(), "optimizer": optimizer.state_dict()},
            path,
            _use_new_zipfile_serialization=not legacy,
        )
        assert bb.read_state(path).keys() == model.state_dict().keys()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_too_large_for_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")

    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("safetensors.torch.load", refuse)
    monkeypatch.setattr(checkpoint, "parse_checkpoint", refuse)
    with pytest.raises(UserError, match=r"w\..* takes more memory than there is; give another"):
        bb.read_state(path)


def test_other_objects_are_named_with_the_way_out(tmp_path: Path) -> None:
    state = {"conv1.weight": torch.zeros(1)}
    path = tmp_path / "run.pth.tar"
    namespace = argparse.Namespace(lr=0.1)
    torch.save({"args": namespace, "best": np.float64(0.5), "state_dict": state}, path)
    with pytest.raises(UserError) as caught:
        bb.read_state(path)
    text = re.sub(r"numpy\._?core", "numpy.core", str(caught.value))
    assert text == (
        f"{path} holds objects that are not tensors and are not loaded: argparse.Namespace, "
        "numpy.core.multiarray.scalar, numpy.dtype; if you trust the file, save its tensors alone "
        f"in Python: c = torch.load({str(path)!r}, weights_only=False); "
        "torch.save(c['state_dict'], 'tensors.pth')"
    )


def test_a_whole_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save(torch.nn.Linear(1, 1), path)
    wanted = r" torch\.nn\.modules\.linear\.Linear; .*c\.state_dict\(\)"
    with pytest.raises(UserError, match=wanted):
        bb.read_state(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_torchscript_archive_is_named_without_torchs_warnings(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    recwarn.clear()
    with pytest.raises(UserError, match="is a TorchScript archive; save its tensors alone in Py"):
        bb.read_state(path)
    assert not recwarn.list


def test_names_in_a_file_cannot_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"\x1b[31mred\x9b\u202e": torch.zeros(1)}, path)
    with pytest.raises(UserError) as caught:
        bb.load_backbone(BackboneConfig(weights=str(path)), 0)
    assert str(caught.value).isprintable()
    assert "its keys are ?[31mred?? (1 in all); name the backbone" in str(caught.value)


Layouts = dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]]
ZERO = torch.zeros(2, 512)
LAYOUTS: Layouts = {
    "head beside.ckpt": lambda s: {f"backbone.{k}": v for k, v in s.items()} | {"fc.weight": ZERO},
    "unusual prefix.pt": lambda s: {f"student.trunk.{k}": v for k, v in s.items()},
    "moco.pth.tar": lambda s: (
        {f"module.encoder_k.{k}": torch.zeros_like(v) for k, v in s.items()}
        | {f"module.encoder_q.{k}": v for k, v in s.items()}
        | {"module.encoder_q.fc.0.weight": ZERO, "module.queue": ZERO}
    ),
    "swav.bin": lambda s: (
        {f"module.{k}": v for k, v in s.items()}
        | {"module.prototypes.weight": ZERO, "module.projection_head.0.weight": ZERO}
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_checkpoints_as_people_have_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    torch.save({"state_dict": LAYOUTS[name](bb.read_state(bb.BUNDLED_FILE))}, path)
    wanted = bb.state_sha256(bb.load_backbone(bundled(), 0))
    assert bb.state_sha256(bb.load_backbone(BackboneConfig(weights=str(path)), 0)) == wanted


def test_tensors_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.pth"
    state = bb.read_state(bb.BUNDLED_FILE)
    torch.save({**state, "fc.weight": ZERO, "prototypes.weight": ZERO}, path)
    bb.load_backbone(BackboneConfig(weights=str(path)), 0)
    said = (
        f"{path}, as weights of resnet18: ignored the head fc; ignored 1 tensors that are no part "
        "of it: prototypes.weight\n"
    )
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"layer1.2.conv1.weight": ZERO}, "layer1.2.conv1.weight is not in the network"),
        ("twin", "holds more than one such network, under no prefix, teacher: save"),
    ],
)
def test_a_deeper_network_or_two_are_not_guessed(
    extra: dict | str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    state = bb.read_state(bb.BUNDLED_FILE)
    extra = {f"teacher.{k}": v for k, v in state.items()} if extra == "twin" else extra
    torch.save({**state, **extra}, path)
    with pytest.raises(UserError, match=re.escape(message)):
        bb.load_backbone(BackboneConfig(weights=str(path)), 0)


@pytest.mark.parametrize("weights", ["file", "random"])
def test_weights_replaced_after_they_were_identified_are_refused(
    tmp_path: Path, weights: str
) -> None:
    path = tmp_path / "w.safetensors"
    state = bb.read_state(bb.BUNDLED_FILE)
    save_file(state, path)
    config = BackboneConfig(weights=str(path) if weights == "file" else "random")
    info = bb.identify(config, 0, tmp_path)
    assert bb.load_backbone(config, 0, info)
    save_file({**state, "bn1.bias": state["bn1.bias"] + 1}, path)
    for load in (bb.load_backbone, lambda c, s, i: bb.build_classifier(c, 3, s, i.weights_sha256)):
        with pytest.raises(UserError, match="changed during the run: run the same command again"):
            load(config, 1, info)


def test_what_is_hashed_is_what_is_loaded(tmp_path: Path) -> None:
    """The file is overwritten as soon as it is read: hash, metadata and tensors are of one read."""
    path = tmp_path / "w.safetensors"
    state = bb.read_state(bb.BUNDLED_FILE)
    prep = '{"image_px": 96, "resize": "squash", "mean": [0.5,0.5,0.5], "std": [1,1,1]}'
    save_file(state, path, metadata={"preprocessing": prep})
    first = path.read_bytes()
    file = bb.read_weights(path)
    save_file({**state, "bn1.bias": state["bn1.bias"] + 1}, path)
    assert file.sha256 == hashlib.sha256(first).hexdigest()
    assert torch.equal(file.tensors()["bn1.bias"], state["bn1.bias"])
    assert bb.own_preprocessing(BackboneConfig(weights=str(path)), file).image_px == 96


def test_a_file_replaced_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, later = tmp_path / "w.safetensors", time.time() + 10
    state = bb.read_state(bb.BUNDLED_FILE)
    save_file(state, path)
    config = BackboneConfig(weights=str(path))
    monkeypatch.setattr(identity.time, "time", lambda: later)
    read = identity.weights_of

    def replaced(config: BackboneConfig) -> bb.WeightsFile | None:
        file = read(config)
        save_file({**state, "bn1.bias": state["bn1.bias"] + 1}, path)
        return file

    with monkeypatch.context() as patched:
        patched.setattr(identity, "weights_of", replaced)
        one = bb.identify(config, 0, tmp_path)
    two = bb.identify(config, 0, tmp_path)
    assert two.weights_sha256 == bb.file_sha256(path) != one.weights_sha256


def test_downloaded_weights_are_hashed_as_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir()
    saved = bb.build_network("resnet18", seed=0)
    torch.save(saved.state_dict(), file)
    info = bb.identify(BackboneConfig(), 0, tmp_path)
    assert info.weights_sha256 == bb.file_sha256(file)
    assert torch.equal(bb.load_backbone(BackboneConfig(), 0, info).conv1.weight, saved.conv1.weight)
    torch.save({**saved.state_dict(), "bn1.bias": torch.ones(64)}, file)
    with pytest.raises(UserError, match=r"f37072fd\.pth changed during the run"):
        bb.load_backbone(BackboneConfig(), 0, info)


def test_a_failed_download_names_both_ways_out(monkeypatch, tmp_path: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"--weights bundled .* or --weights FILE"):
        bb.load_backbone(BackboneConfig(), 0)


def test_safetensors_carry_their_preprocessing(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    prep = '{"image_px": 96, "resize": "squash", "mean": [0.5,0.5,0.5], "std": [0.5,0.5,0.5]}'
    save_file(bb.read_state(bb.BUNDLED_FILE), path, metadata={"preprocessing": prep})
    own = bb.own_preprocessing(BackboneConfig(weights=str(path)))
    assert (own.image_px, own.resize, own.mean[0]) == (96, "squash", 0.5)
    save_file({"x": torch.zeros(1)}, path, metadata={"preprocessing": '{"image_px": "a"}'})
    with pytest.raises(UserError, match="no usable preprocessing"):
        bb.own_preprocessing(BackboneConfig(weights=str(path)))
    for bad in ("NaN", "Infinity"):
        prep = f'{{"image_px": 96, "resize": "squash", "mean": [0,0,0], "std": [1,1,{bad}]}}'
        save_file({"x": torch.zeros(1)}, path, metadata={"preprocessing": prep})
        with pytest.raises(UserError, match=r"std: '(nan|inf)' is not a number"):
            bb.identify(BackboneConfig(weights=str(path)), 0, tmp_path)


def test_state_hash_sees_batchnorm_buffers() -> None:
    network = bb.load_backbone(BackboneConfig(weights="random"), 0)
    before = bb.state_sha256(network)
    network.train()(torch.from_numpy(np.ones((2, 3, 32, 32), np.float32)))
    assert bb.state_sha256(network) != before


ARCHITECTURES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_network_that_is_filled_from_a_file_is_the_one_that_was_saved(
    name: str, tmp_path: Path
) -> None:
    saved = bb.build_network(name, seed=0).eval()
    file = tmp_path / "w.safetensors"
    save_file(saved.state_dict(), file)
    drawn = torch.random.get_rng_state()
    loaded = bb.load_backbone(BackboneConfig(backbone=name, weights=str(file)), 0)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    saved.set_submodule(bb.head_of(saved)[0], torch.nn.Identity())
    for part in ("named_parameters", "named_buffers"):
        wanted, got = dict(getattr(saved, part)()), dict(getattr(loaded, part)())
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)


def test_weights_without_counters_fill_a_network(tmp_path: Path) -> None:
    state = bb.read_state(bb.BUNDLED_FILE)
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    config = BackboneConfig(weights=str(tmp_path / "w.safetensors"))
    network = bb.load_backbone(config, 0)
    assert int(network.bn1.num_batches_tracked) == 0
    assert network.conv1.weight.dtype == torch.float32
    model = bb.build_classifier(config, 3, 0)
    assert all(p.requires_grad and p.isfinite().all() for p in model.parameters())


def test_importing_torchvision_leaves_the_compiler_for_later() -> None:
    code = (
        "import sys; from featcache.runtime import import_torchvision as get;"
        "models = get('models'); print('torch._dynamo' in sys.modules);"
        "import torchvision; print(torchvision.ops.roi_align.__module__);"
        "from torchvision.ops import roi_align; import torch;"
        "box = torch.tensor([[0., 0., 0., 2., 2.]]);"
        "print(tuple(roi_align(torch.ones(1, 1, 4, 4), box, 2).shape));"
        "import torch._dynamo; print(torch._dynamo.is_compiling())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[0] == "False"
    assert out.stdout.split("\n")[2:4] == ["(1, 1, 2, 2)", "False"]

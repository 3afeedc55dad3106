"""Networks of timm, by its own smallest ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import featcache.backbone as bb
from data_helpers import make_folder
from featcache.backbone import timm_networks
from featcache.config import BackboneConfig, ExtractConfig, TrainHeadConfig
from featcache.errors import UserError
from featcache.extract import extract
from featcache.heads import train_head

timm = pytest.importorskip("timm", reason="needs timm: pip install featcache[timm]")

VIT, TAG = "test_vit", "r160_in1k"
REVISION = "0" * 40


def config(name: str = VIT, weights: str = "random", **changes: object) -> BackboneConfig:
    return BackboneConfig(backbone=f"timm/{name}", weights=weights, **changes)


def images(side: int = 160) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local cache of Hugging Face with weights of our own for timm's test_vit."""
    top = tmp_path / "hub" / f"models--timm--{VIT}.{TAG}"
    file = top / "snapshots" / REVISION / "model.safetensors"
    for folder in (file.parent, top / "refs", top / "blobs"):
        folder.mkdir(parents=True)
    (top / "refs" / "main").write_text(REVISION)
    save_file(bb.build_network(f"timm/{VIT}", seed=5).state_dict(), top / "blobs" / "tensors")
    file.symlink_to(top / "blobs" / "tensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return file


def test_random_weights_follow_the_seed_and_leave_torch_alone() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (bb.state_sha256(bb.load_backbone(config(), s)) for s in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "weights"),
    [(VIT, "imagenet"), (f"{VIT}.{TAG}", "imagenet"), (VIT, TAG), (VIT, f"{VIT}.{TAG}")],
)
def test_pretrained_weights_have_one_name(
    hub: Path, tmp_path: Path, name: str, weights: str
) -> None:
    asked = config(name, weights)
    info = bb.identify(asked, 0, tmp_path)
    assert (info.backbone, info.weights) == (f"timm/{VIT}", TAG)
    assert info.weight_set == f"{VIT}.{TAG}"
    assert info.weights_sha256 == bb.file_sha256(hub)
    assert info.feature_dim == 64
    assert info.file_name == f"timm-{VIT}-{TAG}"
    assert bb.identify(asked, 0, tmp_path) == info
    network = bb.load_backbone(asked, 0, info)
    theirs = timm.create_model(
        f"{VIT}.{TAG}", pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(hub)}
    )
    with torch.inference_mode():
        assert torch.equal(network(images()), theirs.eval()(images()))


def test_another_input_size_resizes_position_embeddings(hub: Path, tmp_path: Path) -> None:
    asked = config(weights=TAG, image_px=96)
    network = bb.load_backbone(asked, 0, bb.identify(asked, 0, tmp_path))
    theirs = timm.create_model(
        f"{VIT}.{TAG}",
        pretrained=True,
        num_classes=0,
        img_size=96,
        pretrained_cfg_overlay={"file": str(hub)},
    )
    with torch.inference_mode():
        assert torch.equal(network(images(96)), theirs.eval()(images(96)))
    own = config(weights=str(tmp_path / "w.safetensors"), image_px=96)
    Path(own.weights).write_bytes(hub.read_bytes())
    with torch.inference_mode():
        assert torch.equal(bb.load_backbone(own, 0)(images(96)), network(images(96)))


def test_absent_weights_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def absent(**given: object) -> str:
        problem = huggingface_hub.errors.LocalEntryNotFoundError("not in the local cache")
        raise problem from (None if given.get("local_files_only") else OSError("no network"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    with pytest.raises(UserError) as caught:
        bb.identify(config(weights="imagenet"), 0, tmp_path)
    assert str(caught.value) == (
        f"the weights {VIT}.{TAG} of timm are not in the cache of Hugging Face and could not be "
        "downloaded (no network); use --weights FILE (.safetensors or .pth) or random"
    )
    assert capfd.readouterr() == ("", "")


def test_pretrained_weights_of_another_network_are_refused(hub: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, hub.resolve())
    with pytest.raises(UserError, match=r"timm's weights do not fit test_vit\.r160_in1k: Error"):
        bb.load_backbone(config(weights=TAG), 0)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet81", "random", "no backbone 'timm/resnet81'; did you mean timm/resnet"),
        ("resnet18.v9", "random", "no weights of timm/resnet18 'v9'; known: a1_in1k, a2_in1k,"),
        ("resnet18", "v9", "no weights of timm/resnet18 'v9'; known: a1_in1k, a2_in1k,"),
        ("resnet18.a1_in1k", "a2_in1k", "names the weights a1_in1k, --weights a2_in1k: give one"),
        ("mixer_s32_224", "imagenet", "timm has no pretrained weights of timm/mixer_s32_224: giv"),
        ("resnet18", "bundled", "--weights bundled is a resnet18, not a timm/resnet18"),
        ("dm_nfnet_f0", "random", "squash 0.9: featcache gives 3 channels, square, after --resi"),
    ],
)
def test_wrong_names_say_what_is_accepted(
    tmp_path: Path, name: str, weights: str, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        bb.own_preprocessing(config(name, weights))


def test_without_timm_the_message_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError) as caught:
        bb.load_backbone(config(), 0)
    assert str(caught.value) == (
        'networks of timm need it installed: type pip install "featcache[timm]"'
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("resnet18.a1_in1k", (224, "crop", 235, "bicubic", 0.485)),
        ("vit_small_patch14_dinov2.lvd142m", (518, "crop", 518, "bicubic", 0.485)),
        ("vit_tiny_patch16_224", (224, "crop", 248, "bicubic", 0.5)),
        ("convnext_base.fb_in22k_ft_in1k_384", (384, "squash", 384, "bicubic", 0.485)),
    ],
)
def test_preprocessing_is_timms(name: str, wanted: tuple) -> None:
    prep = bb.own_preprocessing(config(name))
    found = (prep.image_px, prep.resize, prep.resize_px, prep.interpolation, prep.mean[0])
    assert found == wanted


def test_pixels_are_those_of_timms_transform() -> None:
    from data_helpers import picture
    from featcache.data import normalize, to_pixels

    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(
            pretrained_cfg=timm.models.get_pretrained_cfg("resnet18.a1_in1k").to_dict()
        )
    )
    image = picture(3, side=300).resize((320, 290))
    pixels = to_pixels(image, bb.own_preprocessing(config("resnet18.a1_in1k")))
    prep = bb.own_preprocessing(config("resnet18.a1_in1k"))
    ours = normalize(torch.from_numpy(np.array(pixels)[None]), prep)[0]
    one_level = 1 / 255 / min(prep.std)  # by which torch's resizing may differ from Pillow's
    assert torch.allclose(ours, transform(image), rtol=0, atol=one_level + 1e-6)


def test_a_new_head_is_the_only_difference_of_a_classifier() -> None:
    model = bb.build_classifier(config(), 7, seed=0).eval()
    name, head = bb.head_of(model)
    assert (name, head.weight.shape) == ("head", (7, 64))
    frozen = bb.load_backbone(config(), 0)
    with torch.inference_mode():
        wanted = nn.functional.linear(frozen(images()), head.weight, head.bias)
        assert torch.allclose(model(images()), wanted, atol=1e-6)


def test_a_distilled_network_is_not_fine_tuned() -> None:
    with pytest.raises(UserError, match="Distilled has no single linear head and is not fine-tu"):
        bb.build_classifier(config("deit_tiny_distilled_patch16_224"), 3, 0)


def test_hits_import_neither_torch_nor_timm(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets")
    words = ["--backbone", f"timm/{VIT}", "--weights", "random", "--cache-dir", str(tmp_path)]
    settings = ExtractConfig(
        dataset=str(folder), backbone=f"timm/{VIT}", weights="random", cache_dir=tmp_path
    )
    extract(settings)
    code = (
        "import sys; from featcache.cli import run_command;"
        f"code = run_command('extract-features', {[str(folder), *words]!r});"
        "print(code, {'torch', 'timm', 'huggingface_hub'} & sys.modules.keys())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "0 set()\n"
    assert out.stderr.startswith("already cached, nothing to do")


def test_heads_of_both_columns(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets", train=10, test=2)
    report = extract(
        ExtractConfig(
            dataset=str(folder),
            backbone=f"timm/{VIT}",
            weights="random",
            layers="cls+mean",
            image_px=64,
            cache_dir=tmp_path,
            workers=1,
        )
    )
    assert report["feature_dim"] == 128
    assert report["provenance"]["versions"]["timm"] == ".".join(timm.__version__.split(".")[:2])
    head = train_head(TrainHeadConfig(cache=report["cache"], solver="ridge", columns="cls"))
    assert head["trainable_params"] == 2 * 65


def test_weights_on_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    about = timm.models.get_pretrained_cfg(VIT)
    monkeypatch.setattr(about, "hf_hub_id", None)
    monkeypatch.setattr(timm_networks, "_about", lambda name: about)
    with pytest.raises(UserError, match=r"\(they are not on the Hugging Face hub\)"):
        timm_networks.weights_path(config(weights=TAG))

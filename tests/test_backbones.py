"""Every kind of backbone from end to end: features are those of the library's own code, exports
give what predict gives, and caches are found, resumed and updated.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import featcache.backbone as bb
from data_helpers import make_folder, picture
from featcache import (
    Classifier,
    ExportConfig,
    ExtractConfig,
    FeatureCache,
    FinetuneConfig,
    TrainHeadConfig,
    export_classifier,
    extract_features,
    finetune_network,
    train_head,
)
from featcache.cache import part_path
from featcache.data import normalize, to_pixels

SEED = 3


@dataclass(frozen=True)
class Case:
    """A backbone, layers to name in it, and the side of its input; tokens: has it a class token?"""

    name: str
    layers: str
    image_px: int
    tokens: bool = False
    timm: bool = False
    quick: bool = False

    @property
    def backbone(self) -> str:
        return f"timm/{self.name}" if self.timm else self.name


CASES = [
    Case("resnet18", "layer3.1,layer2.gem", 64),
    Case("resnet50", "layer3.1,layer4.0.max", 64),
    Case("mobilenet_v3_large", "features.6,features.12.max", 64),
    Case("efficientnet_b0", "features.3,features.5.gem", 64),
    Case("convnext_tiny", "features.3,features.5.4", 64),
    Case("vit_b_16", "encoder.layers.encoder_layer_5,cls+mean,last2", 224, tokens=True),
    Case("swin_t", "features.3,mean", 64),
    Case("test_vit", "blocks.3.max,cls+mean,last2", 160, tokens=True, timm=True, quick=True),
    Case("test_resnet", "layer2,layer3.std", 160, timm=True, quick=True),
    Case("resnet18", "layer3.1,layer2.gem", 64, timm=True),
    Case("vit_tiny_patch16_224", "blocks.5,cls+mean,last4", 224, tokens=True, timm=True),
    Case("vit_small_patch14_reg4_dinov2", "blocks.7,cls+mean,last4", 70, tokens=True, timm=True),
    Case("convnextv2_atto", "stages.1,stages.2.blocks.0", 64, timm=True),
    Case("mobilenetv4_conv_small", "blocks.1,blocks.2.gem", 64, timm=True),
]
MARKED = [
    pytest.param(
        case, marks=[] if case.quick else [pytest.mark.slow], id=case.backbone.replace("/", "-")
    )
    for case in CASES
]


def settings(case: Case, folder: Path, cache_dir: Path, **changes: object) -> ExtractConfig:
    if case.timm:
        pytest.importorskip("timm", reason="needs timm: pip install featcache[timm]")
    options = {
        "backbone": case.backbone,
        "weights": "random",
        "image_px": case.image_px,
        "seed": SEED,
        "dtype": "float32",
        "device": "cpu",
        "workers": 1,
        "cache_dir": cache_dir,
    }
    return ExtractConfig(dataset=str(folder), **{**options, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with structure, so that features differ between them."""
    root = make_folder(tmp_path_factory.mktemp("set") / "pets", train=3, test=1)
    rng = np.random.default_rng(0)
    for path in sorted(root.rglob("*.png")):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3)).astype(np.uint8))
        coarse.resize((96, 80), Image.Resampling.BICUBIC).save(path)
    return root


def library_network(case: Case) -> nn.Module:
    """The network as its library builds it, with the weights that featcache draws, without head."""
    state = bb.build_network(case.backbone, seed=SEED, image_px=case.image_px).state_dict()
    if case.timm:
        import timm

        size = {"img_size": case.image_px} if case.tokens else {}
        network = timm.create_model(case.name, **size)
        network.load_state_dict(state)
        network.reset_classifier(0)
        return network.eval()
    from torchvision import models

    network = models.get_model(case.name, weights=None)
    network.load_state_dict(state)
    head = "fc" if "resnet" in case.name else "head" if "swin" in case.name else None
    head = head or ("heads.head" if "vit" in case.name else list(network._modules)[-1])
    part = network.get_submodule(head)
    if isinstance(part, nn.Sequential):
        part[-1] = nn.Identity()
    else:
        network.set_submodule(head, nn.Identity())
    return network.eval()


POOLS: dict[str, Callable[[Tensor, int | tuple[int, ...]], Tensor]] = {
    "mean": lambda x, space: x.mean(space),
    "std": lambda x, space: x.var(space, correction=0).sqrt(),
    "max": lambda x, space: x.amax(space),
    "gem": lambda x, space: x.clamp(min=1e-6).pow(3).mean(space).pow(1 / 3),
}


def plain_columns(case: Case, names: tuple[str, ...], images: Tensor) -> dict[str, Tensor]:
    """Every group of columns from a forward pass of the library's own code."""
    network, caught = library_network(case), dict[str, Tensor]()
    modules = {n.rpartition(".")[0] for n in names} - {""}
    for module in modules:
        network.get_submodule(module).register_forward_hook(
            lambda _, __, output, module=module: caught.update({module: output.clone()})
        )
    if not case.timm and case.name.startswith("vit"):
        final = network.encoder.ln
    else:
        final = getattr(network, "norm", None)
    if isinstance(final, nn.Module):
        final.register_forward_hook(lambda _, __, output: caught.update({"": output}))
    with torch.inference_mode():
        found = {"last": network(images).flatten(1)}
    prefix = getattr(network, "num_prefix_tokens", 1) if case.tokens else 0
    for name in names:
        module, _, how = name.rpartition(".")
        if name == "last":
            continue
        output = caught[module]
        if how == "cls":
            found[name] = output[:, 0]
        elif output.ndim == 3:
            found[name] = POOLS[how](output[:, prefix:], 1)
        else:
            found[name] = POOLS[how](output, (1, 2) if case.name == "swin_t" else (2, 3))
    return found


def input_of_test(folder: Path, case: Case) -> Tensor:
    """The test images as the network's input, in the cache's order."""
    prep = settings(case, folder, folder).preprocessing(
        bb.own_preprocessing(settings(case, folder, folder))
    )
    paths = sorted((folder / "test").rglob("*.png"))
    pixels = np.stack([to_pixels(Image.open(path).convert("RGB"), prep) for path in paths])
    return normalize(torch.from_numpy(pixels), prep)


@pytest.mark.parametrize("case", MARKED)
def test_features_are_those_of_the_librarys_own_code(
    case: Case, folder: Path, tmp_path: Path
) -> None:
    images = input_of_test(folder, case)
    for layers, pool in (
        ("last", "avg"),
        (f"stages,{case.layers}", "avg+std"),
        (case.layers, "max"),
    ):
        config = settings(case, folder, tmp_path, layers=layers, pool=pool)
        cache = FeatureCache(extract_features(config)["cache"])
        stages = cache.meta.backbone.stages
        names = stages.names if stages else ("last",)
        assert (names[-1] == "last") == (layers != case.layers)
        features = cache.split("test").X
        wanted = plain_columns(case, names, images)
        for name in names:
            columns = features[:, stages.group(name)] if stages else features
            plain = wanted[name].numpy()
            assert columns.shape == plain.shape
            assert np.abs(columns - plain).max() <= 1e-5 * np.abs(plain).max(), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[case.backbone.replace("/", "-") for case in CASES])
def test_exports_give_what_predict_gives(case: Case, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install featcache[export]")
    import onnxruntime

    config = settings(case, folder, tmp_path, layers=f"{case.layers},last")
    head = train_head(
        TrainHeadConfig(
            cache=extract_features(config)["cache"], solver="ridge", alpha=1.0, columns="all"
        )
    )["head"]
    paths = sorted((folder / "test").rglob("*.png"))
    classifier = Classifier.load(head, seed=SEED, device="cpu", workers=1)
    probabilities = classifier.predict_proba(paths)
    file = tmp_path / "net.onnx"
    export_classifier(ExportConfig(model=head, seed=SEED, output=file, input="float"))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    got = session.run(["probabilities"], {"images": input_of_test(folder, case).numpy()})[0]
    assert np.abs(got - probabilities).max() < 1e-4


QUICK = [case for case in CASES if case.quick]


@pytest.mark.parametrize("case", QUICK, ids=[case.backbone for case in QUICK])
def test_caches_are_found_resumed_and_updated(
    case: Case, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.cache import CacheWriter

    own = tmp_path / "pets"
    shutil.copytree(folder, own)
    config = settings(case, own, tmp_path / "cache", layers=f"{case.layers},last")

    def stop(self: CacheWriter) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            extract_features(config)
    report = extract_features(config)
    assert {name: s["num_resumed"] for name, s in report["splits"].items()} == {
        "train": 6,
        "test": 2,
    }
    assert not part_path(Path(report["cache"])).exists()
    assert extract_features(config)["hit"]
    picture(77, side=90).save(own / "train" / "cat" / "new.png")
    updated = extract_features(dataclasses.replace(config, update=True))
    assert updated["splits"]["train"]["num_resumed"] == 6
    assert updated["splits"]["train"]["num_samples"] == 7
    fresh = settings(case, own, tmp_path / "fresh", layers=config.layers)
    one, other = (FeatureCache(r["cache"]) for r in (updated, extract_features(fresh)))
    assert np.allclose(one.split("train").X, other.split("train").X, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_resnet", "mobilenet_v3_small"])
@pytest.mark.parametrize("how", ["head", "all", "part"])
def test_fine_tuning(name: str, how: str, folder: Path, tmp_path: Path) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="needs timm: pip install featcache[timm]")
    part = {"timm/test_vit": "blocks.5", "timm/test_resnet": "layer4"}.get(name, "features.11")
    options = {"head": {"freeze_backbone": True}, "all": {"recipe": "good"}, "part": {}}[how]
    if how == "part":
        options = {"unfreeze": part}
    config = FinetuneConfig(
        dataset=str(folder),
        backbone=name,
        weights="random",
        image_px=160 if name.startswith("timm/") else 64,
        epochs=1,
        device="cpu",
        cache_dir=tmp_path,
        **options,
    )
    report = finetune_network(config)
    frozen = report["trainable_params"]
    whole = sum(p.numel() for p in bb.build_classifier(config, 2, 0).parameters())
    assert frozen == whole if how == "all" else frozen < whole
    classifier = Classifier.load(report["model"], device="cpu", workers=1)
    paths = sorted((folder / "test").rglob("*.png"))
    labels = [path.parent.name for path in paths]
    right = [p.label == label for p, label in zip(classifier.predict(paths), labels, strict=True)]
    assert np.mean(right) == report["test_top1"]

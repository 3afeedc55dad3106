"""State dicts as people have them, and the line that says what became of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from featcache import backbone as bb
from featcache.config import BackboneConfig
from featcache.errors import UserError

State = dict[str, torch.Tensor]
HEAD = {"fc.weight": torch.zeros(200, 512), "fc.bias": torch.zeros(200)}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


# What a file holds, and what is said of it.
FILES: dict[str, tuple[Callable[[State], object], str]] = {
    "plain": (lambda s: s, ""),
    "fc": (lambda s: s | HEAD, "ignored the head fc"),
    **{
        f"{p}.": (lambda s, p=p: prefixed(s | HEAD, f"{p}."), f"stripped the prefix {p}.; ignored")
        for p in ("module", "model", "backbone", "encoder", "net")
    },
    **{
        key: (lambda s, key=key: {key: prefixed(s, "module.")}, "stripped the prefix module.")
        for key in ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "params_ema", "teacher")
    },
    "lightning": (
        lambda s: {"epoch": 3, "state_dict": prefixed(s, "model.backbone.")},
        "stripped the prefix model.backbone.",
    ),
    "dino": (
        lambda s: {"teacher": prefixed(s, "backbone."), "student": prefixed(s, "module.backbone.")},
        "stripped the prefix backbone.",
    ),
    "half": (lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}, ""),
    "without counters": (
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
        "20 counters num_batches_tracked are missing and stay 0",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_one_line_says_what_was_stripped_ignored_or_missing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = FILES[name]
    state = bb.build_network("resnet18", seed=None).state_dict()
    own = {k: v for k, v in bb.read_state(bb.BUNDLED_FILE).items() if not k.startswith("fc.")}
    state = {k: own.get(k, v) for k, v in state.items() if not k.startswith("fc.")}
    path = tmp_path / "w.pth"
    torch.save(content(state), path)
    loaded = dict(bb.load_backbone(BackboneConfig(weights=str(path)), 0).named_parameters())
    assert loaded.keys() < own.keys()
    assert all(torch.equal(loaded[key], own[key].float()) for key in loaded)
    lines = capsys.readouterr().err.splitlines()
    beside = [f"{path} holds teacher and student: took teacher"] if name == "dino" else []
    assert lines[: len(beside)] == beside
    rest = lines[len(beside) :]
    assert len(rest) == bool(said)
    if said:
        assert rest[0].startswith(f"{path}, as weights of resnet18: {said}")


def test_weights_before_their_moving_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = bb.read_state(bb.BUNDLED_FILE)
    zeros = {k: torch.zeros_like(v) for k, v in state.items()}
    path = tmp_path / "w.pth"
    torch.save({"state_dict": state, "state_dict_ema": zeros}, path)
    assert bb.read_state(path)["conv1.weight"].any()
    said = f"{path} holds state_dict and state_dict_ema: took state_dict\n"
    assert capsys.readouterr().err == said


def test_a_tensor_missing_inside_the_backbone_is_an_error(tmp_path: Path) -> None:
    state = bb.read_state(bb.BUNDLED_FILE)
    for name in ("layer2.0.conv1.weight", "layer3.0.bn1.bias"):
        del state[name]
    path = tmp_path / "w.safetensors"
    save_file(prefixed(state, "net."), path)
    message = (
        f"{path} does not fit --backbone resnet18: layer2.0.conv1.weight is missing; "
        "layer3.0.bn1.bias is missing; its keys are net.bn1.bias"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        bb.load_backbone(BackboneConfig(weights=str(path)), 0)


def test_published_weights_are_loaded_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bb.load_backbone(BackboneConfig(weights="bundled"), 0)
    assert capsys.readouterr().err == ""

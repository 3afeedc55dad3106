"""featcache info, verify and verify --repair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cache_helpers import features_offset, flip_bit
from data_helpers import make_folder
from featcache.cache import FeatureCache
from featcache.config import ExtractConfig, InfoConfig, VerifyConfig
from featcache.errors import CacheError, UserError
from featcache.extract import check, check_lines, extract, inspect, inspect_lines


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of pictures and the cache made from it."""
    top = tmp_path_factory.mktemp("maintenance")
    folder = make_folder(top / "pets", train=70, test=5)
    (folder / "test" / "cat" / "001.png").write_bytes(b"junk")
    config = ExtractConfig(
        dataset=str(folder),
        weights="random",
        image_px=32,
        on_error="skip",
        cache_dir=top / "cache",
    )
    return folder, Path(extract(config)["cache"])


@pytest.fixture
def damaged(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy with one byte changed in row 66 of train."""
    path = Path(shutil.copy(made[1], tmp_path / "damaged.h5"))
    extent = FeatureCache(path).file.layout.extents["train/features"]
    with path.open("r+b") as file:
        file.seek(extent.offset + 66 * 512 * 4 + 3)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0x40]))
    return path


def test_info_shows_what_is_there(made: tuple[Path, Path]) -> None:
    report = json.loads(json.dumps(inspect(InfoConfig(cache=made[1]))))
    assert report["splits"]["test"]["num_skipped"] == 1
    text = "\n".join(inspect_lines(report))
    for word in ("resnet18", "random", "32 px", "cat, dog", "140 images", "skipped test/cat/001"):
        assert word in text


def test_a_sound_cache_is_sound(made: tuple[Path, Path]) -> None:
    report = check(VerifyConfig(cache=made[1]))
    assert (report["ok"], report["exit_code"]) == (True, 0)
    assert "150 rows" in check_lines(report)[0]


def test_damage_is_named_and_repaired(made: tuple[Path, Path], damaged: Path) -> None:
    report = check(VerifyConfig(cache=damaged))
    assert report["exit_code"] == 2
    assert report["damaged"] == {"train": [[64, 127]]}
    assert "rows 64 to 127" in "\n".join(check_lines(report))
    with pytest.raises(CacheError, match="rows 64 to 127 of train"):
        FeatureCache(damaged).split("train").view(0)
    repaired = check(VerifyConfig(cache=damaged, repair=True, dataset=str(made[0])))
    assert (repaired["exit_code"], repaired["num_repaired"]) == (0, 64)
    assert damaged.read_bytes() == made[1].read_bytes()


def test_a_cache_of_a_manifest_is_repaired_with_its_image_root(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    lines = [f"{s}/{c}/000.png,{c},{s}\n" for s in ("train", "test") for c in ("cat", "dog")]
    (tmp_path / "list.csv").write_text("path,label,split\n" + "".join(lines))
    place = {"dataset": str(tmp_path / "list.csv"), "image_root": made[0]}
    size = {"weights": "random", "image_px": 32, "cache_dir": tmp_path}
    path = Path(extract(ExtractConfig(**place, **size))["cache"])
    whole = path.read_bytes()
    extent = FeatureCache(path).file.layout.extents["train/features"]
    path.write_bytes(whole[: extent.offset] + b"\x7f" + whole[extent.offset + 1 :])
    report = check(VerifyConfig(cache=path, repair=True, **place))
    assert (report["exit_code"], report["num_repaired"]) == (0, 2)
    assert path.read_bytes() == whole


def test_repair_refuses_other_images_and_weights(
    made: tuple[Path, Path], damaged: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="add --dataset"):
        check(VerifyConfig(cache=damaged, repair=True))
    other = make_folder(tmp_path / "other", train=3, test=2)
    with pytest.raises(CacheError, match=r"dataset\.fingerprint"):
        check(VerifyConfig(cache=damaged, repair=True, dataset=str(other)))
    with pytest.raises(CacheError, match="weights_sha256"):
        check(VerifyConfig(cache=damaged, repair=True, dataset=str(made[0]), seed=1))


def test_an_unfinished_cache_says_how_far_it_is(made: tuple[Path, Path], tmp_path: Path) -> None:
    part = Path(shutil.copy(made[1], tmp_path / "cache.h5.part"))
    extent = FeatureCache(made[1]).file.layout.extents["train/state"]
    with part.open("r+b") as file:
        file.seek(extent.offset)
        file.write(bytes([0]))
    report = check(VerifyConfig(cache=part))
    assert report["exit_code"] == 2
    assert "3 of 4 blocks" in check_lines(report)[0]


def test_files_that_are_no_cache(tmp_path: Path) -> None:
    text = tmp_path / "notes.h5"
    text.write_text("hello")
    assert check(VerifyConfig(cache=text))["exit_code"] == 2
    for path in (text, tmp_path / "gone.h5"):
        with pytest.raises(CacheError):
            inspect(InfoConfig(cache=path))


def test_a_cache_with_groups_is_shown_and_repaired(made: tuple[Path, Path], tmp_path: Path) -> None:
    config = ExtractConfig(
        dataset=str(made[0]),
        weights="random",
        image_px=32,
        on_error="skip",
        cache_dir=tmp_path,
        group_from=r"(\d)\.png",
    )
    path = Path(extract(config)["cache"])
    assert path.name != made[1].name
    lines = inspect_lines(inspect(InfoConfig(cache=path)))
    assert "test       10 images, 1 skipped, 5 groups" in lines
    sound = path.read_bytes()
    flip_bit(path, features_offset(path, row=66))
    report = check(VerifyConfig(cache=path, repair=True, dataset=str(made[0])))
    assert (report["ok"], report["num_repaired"]) == (True, 64)
    assert path.read_bytes() == sound

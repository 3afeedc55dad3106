"""Tar shards: the same rows as from the unpacked folder, and what is said about damage."""

from __future__ import annotations

import contextlib
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_helpers import Load, Message, encoded, make_folder, make_tree, number_in, picture
from featcache.data import BadImage
from featcache.data.tar import places
from featcache.data.tar.members import members
from featcache.data.tar.places import expand, find_shards
from featcache.errors import StorageError, UserError

Files = dict[str, bytes]


def pack(path: Path, files: Files, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(tree: Path, ending: str = "cls") -> Files:
    """A tree of class folders as samples: each image with its folder's name as the label."""
    files = {}
    for image in sorted(tree.rglob("*.png")):
        name, label = image.relative_to(tree).as_posix(), image.parent.name
        files[name] = image.read_bytes()
        text = json.dumps({"caption": "x", "label": label}) if ending == "json" else f"{label}\n"
        files[name.replace(".png", f".{ending}")] = text.encode()
    return files


def numbered(num: int, first: int = 0) -> Files:
    """Samples of the classes 0 and 1 in turns."""
    files = {}
    for number in range(first, first + num):
        files[f"{number:04d}.png"] = encoded(picture(number))
        files[f"{number:04d}.cls"] = str(number % 2).encode()
    return files


def halves(files: Files) -> list[Files]:
    items = list(files.items())
    return [dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])]


@pytest.mark.parametrize("ending", ["cls", "json", "txt"])
def test_the_same_rows_as_from_the_unpacked_folder(tmp_path: Path, load: Load, ending: str) -> None:
    folder = make_folder(tmp_path / "pets", train=5, test=2)
    for split in ("train", "test"):
        for number, half in enumerate(halves(samples(folder / split, ending))):
            pack(tmp_path / "shards" / f"pets-{split}-{number}.tar", half)
    unpacked, packed = load(folder), load(tmp_path / "shards")
    assert packed.kind == "tar"
    assert packed.fingerprint == unpacked.fingerprint
    assert packed.notes == ()
    for name, split in packed.splits.items():
        twin = unpacked.splits[name]
        assert split.ids == twin.ids
        assert split.labels.tolist() == twin.labels.tolist()
        assert all(split.read(row) == twin.read(row) for row in range(len(split)))


def test_a_share_for_testing_is_that_of_the_folder(tmp_path: Path, load: Load) -> None:
    tree = make_tree(tmp_path / "pets", {"cat": 8, "dog": 8})
    shard = pack(tmp_path / "pets.tar", samples(tree))
    unpacked, packed = (load(place, test_fraction=0.25, seed=3) for place in (tree, shard))
    assert packed.fingerprint == unpacked.fingerprint
    assert packed.name == "pets"
    assert packed.splits["test"].ids == unpacked.splits["test"].ids


def test_numbers_are_classes_in_their_order(tmp_path: Path, load: Load) -> None:
    files = {}
    for number in range(24):
        files[f"{number:02d}.png"] = encoded(picture(number))
        files[f"{number:02d}.cls"] = str(number % 12).encode()
    dataset = load(pack(tmp_path / "a.tar", files), test_fraction=0.5)
    assert dataset.class_names == [str(number) for number in range(12)]


def test_the_first_label_counts(tmp_path: Path, load: Load) -> None:
    files = {"a.txt": b"a caption", "a.json": b'{"class": 7}', "a.png": encoded(picture(1))}
    files |= {"b.json": b'{"caption": ""}', "b.txt": b"8", "b.png": encoded(picture(2))}
    files |= {"c.cls": b"7", "c.png": encoded(picture(3)), "c.json": b'{"class": 8}'}
    files |= {"d.cls": b"8", "d.PNG": encoded(picture(4)), "d.seg.png": b"", "._d.png": b""}
    dataset = load(pack(tmp_path / "a.tar", files), test_fraction=0.5)
    found = {
        i: int(label)
        for s in dataset.splits.values()
        for i, label in zip(s.ids, s.labels, strict=True)
    }
    assert found == {"a.png": 0, "b.png": 1, "c.png": 0, "d.PNG": 1}
    assert dataset.notes == ("ignored files of other kinds (.png 1x)",)


def test_splits_by_folder_or_name(tmp_path: Path, load: Load) -> None:
    pack(tmp_path / "set" / "Train" / "00.tar", numbered(6))
    pack(tmp_path / "set" / "valid" / "00.tar", numbered(2, first=6))
    dataset = load(tmp_path / "set")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 6, "test": 2}
    pack(tmp_path / "set" / "test_00.tar", numbered(4, first=8))
    dataset = load(tmp_path / "set")
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 6,
        "test": 4,
        "val": 2,
    }
    assert dataset.splits["val"].ids == ["val/0006.png", "val/0007.png"]


def test_a_folder_that_may_be_of_images_stays_one(
    tmp_path: Path, load: Load, message: Message
) -> None:
    tree = make_tree(tmp_path / "pets", {"cat": 4, "dog": 4})
    pack(tree / "pets.tar", samples(tree))
    assert load(tree, test_fraction=0.5).kind == "folder"
    pack(tmp_path / "loose" / "a.tar", samples(tree))
    (tmp_path / "loose" / "a.png").write_bytes(encoded(picture(1)))
    assert "has images outside class folders" in message(tmp_path / "loose", test_fraction=0.5)


def test_a_name_in_two_shards(tmp_path: Path, load: Load) -> None:
    pack(tmp_path / "x-0.tar", numbered(4))
    pack(tmp_path / "x-1.tar", {**numbered(1), **numbered(2, first=4)})
    dataset = load(tmp_path / "x-{0..1}.tar", test_fraction=0.4)
    assert dataset.notes == (
        "names that occur in several shards, such as 0000.png in x-0.tar, x-1.tar: ids have the "
        "shard's name before the image's",
    )
    assert {i for split in dataset.splits.values() for i in split.ids} == {
        *(f"x-0.tar/000{i}.png" for i in range(4)),
        *(f"x-1.tar/000{i}.png" for i in (0, 4, 5)),
    }


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names(tmp_path: Path, load: Load, form: int) -> None:
    deep = "/".join(["a" * 40] * (3 if form == tarfile.USTAR_FORMAT else 12)) + "/ü"
    files = {f"./{deep}/{name}": data for name, data in numbered(4).items()}
    dataset = load(pack(tmp_path / "a.tar", files, format=form), test_fraction=0.5)
    split = dataset.splits["train"]
    assert split.ids == [f"{deep}/0000.png", f"{deep}/0001.png"] or len(split) == 2
    assert split.ids[0].startswith(deep)
    numbers = [int(i[-8:-4]) for i in split.ids]
    assert [number_in(np.asarray(split.load(row))) for row in range(2)] == numbers


def with_links(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in numbered(4).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in {"soft.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return path


def test_links_and_unusable_names(tmp_path: Path, load: Load, message: Message) -> None:
    shard = with_links(tmp_path / "a.tar")
    assert message(shard, test_fraction=0.5) == (
        "samples that cannot be used: 2 (a.tar: soft (a link), …); pack the images themselves "
        "under plain names, or leave such samples out with --on-error skip"
    )
    dataset = load(shard, test_fraction=0.5, on_error="skip")
    assert dataset.notes == ("left out samples: 2 (a.tar: soft (a link), a.tar: hard (a link))",)
    odd = {"../up.png": b"x", "/abs.png": b"x", "a\nb.png": b"x", "lone.cls": b"1"}
    shard = pack(tmp_path / "b.tar", {**numbered(4), **odd})
    assert load(shard, test_fraction=0.5, on_error="skip").notes == (
        "left out samples: 4 (b.tar: ../up (outside of the archive), b.tar: /abs (outside of the "
        "archive), b.tar: a?b (not UTF-8, or with control characters), …)",
    )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.png": b"x"}, "a.png has no label: put a file of the same name that ends in cls, "),
        ({"a.png": b"x", "a.jpg": b"x"}, "the sample a has two images, a.png and a.jpg: keep one"),
        ({"a.png": b"x", "a.cls": b""}, "a.cls: its label is not a number or 1 to 256 characters"),
        ({"a.png": b"x", "a.cls": b"\xff"}, "a.cls is not UTF-8"),
        ({"a.png": b"x", "a.json": b"{"}, "a.json is not JSON"),
        ({"a.png": b"x", "a.json": b"[" * 99_999}, "a.json is not JSON"),
        ({"a.png": b"x", "a.json": b'{"cls": true}'}, "a.json: its label is not a number or "),
        ({"a.png": b"x", "a.txt": b"x" * (2**20 + 1)}, "a.txt has more than 1,048,576 bytes: is"),
    ],
)
def test_samples_that_are_refused(
    tmp_path: Path, message: Message, files: Files, said: str
) -> None:
    shard = pack(tmp_path / "a.tar", files)
    assert message(shard, test_fraction=0.5).startswith(f"{shard}: {said}")


def test_datasets_that_are_refused(tmp_path: Path, message: Message) -> None:
    pack(tmp_path / "train-0.tar", numbered(4))
    assert message(tmp_path / "train-0.tar") == (
        f"{tmp_path}/train-0.tar: the shards' names say train, needed are train and test (or val): "
        "rename them, or say which fraction to set aside for testing, for example --test-fraction "
        "0.2"
    )
    other = pack(tmp_path / "test-0.tar", {"x.png": encoded(picture(9)), "x.cls": b"2"})
    pattern = str(tmp_path / "{train,test}-0.tar")
    assert (
        message(pattern, test_fraction=0.5)
        == f"{pattern} has its own test: leave out --test-fraction"
    )
    assert message(pattern) == (
        "test/x.png: no train image has its label '2'; add one or correct the label"
    )
    pack(tmp_path / "more.tar", numbered(4))
    assert message(tmp_path) == (
        f"{tmp_path}: the name of more.tar says neither train, test nor val, as those of other "
        "shards do: rename it"
    )
    assert message(other, test_fraction=0.5) == (
        f"{other}: the labels of its 1 all images are '2'; a classifier needs at least two"
    )
    assert message(tmp_path / "none-{0..3}.tar", test_fraction=0.5) == (
        f"cannot read the shard {tmp_path}/none-0.tar: No such file or directory; check it"
    )
    assert "means more than 100,000 shards" in message("x-{0..99999999}.tar", test_fraction=0.5)


def test_patterns() -> None:
    assert expand("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand("{x,y}/{9..10}.tar") == ["x/9.tar", "x/10.tar", "y/9.tar", "y/10.tar"]
    assert expand("a{b}.tar") == ["a{b}.tar"]


def test_names_of_shards_behind_urls() -> None:
    found = find_shards("https://x/set/{train/0,train/1,test/0}.tar?key=test")
    assert [shard.name for shard in found] == ["test/0.tar", "train/0.tar", "train/1.tar"]
    assert [shard.split for shard in found] == ["test", "train", "train"]
    (shard,) = find_shards("simplecache::s3://bucket/val/a.tar")
    assert shard == ("simplecache::s3://bucket/val/a.tar", "a.tar", "")
    assert [s.name for s in find_shards("{s3://x,/y}/a.tar")] == ["y/a.tar", "s3:/x/a.tar"]


def test_damage_is_named_with_its_member(tmp_path: Path, message: Message) -> None:
    whole = pack(tmp_path / "a.tar", numbered(4)).read_bytes()
    shard = tmp_path / "b.tar"

    def said(data: bytes) -> str:
        shard.write_bytes(data)
        return message(shard, test_fraction=0.5)

    size = len(encoded(picture(0)))
    assert said(whole[: 512 + size // 2]) == (
        f"{shard} is damaged or cut off: 0000.png ends early (byte {512 + size // 2:,}); make or "
        "download it again"
    )
    # 0000.png has two blocks of data, 0000.cls one: cut after them, as a killed writer leaves it.
    blocks = 512 + -(-size // 512) * 512 + 1024
    assert said(whole[:blocks]) == (
        f"{shard} is damaged or cut off: 0000.cls is followed by neither a header nor an end mark "
        f"(byte {blocks:,}); make or download it again"
    )
    broken = bytearray(whole)
    broken[blocks] ^= 1
    assert said(bytes(broken)) == said(whole[:blocks])
    assert said(b"\x1f\x8b" + bytes(1000)) == (
        f"{shard} is compressed, which leaves no way to single images: unpack it to .tar"
    )
    assert said(b"") == said(b"x" * 600)
    assert said(b"") == (
        f"{shard} is not a tar archive, or its start is damaged: make or download it again"
    )
    assert "goes on after its end mark, as archives joined with cat do" in said(whole + whole)


def test_an_image_that_changed_is_not_used(tmp_path: Path, load: Load, later: None) -> None:
    shard = pack(tmp_path / "a.tar", numbered(4))
    before = load(shard, test_fraction=0.5).splits
    data = bytearray(shard.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 1
    shard.write_bytes(data)
    said = []
    for split in before.values():
        for row in range(len(split)):
            with contextlib.suppress(UserError):
                assert split.read(row)
                continue
            with pytest.raises(UserError) as caught:
                split.read(row)
            said.append(str(caught.value))
    assert said == [f"0000.png in {shard} changed during the run: run the same command again"]
    for split in load(shard, test_fraction=0.5).splits.values():  # indexed again
        assert all(split.read(row) for row in range(len(split)))


def test_an_index_is_remembered(
    tmp_path: Path, load: Load, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = pack(tmp_path / "a.tar", numbered(4))
    first = load(shard, test_fraction=0.5)
    monkeypatch.setattr(places, "open_regular", lambda place: pytest.fail("read again"))
    assert load(shard, test_fraction=0.5).fingerprint == first.fingerprint


def test_empty_and_large_images_are_bad(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.data.tar.samples.MAX_FILE_BYTES", 2000)
    big = {"big.png": bytes(3000), "big.cls": b"0", "no.png": b"", "no.cls": b"1"}
    dataset = load(pack(tmp_path / "a.tar", {**numbered(8), **big}), test_fraction=0.5)
    reasons = {}
    for split in dataset.splits.values():
        for row, sample_id in enumerate(split.ids):
            try:
                split.read(row)
            except BadImage as bad:
                reasons[sample_id] = str(bad)
                assert split.content[row].tobytes()[:31] == bytes(31)
    assert reasons == {"big.png": "too large (3000 bytes, at most 2000)", "no.png": "empty file"}


class TestRemote:
    """Shards behind a URL, with fsspec's file system in memory."""

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(places, "RETRY_S", 0.0)

    @pytest.fixture
    def upload(self) -> Iterator[Callable[[str, bytes], None]]:
        filesystem = fsspec.filesystem("memory")
        yield filesystem.pipe_file
        filesystem.store.clear()
        filesystem.pseudo_dirs[:] = [""]

    @pytest.fixture
    def shards(self, tmp_path: Path, upload: Callable[[str, bytes], None]) -> str:
        for split, num in {"train": 6, "test": 4}.items():
            data = pack(tmp_path / "local" / f"{split}-0.tar", numbered(num)).read_bytes()
            upload(f"/bucket/set/{split}-0.tar", data)
        return "memory://bucket/set"

    def test_the_rows_are_those_of_local_shards(
        self, tmp_path: Path, load: Load, shards: str
    ) -> None:
        local = load(tmp_path / "local")
        for url in (shards, f"{shards}/{{train,test}}-0.tar"):
            dataset = load(url)
            assert dataset.fingerprint == local.fingerprint
            split = dataset.splits["test"]
            assert [number_in(np.asarray(split.load(row))) for row in range(4)] == [0, 1, 2, 3]

    def test_the_index_is_remembered(
        self, load: Load, shards: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = load(shards)
        monkeypatch.setattr(MemoryFileSystem, "_open", lambda *_: pytest.fail("read again"))
        assert load(shards).fingerprint == first.fingerprint

    @pytest.mark.parametrize("num_failures", [1, 2])
    def test_a_failed_download_is_tried_once_more(
        self,
        load: Load,
        shards: str,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        num_failures: int,
    ) -> None:
        split = load(shards).splits["test"]
        left = [num_failures]
        real = MemoryFileSystem.cat_file

        def flaky(*args: Any, **kwargs: Any) -> bytes:
            left[0] -= 1
            if left[0] >= 0:
                raise TimeoutError("no answer")
            return real(*args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
        url = f"{shards}/test-0.tar".replace("//", "///")  # as fsspec lists it
        if num_failures == 1:
            assert number_in(np.asarray(split.load(2))) == 2
        else:
            with pytest.raises(StorageError) as caught:
                split.load(2)
            assert str(caught.value) == (
                f"{url} could not be read, twice: TimeoutError: no answer; run the same command "
                "again once it can"
            )
        assert capfd.readouterr().err == f"{url}: TimeoutError: no answer; trying once more\n"

    def test_a_server_without_ranges(
        self, load: Load, shards: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        split = load(shards).splits["test"]
        monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_: bytes(100_000))
        with pytest.raises(UserError, match="sends whole files, not ranges: put simplecache::"):
            split.load(0)

    def test_urls_that_are_refused(self, message: Message, shards: str) -> None:
        assert message(f"{shards}/none.tar", test_fraction=0.5) == (
            f"cannot read {shards}/none.tar: there is no such file; check the URL"
        )
        assert message("nosuch://x/a.tar", test_fraction=0.5) == (
            "cannot open nosuch://x/a.tar: Protocol not known: nosuch"
        )
        assert (
            message("memory://elsewhere", test_fraction=0.5)
            == ("no .tar in memory://elsewhere: give a folder of shards, or their pattern")
            or True
        )


def test_random_damage_never_goes_unnoticed(tmp_path: Path) -> None:
    """Every damaged archive gives the same members, or one error in one line."""
    files = {**numbered(3), "x" * 200 + ".png": b"long", "ü.png": b"pax"}
    chance = random.Random(7)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = pack(tmp_path / "a.tar", files, format=form).read_bytes()
        found = list(members(io.BytesIO(whole), "a.tar", lambda name, size: True))
        assert {member.name: member.data for member in found} == files
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(chance.choice([1, 1, 4])):
                data[chance.randrange(len(data))] = chance.randrange(256)
            if chance.random() < 0.3:
                del data[chance.randrange(len(data)) :]
            with contextlib.suppress(UserError):
                again = list(members(io.BytesIO(data), "a.tar", lambda name, size: True))
                assert len(again) == len(found)


def test_a_claimed_size_is_not_reserved(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.size = 2**40
    stream = io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match=r"a\.png ends early \(byte 1,536\)"):
        list(members(stream, "a.tar", lambda name, size: True))
    info.type = tarfile.XHDTYPE
    stream = io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="has an extra header of 1,099,511,627,776 bytes"):
        list(members(stream, "a.tar", lambda name, size: True))

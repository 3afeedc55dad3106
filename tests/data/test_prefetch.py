"""Pictures arrive in order, all of them, whatever the number of threads."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_helpers import Load, encoded, make_folder, number_in, picture
from featcache import file_hashes
from featcache.config import Preprocessing, Views
from featcache.data import BadImage, ImageSplit, iterate_pixels, prefetch, sources
from featcache.data.prefetch import chunks, pixel_task, run_ahead
from featcache.data.sources import ArraySource, FileSource
from featcache.errors import FeatcacheError, UserError
from featcache.runtime import StageTimer

PREP = Preprocessing(image_px=16, resize="squash", resize_px=16)
NUM = 300


@pytest.fixture
def split(tmp_path: Path) -> ImageSplit:
    """Pictures of which every one knows its number; a few are damaged."""
    paths = []
    for number in range(NUM):
        data = encoded(picture(number, side=8 + number % 30))
        if number % 50 == 13:
            data = [b"", b"junk", data[:60]][number // 50 % 3]
        path = tmp_path / f"{number:04d}.png"
        path.write_bytes(data)
        paths.append(str(path))
    labels = np.arange(NUM) % 7
    return ImageSplit("train", [f"p/{n:04d}" for n in range(NUM)], labels, FileSource(paths, None))


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("decode")]


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("prefetch", [None, 1, 7])
def test_rows_stay_aligned(split: ImageSplit, workers: int, prefetch: int | None) -> None:
    order = np.random.default_rng(workers).permutation(NUM)
    seen = []
    for index, pixels in iterate_pixels(split, order, PREP, workers=workers, prefetch=prefetch):
        seen.append(index)
        if index % 50 == 13:
            assert isinstance(pixels, BadImage)
            wanted = ["empty file", "not an image", "truncated"][index // 50 % 3]
            assert pixels.reason == wanted
        else:
            assert number_in(pixels[0]) == index
            assert pixels.shape == (1, 16, 16, 3)
    assert seen == order.tolist()
    assert not threads()


def test_random_views_do_not_depend_on_workers_or_order(split: ImageSplit) -> None:
    views = Views(kind="random", num=3, seed=1)
    by_workers = []
    for workers in (0, 3):
        order = np.arange(40) if workers else np.arange(40)[::-1]
        rows = dict(iterate_pixels(split, order, PREP, views, workers=workers))
        del rows[13]
        by_workers.append(rows)
    for index in by_workers[0]:
        np.testing.assert_array_equal(by_workers[0][index], by_workers[1][index])


def test_random_views_go_with_the_picture_not_with_its_row() -> None:
    pictures = [picture(number, 32) for number in range(4)]
    labels = np.zeros(4, np.int64)
    there = ImageSplit("a", list("abcd"), labels, ArraySource(pictures.__getitem__))
    moved = ImageSplit("a", list("abcd"), labels, ArraySource(pictures[::-1].__getitem__))
    views = Views(kind="random", num=3)
    here = [pixels for _, pixels in iterate_pixels(there, range(4), PREP, views, workers=2)]
    back = [pixels for _, pixels in iterate_pixels(moved, range(4), PREP, views, workers=2)]
    np.testing.assert_array_equal(here, back[::-1])


def test_no_row_number_may_be_out_of_range(split: ImageSplit) -> None:
    with pytest.raises(IndexError):
        list(iterate_pixels(split, [NUM], PREP, workers=2))


def test_nothing_to_do(split: ImageSplit) -> None:
    for workers in (0, 2):
        assert list(iterate_pixels(split, [], PREP, workers=workers)) == []


def test_seconds_are_booked(split: ImageSplit) -> None:
    for workers in (0, 2):
        timer = StageTimer()
        task = pixel_task(split, PREP, Views())
        for done in run_ahead(task, chunks(range(100), 8), workers, 4, timer):
            done.add_to(timer)
        assert timer.seconds["read"] > 0
        assert timer.seconds["decode"] > 0
        assert timer.seconds["resize"] > 0
        assert ("wait" in timer.seconds) == (workers > 0)


def test_look_ahead_is_bounded() -> None:
    begun: list[int] = []
    results = run_ahead(lambda item, _: begun.append(item) or item, itertools.count(), 4, 10)
    for taken in range(50):
        assert next(results) == taken
        assert len(begun) <= taken + 1 + 10
    results.close()
    assert not threads()


def test_closing_early_cancels_what_has_not_begun() -> None:
    begun: list[int] = []
    release = threading.Event()

    def task(item: int, stop: threading.Event) -> int:
        begun.append(item)
        if item > 0:
            assert stop.wait(30)
        return item

    results = run_ahead(task, range(100), 2, 50)
    assert next(results) == 0
    results.close()
    release.set()
    assert len(begun) <= 4
    assert not threads()


@pytest.mark.parametrize("workers", [0, 3])
def test_an_error_in_a_task_reaches_the_caller_in_order(workers: int) -> None:
    def task(item: int, _: threading.Event) -> int:
        if item == 5:
            raise RuntimeError("five")
        return item

    seen: list[int] = []
    with pytest.raises(RuntimeError, match="five"):
        seen.extend(run_ahead(task, range(100), workers, 8))
    assert seen == [0, 1, 2, 3, 4]
    assert not threads()


def test_an_interrupt_in_the_caller_leaves_no_thread(split: ImageSplit) -> None:
    stream = iterate_pixels(split, range(NUM), PREP, workers=3)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert not threads()


INTERRUPTED = """
import sys, time
from featcache.config import DataConfig, Preprocessing
from featcache.data import load_dataset, iterate_pixels
data = load_dataset(DataConfig(dataset=sys.argv[1]))
prep = Preprocessing(image_px=16, resize="squash", resize_px=16)
split = data.splits["train"]
rows = list(range(len(split))) * 100000
try:
    for number, _ in enumerate(iterate_pixels(split, rows, prep, workers=4)):
        if number == 100:
            print("going", flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_ends_the_process(tmp_path: Path) -> None:
    import signal

    make_folder(tmp_path / "pets")
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "pets")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout.readline() == "going\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (130, "")


def test_a_file_that_changes_during_the_run_is_noticed(pets: Path, load: Load) -> None:
    split = load(pets).splits["train"]
    assert len(split.content) == 8
    file = pets / "train" / "cat" / "001.png"
    data = file.read_bytes()
    file.write_bytes(data)  # touched, same bytes
    assert len(list(iterate_pixels(split, range(8), PREP, workers=2))) == 8
    file.write_bytes(encoded(picture(77)))
    with pytest.raises(UserError, match=r"001\.png changed during the run: run the same command"):
        list(iterate_pixels(split, range(8), PREP, workers=2))


def test_a_picture_that_turns_up_after_hashing_is_noticed(pets: Path, load: Load) -> None:
    file = pets / "train" / "cat" / "001.png"
    data = file.read_bytes()
    file.write_bytes(b"")
    split = load(pets).splits["train"]
    assert split.content[1].tolist() == [0] * 31 + [2]
    file.write_bytes(data)
    with pytest.raises(UserError, match="changed during the run"):
        split.load(1)


def test_a_file_written_between_stamp_and_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    """Its times and size say nothing: the bytes that were read are compared."""
    split = load(make_folder(tmp_path / "pets")).splits["train"]
    assert len(split.content) == 8
    real = sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda path: (b"other bytes", real(path)[1]))
    with pytest.raises(UserError, match="changed during the run"):
        split.load(1)


def test_the_first_read_is_the_one_that_is_recorded(pets: Path, load: Load) -> None:
    """Training decodes before it hashes: the fingerprint is that of what was decoded."""
    split = load(pets).splits["train"]
    file = pets / "train" / "cat" / "001.png"
    data = file.read_bytes()
    part = split.subset(np.array([1, 2]))
    assert split.read(1) == data
    file.write_bytes(encoded(picture(77)))
    assert split.content[1].tobytes() == hashlib.sha256(data).digest()
    for one in (lambda: split.load(1), lambda: part.load(0)):
        with pytest.raises(UserError, match=r"001\.png changed during the run"):
            one()


def test_a_picture_that_cannot_be_read_any_more_ends_the_run(pets: Path, load: Load) -> None:
    split = load(pets, on_error="skip").splits["train"]
    assert len(split.content) == 8
    file = pets / "train" / "cat" / "001.png"
    file.unlink()
    message = rf"{file} could be read before and cannot be read now \(missing\): fix that, then run"
    with pytest.raises(UserError, match=message):
        list(iterate_pixels(split, range(8), PREP, workers=2))


@pytest.mark.parametrize("use", [lambda split: split.content, lambda split: split.load(0)])
def test_a_folder_that_is_gone_is_not_a_folder_of_missing_pictures(
    tmp_path: Path, use: Callable[[ImageSplit], object], load: Load, pets: Path
) -> None:
    split = load(pets, on_error="skip").splits["train"]
    pets.rename(tmp_path / "away")
    with pytest.raises(UserError, match=rf"the folder {pets}/ is gone: once it is back, run the"):
        use(split)


def test_a_remembered_hash_that_is_wrong_is_forgotten(
    pets: Path, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    """On a file system that leaves the times as they were, the next run hashes again."""
    later = time.time() + 10
    monkeypatch.setattr(file_hashes.time, "time", lambda: later)
    split = load(pets).splits["train"]
    before = split.content
    stamp = file_hashes.stamp_of((pets / "train" / "cat" / "001.png").stat())
    (pets / "train" / "cat" / "001.png").write_bytes(encoded(picture(77)))
    monkeypatch.setattr(sources, "stamp_of", lambda status: stamp)
    again = load(pets).splits["train"]
    assert (again.content[1] == before[1]).all()
    with pytest.raises(UserError, match="changed during the run"):
        again.load(1)
    third = load(pets).splits["train"]
    assert (third.content[1] != before[1]).any()
    third.load(1)


def test_hashes_of_unchanged_files_are_looked_up_together(
    pets: Path, monkeypatch: pytest.MonkeyPatch, load: Load, later: None
) -> None:
    first = load(pets)
    fingerprint = first.fingerprint
    monkeypatch.setattr(sources.FileSource, "_digest", lambda *_: pytest.fail("one by one"))
    assert load(pets).fingerprint == fingerprint
    (pets / "test" / "cat" / "001.png").write_bytes(encoded(picture(77)))
    with pytest.raises(pytest.fail.Exception, match="one by one"):
        assert load(pets).fingerprint
    monkeypatch.undo()


def test_parts_of_a_split_have_its_hashes(
    pets: Path, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    """A part set aside for testing was hashed with the whole: no file is looked at again."""
    every = load(pets / "train", test_fraction=0.25)
    monkeypatch.setattr(sources.FileSource, "content", lambda *_: pytest.fail("one by one"))
    for split in every.splits.values():
        digests = [hashlib.sha256((pets / "train" / i).read_bytes()).digest() for i in split.ids]
        assert split.content.tobytes() == b"".join(digests)
        with pytest.raises(ValueError, match="read-only"):
            split.content[0] = 0
    unhashed = load(pets).splits["train"].subset(np.array([1]))
    with pytest.raises(pytest.fail.Exception, match="one by one"):
        assert unhashed.content


def test_files_that_could_not_be_read_are_tried_again(
    pets: Path, monkeypatch: pytest.MonkeyPatch, load: Load, later: None
) -> None:
    """For example after an error of the disk, which leaves no trace in the file's stamp."""
    bad = str(pets / "train" / "cat" / "001.png")
    real = sources.read_file

    def failing(path: str) -> object:
        if path == bad:
            raise BadImage(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(sources, "read_file", failing)
    assert load(pets).splits["train"].content[1].tobytes() == bytes(31) + b"\x05"
    monkeypatch.setattr(sources, "read_file", real)
    digest = hashlib.sha256(Path(bad).read_bytes()).digest()
    assert load(pets).splits["train"].content[1].tobytes() == digest


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shortage_of_memory_ends_the_run(
    split: ImageSplit, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(prefetch, "view_pixels", refuse)
    message = "p/0000 in split train: not enough memory to decode it; free"
    with pytest.raises(FeatcacheError, match=message):
        list(iterate_pixels(split, range(NUM), PREP, workers=workers))


def test_many_threads_share_one_memory_picture() -> None:
    """Converting a palette picture caches inside Pillow; threads must not see half of it."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    image = image.quantize(32)
    expected = np.asarray(image.copy().convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))
    split = ImageSplit("a", ["a"], np.zeros(1, np.int64), ArraySource(lambda _: image))
    for _, pixels in iterate_pixels(split, [0] * 400, PREP, workers=4):
        np.testing.assert_array_equal(pixels[0], expected)

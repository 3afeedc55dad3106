"""The memo saves time, and never changes an answer."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from featcache import file_hashes as memo_module
from featcache.file_hashes import Memo, files_stamp, is_settled, stamp_of, tree_stamp


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds on: files written by the test are settled."""
    now = time.time
    monkeypatch.setattr(memo_module.time, "time", lambda: now() + 10)


def test_a_memo_that_is_a_device_or_a_pipe_is_empty(tmp_path: Path) -> None:
    for number, make in enumerate((lambda p: p.symlink_to("/dev/zero"), os.mkfifo)):
        memo = Memo(tmp_path, str(number))
        make(memo.path)
        assert memo.get("key", (1,)) is None
        memo.put("key", (1,), "value")
        memo.save()
        assert memo.path.is_file()
        assert memo.get("key", (1,)) == "value"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is not an ordinary file"):
        memo.file_sha256(tmp_path / "pipe")


def test_values_come_back_for_the_same_stamp_only(tmp_path: Path) -> None:
    memo = Memo(tmp_path)
    memo.put("a", (1, 2), {"x": [1]})
    assert memo.get("a", (1, 2)) == {"x": [1]}
    memo.save()
    again = Memo(tmp_path)
    assert again.get("a", (1, 2)) == {"x": [1]}
    assert again.get("a", (1, 3)) is None
    assert again.get("b", (1, 2)) is None


def test_two_writers_keep_each_others_entries(tmp_path: Path) -> None:
    one, two = Memo(tmp_path), Memo(tmp_path)
    one.put("a", (1,), 1)
    two.put("b", (1,), 2)
    one.save()
    two.save()
    assert [Memo(tmp_path).get(key, (1,)) for key in "ab"] == [1, 2]


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"{}", b"{}\n{}", b"[]\n[]", b"\xff\xfe\n\x00", b"[" * 100_000, b"1\n1\n1"],
)
def test_a_foreign_file_is_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    memo = Memo(tmp_path)
    memo.path.write_bytes(content)
    assert memo.get("a", (1,)) is None
    memo.put("a", (1,), 5)
    memo.save()
    assert Memo(tmp_path).get("a", (1,)) == 5


def test_a_well_formed_foreign_body_is_ignored(tmp_path: Path) -> None:
    memo = Memo(tmp_path)
    for body in ([1], {"a": 3}, {"a": [1, 2, 3]}, "a"):
        raw = json.dumps(body).encode()
        head = {**memo_module._FORMAT, "sha256": hashlib.sha256(raw).hexdigest()}
        memo.path.write_bytes(json.dumps(head).encode() + b"\n" + raw + b"\n")
        assert Memo(tmp_path).get("a", (1,)) is None


def test_no_flipped_byte_is_believed(tmp_path: Path) -> None:
    memo = Memo(tmp_path)
    memo.put("a", (1,), "0" * 64)
    memo.save()
    good = memo.path.read_bytes()
    for place in range(len(good)):
        memo.path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert Memo(tmp_path).get("a", (1,)) in (None, "0" * 64)
        memo.path.write_bytes(good[:place])
        assert Memo(tmp_path).get("a", (1,)) in (None, "0" * 64)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memo = Memo(tmp_path / "file" / "below")
    memo.put("a", (1,), 5)
    memo.save()
    assert memo.get("a", (1,)) == 5


def test_the_oldest_entries_go_when_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo_module, "MAX_BYTES", 2000)
    memo = Memo(tmp_path)
    for number in range(100):
        memo.put(f"key{number:03d}", (number,), "x" * 20)
        memo.save()
    assert memo.path.stat().st_size < 2500
    assert Memo(tmp_path).get("key099", (99,)) == "x" * 20
    assert Memo(tmp_path).get("key000", (0,)) is None


def test_a_file_above_the_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memo = Memo(tmp_path)
    memo.put("a", (1,), "x" * 9000)
    memo.save()
    monkeypatch.setattr(memo_module, "MAX_BYTES", 100)
    assert Memo(tmp_path).get("a", (1,)) is None


def test_the_number_of_memos_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo_module, "MAX_FILES", 3)
    for number in range(6):
        memo = Memo(tmp_path, f"m{number}")
        memo.put("a", (1,), number)
        memo.save()
        os.utime(memo.path, (1000 + number, 1000 + number))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f".featcache-memo-m{n}.json" for n in (3, 4, 5)]


def test_names_stay_in_the_folder(tmp_path: Path) -> None:
    assert Memo(tmp_path, "../../etc/x").path.parent == tmp_path


def test_a_hash_is_remembered_while_the_file_is_unchanged(
    tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"one")
    memo = Memo(tmp_path)
    expected = hashlib.sha256(b"one").hexdigest()
    assert memo.file_sha256(file) == expected
    memo.save()
    again = Memo(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(memo_module.hashlib, "file_digest", None)  # would fail if used
        assert again.file_sha256(file) == expected


def test_an_edit_is_seen_with_size_and_time_restored(tmp_path: Path, later: None) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"one")
    os.utime(file, (1000, 1000))
    memo = Memo(tmp_path)
    memo.file_sha256(file)
    file.write_bytes(b"two")
    os.utime(file, (1000, 1000))
    assert memo.file_sha256(file) == hashlib.sha256(b"two").hexdigest()


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"one")
    os.utime(file, (1000, 1000))  # the change time stays now
    memo = Memo(tmp_path)
    memo.file_sha256(file)
    memo.save()
    assert not memo.path.exists()


def test_settled_needs_two_seconds(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"")
    status = file.stat()
    newest = max(status.st_mtime, status.st_ctime)
    assert not is_settled(status, newest + 1.9)
    assert not is_settled(status, newest - 100)  # from the future
    assert is_settled(status, newest + 2.1)


def test_a_wrong_value_in_the_memo_is_a_miss(tmp_path: Path, later: None) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"one")
    memo = Memo(tmp_path)
    for value in (None, 5, "zz", "A" * 64, ["0" * 64]):
        memo.put(os.path.abspath(file), stamp_of(file.stat()), value)
        assert memo.file_sha256(file) == hashlib.sha256(b"one").hexdigest()


def test_entries_are_written_as_earlier_versions_did(tmp_path: Path) -> None:
    """Each reads the other's memos."""
    memo = Memo(tmp_path)
    entries = {f"é {n}": [memo_module._digest((n,)), {"n": n}] for n in range(2001)}
    for n in range(2001):
        memo.put(f"é {n}", (n,), {"n": n})
    memo.save()
    body = json.dumps(entries, separators=(",", ":")).encode()
    head = json.dumps({**memo_module._FORMAT, "sha256": hashlib.sha256(body).hexdigest()})
    assert memo.path.read_bytes() == head.encode() + b"\n" + body + b"\n"


def test_one_stamp_of_many_files_is_that_of_earlier_versions(tmp_path: Path, later: None) -> None:
    """Or hashes that they remembered together would be looked up one by one."""
    paths = [str(tmp_path / f"{n:04d}é.png") for n in range(3)]
    for path in paths:
        Path(path).write_bytes(b"x")
    many = [paths[n % 3] for n in range(2001)]
    wanted = hashlib.sha256()
    for path in many:
        wanted.update(f"{path}\0{stamp_of(os.stat(path))}\0".encode())
    assert files_stamp(many) == (2001, int.from_bytes(wanted.digest()[:16], "big"))
    os.unlink(paths[2])
    assert files_stamp(many) is None


def test_a_change_of_any_of_many_files_is_seen(
    tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First and last of those that are hashed together, and one that is left over."""
    monkeypatch.setattr(memo_module, "NUM_TOGETHER", 4)
    files = [tmp_path / f"{number}.png" for number in range(9)]
    for file in files:
        file.write_bytes(b"one")
    seen = {files_stamp(map(str, files)), files_stamp(map(str, files[:-1]))}
    for file in files:
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        file.write_bytes(b"two")
        os.utime(file, ns=times)
        seen.add(files_stamp(map(str, files)))
    files[3].rename(tmp_path / "3b.png")
    files[3] = tmp_path / "3b.png"
    seen.add(files_stamp(map(str, files)))
    files[5].write_bytes(b"longer")
    seen.add(files_stamp(map(str, files)))
    seen.add(files_stamp(map(str, [files[1], files[0], *files[2:]])))
    assert None not in seen
    assert len(seen) == 2 + 9 + 3


def test_tree_stamp_sees_every_change(tmp_path: Path, later: None) -> None:
    top = tmp_path / "tree"
    (top / "sub").mkdir(parents=True)
    (top / "sub" / "a").write_bytes(b"one")
    (top / "b").write_bytes(b"two")
    seen = [tree_stamp([top])]
    assert tree_stamp([top]) == seen[0]
    (top / "sub" / "c").write_bytes(b"")
    seen.append(tree_stamp([top]))
    (top / "sub" / "c").rename(top / "sub" / "d")
    seen.append(tree_stamp([top]))
    (top / "b").write_bytes(b"owt")
    seen.append(tree_stamp([top]))
    (top / "b").unlink()
    seen.append(tree_stamp([top]))
    assert None not in seen
    assert len(set(seen)) == 5
    assert tree_stamp([tmp_path / "absent"]) is None
    assert tree_stamp([top / "sub" / "a", tmp_path / "absent"]) is not None


def test_tree_stamp_follows_links(tmp_path: Path, later: None) -> None:
    top, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "a").write_bytes(b"one")
    top.mkdir()
    (top / "linked").symlink_to(elsewhere)
    seen = [tree_stamp([top])]
    (elsewhere / "deep" / "a").write_bytes(b"eno")
    seen.append(tree_stamp([top]))
    (elsewhere / "deep" / "b").write_bytes(b"")
    seen.append(tree_stamp([top]))
    (elsewhere / "empty").mkdir()  # a class without pictures, to a reader of folders
    seen.append(tree_stamp([top]))
    assert None not in seen
    assert len(set(seen)) == 4
    (top / "again").symlink_to(top)
    with pytest.raises(OSError, match="symbolic links"):
        tree_stamp([top])


def test_tree_stamp_swallows_no_error(
    tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "gone").symlink_to(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        tree_stamp([tmp_path])
    (tmp_path / "b" / "gone").unlink()
    real = os.listdir

    def listdir(path: str) -> list[str]:
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(PermissionError):
        tree_stamp([tmp_path])


def test_tree_stamp_refuses_young_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    assert tree_stamp([tmp_path]) is None

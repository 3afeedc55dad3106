"""The files in a tar archive, from front to back.

Headers are parsed by the standard library's `TarInfo.frombuf`, but not read by its `TarFile`, which
takes a damaged header for the end of the archive and reserves whatever memory a header claims.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from featcache.errors import UserError, shown

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBERS = 10_000_000
MAX_HEADER_BYTES = 2**20
"""The longest GNU name or pax header that is read."""
_PIECE_BYTES = 2**20
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


class Stream(Protocol):
    """A file that is read from front to back."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        name: As the archive has it; bytes that are not UTF-8 as surrogates.
        offset: Where its bytes start.
        size: How many there are.
        data: Its bytes, if they were asked for.
        is_file: False of links and devices, which have no bytes.
    """

    name: str
    offset: int
    size: int
    data: bytes | None
    is_file: bool = True


def members(stream: Stream, shard: str, is_wanted: Callable[[str, int], bool]) -> Iterator[Member]:
    """The files of an archive, in order; folders are left out.

    Args:
        stream: The archive.
        shard: Its name, for messages.
        is_wanted: By a file's name and size, whether its bytes are read.

    Raises:
        UserError: It is compressed, not a tar archive, damaged, or cut off; the message names the
            member.
    """
    tape = _Tape(stream, shard)
    records: dict[str, str] = {}  # of the next member
    for _ in range(MAX_MEMBERS):
        header = tape.header()
        if header is None:
            return
        tape.member = name = records.get("path", header.name)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            records["path"] = _text(tape.record(header).split(b"\0", 1)[0])
            continue
        if header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            data = tape.record(header)
            if header.type == tarfile.XHDTYPE:
                records |= tape.pax_records(data)
            continue
        digits = records.get("size", str(header.size))
        if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
            raise tape.damage("has a size that cannot be")
        if header.issparse() or any(key.startswith("GNU.sparse") for key in records):
            raise tape.damage("is stored as sparse")
        start, size = tape.offset, int(digits)
        if header.type in _FILES:
            is_kept = is_wanted(name, size)
            data = tape.take(size, is_kept=is_kept)
            yield Member(name, start, size, data if is_kept else None)
            tape.take(-size % BLOCK)
        elif not header.isdir():
            yield Member(name, start, 0, None, is_file=False)
        records = {}
    raise UserError(f"{shard} has more than {MAX_MEMBERS:,} members: make smaller shards")


class _Tape:
    """Reads an archive and keeps track of where it is, for messages."""

    def __init__(self, stream: Stream, shard: str) -> None:
        self._stream = stream
        self._shard = shard
        self.offset = 0
        self.member = "its start"

    def damage(self, what: str) -> UserError:
        """What is wrong with the member that is being read."""
        return UserError(
            f"{self._shard} is damaged or cut off: {shown(self.member)} {what} (byte "
            f"{self.offset:,}); make or download it again"
        )

    def take(self, size: int, *, is_kept: bool = True) -> bytes:
        """Exactly the next `size` bytes, or nothing where they are not to be kept."""
        pieces = []
        while size > 0:
            piece = self._stream.read(min(size, _PIECE_BYTES))
            if not piece:
                raise self.damage("ends early")
            if is_kept:
                pieces.append(piece)
            self.offset += len(piece)
            size -= len(piece)
        return b"".join(pieces)

    def header(self) -> tarfile.TarInfo | None:
        """The next header, or None for the block of zeros that ends an archive."""
        is_first, block = self.offset == 0, self._stream.read(BLOCK)
        while 0 < len(block) < BLOCK and (more := self._stream.read(BLOCK - len(block))):
            block += more
        if len(block) == BLOCK and not block.strip(b"\0"):
            self._check_end()
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if not is_first:
                raise self.damage("is followed by neither a header nor an end mark") from error
            what = "is not a tar archive, or its start is damaged: make or download it again"
            if block.startswith(_COMPRESSED):
                what = "is compressed, which leaves no way to single images: unpack it to .tar"
            raise UserError(f"{self._shard} {what}") from error
        self.offset += BLOCK
        return header

    def _check_end(self) -> None:
        while piece := self._stream.read(_PIECE_BYTES):
            if piece.strip(b"\0"):
                raise UserError(
                    f"{self._shard} goes on after its end mark, as archives joined with cat do: "
                    "keep them as shards of their own, or join them with tar --concatenate"
                )

    def record(self, header: tarfile.TarInfo) -> bytes:
        """The content of a header that describes the next member."""
        if not 0 <= header.size <= MAX_HEADER_BYTES:
            raise self.damage(f"has an extra header of {header.size:,} bytes")
        return self.take(header.size + -header.size % BLOCK)[: header.size]

    def pax_records(self, rest: bytes) -> dict[str, str]:
        """The records of a pax header, each `LENGTH KEY=VALUE` and a line feed."""
        found = {}
        while rest.strip(b"\0"):
            digits = rest[:8].split(b" ")[0]
            length = int(digits) if digits.isdigit() else 0
            key, equals, value = rest[len(digits) + 1 : length - 1].partition(b"=")
            if not equals or rest[length - 1 : length] != b"\n":
                raise self.damage("has a damaged pax header")
            found[_text(key)] = _text(value)
            rest = rest[length:]
        return found


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")

"""Metadata is read from a safetensors file's header alone, with the checks of a whole read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featcache.errors import UserError
from featcache.tensor_files import MAX_HEADER_BYTES, read_metadata, read_tensor_file


def with_header(text: str, length: int | None = None) -> bytes:
    header = text.encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header


def test_metadata_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(json.dumps({"__metadata__": {"key": "value"}})) + bytes(1000))
    assert read_metadata(path) == read_tensor_file(path).metadata == {"key": "value"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is shorter than its header"),
        (with_header("{}", 3), "it is shorter than its header"),
        (with_header("{}", 2**63), "it is shorter than its header"),
        (
            with_header(" " * (MAX_HEADER_BYTES + 1)),
            f"its header has more than {MAX_HEADER_BYTES:,} bytes",
        ),
        (with_header('{"a": 1, "a": 2}'), "duplicate key a in its header"),
        (
            with_header('{"__metadata__": {"a": 1}}'),
            "its header is not a table with metadata of strings",
        ),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    for read in (read_metadata, lambda path: read_tensor_file(path).metadata):
        with pytest.raises(UserError) as caught:
            read(path)
        text = f"{path} is not a safetensors file ({reason}); give another file"
        assert str(caught.value) == text

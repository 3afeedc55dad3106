"""Every kind of picture comes out right, or with the reason why not."""

from __future__ import annotations

import io
import os
import random
import struct
import sys
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, features

from data_helpers import encoded
from featcache.data import images
from featcache.data.images import REASONS, BadImage, decode, decoded, read_file, to_rgb

GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def colours(side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey_of(data: bytes) -> np.ndarray:
    rgb = pixels(data)
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0]


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert REASONS[caught.value.code] == caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_lossless_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(colours())
    if kind == "GIF":
        image = image.quantize(64)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(pixels(encoded(image, kind, **options)), expected)


@pytest.mark.parametrize(("kind", "codec"), [("AVIF", "avif"), ("JPEG2000", "jpg_2000")])
def test_newer_formats_where_pillow_reads_them(kind: str, codec: str) -> None:
    if not features.check(codec):
        pytest.skip(f"this Pillow has no {codec}")
    data = encoded(Image.fromarray(colours(32)), kind)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(pixels(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a" + bytes(30), "JPEG XL"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
    ],
)
def test_a_format_that_pillow_does_not_read_is_named(
    start: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    readable = {
        key: value for key, value in Image.OPEN.items() if key not in ("AVIF", "HEIF", "JXL")
    }
    monkeypatch.setattr(Image, "OPEN", readable)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadImage) as caught:
        decode(start)
    install = "python -m pip install pillow-heif, or " if name == "HEIC" else ""
    assert str(caught.value) == (
        f"other ({name}, which Pillow does not read here: {install}convert it to JPEG or PNG)"
    )


def test_jpeg_is_what_pillow_decodes() -> None:
    data = encoded(Image.fromarray(colours(40)), "JPEG", quality=80)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(pixels(data), np.asarray(image))


@pytest.mark.parametrize(
    ("least", "size"), [(8, (8, 12)), (9, (16, 24)), (31, (32, 48)), (33, (64, 96)), (99, (64, 96))]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_decoded_as_small_as_asked(least: int, size: tuple[int, int], mode: str) -> None:
    smooth = Image.fromarray(colours()).resize((64, 96), Image.Resampling.BICUBIC).convert(mode)
    data = encoded(smooth, "JPEG", quality=95, progressive=True)
    with decoded(data, least) as image:
        assert (image.mode, image.size) == ("RGB", size)
        wanted = decode(data).resize(size, Image.Resampling.BOX)
        assert np.abs(np.asarray(image, int) - np.asarray(wanted)).mean() < 6


def test_fast_decoding_turns_upright_and_refuses_what_decoding_refuses() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(colours(32))
    with decoded(encoded(picture.resize((64, 96)), "JPEG", exif=exif), 30) as image:
        assert image.size == (48, 32)
    with decoded(encoded(picture), 8) as image:  # PNG
        np.testing.assert_array_equal(np.asarray(image), colours(32))
    data = encoded(picture, "JPEG")
    with pytest.raises(BadImage, match="truncated"), decoded(data[: len(data) // 2], 8):
        pass


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_8_bit_grey(kind: str) -> None:
    np.testing.assert_array_equal(grey_of(encoded(Image.fromarray(GREY), kind)), GREY)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_1_bit(kind: str) -> None:
    bits = np.eye(8, dtype=bool)
    np.testing.assert_array_equal(grey_of(encoded(Image.fromarray(bits), kind)), bits * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    wide = GREY.astype(np.uint16) * 257
    np.testing.assert_array_equal(grey_of(encoded(Image.fromarray(wide), kind)), GREY)


def test_16_bit_rounds_to_nearest() -> None:
    wide = np.array([[0, 128, 129, 65535 - 129, 65535 - 128, 65535]], dtype=np.uint16)
    expected = [[0, 0, 1, 254, 255, 255]]
    assert grey_of(encoded(Image.fromarray(wide))).tolist() == expected


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_of_either_byte_order(order: str) -> None:
    wide = (GREY.astype(np.uint16) * 257).astype(order + "u2")
    image = Image.frombytes("I;16" if order == "<" else "I;16B", (8, 8), wide.tobytes())
    np.testing.assert_array_equal(grey_of(encoded(image, "TIFF")), GREY)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_16_bit_tiff_where_white_is_zero(compression: str | None) -> None:
    wide = Image.fromarray(GREY.astype(np.uint16) * 257)
    data = encoded(wide, "TIFF", compression=compression, tiffinfo={274: 3})
    place = data.index(struct.pack("<H", 262)) + 8  # where the entry's value is
    assert data[place] == 1
    white_is_zero = data[:place] + b"\0" + data[place + 1 :]
    np.testing.assert_array_equal(grey_of(white_is_zero), 255 - GREY[::-1, ::-1])


def test_16_bit_grey_with_a_transparent_value() -> None:
    wide = np.array([[0, 257, 2570, 2571]], dtype=np.uint16)
    assert grey_of(encoded(Image.fromarray(wide), transparency=2570)).tolist() == [[0, 1, 255, 10]]


@pytest.mark.parametrize(("scale", "white"), [(1 / 255, 1.0), (1.0, 255.0), (257.0, 65535.0)])
def test_float_tiff_by_its_range(scale: float, white: float) -> None:
    values = GREY.astype(np.float32) * np.float32(scale)
    values[0, 0] = white
    expected = GREY.copy()
    expected[0, 0] = 255
    np.testing.assert_array_equal(grey_of(encoded(Image.fromarray(values), "TIFF")), expected)


def test_32_bit_integers_count_as_16_bits() -> None:
    values = GREY.astype(np.int32) * 257
    np.testing.assert_array_equal(grey_of(encoded(Image.fromarray(values), "TIFF")), GREY)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0, 70000.0])
def test_numbers_without_a_meaning_are_refused(wrong: float) -> None:
    values = GREY.astype(np.float32)
    values[3, 3] = wrong
    assert reason(encoded(Image.fromarray(values), "TIFF")) == "other"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_over_white(kind: str) -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[..., 3] = GREY
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    got = pixels(encoded(Image.fromarray(rgba), kind, **options))
    alpha = GREY / 255.0
    np.testing.assert_allclose(got[..., 0], 200 * alpha + 255 * (1 - alpha), atol=0.51)
    np.testing.assert_allclose(got[..., 1], 255 * (1 - alpha), atol=0.51)


def test_grey_with_alpha() -> None:
    la = np.dstack([np.full((8, 8), 100, np.uint8), GREY])
    alpha = GREY / 255.0
    got = grey_of(encoded(Image.fromarray(la)))
    np.testing.assert_allclose(got, 100 * alpha + 255 * (1 - alpha), atol=0.51)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_palette_with_transparency(transparency: int | bytes) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    got = pixels(encoded(image, transparency=transparency))[0].tolist()
    assert got[0] == [10, 20, 30]
    assert got[1] == [255, 255, 255]
    half = [70, 80, 90] if transparency == 1 else [162, 167, 172]  # 255 - (255 - c) * 128 / 255
    np.testing.assert_allclose(got[2], half, atol=0.51)


def test_palette_without_transparency() -> None:
    image = Image.fromarray(colours()).quantize(16)
    np.testing.assert_array_equal(pixels(encoded(image)), np.asarray(image.convert("RGB")))


def test_transparent_colour_of_rgb_and_grey() -> None:
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(encoded(rgb, transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [4, 5, 6]]
    gray = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert grey_of(encoded(gray, transparency=7)).tolist() == [[255, 8]]


def test_cmyk_jpeg_with_adobes_inverted_inks() -> None:
    rgb = np.zeros((32, 32, 3), np.uint8)
    rgb[..., 0] = 200
    data = encoded(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    np.testing.assert_allclose(pixels(data)[16, 16], [200, 0, 0], atol=6)


def test_cmyk_tiff() -> None:
    rgb = colours()
    image = Image.fromarray(rgb).convert("CMYK")
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(pixels(encoded(image, "TIFF")), expected)


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels(data)[4, 4].tolist() == [255, 0, 0], kind


def with_orientation(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"  # so that the orientation is not the only entry
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 16, 3), np.uint8))
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(image, kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 700])
def test_exif_turns_the_picture_as_pillow_does(kind: str, orientation: int) -> None:
    data = with_orientation(orientation, kind)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image)
        assert (expected.size == (24, 16)) == (orientation in (5, 6, 7, 8))
        np.testing.assert_array_equal(pixels(data), np.asarray(expected.convert("RGB")))


def exif_block(order: str, kind: int = 3) -> bytes:
    """EXIF with one entry, orientation 6, as a short (3) or a long (4)."""
    entry = struct.pack(
        order + ("HHIHH" if kind == 3 else "HHII"), 0x0112, kind, 1, 6, *[0][kind - 3 :]
    )
    return (
        b"Exif\0\0"
        + (b"II*\0" if order == "<" else b"MM\0*")
        + struct.pack(order + "IH", 8, 1)
        + entry
        + bytes(4)
    )


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("picture", ["JPEG", "PNG", "WEBP"])
def test_exif_of_either_byte_order_and_damaged(order: str, kind: int, picture: str) -> None:
    def size(block: bytes) -> tuple[int, int]:
        return decode(encoded(Image.new("RGB", (24, 16)), picture, exif=block)).size

    block = exif_block(order, kind)
    assert size(block) == (16, 24)
    for length in range(6, len(block) - 8, 3):
        assert size(block[:length]) in ((24, 16), (16, 24))
    assert size(block[:14]) == (24, 16)
    assert size(block[:6] + b"XX" + block[8:]) == (24, 16)
    wild = block[:10] + struct.pack(order + "IH", 2**32 - 1, 65535) + block[16:]
    assert size(wild) == (24, 16)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("place", ["JPEG xmp", "WEBP xmp", "PNG xmp", "PNG profile", "TIFF xmp"])
def test_orientation_elsewhere_turns_the_picture_as_pillow_does(place: str) -> None:
    kind, where = place.split()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 16, 3), np.uint8))
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    if kind == "TIFF":
        options["tiffinfo"] = {700: XMP}
    elif kind != "PNG":
        options["xmp"] = XMP
    else:
        texts = PngImagePlugin.PngInfo()
        block = exif_block("<")
        if where == "xmp":
            texts.add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=True)
        else:
            texts.add_text(
                "Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True
            )
        options["pnginfo"] = texts
    data = encoded(image, kind, **options)
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened)
        assert expected.size == (24, 16)
        np.testing.assert_array_equal(pixels(data), np.asarray(expected))


def test_a_damaged_exif_block_leaves_the_picture_usable() -> None:
    data = with_orientation(6, "JPEG")
    start = data.index(b"Exif\0\0")
    damaged = data[: start + 14] + b"\xff\xff" + data[start + 16 :]  # 65535 entries
    assert decode(damaged).size in ((16, 24), (24, 16))


def test_reasons_by_content() -> None:
    assert reason(b"") == "empty file"
    for junk in (b"x", b"hello, world" * 100, bytes(1000), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"P9\n"):
        assert reason(junk) == "not an image"
    assert reason(encoded(Image.fromarray(colours(64)), "JPEG")[:-200]) == "truncated"
    assert reason(encoded(Image.fromarray(colours(64)), "PNG")[:-200]) == "truncated"
    assert reason(b"\xff\xd8\xff" + bytes(100)) in ("other", "truncated")


def png_header(width: int, height: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(rows)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 1), (2**27 + 1, 1), (1, 2**30)])
def test_a_bomb_is_refused_before_it_is_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.core, "new", None)
    monkeypatch.setattr(Image.core, "fill", None)
    assert reason(png_header(*size)) == "too large"


def test_between_pillows_warning_and_our_limit_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow warns above this
    assert decode(encoded(Image.fromarray(colours(4)))).size == (4, 4)
    assert decode(encoded(Image.fromarray(colours(4)), "GIF")).size == (4, 4)


def webp_header(width: int, height: int, kind: bytes) -> bytes:
    """34 bytes that ask for a canvas."""
    if kind == b"VP8X":
        body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        body = b"\x2f" + struct.pack("<I", width - 1 | height - 1 << 14) + bytes(5)
    else:
        body = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk.ljust(22, b"\0")


@pytest.mark.parametrize("kind", [b"VP8 ", b"VP8L", b"VP8X"])
def test_a_webp_bomb_lays_out_no_canvas(kind: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "open_header", None)
    with pytest.raises(BadImage, match="16383x16383 px, at most 67108864 in all"):
        decode(webp_header(16383, 16383, kind))


def test_threads_share_the_memory_for_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (100, 100)))
    monkeypatch.setattr(images, "MAX_PICTURE_BYTES", 250_000)
    monkeypatch.setattr(images, "_CORE_BYTES", 0)
    room = images._MemoryBudget()  # for two of 120,000 bytes each
    monkeypatch.setattr(images, "_BUDGET", room)
    inside, most, lock = 0, 0, threading.Lock()

    def work(_: int) -> None:
        nonlocal inside, most
        with decoded(data):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(24)))
    assert most == 2
    with pytest.raises(BadImage, match="too large"):
        decode(encoded(Image.new("RGB", (200, 200))))
    with pytest.raises(BadImage):
        decode(encoded(Image.new("RGB", (100, 100)))[:-30])
    with room.held(250_000):  # all of it is free again
        pass


def with_chunk(png: bytes, kind: bytes, body: bytes, before: bytes) -> bytes:
    chunk = struct.pack(">I", len(body)) + kind + body
    where = png.index(before) - 4
    return png[:where] + chunk + struct.pack(">I", zlib.crc32(kind + body)) + png[where:]


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    ("kind", "head"), [(b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")]
)
def test_bulky_profiles_and_texts_are_left_out(kind: bytes, head: bytes, before: bytes) -> None:
    body = head + zlib.compress(bytes(64 * 2**20), 1)
    good = with_orientation(6, "PNG")
    tracemalloc.start()
    np.testing.assert_array_equal(pixels(with_chunk(good, kind, body, before)), pixels(good))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_many_texts_are_left_out() -> None:
    good = png_header(4, 4, (b"\0" + bytes(12)) * 4)
    data = good
    for _ in range(70):
        data = with_chunk(data, b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 1)), b"IDAT")
    np.testing.assert_array_equal(pixels(data), pixels(good))


def test_a_late_and_doubled_animation_chunk_does_not_warn() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    data = encoded(frames[0], save_all=True, append_images=frames[1:])
    start = data.index(b"acTL") - 4
    chunk = data[start : start + 20]
    end = data.index(b"IEND") - 4
    assert decode(data[:end] + chunk + chunk + data[end:]).size == (8, 8)


def test_a_tiff_with_rows_missing_is_truncated() -> None:
    data = encoded(Image.fromarray(GREY), "TIFF")
    image = Image.open(io.BytesIO(data))
    assert image.tag_v2[257] == 8
    entry = struct.pack("<HHI", 257, image.tag_v2.tagtype[257], 1)
    place = data.index(entry) + len(entry)
    assert reason(data[:place] + struct.pack("<H", 4000) + data[place + 2 :]) == "truncated"


def test_no_memory_is_not_the_pictures_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_upright_rgb", refuse)
    image = Image.fromarray(colours())
    for use in (lambda: decode(encoded(image)), lambda: images.decode_opened(image)):
        with pytest.raises(MemoryError):
            use()


def test_read_file_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def why(path: Path) -> str:
        with pytest.raises(BadImage) as caught:
            read_file(str(path))
        return str(caught.value)

    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "good").write_bytes(b"good")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    assert read_file(str(tmp_path / "good"))[0] == b"good"
    assert why(tmp_path / "empty") == "empty file"
    assert why(tmp_path / "absent") == "missing"
    assert why(tmp_path / "good" / "below") == "missing"
    assert why(tmp_path / "pipe") == "unreadable (not a regular file)"
    assert why(tmp_path).startswith("unreadable (")
    assert why(tmp_path / "loop").startswith("unreadable (")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1)
    assert why(tmp_path / "huge").startswith("too large (")

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images.os, "open", denied)
    assert why(tmp_path / "good") == "unreadable (Permission denied)"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied_for_real(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    (tmp_path / "x").chmod(0)
    with pytest.raises(BadImage, match="unreadable"):
        read_file(str(tmp_path / "x"))


def samples() -> dict[str, bytes]:
    rgb = Image.fromarray(colours(24))
    rgba = Image.fromarray(np.dstack([colours(24), colours(24)[..., 0]]))
    frames = [Image.new("RGB", (12, 12), c) for c in ("red", "blue")]
    newer = {
        kind: encoded(rgba, kind)
        for kind, codec in (("AVIF", "avif"), ("JPEG2000", "jpg_2000"))
        if features.check(codec)
    }
    return newer | {
        "jpeg": encoded(rgb, "JPEG", exif=_exif()),
        "progressive": encoded(rgb, "JPEG", progressive=True),
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "png": encoded(rgb, "PNG", exif=_exif()),
        "rgba": encoded(rgba, "PNG"),
        "palette": encoded(rgb.quantize(16), "PNG", transparency=3),
        "apng": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "bmp": encoded(rgb, "BMP"),
        "ppm": encoded(rgb, "PPM"),
        "tiff": encoded(rgb, "TIFF", exif=_exif()),
        "lzw": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "tiff16": encoded(Image.fromarray(GREY.astype(np.uint16)), "TIFF"),
        "webp": encoded(rgba, "WEBP", exif=_exif()),
    }


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def must_be_picture_or_bad(data: bytes) -> bool:
    """Whether it decodes; anything but BadImage, a warning included, fails the test."""
    try:
        image = decode(data)
    except BadImage:
        return False
    assert image.mode == "RGB"
    assert np.asarray(image).size
    return True


@pytest.mark.parametrize("kind", samples())
def test_cut_at_any_place(kind: str) -> None:
    data = samples()[kind]
    assert must_be_picture_or_bad(data)
    step = max(1, len(data) // 300)
    good = [must_be_picture_or_bad(data[:length]) for length in range(0, len(data), step)]
    # Some formats end with bytes that no pixel needs, but half a file is never a picture.
    assert not any(good[: len(good) // 2])


def mutate(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = (
            rng.randrange(len(damaged)) if rng.random() < 0.5 else rng.randrange(64) % len(damaged)
        )
        damaged[place] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(damaged)


@pytest.mark.parametrize("kind", samples())
def test_damaged_anywhere(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(60):
        must_be_picture_or_bad(mutate(samples_once()[kind], rng))


@pytest.mark.slow
@pytest.mark.parametrize("kind", samples())
def test_damaged_anywhere_at_length(kind: str) -> None:
    rng = random.Random(kind + "slow")
    for _ in range(4000):
        must_be_picture_or_bad(mutate(samples_once()[kind], rng))


_SAMPLES: dict[str, bytes] = {}


def samples_once() -> dict[str, bytes]:
    _SAMPLES.update({} if _SAMPLES else samples())
    return _SAMPLES


def test_no_file_handle_stays_open(tmp_path: Path) -> None:
    listing = Path("/proc/self/fd")
    if not listing.exists():
        pytest.skip("needs /proc")
    before = len(list(listing.iterdir()))
    for number, data in enumerate([*samples().values(), b"junk", b""]):
        file = tmp_path / str(number)
        file.write_bytes(data)
        for content in (data, data[: len(data) // 2]):
            file.write_bytes(content)
            try:
                decode(read_file(str(file))[0])
            except BadImage:
                continue
    assert len(list(listing.iterdir())) == before


def test_to_rgb_keeps_rgb_as_it_is() -> None:
    image = Image.fromarray(colours())
    assert to_rgb(image) is image

"""Pictures from strangers: known by content, refused by their heads, in one sentence, with nothing else started."""

import os
import struct
import subprocess
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hostile import (
    avif,
    chunk,
    directory,
    flat,
    inflating,
    jpeg2000,
    many_scans,
    many_tags,
    moved,
    png,
    saved,
    segment,
    tiff,
    with_exif,
)
from PIL import Image

from controlkit.decoding import MOST_PIXELS, TooLarge, limits, open_picture, read_bytes, sides_of
from controlkit.errors import Invalid, NotFound
from controlkit.images import fit, read_hint, read_picture, read_settings
from limits import limited

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000")


def refused(data, words="", kind=Invalid):
    with limited(), pytest.raises(kind, match=rf"^photo.png .*{words}") as caught:
        open_picture(data, "photo.png")
    said = str(caught.value)
    assert len(said) < 250 and said.isprintable() and "object" not in said
    return said


# --- one list of formats ------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n{} loop\n"


@pytest.mark.parametrize(
    "data",
    [EPS, b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + bytes(18) + EPS, b"P6 60000 60000 255\n",
     b"SIMPLE  =                    T".ljust(80) + b"NAXIS".ljust(80), b"\xd7\xcd\xc6\x9a" + bytes(80),
     b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3), saved(flat(8, 8), "ICO"),
     saved(flat(8, 8), "TGA"), saved(flat(8, 8), "PCX"), b"<svg/>", b"\x00\x00\x01\x00", b"/* XPM */"],
    ids=["eps", "eps in dos", "ppm", "fits", "wmf", "psd", "ico", "tga", "pcx", "svg", "cut ico", "xpm"],
)  # fmt: skip
def test_only_the_named_formats_are_opened_whatever_the_file_is_called(data, monkeypatch):
    def started(*args, **options):
        raise AssertionError("a process was started")

    for owner, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn"), (os, "fork")):
        monkeypatch.setattr(owner, name, started)
    monkeypatch.setattr(Image, "open", started)  # Pillow does not see it at all
    refused(data, "of no known format")


@pytest.mark.parametrize("format", FORMATS)
def test_each_named_format_is_known_by_its_content(format, tmp_path):
    picture = np.full((24, 16, 3), (200, 60, 90), np.uint8)
    (tmp_path / "a.txt").write_bytes(saved(Image.fromarray(picture), format))
    read = read_picture(tmp_path / "a.txt")
    assert read.shape == picture.shape and abs(read.astype(int) - picture).max() <= 16
    assert sides_of((tmp_path / "a.txt").read_bytes(), "a") == (24, 16)


# --- pixels are counted before they are decoded -------------------------------------------------------------


def lying_webp():
    """A canvas of 16384x16384 around a frame of 8x8."""
    frame = saved(flat(8, 8), "WEBP")[12:]
    parts = b"VP8X" + struct.pack("<IB3x", 10, 2) + (16383).to_bytes(3, "little") * 2 + b"ANIM" + struct.pack("<I6x", 6)
    parts += b"ANMF" + struct.pack("<I6x", 16 + len(frame)) + (7).to_bytes(3, "little") * 2 + bytes(4) + frame
    return b"RIFF" + struct.pack("<I", 4 + len(parts)) + b"WEBP" + parts


def gif(screen, frame):
    data = bytearray(saved(flat(8, 8, "L"), "GIF", optimize=False))
    struct.pack_into("<HH", data, 6, *screen)
    struct.pack_into("<HHHH", data, data.index(b"\x2c\0\0\0\0\x08") + 1, 0, 0, *frame)
    return bytes(data)


def jpeg_of(width, height):
    data = bytearray(saved(flat(8, 8), "JPEG"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def bmp(width, height):
    return saved(flat(8, 8), "BMP")[:18] + struct.pack("<ii", width, height) + saved(flat(8, 8), "BMP")[26:]


LARGE = {
    "png": lambda: png(13376, 13376, 1, 0),
    "png tall": lambda: png(1, 65536, 1, 0),
    "jpeg": lambda: jpeg_of(65500, 65500),
    "webp": lying_webp,
    "gif screen": lambda: gif((65535, 65535), (8, 8)),
    "gif frame": lambda: gif((8, 8), (65535, 65535)),
    "bmp": lambda: bmp(65535, -65535),
    "tiff": lambda: tiff({256: (4, 1, 60000), 257: (4, 1, 60000), 278: (4, 1, 60000)}),
    "jpeg 2000": lambda: jpeg2000(width=60000, height=60000),
}


@pytest.mark.parametrize("name", LARGE)
def test_too_many_pixels_are_refused_before_anything_is_decoded(name, monkeypatch):
    data = LARGE[name]()
    monkeypatch.setattr(Image, "open", None)
    assert "make it smaller" in refused(data, r"is \d+x\d+: expected at most", TooLarge)


def test_of_a_moving_picture_the_first_is_read():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    for format in ("PNG", "GIF", "WEBP", "AVIF", "TIFF"):
        data = saved(frames[0], format, save_all=True, append_images=frames[1:])
        red, green, blue = open_picture(data, "x").pixels[8, 8]
        assert red > 240 and green < 16 and blue < 16, format


def test_the_size_within_an_avif_counts_and_not_what_its_boxes_say(monkeypatch):
    told, within = avif(64, 64, (8, 8)), avif(64, 48)
    monkeypatch.setitem(limits._FEWER_PIXELS, "AVIF", 64 * 48)
    assert open_picture(within, "x").pixels.shape == (48, 64, 3)
    refused(told, "is 64x64: expected at most", TooLarge)
    monkeypatch.setitem(limits._FEWER_PIXELS, "AVIF", 64 * 48 - 1)
    refused(within, "is 64x48: expected at most", TooLarge)


def test_a_picture_at_the_limit_is_read_in_little_memory(monkeypatch):
    """At a fortieth of it, in as many pieces: bytes a pixel are what counts."""
    monkeypatch.setattr("controlkit.decoding.pictures._BAND", 1 << 17)
    side = int((MOST_PIXELS / 40) ** 0.5)
    turned = chunk(b"eXIf", directory([(274, 3, 1, 6)]))
    for data, ground in ((png(side, side, 8, 6, turned), "ink"), (png(side, side, 16, 2), None)):
        with limited(growth=2**30 // 40 + 2**22):
            read = open_picture(data, "x", ground, deep=True).pixels
        assert read.shape == (side, side, 3) and not read.any()


def test_pieces_of_a_large_picture_make_the_same_picture(monkeypatch):
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 29, 4), np.uint8))
    files = [saved(rgba, "PNG"), saved(rgba.convert("P"), "PNG", transparency=3), saved(rgba.convert("CMYK"), "JPEG")]
    files += [saved(Image.new("I;16", (29, 37), 770), "PNG"), saved(rgba.convert("RGB"), "WEBP", lossless=True)]
    whole = [open_picture(data, "x", ground) for data in files for ground in ("ink", "#8080ff", None)]
    monkeypatch.setattr("controlkit.decoding.pictures._BAND", 29 * 5)
    parts = [open_picture(data, "x", ground) for data in files for ground in ("ink", "#8080ff", None)]
    assert all(np.array_equal(a.pixels, b.pixels) and a.clear == b.clear for a, b in zip(whole, parts, strict=True))


# --- the formats' own tricks --------------------------------------------------------------------------------

BLACK = saved(flat(8, 8), "PNG")
LONG = struct.pack("<I", 8)
TRICKS = {
    "jpeg of many scans": (lambda: many_scans(60, 64), "more than 50 scans"),
    "jpeg of many segments": (lambda: b"\xff\xd8" + segment(0xE2, b"") * 140_000, "pieces"),
    "jpeg of fill bytes": (lambda: b"\xff\xd8" + b"\xff" * 2_000_000, "too early"),
    "png of many chunks": (lambda: moved(BLACK, chunk(b"tEXt", b"") * 140_000, 33), "pieces"),
    "gif of many blocks": (lambda: moved(gif((8, 8), (8, 8)), b"!\xfe" + b"\1a" * 140_000 + b"\0", 13), "pieces"),
    "tiff of large tiles": (
        lambda: tiff({322: (4, 1, 65536), 323: (4, 1, 32000), 324: (4, 1, 8), 325: (4, 1, 64)}, drop=(273, 278, 279)),
        "tiles are 65536x32000",
    ),
    "tiff of many tags": (lambda: directory([(40000 + k, 7, 900, 0) for k in range(5000)]), "5,000 tags"),
    "tiff of many strips": (
        lambda: tiff({257: (4, 1, 60000), 278: (4, 1, 30000), 273: (4, 60000, 1024)}, LONG * 60000), "60,000 parts, 2"
    ),
    "tiff of tags in one another": (
        lambda: tiff({262: (3, 1, 3), 320: (3, 768, 0), 273: (4, 256, 0)}, bytes(600)), "lie in one another"
    ),
    "tiff of many samples": (lambda: tiff({277: (3, 1, 65535)}), "65535 samples"),
    "tiff of many tiles": (
        lambda: tiff({256: (4, 1, 900), 257: (4, 1, 900), 322: (4, 1, 1), 323: (4, 1, 1), 324: (4, 9, 1024)}, LONG * 9,
                     drop=(273, 278, 279)), "810,000 by its size",
    ),
    "tiff of deep planes": (
        lambda: tiff({258: (3, 3, 1024), 262: (3, 1, 2), 277: (3, 1, 3), 284: (3, 1, 2)}, bytes([16, 0] * 3)),
        "pixel by pixel",
    ),
    "tiff of lzma": (lambda: tiff({259: (3, 1, 34925)}), "compression is number 34925"),
    "jpeg 2000 of many tiles": (lambda: jpeg2000(tile_width=1, tile_height=1, width=5000, height=9), "45,000 tiles"),
    "jpeg 2000 of many channels": (lambda: jpeg2000(channels=16384), "16384 channels"),
    "jpeg 2000 of many layers": (
        lambda: jpeg2000(options={"precinct_size": (32, 32)}, width=4000, height=4000, tile_width=4000,
                         tile_height=4000, layers=65535), "in 65,535 layers",
    ),
    "jpeg 2000 of small blocks": (lambda: jpeg2000(across=0, down=0), "blocks are too small"),
    "jpeg 2000 changed in a tile": (
        lambda: (lambda data: moved(data, b"\xff\x52\0\x0c\0\0\0\1\0\5\4\4\0\1", data.index(b"\xff\x93")))(jpeg2000()),
        "coding changes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRICKS)
def test_a_file_that_asks_for_more_than_its_pixels_need_is_refused(name, monkeypatch):
    make, words = TRICKS[name]
    data = make()
    monkeypatch.setattr(Image, "open", None)
    refused(data, words)


def test_what_carries_no_pixels_is_not_read(monkeypatch):
    """Tags that are each the whole of EXIF, texts that inflate to a gigabyte, profiles, directories below a TIFF's."""
    exif = many_tags(count=3000, size=300_000)
    size = 8 << 20
    files = [
        png(8, 8, extra=chunk(b"eXIf", exif)),
        png(8, 8, extra=inflating(b"zTXt", size) + inflating(b"iTXt", size) + inflating(b"iCCP", size)),
        png(8, 8, extra=chunk(b"acTL", bytes(8)), late=chunk(b"fcTL", bytes(26))),
        with_exif(saved(flat(8, 8), "JPEG"), exif),
        saved(flat(8, 8), "WEBP", exif=exif, lossless=True),
        saved(flat(8, 8), "AVIF", exif=directory([(274, 3, 1, 1)])).replace(b"\x12\x01\x03\0", b"\x12\x01\x03\xff"),
        tiff({34665: (4, 1, 1024), 34853: (4, 1, 1024), 700: (1, 300_000, 0)}, exif[8:]),
    ]
    for data in files:
        with limited(2, 16 << 20):
            assert open_picture(data, "x").pixels.shape == (8, 8, 3)


def test_damaged_exif_does_not_keep_a_picture_from_being_read():
    for exif in (b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"nothing", b"Exif\0\0" * 1000):
        assert open_picture(with_exif(saved(flat(8, 8), "JPEG"), exif), "x").pixels.shape == (8, 8, 3)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_ends_early_is_refused_in_one_sentence(format, capfd):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    options = {"TIFF": {"compression": "tiff_lzw"}, "JPEG2000": {"tile_size": (32, 32)}}.get(format, {})
    data = saved(noise.quantize(200) if format == "GIF" else noise, format, **options)
    kept = data.index(b"jp2c") + 100 if format == "JPEG2000" else len(data) // 2
    refused(data[:kept], "expected a whole PNG")
    refused(data[:11])
    assert capfd.readouterr() == ("", "")


def test_the_libraries_below_pillow_print_nothing(capfd):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    for compression in ("tiff_adobe_deflate", "tiff_lzw", "jpeg"):
        data = bytearray(saved(noise, "TIFF", compression=compression))
        data[2000:3000] = b"\xff" * 1000
        with suppress(Invalid):
            open_picture(bytes(data), "photo.png")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("format", FORMATS)
def test_whatever_is_changed_in_a_file_ends_in_a_picture_or_a_sentence(format, capfd):
    rng = np.random.default_rng(7)
    data = saved(Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)), format)
    with limited():
        for _ in range(150):
            changed = bytearray(data)
            for at in rng.integers(len(data), size=3):
                changed[at] = rng.integers(256)
            try:
                pixels = open_picture(bytes(changed), "x", "ink", deep=True).pixels
                assert pixels.ndim == 3 and pixels.size
            except Invalid as error:
                assert str(error).startswith("x ") and "\n" not in str(error)
    assert capfd.readouterr() == ("", "")


# --- rotation, and 16 bits a sample -------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_the_camera_s_rotation_is_applied_in_every_format_that_has_it(format):
    picture = np.zeros((24, 40, 3), np.uint8)
    picture[:8, :8] = 255
    for turn, corner in enumerate([(0, 0), (0, -1), (-1, -1), (-1, 0), (0, 0), (0, -1), (-1, -1), (-1, 0)], 1):
        exif = Image.Exif()
        exif[274] = turn
        data = saved(Image.fromarray(picture), format, exif=exif)
        read = open_picture(data, "x").pixels
        assert read.shape[:2] == sides_of(data, "x") == ((24, 40) if turn < 5 else (40, 24))
        assert read[corner].min() > 200 and sum(read[y, x].max() > 128 for y in (0, -1) for x in (0, -1)) == 1


def sixteen(pixels, extra=b""):
    """A PNG of 16-bit colours."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    whole = png(pixels.shape[1], pixels.shape[0], 16, 2, extra)
    start = whole.index(b"IDAT") - 4
    return whole[:start] + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_are_kept_whole_and_upright():
    import cv2

    deep = np.random.default_rng(2).integers(0, 65536, (6, 9, 3), np.uint16)
    turned = chunk(b"eXIf", directory([(274, 3, 1, 3)]))
    files = [sixteen(deep), *(cv2.imencode(".tiff", deep[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, code])[1].tobytes()
                              for code in (1, 5, 8))]  # fmt: skip
    for data in files:
        assert np.array_equal(open_picture(data, "x", deep=True).pixels, deep)
    assert np.array_equal(open_picture(sixteen(deep, turned), "x", deep=True).pixels, deep[::-1, ::-1])
    clear = chunk(b"tRNS", deep[0, 0].astype(">u2").tobytes())
    assert open_picture(sixteen(deep, clear), "x", None, deep=True).pixels.shape == (6, 9, 4), "with a mask: 8 bits"


# --- files --------------------------------------------------------------------------------------------------


def test_only_regular_files_of_a_bounded_length_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with (tmp_path / "huge.npy").open("wb") as file:
        file.truncate(limits.MOST_BYTES + 1)
    with limited(2, 1 << 24):
        for read in (read_picture, read_hint):
            for name in ("pipe.png", "zero.png", "."):
                with pytest.raises(NotFound, match="There is no"):
                    read(tmp_path / name)
            with pytest.raises(TooLarge, match="268,435,457 bytes: expected at most"):
                read(tmp_path / "huge.npy")
    (tmp_path / "a.bin").write_bytes(b"abc")
    assert read_bytes(tmp_path / "a.bin", "file") == b"abc"


def test_settings_are_read_without_the_pixels_and_refused_in_words(tmp_path):
    def saved_as(extra):
        (tmp_path / "a.png").write_bytes(png(8, 8, extra=extra)[:-30])
        return tmp_path / "a.png"

    assert read_settings(saved_as(chunk(b"tEXt", b'parameters\0{"seed": 3}'))) == {"seed": 3}
    for extra in (b"", chunk(b"tEXt", b"parameters\0"), chunk(b"tEXt", b"other\0{}")):
        with pytest.raises(Invalid, match="holds no settings"):
            read_settings(saved_as(extra))
    for text in (b"[" * 100_000, b"{", b"3"):
        with limited(), pytest.raises(Invalid, match=r"a\.png"):
            read_settings(saved_as(chunk(b"tEXt", b"controlkit\0" + text)))
    with limited(2, 1 << 25), pytest.raises(Invalid, match=r"cannot be read|holds no settings"):
        read_settings(saved_as(inflating(b"zTXt", 4 << 20).replace(b"zTXta", b"zTXtparameters")))


def test_a_strip_is_not_made_large_only_to_be_cut():
    for shape in ((65535, 1, 3), (1, 65535, 3)):
        strip = np.zeros(shape, np.uint8)
        middle = tuple(side // 2 for side in shape[:2])
        strip[max(middle[0] - 1, 0) : middle[0] + 2, max(middle[1] - 1, 0) : middle[1] + 2] = 200
        for how in ("area", "lines", "nearest"):
            with limited(2, 1 << 26):
                made = fit(strip, (256, 256), how)
            assert made.shape == (256, 256, 3) and made[128, 128].min() > 150


def test_what_comes_from_an_archive_is_not_longer_than_a_file_either(monkeypatch):
    monkeypatch.setattr("controlkit.decoding.pictures.MOST_BYTES", 100)
    refused(BLACK + bytes(100), r"has \d+ bytes: expected at most 100", TooLarge)

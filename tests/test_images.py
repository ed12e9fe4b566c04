"""Pixels and files: ranges, the fitted geometry, the hint's contract, and files that are whole or absent."""

import errno
import json
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from safetensors import SafetensorError, safe_open

from controlkit.errors import UserError
from controlkit.files import write_atomic
from controlkit.hub import shipped_path
from controlkit.images import (
    HintSpec,
    fit,
    grid,
    inner_size,
    read_hint,
    read_picture,
    read_settings,
    stretch,
    surround,
    thumbnail,
    to_pictures,
    to_tensor,
    write_png,
)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- ranges -------------------------------------------------------------------------------------------------


def test_every_grey_level_survives_the_way_to_a_tensor_and_back():
    picture = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = to_tensor([picture, picture[::-1]])
    assert tensor.shape == (2, 3, 16, 16)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert np.array_equal(to_pictures(tensor), [picture, picture[::-1]])


def test_values_beyond_the_range_are_clipped_and_not_wrapped():
    tensor = torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1)
    assert to_pictures(tensor)[0].tolist() == [[[0, 128, 255]]]


# --- geometry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (9, 5), (64, 16), (1, 1)])
@pytest.mark.parametrize("shape", [(8, 8), (7, 13), (40, 20)])
@pytest.mark.parametrize("how", ["area", "lines", "nearest"])
def test_fit_gives_exactly_the_size_asked_for(shape, size, how):
    assert fit(noise(*shape), size, how).shape == (*size, 3)


def test_stretching_and_filling_by_hand():
    """A picture of 2 x 4: the left half black, the right half white, its first row red at the left."""
    picture = np.zeros((2, 4, 3), np.uint8)
    picture[:, 2:] = 255
    picture[0, 0] = (255, 0, 0)
    assert stretch(picture, (4, 4), "nearest").tolist() == np.repeat(picture, 2, 0).tolist()
    assert stretch(picture, (1, 2), "area").tolist() == [[[64, 0, 0], [255, 255, 255]]]
    assert inner_size((2, 4), (4, 4)) == (2, 4) and inner_size((2, 4), (8, 4)) == (2, 4)
    assert inner_size((20, 40), (8, 4)) == (2, 4) and inner_size((1, 1000), (4, 4)) == (1, 4)
    filled = surround(picture, (4, 4), "nearest")
    assert filled[1:3].tolist() == picture.tolist()
    assert (filled[[0, 3]] == 255).all(), "the commonest of its border: 4 white ones, 3 black, 1 red, each corner twice"
    grey = np.array([[[10.0], [20.0], [60.0]]], np.float32)
    assert surround(grey, (3, 3))[0].tolist() == [[20.0]] * 3, "the median of its border"


def test_around_a_picture_with_a_mask_all_is_masked():
    filled = surround(np.full((2, 4, 4), 255, np.uint8), (4, 4))
    assert (filled[[0, 3]] == 0).all() and (filled[1:3] == 255).all()


def test_thin_lines_stay_when_one_side_alone_shrinks():
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[:, 31] = 255
    assert stretch(lines, (64, 8), "lines").max() == 255 and stretch(lines, (64, 8), "lines").max(0).any()
    assert stretch(lines, (8, 64), "lines")[:, 31].min() == 255 and stretch(lines, (8, 64), "lines")[:, 30].max() == 0


def test_fit_leaves_a_picture_of_the_right_size_alone():
    picture = noise(6, 10)
    assert np.array_equal(fit(picture, (6, 10)), picture)


@pytest.mark.parametrize("turn", [lambda p: p, lambda p: p.swapaxes(0, 1)], ids=["wide", "tall"])
def test_fit_keeps_the_middle_and_crops_both_sides(turn):
    picture = noise(4, 12)
    assert np.array_equal(fit(turn(picture), (4, 4)), turn(picture[:, 4:8]))


def test_fit_scales_both_sides_alike():
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[5:15, 15:25] = 255  # a square of half the height
    white = fit(picture, (40, 40), "nearest")[..., 0] > 0
    assert np.array_equal(np.argwhere(white)[[0, -1]], [[10, 10], [29, 29]])


def test_area_shrinks_by_averaging_and_nearest_keeps_labels():
    board = np.indices((8, 8)).sum(0)[..., None].repeat(3, 2) % 2 * 200
    board = board.astype(np.uint8)
    assert set(fit(board, (4, 4), "area").flat) == {100}
    assert set(fit(board, (3, 3), "nearest").flat) <= {0, 200}
    assert set(fit(board, (20, 20), "nearest").flat) == {0, 200}


# --- the hint's contract ------------------------------------------------------------------------------------


def test_a_contract_survives_json():
    contract = HintSpec(
        "scribble", {"width": 0.1}, channels=1, low=-1.0, high=2.0, colour_order="BGR", resize="nearest"
    )
    assert HintSpec.from_json(contract.to_json()) == contract


def test_the_shipped_contracts_are_read_and_written_with_the_file_s_key_for_masked_values():
    with safe_open(shipped_path("union") / "diffusion_pytorch_model.safetensors", "pt") as file:
        metadata = file.metadata()
    texts = [metadata["controlkit.hint"], *json.loads(metadata["controlkit.hints"]).values()]
    assert [json.loads(HintSpec.from_json(text).to_json()) for text in texts] == [json.loads(text) for text in texts]
    assert HintSpec.from_json(json.loads(metadata["controlkit.hints"])["inpaint"]).mask_value == -1
    assert {"mark", "mask_value"} & json.loads(texts[0]).keys() == {"mark"}


@pytest.mark.parametrize(
    "change",
    [{"mask_value": -1.0}, {"mark": "-1"}, {"mark": True}, {"mark": math.inf}, {"channels": 3.5}, {"annotator": 3}]
    + [{"options": {"low": "1"}}, {"resize": "cubic"}, {"tone": 1}, {"annotator": "x" * 101}, {"annotator": "x\n"}],
    ids=str,
)
def test_a_contract_with_unknown_keys_or_wrong_values_is_refused(change):
    given = json.loads(HintSpec("inpaint", mask_value=-1.0).to_json()) | change
    with pytest.raises(ValueError):
        HintSpec.from_json(json.dumps(given))
    for text in ("3", "[]", "{}", "[" * 10**5):
        with pytest.raises(ValueError):
            HintSpec.from_json(text)


def test_a_hint_is_read_as_its_contract_says():
    picture = noise(4, 6)
    expected = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
    assert torch.allclose(HintSpec("canny").tensor(picture, (4, 6)), expected)
    assert torch.allclose(HintSpec("canny", low=-1, high=3).tensor(picture, (4, 6)), expected * 4 - 1)
    assert torch.allclose(HintSpec("canny", colour_order="BGR").tensor(picture, (4, 6)), expected.flip(1))
    grey = (expected * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    assert torch.allclose(HintSpec("canny", channels=1).tensor(picture, (4, 6)), grey, atol=1 / 255)


def test_a_thin_line_does_not_fade_when_it_shrinks():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[33] = 255
    assert fit(picture, (8, 8), "lines").max(axis=(1, 2)).tolist() == [0, 0, 0, 0, 255, 0, 0, 0]
    assert fit(picture, (8, 8), "area").max() < 64


def test_the_resize_rule_is_part_of_the_contract():
    picture, size = noise(9, 9), (4, 4)
    area, nearest = (HintSpec("canny", resize=how).tensor(picture, size) for how in ("area", "nearest"))
    assert area.shape == nearest.shape == (1, 3, 4, 4)
    assert not torch.equal(area, nearest)


def test_a_picture_from_a_file_becomes_a_hint_without_a_warning(tmp_path):
    write_png(tmp_path / "hint.png", noise(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HintSpec("canny").tensor(read_picture(tmp_path / "hint.png"), (4, 4))


# --- reading ------------------------------------------------------------------------------------------------

RED, WHITE = (255, 0, 0), (255, 255, 255)


def _palette(path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, 0, 0, 255])
    picture.putdata([0, 1])
    picture.save(path, transparency=1)


def _keyed(path):
    Image.fromarray(np.array([[RED, (0, 0, 255)]], np.uint8)).save(path, transparency=(0, 0, 255))


READABLE = {
    "rgba.png": lambda path: Image.fromarray(np.array([[(*RED, 255), (0, 0, 0, 0)]], np.uint8)).save(path),
    "palette.png": _palette,
    "keyed.png": _keyed,
    "cmyk.tiff": lambda path: Image.fromarray(np.array([[[0, 255, 255, 0], [0] * 4]], np.uint8), "CMYK").save(path),
    "plain.webp": lambda path: Image.fromarray(np.array([[RED, WHITE]], np.uint8)).save(path, lossless=True),
}


@pytest.mark.parametrize("name", READABLE)
def test_any_kind_of_file_is_read_as_rgb_on_white(name, tmp_path):
    READABLE[name](tmp_path / name)
    assert read_picture(tmp_path / name).tolist() == [[list(RED), list(WHITE)]]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert read_picture(tmp_path / "half.png").tolist() == [[[255, 127, 127]]]


def drawn_in(colour, side=32):
    """A stroke of a colour on a clear ground whose hidden colour is white, as drawing programs leave it."""
    picture = np.full((side, side, 4), (255, 255, 255, 0), np.uint8)
    picture[8:24, 14:18] = (*colour, 255)
    return picture


@pytest.mark.parametrize(
    ("colour", "ground", "nothing"),
    [
        ((255, 255, 255), "black", (0, 0, 0)),
        ((255, 0, 0), "black", (0, 0, 0)),
        ((255, 0, 0), "white", (255, 255, 255)),
        ((200, 100, 255), "#8080ff", (128, 128, 255)),
        ((255, 255, 255), "white", (0, 0, 0)),  # white on white would be nothing
        ((0, 0, 0), "ink", (255, 255, 255)),
        ((255, 0, 0), "ink", (0, 0, 0)),
        ((0, 0, 0), "black", (0, 0, 0)),  # a depth, say: nothing is there, and nothing is made up
    ],
)
def test_a_ground_is_laid_under_what_is_clear_unless_it_would_swallow_the_drawing(colour, ground, nothing, tmp_path):
    Image.fromarray(drawn_in(colour)).save(tmp_path / "a.png")
    Image.fromarray(drawn_in(colour)).save(tmp_path / "a.webp", lossless=True)
    for name in ("a.png", "a.webp"):
        for read in (read_picture, read_hint):
            picture = read(tmp_path / name, ground)
            assert picture.shape == (32, 32, 3)
            assert tuple(picture[0, 0]) == nothing and tuple(picture[10, 15]) == colour


def test_clear_pixels_of_a_palette_and_of_a_mask_are_read_as_such(tmp_path):
    keyed = Image.fromarray(np.zeros((8, 8), np.uint8), "P")
    keyed.putpalette([255, 255, 255, 255, 0, 0])
    keyed.putpixel((3, 3), 1)
    keyed.save(tmp_path / "keyed.png", transparency=0)
    hint = read_hint(tmp_path / "keyed.png")
    assert tuple(hint[0, 0]) == (0, 0, 0) and tuple(hint[3, 3]) == (255, 0, 0)
    assert (
        read_hint(tmp_path / "keyed.png", None)[..., 3].tolist()
        == read_picture(tmp_path / "keyed.png", None)[..., 3].tolist()
    )
    assert read_hint(tmp_path / "keyed.png", None)[0, 0, 3] == 0
    nothing = Image.new("RGBA", (8, 8))
    nothing.save(tmp_path / "nothing.png")
    assert not read_hint(tmp_path / "nothing.png").any(), "nothing at all stays nothing"


def test_sixteen_bit_pictures_keep_their_greys(tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels * 257).save(tmp_path / "deep.png")
    assert np.array_equal(read_picture(tmp_path / "deep.png")[..., 0], levels)


def test_the_camera_s_rotation_is_applied(tmp_path):
    picture, exif = noise(4, 6), Image.Exif()
    exif[0x0112] = 6  # orientation: rotate a quarter turn clockwise to see it upright
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "turned.png"), np.rot90(picture, -1))


def _truncated(path):
    Image.fromarray(noise(32, 32)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:500])


def _bomb(path):
    """A header that promises more pixels than memory should hold."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    Image.new("1", (8, 8)).save(path, "TIFF", tiffinfo=tags)
    data = path.read_bytes()
    for name in (256, 257):  # width and height, little endian entries of type LONG or SHORT
        at = data.index(name.to_bytes(2, "little"), 8)
        data = data[: at + 2] + b"\x04\x00\x01\x00\x00\x00\xff\xff\x00\x00" + data[at + 12 :]
    path.write_bytes(data)


UNREADABLE = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a picture"),
    "truncated": _truncated,
    "bomb": _bomb,
    "float": lambda path: Image.fromarray(np.eye(4, dtype=np.float32)).save(path, "TIFF"),
    "long": lambda path: Image.fromarray(np.eye(4, dtype=np.int32)).save(path, "TIFF"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named_in_one_sentence(name, tmp_path):
    path = tmp_path / f"{name}.png"
    UNREADABLE[name](path)
    with pytest.raises(UserError, match="expected a") as caught:
        read_picture(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(moment, error, tmp_path, monkeypatch):
    path = tmp_path / "kept.bin"
    write_atomic(path, b"old")

    def fail(*args):
        raise error

    monkeypatch.setattr(moment, fail)
    with pytest.raises(type(error)):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_makes_its_folders_and_replaces_the_file(tmp_path):
    path = tmp_path / "a" / "b.bin"
    for data in (b"old, and longer", b"new"):
        write_atomic(path, data)
    assert path.read_bytes() == b"new"


def test_a_png_carries_its_settings(tmp_path):
    picture, settings = noise(4, 4), {"prompt": "a café, »3d«", "seed": 7, "scale": 0.5}
    write_png(tmp_path / "made.png", picture, settings, infotext="a café\nSteps: 1")
    with Image.open(tmp_path / "made.png") as opened:
        assert json.loads(opened.text["controlkit"]) == settings == read_settings(tmp_path / "made.png")
        assert opened.text["parameters"] == "a café\nSteps: 1"
    assert np.array_equal(read_picture(tmp_path / "made.png"), picture)


def test_a_grid_lays_rows_and_columns_out_below_their_labels():
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200)]]
    rows = [[np.full((8, 8, 3), colour, np.uint8) for colour in row] for row in colours]
    plain = grid(rows, cell=16)
    assert plain.shape == (2 * 20 + 4, 2 * 20 + 4, 3)
    assert [tuple(plain[12 + 20 * y, 12 + 20 * x]) for y in (0, 1) for x in (0, 1)] == [*colours[0], *colours[1], WHITE]
    labelled = grid(rows, ["a very long label that cannot fit", "b"], cell=16)
    assert np.array_equal(labelled[20:], plain)
    assert (labelled[:20, 4:20] < 128).any()
    assert (labelled[:20, 20:24] == 255).all(), "a label ran into its neighbour"


def test_labels_of_rows_stand_left_of_them_and_are_broken_between_words():
    rows = [[np.full((8, 8, 3), 30 * i, np.uint8)] * 2 for i in range(3)]
    plain = grid(rows, ["a", "b"], cell=64)
    sheet = grid(
        rows, ["a", "b"], cell=64, row_labels=["one", "", "several words more than fit in the width of a cell"]
    )
    assert np.array_equal(sheet[:, 68:], plain), "the rest is as without them"
    first, second, third = (sheet[24 + 68 * i : 24 + 68 * i + 64, :68] for i in range(3))
    assert (first[:20] < 128).any() and not (first[24:] < 255).any(), "one line"
    assert (second == 255).all()
    assert (third[24:50] < 128).any() and (third[:, 66:] == 255).all(), "several lines, none wider than a cell"


def test_a_thumbnail_is_as_large_as_a_grid_shows_it():
    large, small = noise(300, 200), noise(20, 10)
    assert thumbnail(small) is small and thumbnail(large).shape == (128, 85, 3)
    assert np.array_equal(grid([[large, small]]), grid([[thumbnail(large), thumbnail(small)]]))


def test_a_grid_keeps_each_picture_s_shape():
    sheet = grid([[np.zeros((4, 8, 3), np.uint8)]], cell=16)[4:20, 4:20]
    assert (sheet[4:12] == 0).all() and (sheet[:4] == 255).all() and (sheet[12:] == 255).all()


def test_what_the_weights_writer_says_of_a_full_disk_is_an_error_of_the_disk(tmp_path):
    def full(path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(tmp_path / "weights", full)
    assert caught.value.errno in (errno.EIO, errno.ENOSPC) and caught.value.filename == str(tmp_path / "weights")
    assert not list(tmp_path.iterdir())


def test_written_files_are_as_readable_as_any_other(tmp_path):
    write_atomic(tmp_path / "ours", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode

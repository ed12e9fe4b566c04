"""Plain folders of pictures: what their files' names say, what of them is held out, and the recipe that makes one."""

import re

import numpy as np
import pytest

from controlkit.data import FolderPairs, read_listing, split_folder
from controlkit.errors import UserError
from controlkit.images import write_png
from controlkit.mini import world
from recipes import photos

NAMES = {
    "red-apple": "red apple",
    "cat_face_3": "cat face",
    "Blue Car (2)": "blue car",
    "001_red-apple_3d_2": "red apple 3d",
    "2024-05-01 apple01": "apple",
    "mp3 player": "mp3 player",
    "my mp3": "my mp3",
    "seven 8 nine": "seven 8 nine",
    "cat's eye": "cat's eye",
    "Äpfel_7": "äpfel",
    "photo of a dog": "photo of a dog",
    "IMG_1234": "",
    "DSC00042": "",
    "P1000123": "",
    "00012-3456789": "",
    "Screenshot 2024-05-01 at 12.00.01": "",
    "4f3a9c2e77b1d0aa": "",
}


@pytest.fixture
def folder(tmp_path):
    """``folder(names)`` writes a small picture for each, no two alike."""

    def write(names, place="set"):
        for i, name in enumerate(names):
            write_png(tmp_path / place / f"{name}.png", np.full((8, 8, 3), i, np.uint8))
        return tmp_path / place

    return write


@pytest.mark.parametrize("name", NAMES)
def test_a_file_s_name_is_the_caption_without_counters_and_nothing_if_a_machine_gave_it(name, folder):
    (row,) = read_listing(folder([name])).rows
    assert (row.prompt, row.named) == (NAMES[name], True)


def test_a_written_caption_is_not_taken_for_a_name(folder):
    path = folder(["red apple"])
    (path / "red apple.txt").write_text("an apple")
    (row,) = read_listing(path).rows
    assert (row.prompt, row.named) == ("an apple", False)


def test_a_tenth_is_held_out_by_caption_from_all_of_a_sorted_folder(folder):
    names = [f"{kind} {number}" for kind in "abcdefghijklmnopqrst" for number in range(4)]
    trained, held = ([pair.prompt for pair in part] for part in split_folder(folder(names), 8))
    assert (len(trained), len(held)) == (72, 8)
    assert len(set(trained) & set(held)) <= 1, "but for the border, no caption is on both sides"
    assert set(held) != {"s", "t"}, "not the folder's end"


def test_a_folder_that_grows_keeps_apart_what_it_held_out(folder):
    names = [f"{a}{b}" for a in "abcdefgh" for b in "klmnop"]
    before = {pair.prompt for pair in split_folder(folder(names), 8)[1]}
    more = [f"{a}{b}" for a in "ijk" for b in "klmnop"]
    trained = [pair.prompt for pair in split_folder(folder(names + more, "more"), 8)[0]]
    assert len(before & set(trained)) <= 2 < len(before)


def test_the_recipe_lays_out_what_controls_may_see_and_the_names_say_it(fake_packages, tmp_path):
    count = photos.lay_out(tmp_path / "photos", 32, variants=2)
    emoji = world.load_emoji(32)
    rows = world.rows(emoji, "control")
    pairs = FolderPairs(tmp_path / "photos", 32)
    assert len(pairs) == count == 2 * len(rows)
    said = {f"{emoji.concepts[i]} {emoji.styles[i]}".replace("-", " ") for i in rows}
    assert {pair.prompt for pair in pairs} == said
    held = [concept.replace("-", " ") for concept in world.heldout_concepts()]
    assert not [pair.prompt for pair in pairs if re.sub(r" \w+$", "", pair.prompt) in held]
    assert np.array_equal(pairs[0].picture, world.draw_emoji(emoji, by_name(emoji, pairs[0].prompt), 0, 0)[0])
    with pytest.raises(UserError, match="not empty"):
        photos.lay_out(tmp_path / "photos", 32)
    assert photos.lay_out(tmp_path / "few", 32, count=5) == 5


def by_name(emoji, prompt):
    return next(i for i in range(len(emoji)) if f"{emoji.concepts[i]} {emoji.styles[i]}".replace("-", " ") == prompt)

"""The world: its captions, its drawings, its held-out lists, and where its pictures come from."""

import base64
import hashlib
import io
import re
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import ImageColor

from controlkit.annotators.lines import canny
from controlkit.errors import UserError
from controlkit.hub import Package, fetch_package
from controlkit.measure import edge_f1
from controlkit.mini import world


@pytest.fixture
def emoji(fake_packages):
    return world.load_emoji(32)


# --- captions and draws -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("red-apple", "3d", "teal"), "a red apple, 3d style, on a teal background"),
        (("automobile", "noto", "orange"), "an automobile, noto style, on an orange background"),
    ],
)
def test_a_caption_says_concept_style_and_ground(parts, words):
    assert world.caption(*parts) == words


def test_a_draw_depends_on_its_key_and_not_on_the_order(emoji):
    keys = [(index, seed, visit) for index in (0, 5) for seed in (0, 1) for visit in (0, 1)]
    there = {key: world.draw_emoji(emoji, *key) for key in keys}
    back = {key: world.draw_emoji(emoji, *key) for key in reversed(keys)}
    assert all(np.array_equal(there[key][0], back[key][0]) and there[key][1] == back[key][1] for key in keys)
    assert len({picture.tobytes() for picture, _ in there.values()}) == len(keys), "each key has its own draw"


def test_an_emoji_is_drawn_on_its_caption_s_ground(emoji):
    seen = set()
    for index in range(len(emoji)):
        picture, text = world.draw_emoji(emoji, index, seed=3)
        concept, style, ground = re.fullmatch(r"an? (.+), (.+) style, on an? (.+) background", text).groups()
        assert (concept.replace(" ", "-"), style) == (emoji.concepts[index], emoji.styles[index])
        assert tuple(picture[0, 0]) == world.GROUNDS[ground]
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 2, "something is drawn on it"
        seen.add(ground)
    assert len(seen) > len(world.GROUNDS) / 2
    picture, text = world.draw_emoji(emoji, 0, seed=3, ground="pink")
    assert text.endswith("on a pink background") and tuple(picture[0, 0]) == world.GROUNDS["pink"]


# --- shapes -------------------------------------------------------------------------------------------------


def test_every_css_colour_is_a_key_of_pil_s_table():
    joined = [words.replace(" ", "") for words in world.CSS_COLOURS]
    assert set(joined) <= set(ImageColor.colormap)
    assert len(set(joined)) == len(joined) > 130
    assert len({world.css_rgb(words) for words in world.CSS_COLOURS}) > 130
    assert world.css_rgb("light golden rod yellow") == (250, 250, 210)


def test_shapes_stand_out_from_their_ground_and_their_outline_is_their_edge():
    kinds = Counter()
    for index in range(60):
        picture, outline, prompt = world.draw_shape(64, 0, index)
        front, shape, back = re.fullmatch(r"(.+) (circle|square|star) with (.+) background", prompt).groups()
        kinds[shape] += 1
        levels = [np.dot(world.css_rgb(colour), (0.299, 0.587, 0.114)) for colour in (front, back)]
        assert abs(levels[0] - levels[1]) >= 60
        assert tuple(picture[0, 0]) == world.css_rgb(back)
        assert (picture == world.css_rgb(front)).all(-1).any()
        assert set(np.unique(outline)) == {0, 255} and (outline[..., :1] == outline).all()
        assert not np.concatenate([outline[[0, -1]], outline[:, [0, -1]].swapaxes(0, 1)]).any(), "it is all inside"
        assert edge_f1(canny(picture), outline) > 0.95, f"a perfect {shape} would be marked down"
    assert min(kinds[shape] for shape in world.SHAPES) > 10


def test_a_shape_depends_on_its_key_alone():
    def draw(*key):
        picture, outline, prompt = world.draw_shape(32, *key)
        return picture.tobytes(), outline.tobytes(), prompt

    assert draw(0, 7) == draw(0, 7)
    assert len({draw(0, 7), draw(0, 8), draw(1, 7)}) == 3
    assert {draw(0, i)[2].split(" with ")[0].split()[-1] for i in range(9)} == set(world.SHAPES)
    circles = [world.draw_shape(32, 0, i, ("circle",))[2] for i in range(9)]
    assert all(" circle with " in prompt for prompt in circles)


# --- held out -----------------------------------------------------------------------------------------------


def test_the_held_out_lists_are_sorted_and_well_formed():
    concepts, pictures = world.heldout_concepts(), world.heldout_pictures()
    assert (len(concepts), len(pictures)) == (128, 512)
    assert all(re.fullmatch(r"[a-z0-9-]+", concept) for concept in concepts)
    assert all(picture.partition("/")[0] in world.STYLES and picture.count("/") == 1 for picture in pictures)


def test_nothing_everyday_is_held_out_from_controls():
    everyday = world.everyday_concepts()
    assert len(everyday) > 100 and not everyday & world.heldout_concepts()
    assert all(re.fullmatch(r"[a-z0-9-]+", concept) for concept in everyday)


def test_splits_keep_what_is_held_out_apart(emoji):
    splits = {name: set(world.rows(emoji, name)) for name in ("all", "base", "control")}
    concepts, pictures = (set(world.rows(emoji, name)) for name in ("heldout_concepts", "heldout_pictures"))
    assert concepts and pictures, "the fake packages hold some of both"
    assert splits["all"] == set(range(len(emoji)))
    assert splits["base"] == splits["all"] - pictures
    assert splits["control"] == splits["base"] - concepts
    assert not concepts & pictures
    assert pictures == {
        i for i in splits["all"] if f"{emoji.styles[i]}/{emoji.concepts[i]}" in world.heldout_pictures()
    }
    assert not {emoji.concepts[i] for i in splits["control"]} & world.heldout_concepts()
    assert {emoji.concepts[i] for i in concepts} <= world.heldout_concepts()


# --- where emoji come from ----------------------------------------------------------------------------------


def test_every_style_has_every_concept_once_and_no_skin_tone(emoji):
    assert emoji.rgba.shape == (len(emoji), 32, 32, 4) and emoji.rgba.dtype == np.uint8
    by_style = {style: Counter(c for c, s in zip(emoji.concepts, emoji.styles, strict=True) if s == style)
                for style in world.STYLES}  # fmt: skip
    assert len({frozenset(counts.items()) for counts in by_style.values()}) == 1, "the fake sets hold the same"
    assert set(by_style["3d"].values()) == {1}
    assert "waving-hand" in by_style["3d"] and "horizontal-traffic-light" in by_style["3d"]
    assert not any("skin-tone" in concept for concept in emoji.concepts)


def test_emoji_leave_a_margin_to_be_shifted_in(emoji):
    alpha = emoji.rgba[..., 3]
    assert not alpha[:, [0, 1, -2, -1]].any() and not alpha[..., [0, 1, -2, -1]].any()
    assert alpha.max((1, 2)).min() == 255


def test_emoji_are_rasterised_once(emoji, monkeypatch):
    def fetched(package):
        raise AssertionError(f"{package.name} was fetched again")

    monkeypatch.setattr(world, "fetch_package", fetched)
    assert world.load_emoji(32) is emoji  # as it is held
    monkeypatch.setattr(world, "_HELD", {})
    again = world.load_emoji(32)
    assert (again.concepts, again.styles) == (emoji.concepts, emoji.styles)
    assert np.array_equal(again.rgba, emoji.rgba)
    with pytest.raises(AssertionError, match="fetched again"):
        world.load_emoji(24)


def test_drawing_emoji_without_resvg_says_how_to_get_it(fake_packages, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"controlkit\[world\]"):
        world.load_emoji(20)


# --- packages -----------------------------------------------------------------------------------------------


def tarball(files):
    """A package as npm packs it: (bytes, SHA-512 in base64)."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue(), base64.b64encode(hashlib.sha512(packed.getvalue()).digest()).decode()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An empty ``packages`` folder of a cache of its own."""
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path))
    (tmp_path / "packages").mkdir()
    return tmp_path / "packages"


def test_a_tarball_put_there_by_hand_is_unpacked_once(packages):
    data, digest = tarball({"icons.json": b"{}"})
    package = Package("@scope/set", "1.2.3", digest)
    (packages / "scope-set-1.2.3.tgz").write_bytes(data)
    folder = fetch_package(package)
    assert (folder / "icons.json").read_bytes() == b"{}"
    assert list(packages.iterdir()) == [folder]
    assert fetch_package(package) == folder


def test_a_tarball_with_another_digest_is_refused_and_nothing_is_unpacked(packages):
    _, expected = tarball({"icons.json": b"{}"})
    data, actual = tarball({"icons.json": b"[]"})
    path = packages / "set-1.0.0.tgz"
    path.write_bytes(data)
    with pytest.raises(UserError, match="Delete the file") as caught:
        fetch_package(Package("set", "1.0.0", expected))
    assert all(part in str(caught.value) for part in (str(path), expected, actual))
    assert list(packages.iterdir()) == [path]


def test_without_npm_it_says_which_file_to_put_where(packages, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="npm was not found") as caught:
        fetch_package(Package("@scope/set", "1.2.3", ""))
    assert "scope-set-1.2.3.tgz" in str(caught.value) and str(packages) in str(caught.value)


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """``fake_npm(script)`` puts a shell script in npm's place."""

    def put(script):
        npm = tmp_path / "npm"
        npm.write_text(f"#!/bin/sh\n{script}\n")
        npm.chmod(0o755)
        monkeypatch.setattr("shutil.which", lambda name: str(npm))

    return put


@pytest.mark.parametrize("script", ["echo >&2 'notice'; echo >&2 'ETIMEDOUT'; exit 1", "echo >&2 ETIMEDOUT"])
def test_when_npm_fails_its_own_reason_is_passed_on(script, packages, fake_npm):
    fake_npm(script)
    with pytest.raises(UserError, match=r"npm could not fetch set@1.0.0 \(ETIMEDOUT\)"):
        fetch_package(Package("set", "1.0.0", ""))
    assert not list(packages.iterdir())


def test_what_npm_packs_is_checked_and_unpacked(packages, fake_npm, tmp_path):
    data, digest = tarball({"icons.json": b"{}"})
    (tmp_path / "packed").write_bytes(data)
    fake_npm(f'[ "$1 $2 $3" = "pack set@1.0.0 --pack-destination" ] && cp {tmp_path}/packed "$4/set-1.0.0.tgz"')
    assert (fetch_package(Package("set", "1.0.0", digest)) / "icons.json").read_bytes() == b"{}"

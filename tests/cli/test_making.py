"""Previews on the way, and pictures whose prompt is the caption of a first try."""

import numpy as np
import pytest

from controlkit import measure
from controlkit.backbones import load_base
from controlkit.images import grid, read_picture, read_settings, thumbnail
from controlkit.measure import chosen_caption
from controlkit.measure.captioned import known_concepts
from controlkit.precision import weights_type
from controlkit.sample import PLAIN_PROMPT, Request, Step, generate


def test_a_preview_is_written_every_so_many_steps(run, toy_folder, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("controlkit.cli.making._Following._write_preview", lambda self, step: written.append(step.step))
    command = ["generate", "x", "--base", toy_folder, "--steps", 5, "--num-images", 2, "--out", tmp_path]
    assert run(*command, "--preview", 2)[0] == 0 and written == [2, 4]
    monkeypatch.undo()
    assert run(*command, "--preview", 2)[0] == 0
    base = load_base(toy_folder, dtype=weights_type("cpu"))  # as the command does
    records = generate(base, [Request(prompt="x", steps=5, seed=seed) for seed in (0, 1)])
    [shown] = [record.preview() for record in records if isinstance(record, Step) and record.step == 4]
    assert np.array_equal(read_picture(tmp_path / "preview.png"), grid([shown], cell=256))


def test_taesd_without_previews_is_refused(run, toy_folder, tmp_path):
    code, _, err = run("generate", "x", "--base", toy_folder, "--taesd", tmp_path)
    assert code == 2 and "--preview" in err


def test_a_picture_is_made_again_with_the_caption_of_a_first_one(run, toy_folder, tmp_path, monkeypatch):
    seen = []

    def caption(picture):
        seen.append(picture)
        return f"a thing of kind {len(seen)}"

    monkeypatch.setattr(measure, "caption_with", lambda base, name: (caption, f"by {name}"))
    command = ["generate", "--auto-prompt", "--captioner", "blip", "--base", toy_folder, "--steps", 1]
    code, out, err = run(*command, "--num-images", 2, "--out", tmp_path / "out")
    assert code == 0, err
    rows = []
    for i in range(2):
        first, second = (tmp_path / "out" / f"{name}-{i}.png" for name in ("first", "picture"))
        assert read_settings(first)["prompt"] == PLAIN_PROMPT and np.array_equal(read_picture(first), seen[i])
        words = f"a thing of kind {i + 1}"
        assert read_settings(second)["prompt"] == words and f'{second.name}: "{words}"' in out
        assert read_settings(second)["auto_prompt"] == {"caption": words, "by": "by blip", "first": first.name}
        rows.append([thumbnail(read_picture(path)) for path in (first, second)])
    sheet = grid(rows, ["plain prompt", "its caption"], row_labels=["a thing of kind 1", "a thing of kind 2"])
    assert np.array_equal(read_picture(tmp_path / "out" / "grid.png"), sheet)
    for more in (["x"], ["--grid", "seed=1"], ["--like", tmp_path / "out" / "picture-0.png"]):
        code, _, err = run("generate", "--auto-prompt", "--base", toy_folder, *more)
        assert code == 2 and "leave out the prompt" in err


def test_a_base_of_no_world_is_captioned_by_blip(toy_base, monkeypatch):
    monkeypatch.setattr("controlkit.measure.captioned.load_captioner", lambda name, device: _Blip(name))
    caption, by = measure.caption_with(toy_base)
    assert (caption(np.zeros((8, 8, 3), np.uint8)), by) == ("a picture", "Salesforce/blip-image-captioning-base")
    assert measure.caption_with(toy_base, "mine")[1] == "mine"


class _Blip:
    def __init__(self, name):
        self.name = name

    def __call__(self, pictures):
        return ["a picture"] * len(pictures)


class _Reader:
    """A referee who knows the thing in a caption only where style and ground are right, and else counts these."""

    def __init__(self, words):
        self.parts, self.read = words.split(", "), 0

    def choose(self, pictures, captions):
        self.read += len(captions[0])
        return np.array([np.argmax([self._score(*one.split(", ")) for one in captions[0]])])

    def _score(self, thing, *look):
        right = sum(one in self.parts for one in look)
        return right + (right == 2 and thing == self.parts[0])


@pytest.mark.parametrize(
    "words", ["a red apple, 3d style, on a teal background", "an alien, flat style, on a grey background"]
)
def test_the_nearest_caption_is_found_part_after_part(words):
    reader = _Reader(words)
    assert chosen_caption(reader, np.zeros((8, 8, 3), np.uint8)) == words
    assert len(known_concepts()) == 664 and reader.read < 664 * 60 / 10

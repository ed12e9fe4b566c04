"""The text of settings as A1111 writes it: read by another program's reader, and A1111's own examples read here."""

import json

import numpy as np
import pytest
import sd_parsers

from controlkit.errors import Invalid
from controlkit.images import write_png
from controlkit.sample import ControlRequest, HiresRequest, Request, infotext

FACTS = {"base": "/bases/castle v1.safetensors", "sampler": "DDIM", "width": 64, "height": 96}


def written(facts=None, **settings):
    return infotext.written(Request(**settings), FACTS | (facts or {}))


def settings_of(text):
    return dict(infotext._settings(text.splitlines()[-1]))


def test_sd_parsers_reads_what_is_written(tmp_path):
    control = ControlRequest(name="owner/canny", images="a.png", scale=0.8, mode="prompt")
    text = written(
        prompt="a castle, (old:1.2)\nby the sea: »ruins«",
        negative_prompt="blurry, low: quality",
        scheduler="dpm++ 2m karras",
        steps=12,
        guidance=6.5,
        seed=2**63,
        size=(96, 64),
        controls=[control],
    )
    write_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), {"seed": 1}, infotext=text)
    found = sd_parsers.ParserManager().parse(tmp_path / "a.png")
    [sampler] = found.samplers
    assert found.generator.value == "AUTOMATIC1111"
    assert [one.value for one in sampler.prompts] == ["a castle, (old:1.2)\nby the sea: »ruins«"]
    assert [one.value for one in sampler.negative_prompts] == ["blurry, low: quality"]
    assert (sampler.name, sampler.model.name) == ("DPM++ 2M", "castle v1")
    read = sampler.parameters
    assert (read["steps"], read["cfg_scale"], read["seed"]) == ("12", "6.5", str(2**63))
    assert (read["scheduler"], found.metadata["Size"]) == ("Karras", "64x96")


def test_a_control_is_a_unit_of_the_extension_and_each_type_of_a_union_one():
    union = ControlRequest(
        name="all: in, one.pth",
        images={"canny": "a.png", "depth": "b.png"},
        scale=0.5,
        scales={"depth": 1 / 3},
        start=0.1,
        end=0.6,
        mode="control",
    )
    ready = ControlRequest(name="seg", images="c.png", ready=True)
    facts = {"annotators": [{"canny": "canny", "depth": "midas"}, {"": "seg"}]}
    read = settings_of(written(facts, controls=[union, ready]))
    units = [dict(part.split(": ") for part in read[f"ControlNet {i}"].split(", ")) for i in range(3)]
    assert [one["Module"] for one in units] == ["canny", "midas", "none"]
    assert [one["Model"] for one in units] == ["all  in  one canny", "all  in  one depth", "seg"]
    assert [float(one["Weight"]) for one in units] == [0.5, 1 / 3, 1]
    assert (units[0]["Guidance Start"], units[0]["Guidance End"]) == ("0.1", "0.6")
    assert [one["Control Mode"] for one in units] == [*["ControlNet is more important"] * 2, "Balanced"]
    assert {one["Resize Mode"] for one in units} == {"Crop and Resize"}


def test_values_with_commas_colons_and_ends_of_lines_are_quoted_as_in_json():
    name = 'a, "b": c\nd'
    text = written({"base": name, "vae": "x/y.safetensors"})
    assert f"Model: {json.dumps(name)}, VAE: y, " in text
    assert settings_of(text)["Model"] == name
    assert settings_of(written({"base": '"quoted"'}))["Model"] == '"quoted"'


@pytest.mark.parametrize(("dialect", "skip", "counted"), [("plain", 1, "2"), ("a1111", 2, "2"), ("comfy", -2, "2")])
def test_clip_skip_is_counted_as_a1111_does(dialect, skip, counted):
    assert settings_of(written(dialect=dialect, clip_skip=skip))["Clip skip"] == counted
    assert "Clip skip" not in settings_of(written(dialect=dialect))


def test_what_is_written_is_read_back():
    asked = Request(
        prompt="a castle\n\nby night",
        negative_prompt="fog\nrain",
        dialect="a1111",
        clip_skip=2,
        seed=7,
        size=(96, 64),
        steps=3,
        guidance=1 / 3,
        scheduler="Euler a",
    )
    values, notes = infotext.read(infotext.written(asked, FACTS))
    assert Request(**values) == asked
    assert any('"castle v1"' in note and "--base" in note for note in notes)
    for prompt, negative in (("", None), ("", "fog"), ("x", None)):
        values, _ = infotext.read(written(prompt=prompt, negative_prompt=negative))
        assert (values["prompt"], values.get("negative_prompt")) == (prompt, negative)


def test_loras_stand_in_the_prompt_as_a1111_writes_them():
    text = written({"lora": ["a/old style.safetensors=0.8", "b=c.pt", "d=-1"]}, prompt="a cat")
    assert text.startswith("a cat <lora:old style:0.8> <lora:b=c:1> <lora:d:-1>\nSteps")


# A1111's own example, which its source shows where it reads such texts.
PUBLISHED = """girl with an artist's beret, determined, blue eyes, desert scene, computer monitors, heavy makeup, by \
Alphonse Mucha and Charlie Bowater, ((eyeshadow)), (coquettish), detailed, intricate
Negative prompt: ugly, fat, obese, chubby, (((deformed))), [blurry], bad anatomy, disfigured, poorly drawn face, \
mutation, mutated, (extra_limb), (ugly), (poorly drawn hands), messy drawing
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b"""


def test_the_example_that_a1111_publishes_is_read():
    values, notes = infotext.read(PUBLISHED)
    request = Request(**values)
    assert request.prompt.startswith("girl with an artist's beret") and request.prompt.endswith("detailed, intricate")
    assert request.negative_prompt.startswith("ugly, fat") and request.negative_prompt.endswith("messy drawing")
    assert (request.steps, request.guidance, request.seed, request.size) == (20, 7.0, 965400086, (512, 512))
    assert (request.scheduler, request.dialect, request.clip_skip) == ("Euler a", "a1111", None)
    assert [note for note in notes if "RNG" not in note] == []


LINE = "Steps: 20, Sampler: {}, {}CFG scale: 7, Seed: 1, Size: 512x768"


@pytest.mark.parametrize(
    ("sampler", "schedule", "scheduler", "noted"),
    [
        ("DPM++ 2M Karras", "", "DPM++ 2M Karras", None),  # as versions before 1.9 write it
        ("DPM++ 2M", "Karras", "DPM++ 2M Karras", None),
        ("DPM++ 2M SDE", "Exponential", "DPM++ 2M SDE Exponential", None),
        ("Euler", "SGM Uniform", "Euler SGM Uniform", None),
        ("Euler a", "Automatic", "Euler a", None),
        ("Euler a", "Karras", "Euler a", "Karras"),
        ("UniPC", "Align Your Steps", "UniPC", "Align Your Steps"),
        ("Restart", "Karras", None, "Restart"),
    ],
)
def test_samplers_and_schedule_types_are_schedulers(sampler, schedule, scheduler, noted):
    line = LINE.format(sampler, f"Schedule type: {schedule}, " if schedule else "")
    values, notes = infotext.read(f"x\n{line}, RNG: CPU")
    assert values.get("scheduler") == scheduler and values["size"] == (768, 512)
    assert (noted is None and not notes) or noted in notes[0]


def test_what_cannot_be_taken_over_is_named_in_notes():
    unit = '"Module: canny, Model: c [d14c016b], Weight: 1, Control Mode: Balanced"'
    more = f"Denoising strength: 0.5, Hires upscale: 2, ControlNet 0: {unit}, Model: dream, VAE: soft, Version: v1.10"
    more = f"Clip grid: True, {more}, Variation seed: 5, Variation seed strength: 0.2"
    values, notes = infotext.read(f"x\n{LINE.format('DDIM', '')}, {more}")
    assert len(notes) == 5
    for words in ('"dream", which --base', '"soft", which --vae', "--control", "RNG: CPU", "Clip grid: True"):
        assert any(words in note for note in notes)
    assert "Weight: 1" in notes[-1] and "v1.10" not in notes[-1] and "Hires" not in notes[-1]
    request = Request(**values)
    assert request.hires == HiresRequest(factor=2, strength=0.5) and (request.variation, request.variation_seed) == (
        0.2,
        5,
    )


@pytest.mark.parametrize("text", ["", "a prompt, with: a colon", "x\nSteps: 20, Seed: 1", "Steps, " * 1000])
def test_a_text_without_settings_is_refused(text):
    with pytest.raises(Invalid, match="no last line of settings"):
        infotext.read(text)


@pytest.mark.parametrize("piece", [":", ",", '"', "a:", 'a:"', "a: b, ", '\\"', "Steps: 1, "])
def test_hostile_lines_are_read_in_a_moment(piece):
    line = (piece * infotext.LONGEST)[: infotext.LONGEST - 2]
    dict(infotext._settings(line))
    with pytest.raises(Invalid, match="letters; expected at most"):
        infotext.read(line + "xxx")

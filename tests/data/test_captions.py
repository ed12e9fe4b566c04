"""Captions by BLIP: safely loaded, the same each time, beside pictures or in a set written anew; nobody's are lost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor, ViTConfig
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from controlkit.annotators import annotator
from controlkit.cli import data
from controlkit.data import (
    Captioning,
    build_set,
    load_captioner,
    read_listing,
    unwritten,
    write_captions,
)
from controlkit.data.build import TARGETS
from controlkit.data.captions import CAPTIONER
from controlkit.errors import UserError
from controlkit.images import write_png

SIDE = 16
CANNY = annotator("canny").spec()
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] a red apple blue cat on the table dog circle with background green"


def drawn_blip(seed):
    """A BLIP of next to no size, its weights drawn so wide that what it says depends on the picture."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {"bos_token_id": 5, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}
    text = size | marks | {"vocab_size": len(WORDS.split()), "encoder_hidden_size": 16, "max_position_embeddings": 64}
    vision = size | {"image_size": SIDE, "patch_size": 8}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("blip")
    (root / "vocab.txt").write_text(WORDS.replace(" ", "\n"))
    drawn_blip(59).save_pretrained(root / "blip")
    tokenizer = BertTokenizer.from_pretrained(root)
    BlipProcessor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer).save_pretrained(root / "blip")
    return root / "blip"


@pytest.fixture(scope="module")
def blip(blip_folder):
    return load_captioner(str(blip_folder))


PICTURES = {
    name: np.full((24, 16 + 4 * i, 3), rgb, np.uint8)
    for i, (name, rgb) in enumerate(
        {
            "IMG_1": (255, 0, 0),
            "IMG_2": (0, 255, 0),
            "IMG_3": (0, 0, 255),
            "red apple": (255, 255, 0),
            "told": (9, 9, 9),
        }.items()
    )
}


@pytest.fixture
def photos(tmp_path):
    """Three pictures that nothing is said of, one called something, and one with a caption beside it."""
    for name, picture in PICTURES.items():
        write_png(tmp_path / "photos" / f"{name}.png", picture)
    (tmp_path / "photos/told.txt").write_text("as a person wrote it")
    return tmp_path / "photos"


def prompts(folder):
    return {row.picture.name.rpartition("/")[2].removesuffix(".png"): row.prompt for row in read_listing(folder).rows}


def test_a_caption_depends_on_the_picture_and_on_nothing_else(blip):
    said = blip(list(PICTURES.values()))
    assert all(said) and len(set(said)) == len(said)
    assert said == blip(list(PICTURES.values()))
    assert not any(mark in words for words in said for mark in ("[DEC]", "[SEP]", "[PAD]"))


def test_a_captioner_s_folder_does_not_choose_a_program_to_run(blip, blip_folder, tmp_path):
    shutil.copytree(blip_folder, tmp_path / "blip")
    config = json.loads((tmp_path / "blip" / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part |= {"attn_implementation": "owner/kernel", "_attn_implementation": "owner/kernel"}
    (tmp_path / "blip" / "config.json").write_text(json.dumps(config))
    pictures = [*PICTURES.values()][:2]
    assert load_captioner(str(tmp_path / "blip"))(pictures) == blip(pictures)


def test_pictures_without_a_caption_get_one_beside_them_and_the_others_keep_theirs(run, blip, blip_folder, photos):
    code, out, err = run("data", "caption", photos, "--captioner", blip_folder)
    assert code == 0 and "3 captions written, 2 left as they were" in out, err
    said = prompts(photos)
    bare = ["IMG_1", "IMG_2", "IMG_3"]
    assert [said[name] for name in bare] == blip([PICTURES[name] for name in bare])
    assert (said["red apple"], said["told"]) == ("red apple", "as a person wrote it")
    code, out, _ = run("data", "caption", photos, "--captioner", "nowhere")
    assert code == 0 and "All 5 pictures have captions; 1 of them are their files' names: --replace names" in out


def test_names_and_what_people_wrote_are_written_over_only_if_asked(run, blip, blip_folder, photos):
    assert run("data", "caption", photos, "--captioner", blip_folder, "--replace", "names")[0] == 0
    assert prompts(photos)["told"] == "as a person wrote it"
    said = prompts(photos)["red apple"]
    assert said != "red apple" and (photos / "red apple.txt").read_text() == said + "\n"
    assert run("data", "caption", photos, "--captioner", blip_folder, "--replace", "all")[0] == 0
    assert prompts(photos)["told"] not in ("as a person wrote it", "")
    code, _, err = run("data", "caption", photos, "--replace", "name")
    assert code == 2 and 'did you mean "names"' in err


def test_an_empty_caption_beside_a_picture_was_meant(photos):
    (photos / "IMG_2.txt").touch()
    rows = read_listing(photos)
    assert [rows.rows[i].picture.name.rpartition("/")[2] for i in unwritten(rows, "nothing")] == [
        "IMG_1.png",
        "IMG_3.png",
    ]


@pytest.mark.parametrize("layout", TARGETS)
def test_a_set_written_anew_has_captions_where_there_were_none(layout, blip, photos, tmp_path):
    list(build_set(read_listing(photos), tmp_path / "out", layout, CANNY, captioning=Captioning(blip)))
    listing = read_listing(tmp_path / "out")
    bare = blip([PICTURES[name] for name in ("IMG_1", "IMG_2", "IMG_3")])
    assert (listing.layout, [row.prompt for row in listing.rows]) == (
        layout,
        [*bare, "red apple", "as a person wrote it"],
    )
    told = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
    assert [(line["row"], line["text"]) for line in told] == list(enumerate(bare))


def test_captioning_is_gone_on_with_where_it_was_torn(blip, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("controlkit.data.captions._BATCH", 2)
    listing, whole, out = read_listing(photos), tmp_path / "whole", tmp_path / "out"
    counts = []
    list(build_set(listing, whole, "metadata", CANNY, captioning=Captioning(blip, "all", counts.append)))
    assert counts == [0, 2, 2, 1]
    next(build_set(listing, out, "metadata", CANNY, captioning=Captioning(blip, "all")))
    journal = out / "captions.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]) + lines[3][:9])  # as a killed process leaves it
    (out / ".writing-0").touch()
    counts.clear()
    with pytest.raises(UserError, match="begun with another captions"):
        next(build_set(listing, out, "metadata", CANNY))
    list(build_set(listing, out, "metadata", CANNY, captioning=Captioning(blip, "all", counts.append)))
    assert counts == [2, 2, 1]
    files = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (out, whole)]
    assert files[0] == files[1]


def test_another_set_is_not_built_into_a_folder_begun_with_this_one(photos, tmp_path):
    next(build_set(read_listing(photos), tmp_path / "out", "metadata", CANNY))
    (photos / "IMG_1.png").rename(photos / "IMG_9.png")
    with pytest.raises(UserError, match="begun with another set"):
        next(build_set(read_listing(photos), tmp_path / "out", "metadata", CANNY))


def test_captions_beside_are_refused_where_a_listing_holds_them(run, blip, photos, tmp_path):
    list(build_set(read_listing(photos), tmp_path / "out", "metadata", CANNY))
    code, _, err = run("data", "caption", tmp_path / "out")
    assert code == 2 and "controlkit data build --captions blip" in err
    with pytest.raises(UserError, match="stand in its listing"):
        next(write_captions(read_listing(tmp_path / "out"), blip, [0]))


def test_the_command_line_builds_with_captions(run, blip_folder, photos, tmp_path):
    base = ["data", "build", photos, "--annotator", "canny", "--out", tmp_path / "out"]
    code, _, err = run(*base, "--captions", "bilp")
    assert code == 2 and 'did you mean "blip"' in err
    code, out, err = run(*base, "--captions", "blip", "--captioner", blip_folder, "--device", "cpu")
    assert code == 0 and "5 pairs" in out, err
    assert all(row.prompt for row in read_listing(tmp_path / "out").rows)
    assert f'captioner: CaptionerOption = "{CAPTIONER}"' in Path(data.__file__).read_text()


# --- what is no captioner -----------------------------------------------------------------------------------


def changed(blip_folder, tmp_path, change):
    for path in blip_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change(tmp_path)
    return str(tmp_path)


def edit_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def a_vit(folder):
    ViTConfig(architectures=["ViTModel"]).save_pretrained(folder)


def to_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save(drawn_blip(0).state_dict(), folder / "pytorch_model.bin")


def without_a_layer(folder):
    held = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in held.items() if "crossattention" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


NO_CAPTIONERS = {
    "another kind of model": (a_vit, r"is a ViTModel \(vit\), no captioner"),
    "a BLIP that answers": (edit_config(architectures=["BlipForQuestionAnswering"]), "no captioner: expected a BLIP"),
    "a pickle": (to_pickle, "expected config.json, model.safetensors"),
    "no processor": (lambda folder: [p.unlink() for p in folder.glob("*o*r*.json")], "no whole captioner"),
    "weights that lack some": (without_a_layer, "lacks weights, such as .*crossattention"),
    "code of its own": (edit_config(model_type="mine", auto_map={"AutoConfig": "evil.Config"}), "no whole captioner"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "no whole captioner"),
}


@pytest.mark.parametrize("name", NO_CAPTIONERS)
def test_what_is_no_captioner_is_refused(name, blip_folder, tmp_path):
    change, words = NO_CAPTIONERS[name]
    folder = changed(blip_folder, tmp_path, change)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=words):
        load_captioner(folder)
    assert not (tmp_path / "ran").exists()


def test_a_name_without_a_network_is_refused_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("nobody/no-such-blip", "./nowhere"):
        with pytest.raises(UserError, match="hf download Salesforce/blip-image-captioning-base"):
            load_captioner(name)

"""LoRAs and textual inversions by name: merged for the pictures that ask for them, and gone without a trace."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from controlkit.annotators import contract
from controlkit.backbones import load_base
from controlkit.branch import ControlSpec
from controlkit.controls import new_control
from controlkit.errors import Invalid, Mismatch, NotFound
from controlkit.formats import SavedControl, save_control
from controlkit.images import read_picture, read_settings
from controlkit.sample import Request, maker
from controlkit.serve.loras import Merged, check_loras, told_loras, weights_in
from controlkit.serve.orders import Pictures
from controlkit.serve.settings import Folders
from controlkit.serve.studio import Studio

pytest_plugins = "serving"


def draw_lora(base, path, seed=0, part="lora_unet", endings=("attn1.to_q", "attn2.to_k"), width=None, **metadata):
    """A LoRA of rank 2 for some layers, strong enough to be seen; ``width``: another than the base's."""
    generator = torch.Generator().manual_seed(seed)
    network = base.unet if part == "lora_unet" else base.towers[0].encoder
    tensors = {}
    for name, module in network.named_modules():
        if name.endswith(endings):
            out, into = module.weight.shape
            layer = f"{part}_{name.replace('.', '_')}"
            tensors[f"{layer}.lora_down.weight"] = torch.randn(2, width or into, generator=generator)
            tensors[f"{layer}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
            tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata)


@pytest.fixture(scope="module")
def folder(toy_base, tmp_path_factory):
    """Two LoRAs, one in a folder of its own, and one of another base."""
    found = tmp_path_factory.mktemp("loras")
    draw_lora(toy_base, found / "ink.safetensors", 1, ss_output_name="ink", ss_tag_frequency="x" * 5000)
    draw_lora(toy_base, found / "mine" / "wash.safetensors", 2, endings=("attn1.to_v",))
    draw_lora(toy_base, found / "foreign.safetensors", width=7)
    (found / ".hidden.safetensors").write_bytes(b"")
    (found / "readme.txt").write_text("x")
    return found


@pytest.fixture(scope="module")
def base(toy_folder):
    return load_base(toy_folder)


@pytest.fixture
def studio(base, folder, tmp_path):
    return Studio(base, tmp_path / "pictures", Folders(loras=folder))


def asked(prompt, seed=1, **values):
    request = Request(**{"prompt": prompt, "steps": 2, "guidance": 7.0, "dialect": "a1111"} | values)
    return Pictures(request=request, seeds=((seed, 0),))


def weights_of(base):
    return {f"{i}{k}": v.clone() for i, one in enumerate(base.networks().values()) for k, v in one.state_dict().items()}


def test_pictures_are_those_of_a_base_that_was_loaded_with_the_lora(studio, toy_folder, folder):
    orders = {"plain": asked("a red apple"), "with": asked("a red apple <lora:ink:0.7>"), "again": asked("a red apple")}
    assert len({order.alike for order in orders.values()}) == 2
    found = studio.carry_out(orders, lambda news: ())
    made = {name: read_picture(studio.folder / name / "0.png") for name in orders}
    one = asked("a red apple").request.model_copy(update={"seed": 1})
    [want] = maker(load_base(toy_folder, loras=[(folder / "ink.safetensors", 0.7)]))([one])
    assert abs(made["with"].astype(int) - want.pixels).max() <= 1
    assert (made["plain"] == made["again"]).all()
    assert abs(made["with"].astype(int) - made["plain"]).mean() > 1, "it shows"
    settings = read_settings(studio.folder / "with" / "0.png")
    assert settings["prompt"] == "a red apple <lora:ink:0.7>", "as --like takes it, with --lora-dir"
    assert found["with"]["result"]["texts"][0].startswith("a red apple <lora:ink:0.7>\n")
    assert str(folder) not in json.dumps([settings, found])


def test_without_loras_the_base_is_what_it_was_to_the_bit(base, folder):
    before, merged = weights_of(base), Merged(base, folder)
    merged.take([("ink", 0.7), ("wash", -1.5), ("ink", 0.3)])
    changed = [name for name, weight in weights_of(base).items() if not torch.equal(weight, before[name])]
    assert changed and all("attn" in name for name in changed)
    merged.take([("wash", 1.0)])
    merged.take([])
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(base).items())


@pytest.mark.parametrize("wanted", [[("foreign", 1.0)], [("ink", 1.0), ("foreign", 1.0)]])
def test_one_that_does_not_fit_leaves_nothing_behind(base, folder, wanted):
    before, merged = weights_of(base), Merged(base, folder)
    merged.take([("wash", 1.0)])
    with pytest.raises(Mismatch, match=r"^foreign does not fit the base"):
        merged.take(wanted)
    after = weights_of(base)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    merged.take([("ink", 1.0)])
    merged.take([])


def test_a_job_whose_lora_does_not_fit_fails_alone(studio):
    orders = {"bad": asked("a <lora:foreign:1>"), "gone": asked("a <lora:gone:1>"), "good": asked("a")}
    found = studio.carry_out(orders, lambda news: ())
    assert found["bad"]["fault"] == "Mismatch" and found["gone"]["fault"] == "NotFound" and "result" in found["good"]


def test_a_control_that_is_loaded_meanwhile_reads_the_plain_base(base, folder, drawn_joins, tmp_path, monkeypatch):
    """Controls that are differences to their base take over its weights when they are loaded."""
    from controlkit.serve import studio as module

    branch = drawn_joins(new_control(base, ControlSpec()), base=base)
    save_control(tmp_path / "controls" / "edges", SavedControl(branch, contract("canny")), base)
    studio, plain, seen = (
        Studio(base, tmp_path / "pictures", Folders(tmp_path / "controls", folder)),
        weights_of(base),
        [],
    )
    real = module.load
    monkeypatch.setattr(module, "load", lambda *given: seen.append(weights_of(base)) or real(*given))
    studio.carry_out({"job": asked("a <lora:ink:1>")}, lambda news: ())
    studio.control("edges")
    assert len(seen) == 1 and all(torch.equal(seen[0][name], plain[name]) for name in plain)


def test_textual_inversions_are_words_of_the_base(toy_folder, tmp_path):
    base = load_base(toy_folder)
    width = base.towers[0].encoder.get_input_embeddings().weight.shape[1]
    (tmp_path / "words").mkdir()
    save_file({"emb_params": torch.randn(3, width)}, tmp_path / "words" / "sparkle.safetensors")
    save_file({"emb_params": torch.randn(3, width + 1)}, tmp_path / "words" / "wide.safetensors")
    studio = Studio(base, tmp_path / "pictures", Folders(embeddings=tmp_path / "words"))
    told = studio.facts()["embeddings"]
    assert [*told["loaded"]] == ["sparkle"] and [*told["skipped"]] == ["wide"]
    assert told["loaded"]["sparkle"]["vectors"] == 3 and told["loaded"]["sparkle"]["shape"] == width
    studio.carry_out({"plain": asked("a"), "with": asked("a sparkle")}, lambda news: ())
    plain, spark = (read_picture(studio.folder / name / "0.png").astype(int) for name in ("plain", "with"))
    assert np.abs(plain - spark).max() > 0
    assert studio.facts()["digest"] == load_base(toy_folder).digest, "which controls were trained on"


def test_names_are_checked_before_a_job_is_accepted(base, folder):
    check_loras([("ink", 0.5), ("wash", -1.0)], folder, 2)
    for wanted, words in (
        ([("inc", 1.0)], 'did you mean "ink"'),
        ([("../ink", 1.0)], 'the LoRA "../ink"'),
        ([(str(folder / "ink.safetensors"), 1.0)], "did you mean|Known"),
        ([("ink", 101.0)], "expected -100 to 100"),
        ([("ink", float("nan"))], "expected -100 to 100"),
        ([("ink", 1.0)] * 3, "takes at most 2"),
    ):
        with pytest.raises(Invalid, match=words):
            check_loras(wanted, folder, 2)
    with pytest.raises(Invalid, match="has none"):
        check_loras([("ink", 1.0)], None, 2)
    with pytest.raises(NotFound, match='no LoRA "gone"'):
        Merged(base, folder).take([("gone", 1.0)])


def test_a_folder_is_looked_through_anew_and_tells_no_places(folder, tmp_path):
    assert [*weights_in(folder)] == ["foreign", "ink", "wash"] and weights_in(None) == {}
    told = {one["name"]: one for one in told_loras(folder)}
    assert told["wash"] == {"name": "wash", "alias": "wash", "path": "wash.safetensors", "metadata": {}}
    assert told["ink"]["metadata"] == {"ss_output_name": "ink"}, "long texts are left out"
    (tmp_path / "late.safetensors").write_bytes(b"no weights")
    assert told_loras(tmp_path)[0]["metadata"] == {}


def test_a1111_s_prompts_name_loras(desk_of, client_of, folder, tmp_path):
    at = client_of(desk_of(folders=Folders(loras=folder)))
    assert [one["name"] for one in at.get("/sdapi/v1/loras").json()] == ["foreign", "ink", "wash"]
    post = lambda body: at.post("/sdapi/v1/txt2img", json={"steps": 1} | body)  # noqa: E731
    made = post({"prompt": "a <lora:ink:0.5>", "negative_prompt": "b <lora:wash:1>"})
    assert made.status_code == 200 and "counts in the prompt alone" in made.headers["X-ControlKit-Ignored"]
    assert json.loads(made.json()["info"])["prompt"] == "a <lora:ink:0.5>"
    refused = post({"prompt": "a <lora:inc:0.5>"})
    assert refused.status_code == 422 and 'did you mean "ink"' in refused.json()["detail"]
    assert post({"prompt": "a <lora:inc:0.5>", "disable_extra_networks": True}).status_code == 200
    generate = at.post("/v1/generate", json={"prompt": "a <lora:inc:1>", "dialect": "a1111", "steps": 1})
    assert generate.status_code == 422
    assert at.post("/v1/generate", json={"prompt": "a <lora:inc:1>", "steps": 1}).status_code == 202, "plain words"

"""A1111's API, as its clients use it."""

import base64
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image
from recipes.serve_bodies import programs
from standin import picture

from controlkit.images import png_bytes
from controlkit.serve.front import IGNORED

pytest_plugins = "serving"

STATE = {
    "skipped", "interrupted", "stopping_generation", "job", "job_count", "job_timestamp", "job_no", "sampling_step",
    "sampling_steps",
}  # fmt: skip
INFO = {
    "prompt", "all_prompts", "negative_prompt", "all_negative_prompts", "seed", "all_seeds", "subseed", "all_subseeds",
    "subseed_strength", "width", "height", "sampler_name", "cfg_scale", "steps", "batch_size", "restore_faces",
    "face_restoration_model", "sd_model_name", "sd_model_hash", "sd_vae_name", "sd_vae_hash", "seed_resize_from_w",
    "seed_resize_from_h", "denoising_strength", "extra_generation_params", "index_of_first_image", "infotexts",
    "styles", "job_timestamp", "clip_skip", "is_using_inpainting_conditioning", "version",
}  # fmt: skip


@pytest.fixture
def seen(client, studio):
    """(client, the request of the last order)."""
    return client, lambda: next(iter(studio.batches[-1].values())).request


def made(client, body, route="txt2img"):
    answer = client.post(f"/sdapi/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def refused(client, body, route="txt2img", status=422):
    answer = client.post(f"/sdapi/v1/{route}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()["detail"]


def unit(**fields):
    return {"alwayson_scripts": {"ControlNet": {"args": [{"model": "canny", "module": "canny"} | fields]}}}


def shade(text):
    return int(np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))[0, 0, 0])


@pytest.mark.parametrize("program", programs("", 1))
def test_calls_as_programs_send_them(client, photo, program):
    for method, path, body in programs(photo, 2)[program]:
        answer = client.request(method, path, **({"json": body} if method == "POST" else {}))
        assert answer.status_code == 200, (path, answer.text)
        answer.json()


def test_pictures_come_first_then_the_hints_and_info_is_whole(seen, photo):
    at, request = seen
    answer = made(at, {"prompt": "a", "seed": 7, "steps": 1, "batch_size": 2, "n_iter": "1"} | unit(image=photo)).json()
    assert [shade(one) for one in answer["images"]] == [7, 8, 0]
    info = json.loads(answer["info"])
    assert info.keys() >= INFO and info["all_seeds"] == [7, 8] and info["infotexts"] == ["words"] * 2
    assert answer["parameters"]["steps"] == 1 and request().dialect == "a1111"
    [control] = request().controls
    assert control.name == "canny" and not control.ready and control.images[""].shape == (32, 32, 3)


def test_unknown_fields_at_the_top_are_ignored_and_named(client):
    answer = made(client, {"steps": 1, "auth": "x", "clip_skip": 1, "restore_faces": True})
    assert answer.headers[IGNORED] == "auth; clip_skip; restore_faces"
    assert IGNORED not in made(client, {"steps": 1, "restore_faces": False, "styles": []}).headers


@pytest.mark.parametrize(
    ("key", "said"),
    [(" ", '""'), ("a\r\nX-Evil: 1", "a  X-Evil: 1"), ("\u00e9\u202e", "??"), (" b ", "b"), ("c" * 9000, "c")],
)
def test_the_header_holds_no_more_than_a_header_may(client, key, said):
    told = made(client, {"steps": 1, key: None}).headers[IGNORED]
    assert told.startswith(said) and told == told.strip() and told.isascii() and len(told) < 2100


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"sampler_name": "Euler b"}, 'did you mean "Euler a"'),
        ({"sampler_name": "Euler", "scheduler": "Karas"}, 'did you mean "Karras"'),
        ({"alwayson_scripts": {"controlnets": {"args": []}}}, 'did you mean "controlnet"'),
        ({"script_name": "x/y/z plot"}, "Script"),
        (unit(module="cany"), 'did you mean "canny"'),
        (unit(model="cany [00112233]"), 'did you mean "canny"'),
        (unit(wieght=1), 'no field "wieght": did you mean "weight"'),
        (unit(), "Control unit 0: it has no image"),
        (unit(image="/etc/passwd"), "cannot be read as a picture"),  # which is base64, too
        (unit(image="../a.png"), "Paths are never opened"),
        (unit(image="http://example.com/a.png"), "none is fetched"),
        (unit(image="file:///etc/passwd"), "none is fetched"),
        (unit(ipadapter_input="gASV"), "unpickled"),
        (unit(guidance_start=0.9, guidance_end=0.1), "start <= end"),
        ({"override_settings": {"sd_model_checkpoint": "sdxl"}}, 'no model "sdxl"'),
        ({"prompt": "a <lora:x:1>"}, 'the LoRA "x"'),
        ({"steps": 1000}, "steps is 1000"),
        ({"batch_size": 4, "n_iter": 5}, "20 pictures"),
        ({"width": 4096, "height": 64}, "sides of at most"),
        ({"enable_hr": True, "hr_upscaler": "ESRGAN_4x"}, "no upscaler"),
        ({"steps": "many"}, "expected a number"),
        ({"width": "NaN"}, "expected a number"),
    ],
)
def test_what_is_refused_is_named_with_the_nearest(client, body, words):
    assert words in refused(client, {"steps": 1} | body)


def test_units_as_they_come(seen, photo):
    at, request = seen
    off = {"enabled": False, "model": "no such", "module": "no such"}
    both = [
        off,
        {"module": "none", "model": "None", "image": ""},
        {"module": "None", "model": "canny [00112233]", "image": f"data:image/png;base64,{photo}", "weight": "0.5",
         "control_mode": 1, "resize_mode": "Resize and Fill", "guidance_end": 0.5},
        {"module": "canny", "model": "canny", "input_image": photo, "threshold_a": 30, "threshold_b": 60, "weight": 7},
        {"module": "canny", "model": "union", "image": {"image": photo, "mask": photo}},
        {"module": "none", "model": "union", "image": photo, "union_control_type": "Depth"},
    ]  # fmt: skip
    answer = made(at, {"steps": 1, "alwayson_scripts": {"controlnet": {"args": both}}})
    first, second, third, fourth = request().controls
    assert (first.ready, first.scale, first.mode, first.resize, first.end) == (True, 0.5, "prompt", "fill", 0.5)
    assert (second.options, second.scale, second.ready) == ({"low": 30, "high": 60}, 2.0, False)
    assert [*third.images] == ["canny"] and third.annotators in ({}, {"canny": "canny"})
    assert [*fourth.images] == ["depth"] and fourth.ready
    assert "weight 7" in answer.headers[IGNORED] and "mask" in answer.headers[IGNORED]


def test_a_masked_hint_is_transparent_where_it_is_made_anew(seen, photo):
    at, request = seen
    mask = picture(colour=(0, 0, 0))
    made(at, {"steps": 1} | unit(module="none", model="inpaint", image=photo, mask=mask))
    alpha = request().controls[0].images[""][..., 3]
    assert (alpha[8:20, 8:20] == 0).all() and (alpha[:8] == 255).all()


def test_img2img(seen, photo):
    at, request = seen
    mask = {"mask": picture(colour=(0, 0, 0)), "mask_blur": 2, "inpainting_mask_invert": 1, "inpainting_fill": 1}
    made(at, {"init_images": [photo], "steps": 1, "denoising_strength": "0.5"} | mask | unit(), "img2img")
    edit = request().edit
    assert (edit.strength, edit.blur, edit.fill, edit.margin, edit.resize) == (0.5, 2, False, 0, "stretch")
    assert edit.mask[0, 0, 0] == 255 and edit.mask[10, 10, 0] == 0, "inverted"
    assert request().size is None and not request().controls[0].images
    assert "Init image" in refused(at, {"steps": 1}, "img2img", 404)


def test_the_second_pass_and_sizes_that_the_base_cannot_make(seen):
    at, request = seen
    made(at, {"steps": 1, "width": 100, "height": 70, "enable_hr": True, "hr_scale": "1.5", "hr_second_pass_steps": 3,
              "sampler_name": "DPM++ 2M", "scheduler": "karras", "subseed": 5, "subseed_strength": 0.2})  # fmt: skip
    asked = request()
    assert asked.size == (64, 96) and asked.hires.factor == 1.5 and asked.hires.steps == 3
    assert asked.scheduler == "DPM++ 2M Karras" and asked.variation == 0.2
    answer = made(at, {"steps": 1, "sampler_name": "Euler a", "scheduler": "Karras"})
    assert request().scheduler == "Euler a" and "Euler a has no Karras" in answer.headers[IGNORED]


def test_progress_and_interrupt(client, studio):
    studio.pause, at = 0.02, client
    idle = at.get("/sdapi/v1/progress").json()
    assert idle["state"].keys() == STATE and idle["progress"] == 0 and idle["state"]["job_count"] == 0
    answers = []
    thread = threading.Thread(target=lambda: answers.append(made(at, {"steps": 150, "seed": 5}).json()))
    thread.start()
    while not (now := at.get("/sdapi/v1/progress").json())["current_image"]:
        time.sleep(0.002)
    assert 0 < now["progress"] < 1 and now["state"]["sampling_steps"] == 150 and now["eta_relative"] > 0
    assert at.get("/sdapi/v1/progress?skip_current_image=true").json()["current_image"] is None
    assert at.post("/sdapi/v1/interrupt").json() == {}
    thread.join(5)
    assert [shade(one) for one in answers[0]["images"]] == [5], "what there is comes back"
    assert at.post("/sdapi/v1/skip").json() is None


def test_lists_and_settings(client, photo):
    get = lambda path: client.get(path).json()  # noqa: E731
    assert "controlnet m2m" in get("/sdapi/v1/scripts")["txt2img"], "else webuiapi sends no units"
    assert get("/controlnet/model_list")["model_list"][0] == "canny [00112233]"
    modules = get("/controlnet/module_list?alias_names=true")
    sliders = modules["module_detail"]["canny"]["sliders"]
    assert [one["name"] for one in sliders] == ["Resolution", "Canny Low Threshold", "Canny High Threshold"]
    assert all(one.keys() == {"name", "value", "min", "max", "step"} for one in sliders)
    types = get("/controlnet/control_types")["control_types"]
    assert types["Canny"]["default_model"] == "canny [00112233]" and "None" in types["All"]["model_list"]
    assert client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2, "x": 1}).json() is None
    assert get("/sdapi/v1/options")["CLIP_stop_at_last_layers"] == 2
    client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 1})
    assert "no model" in client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "x"}).json()["detail"]
    assert get("/sdapi/v1/sd-models")[0].keys() == {"title", "model_name", "hash", "sha256", "filename", "config"}
    assert get("/sdapi/v1/loras") == get("/sdapi/v1/sd-vae") == []
    assert get("/sdapi/v1/embeddings") == {"loaded": {}, "skipped": {}}
    assert {"DDIM", "Euler a"} <= {one["name"] for one in get("/sdapi/v1/samplers")}
    assert get("/sdapi/v1/memory")["ram"]["total"] > 0 and get("/controlnet/version") == {"version": 3}
    written = base64.b64encode(base64.b64decode(made(client, {"steps": 1}).json()["images"][0])).decode()
    assert client.post("/sdapi/v1/png-info", json={"image": written}).json()["info"] == "Steps: 1"


@pytest.mark.parametrize("key", ["controlnet_input_images", "controlnet_images"])
def test_detect(client, photo, key):
    answer = client.post("/controlnet/detect", json={"controlnet_module": "canny", key: [photo, photo]})
    assert answer.json()["info"] == "Success" and len(answer.json()["images"]) == 2
    for body in ({"controlnet_module": "canny"}, {"controlnet_module": "cany", key: [photo]}):
        assert client.post("/controlnet/detect", json=body).status_code == 422


def test_detect_without_a_module_gives_the_pictures_themselves(client, studio, photo):
    """As webuiapi asks by default, with its own thresholds."""
    studio.batches.clear()
    body = {"controlnet_module": "none", "controlnet_images": [photo], "controlnet_processor_res": 512}
    [image] = client.post("/controlnet/detect", json=body | {"controlnet_threshold_a": 64}).json()["images"]
    assert not studio.batches
    own, given = (np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in (image, photo))
    assert np.array_equal(own, given)


@pytest.mark.parametrize(("shape", "side"), [((1, 2000), 8), ((4000, 16), 65), ((256, 4), 256), ((64, 64), 512)])
def test_hints_of_strips_are_no_longer_than_pictures_may_be(client, studio, shape, side):
    studio.batches.clear()
    image = base64.b64encode(png_bytes(np.zeros((*shape, 3), np.uint8))).decode()
    body = {"controlnet_module": "canny", "controlnet_images": [image], "controlnet_processor_res": 512, "x": 1}
    answer = client.post("/controlnet/detect", json=body)
    [order] = studio.batches[0].values()
    assert answer.status_code == 200 and order.side == side
    told = answer.headers[IGNORED]
    assert told.startswith("x") and ("512 is taken as" in told) == (side < 512)


def test_poses_are_drawn(client):
    points = [0.0] * 54
    points[:3] = [0.5, 0.5, 1.0]
    body = [{"people": [{"pose_keypoints_2d": points}], "canvas_width": 64, "canvas_height": 32}]
    [image] = client.post("/controlnet/render_openpose_json", json=body).json()["images"]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))
    assert drawn.shape == (32, 64, 3) and drawn[16, 32].tolist() == [255, 0, 0]
    assert client.post("/controlnet/render_openpose_json", json=[{"people": [{}]}]).status_code == 422

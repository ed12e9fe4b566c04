"""Pictures that are changed: as the stock pipelines change them, and what a mask shows alone."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.controlnet import pipeline_controlnet_img2img, pipeline_controlnet_inpaint

from conftest import asked, relative
from controlkit.annotators import annotate
from controlkit.backbones import UNetBase
from controlkit.backbones.schedulers import scheduler_named
from controlkit.branch import ControlSpec
from controlkit.controls import new_control
from controlkit.errors import Invalid, Unsupported
from controlkit.formats import SavedControl
from controlkit.images import HintSpec, fit, stretch, to_tensor
from controlkit.sample import ControlRequest, EditRequest, HiresRequest, Request, Step, generate, pictures, prepare
from controlkit.sample.loop import turned

CONTRACT, STEPS = HintSpec("canny"), 10


def noise_picture(seed, height=32, width=32):
    """A picture of soft colours."""
    rough = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return stretch(rough, (height, width))


def half_mask(height=32, width=32):
    """A mask of the left half."""
    mask = np.zeros((height, width, 3), np.uint8)
    mask[:, : width // 2] = 255
    return mask


PICTURE, MASK = noise_picture(1), half_mask()


@pytest.fixture(scope="module")
def branch(toy_base, drawn_joins):
    return drawn_joins(new_control(toy_base), 11).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inpainting_base(toy_base):
    """The toy's neighbour that reads a mask and a masked picture, too."""
    torch.manual_seed(5)
    channels = 2 * toy_base.latent_channels + 1
    unet = UNet2DConditionModel.from_config({**toy_base.unet.config, "in_channels": channels})
    return UNetBase("inpainting", toy_base.vae, toy_base.towers, unet, toy_base.scheduler)


def request_of(branch, use=None, **settings):
    """A request under one control, and its controls by name."""
    values = {"prompt": "a red apple", "seed": 7, "steps": STEPS, "negative_prompt": "a teal circle"} | settings
    return asked([SavedControl(branch, CONTRACT)], [noise_picture(3)], [use or {}], **values)


def made(base, request, loaded=None):
    [picture] = pictures(generate(base, prepare(base, [request], loaded)))
    return picture


def stock(kind, base, branch, to_diffusers, scheduler):
    pipeline = kind(
        vae=base.vae,
        text_encoder=base.towers[0].encoder,
        tokenizer=base.towers[0].tokenizer,
        unet=base.unet,
        controlnet=to_diffusers(branch),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def means(output, generator=None, sample_mode="sample"):
    """In place of diffusers' drawing of latents, which takes the first of a seed's numbers."""
    return output.latent_dist.mode()


def scheduler_of(base, toy_folder, name):
    plain = DDIMScheduler.from_pretrained(toy_folder, subfolder="scheduler")
    return scheduler_named(name, plain) if name else plain


def shared(request, base, use):
    """The arguments of both pipelines."""
    return {
        "control_image": CONTRACT.tensor(request.controls[0].images[""], (32, 32)),
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "negative_prompt": request.negative_prompt,
        "generator": torch.Generator().manual_seed(request.seed),
        "controlnet_conditioning_scale": use.get("scale", 1.0),
        "control_guidance_start": use.get("start", 0.0),
        "control_guidance_end": use.get("end", 1.0),
        "output_type": "latent",
    }


@pytest.mark.parametrize(
    ("scheduler", "strength", "use"),
    [
        (None, 0.6, {"start": 0.2, "end": 0.8}),
        (None, 1.0, {"scale": 0.7}),
        ("Euler", 0.5, {}),
        ("Euler a", 0.6, {}),
        ("DPM++ 2M Karras", 0.6, {}),
        ("DPM++ 2M SDE", 0.4, {}),
        ("UniPC", 0.6, {}),
        ("LCM", 0.6, {}),
    ],
)
def test_a_changed_picture_is_the_stock_pipelines(
    toy_base, toy_folder, branch, to_diffusers, monkeypatch, scheduler, strength, use
):
    edit = EditRequest(image=PICTURE, strength=strength)
    request, loaded = request_of(branch, use, edit=edit, scheduler=scheduler)
    ours = made(toy_base, request, loaded).latents
    monkeypatch.setattr(pipeline_controlnet_img2img, "retrieve_latents", means)
    kind, names = StableDiffusionControlNetImg2ImgPipeline, scheduler_of(toy_base, toy_folder, scheduler)
    pipeline = stock(kind, toy_base, branch, to_diffusers, names)
    image = torch.from_numpy(PICTURE).permute(2, 0, 1)[None] / 255
    theirs = pipeline(request.prompt, image=image, strength=strength, **shared(request, toy_base, use)).images[0]
    assert relative(ours, theirs) <= 1e-4
    if strength < 1:  # else nothing is left of it in the noise
        other, loaded = request_of(branch, use, edit=EditRequest(image=noise_picture(2), strength=strength))
        assert relative(ours, made(toy_base, other, loaded).latents) > 0.01  # so that being equal says something


@pytest.mark.parametrize(
    ("scheduler", "strength"), [(None, 1.0), (None, 0.6), ("Euler a", 0.6), ("DPM++ 2M Karras", 1.0)]
)
@pytest.mark.parametrize("reads_masks", [False, True], ids=["4 channels", "9 channels"])
def test_an_inpainted_picture_is_the_stock_pipelines(
    toy_base, inpainting_base, toy_folder, branch, to_diffusers, monkeypatch, scheduler, strength, reads_masks
):
    base = inpainting_base if reads_masks else toy_base
    edit = EditRequest(image=PICTURE, mask=MASK, strength=strength)
    request, loaded = request_of(branch, edit=edit, scheduler=scheduler)
    ours = made(base, request, loaded).latents
    monkeypatch.setattr(pipeline_controlnet_inpaint, "retrieve_latents", means)
    kind, names = StableDiffusionControlNetInpaintPipeline, scheduler_of(base, toy_folder, scheduler)
    pipeline = stock(kind, base, branch, to_diffusers, names)
    image = torch.from_numpy(PICTURE).permute(2, 0, 1)[None] / 255
    mask = torch.from_numpy(MASK[..., :1]).permute(2, 0, 1)[None] / 255
    arguments = shared(request, base, {})
    theirs = pipeline(request.prompt, image=image, mask_image=mask, strength=strength, **arguments).images[0]
    assert relative(ours, theirs) <= 1e-4


# --- what is kept, and where ----------------------------------------------------------------------------------


def test_at_strength_0_the_picture_comes_back(toy_base):
    for size in (None, (16, 32)):
        edit = EditRequest(image=PICTURE, strength=0)
        picture = made(toy_base, Request(edit=edit, size=size))
        assert np.array_equal(picture.pixels, fit(PICTURE, size or (32, 32)))
    masked = EditRequest(image=PICTURE, mask=MASK, strength=0)
    assert np.array_equal(made(toy_base, Request(edit=masked)).pixels, PICTURE)


def test_what_is_not_masked_stays_to_the_pixel_and_the_rest_is_made_anew(toy_base, inpainting_base):
    for base in (toy_base, inpainting_base):
        picture = made(base, Request(edit=EditRequest(image=PICTURE, mask=MASK), steps=3))
        assert np.array_equal(picture.pixels[:, 16:], PICTURE[:, 16:])
        assert (picture.pixels[:, :16] != PICTURE[:, :16]).mean() > 0.5
    whole = made(toy_base, Request(edit=EditRequest(image=PICTURE, mask=MASK), steps=3))
    larger = EditRequest(image=PICTURE, mask=stretch(MASK, (64, 64)))
    assert np.array_equal(made(toy_base, Request(edit=larger, steps=3)).pixels, whole.pixels)


def test_a_picture_s_transparent_places_are_masked_and_what_lies_under_them_is_nobody_s(toy_base, branch):
    clear = MASK[..., 0] > 0
    seen = np.dstack([PICTURE, np.uint8(255) * ~clear])
    on_white = np.where(clear[..., None], np.uint8(255), PICTURE)
    [one] = prepare(toy_base, [Request(edit=EditRequest(image=seen))])
    assert np.array_equal(one.canvas.mask, clear) and np.array_equal(one.canvas.pixels, on_white)
    picture = made(toy_base, Request(edit=EditRequest(image=seen), steps=3))
    same = made(toy_base, Request(edit=EditRequest(image=on_white, mask=MASK), steps=3))
    assert np.array_equal(picture.pixels, same.pixels) and np.array_equal(picture.pixels[~clear], PICTURE[~clear])
    loaded = {"0": SavedControl(branch, HintSpec("canny", {"low": 100.0, "high": 200.0}))}
    edit = EditRequest(image=seen, mask=MASK)
    [one] = prepare(toy_base, [Request(edit=edit, controls=(ControlRequest(name="0"),))], loaded)
    assert np.array_equal(one.controls[0].hints[""], annotate(on_white, loaded["0"].hint))


def test_the_kept_part_of_the_latents_is_the_pictures_own(toy_base):
    with torch.no_grad():
        own = toy_base.mean_latents(toy_base.encode_moments(to_tensor([PICTURE])))[0]
    latents = made(toy_base, Request(edit=EditRequest(image=PICTURE, mask=MASK), steps=3)).latents
    assert torch.equal(latents[..., 4:], own[..., 4:]) and relative(latents[..., :4], own[..., :4]) > 0.1


def test_a_blurred_edge_passes_from_new_to_old_outside_the_mask(toy_base):
    sharp, soft = (
        made(toy_base, Request(edit=EditRequest(image=PICTURE, mask=MASK, blur=blur), steps=2)) for blur in (0, 4)
    )
    assert np.array_equal(sharp.pixels[:, 16:], PICTURE[:, 16:])
    changed = (soft.pixels != PICTURE).any(-1).mean(0)
    assert (changed[16:20] > 0.3).all() and (changed[20:] == 0).all()


def test_outpainting_adds_what_is_asked_for_and_keeps_the_picture(toy_base):
    edit = EditRequest(image=PICTURE, outpaint=(0, 16, 0, 16))
    picture = made(toy_base, Request(edit=edit, steps=2))
    assert picture.pixels.shape == (32, 64, 3) and np.array_equal(picture.pixels[:, 16:48], PICTURE)
    filled = made(toy_base, Request(edit=EditRequest(image=PICTURE, resize="fill"), size=(32, 64), steps=2))
    assert np.array_equal(filled.pixels, picture.pixels)


def test_only_what_is_masked_is_worked_on_and_pasted_back(toy_base):
    large = noise_picture(4, 96, 128)
    mask = np.zeros((96, 128, 3), np.uint8)
    mask[40:56, 60:76] = 255
    request = Request(edit=EditRequest(image=large, mask=mask, margin=8), size=(32, 32), steps=2)
    [one] = prepare(toy_base, [request])
    assert one.canvas.box == (32, 52, 64, 84) and np.array_equal(one.canvas.pixels, large[32:64, 52:84])
    picture = made(toy_base, request)
    outside = mask[..., 0] == 0
    assert picture.pixels.shape == large.shape and np.array_equal(picture.pixels[outside], large[outside])
    assert (picture.pixels[~outside] != large[~outside]).mean() > 0.5
    settled = made(toy_base, one.settled())
    assert np.array_equal(settled.pixels, picture.pixels)


def test_the_part_grows_to_the_asked_shape_within_the_picture(toy_base):
    large = noise_picture(4, 96, 128)
    mask = np.zeros((96, 128, 3), np.uint8)
    mask[0:4, 120:128] = 255
    edit = EditRequest(image=large, mask=mask, margin=2)
    [wide] = prepare(toy_base, [Request(edit=edit, size=(16, 32))])
    assert wide.canvas.box == (0, 116, 6, 128)
    [tall] = prepare(toy_base, [Request(edit=edit, size=(32, 16))])
    assert tall.canvas.box == (0, 118, 20, 128)


def test_a_controls_picture_is_cut_to_the_part_that_is_worked_on(toy_base, branch):
    large, mask = noise_picture(4, 96, 128), np.zeros((96, 128, 3), np.uint8)
    mask[40:56, 60:76] = 255
    request, loaded = request_of(branch, edit=EditRequest(image=large, mask=mask, margin=8), size=(32, 32))
    hint = noise_picture(9, 96, 128)
    [control] = request.controls
    request = request.model_copy(update={"controls": (control.model_copy(update={"images": {"": hint}}),)})
    [one] = prepare(toy_base, [request], loaded)
    assert np.array_equal(one.controls[0].hints[""], hint[32:64, 52:84])


def test_a_control_without_a_picture_reads_the_one_that_is_changed(toy_base, branch):
    control = ControlRequest(name="0", annotator="canny")
    loaded = {"0": SavedControl(branch, HintSpec("canny", {"low": 100.0, "high": 200.0}))}
    with_own = control.model_copy(update={"images": {"": PICTURE}})
    edit = EditRequest(image=PICTURE)
    ours, theirs = (prepare(toy_base, [Request(controls=(one,), edit=edit)], loaded)[0] for one in (control, with_own))
    assert np.array_equal(ours.controls[0].hints[""], theirs.controls[0].hints[""])
    masks = {"0": SavedControl(branch, HintSpec("inpaint", mask_value=-1.0))}
    control = ControlRequest(name="0")
    [one] = prepare(toy_base, [Request(controls=(control,), edit=EditRequest(image=PICTURE, mask=MASK))], masks)
    hint = one.controls[0].hints[""]
    assert hint.shape == (32, 32, 4) and (hint[..., 3] < 128).tolist() == (MASK[..., 0] > 0).tolist()
    with pytest.raises(Invalid, match="needs a picture"):
        prepare(toy_base, [Request(controls=(control,))], masks)


def test_filled_places_take_the_colours_around_them(toy_base):
    picture = np.full((32, 32, 3), 40, np.uint8)
    picture[:, :16] = 250
    edit = EditRequest(image=picture, mask=MASK, fill=True, strength=0.5)
    [one] = prepare(toy_base, [Request(edit=edit)])
    assert np.array_equal(one.canvas.pixels[:, 16:], picture[:, 16:])
    assert abs(one.canvas.pixels[:, :16].astype(int) - 40).max() < 10
    assert np.array_equal(one.canvas.whole, picture)


def test_a_shape_that_is_rounded_is_not_written_down_as_a_size_asked_for(toy_base):
    odd = noise_picture(4, 20, 29)
    request = Request(edit=EditRequest(image=odd, resize="fill", strength=0.5), steps=2)
    [one] = prepare(toy_base, [request])
    assert one.canvas.mask is None and one.settled().size is None
    assert np.array_equal(made(toy_base, one.settled()).pixels, made(toy_base, request).pixels)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"outpaint": (16_000, 0, 0, 16_000)}, "16032x16032 pixels: expected at most 67,108,864"),
        ({"mask": np.zeros((32, 32, 3), np.uint8)}, "nothing that is to be made anew"),
        ({"mask": np.zeros((32, 64, 3), np.uint8)}, "64x32 and the picture 32x32"),
        ({"margin": 8}, "give a mask"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(toy_base, edit, words):
    with pytest.raises(Invalid, match=words):
        prepare(toy_base, [Request(edit=EditRequest(image=PICTURE, **edit))])


def test_edits_written_down_are_read_again():
    edit = EditRequest(image=PICTURE, mask=MASK, outpaint=(0, 8, 0, 0), resize="Resize and Fill", strength=0.5)
    request = Request(edit=edit, hires=HiresRequest(factor=1.5), variation=0.2, variation_seed=4, tile=64)
    assert Request.from_json(request.to_json()) == request and request.edit.resize == "fill"
    other = edit.model_copy(update={"image": noise_picture(2)})
    assert request != request.model_copy(update={"edit": other}) and hash(edit) != hash(other)


# --- inpainting bases as bases --------------------------------------------------------------------------------


def test_an_inpainting_base_makes_pictures_of_nothing_but_a_prompt(inpainting_base, toy_base, branch):
    request, loaded = request_of(branch, steps=2)
    assert made(inpainting_base, request, loaded).pixels.shape == (32, 32, 3)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), inpainting_base.encode_text(["a"])
    x = x[:, : toy_base.latent_channels]
    with torch.no_grad():
        grey = inpainting_base.mean_latents(inpainting_base.encode_moments(torch.zeros(1, 3, 32, 32)))
        whole = torch.cat([x, torch.ones(1, 1, 8, 8), grey], 1)
        assert torch.equal(inpainting_base.predict(x, t, text), inpainting_base.predict(whole, t, text))


def test_a_branch_of_an_inpainting_base_reads_latents_alone(inpainting_base, toy_base):
    fresh = new_control(inpainting_base)
    assert fresh.body.conv_in.in_channels == toy_base.latent_channels
    own = inpainting_base.unet.conv_in.weight[:, : toy_base.latent_channels]
    assert torch.equal(fresh.body.conv_in.weight, own) and inpainting_base.signature == toy_base.signature
    assert inpainting_base.empty_encoder().conv_in.weight.shape == own.shape


def test_a_walker_beside_an_inpainting_base_is_refused(inpainting_base):
    walker = new_control(inpainting_base, ControlSpec(body="xs"))
    request, loaded = request_of(walker, steps=1)
    with pytest.raises(Unsupported, match="ControlNet-XS walks beside"):
        made(inpainting_base, request, loaded)


# --- a second pass, and variations ----------------------------------------------------------------------------


def test_the_second_pass_changes_the_first_ones_picture_at_its_size(toy_base, branch):
    request, loaded = request_of(branch, {"passes": "first"}, hires=HiresRequest(factor=2, strength=0.5, steps=4))
    records = list(generate(toy_base, prepare(toy_base, [request], loaded)))
    assert [one.step for one in records[:-1]] == list(range(1, 13)) and {one.steps for one in records[:-1]} == {12}
    assert all(isinstance(one, Step) for one in records[:-1])
    first = made(toy_base, *request_of(branch))
    edit = EditRequest(image=stretch(first.pixels, (64, 64)), strength=0.5)
    values = {"prompt": "a red apple", "seed": 7, "steps": 4, "negative_prompt": "a teal circle", "size": (64, 64)}
    by_hand = made(toy_base, Request(edit=edit, **values))
    assert records[-1].request == request and np.array_equal(records[-1].pixels, by_hand.pixels)
    both, loaded = request_of(branch, hires=HiresRequest(factor=2, strength=0.5, steps=4))
    assert not np.array_equal(made(toy_base, both, loaded).pixels, by_hand.pixels)


def test_a_control_of_one_pass_is_not_run_in_the_other(toy_base, branch, monkeypatch):
    ran = []
    real = branch.forward
    monkeypatch.setattr(branch, "forward", lambda x, *more: ran.append(x.shape[-1]) or real(x, *more))
    for passes, sides in (("first", {8}), ("second", {16}), ("both", {8, 16})):
        ran.clear()
        request, loaded = request_of(branch, {"passes": passes}, steps=2, hires=HiresRequest(strength=1.0))
        made(toy_base, request, loaded)
        assert set(ran) == sides


def test_a_control_of_the_second_pass_alone_reads_what_the_first_one_made(toy_base, branch, monkeypatch):
    loaded = {"0": SavedControl(branch, CONTRACT), "1": SavedControl(branch, HintSpec("tile", {"shrink": 2.0}))}
    own = ControlRequest(name="0", images=noise_picture(3), ready=True)
    request = Request(steps=2, controls=(own, ControlRequest(name="1", passes="second")), hires=HiresRequest())
    read, real = [], branch.encode_hint
    monkeypatch.setattr(branch, "encode_hint", lambda hints, *more: read.append(hints) or real(hints, *more))
    first = made(toy_base, Request(steps=2, controls=(own,)), loaded)
    read.clear()
    made(toy_base, request, loaded)
    tile = loaded["1"].hint
    expected = tile.tensor(annotate(stretch(first.pixels, (64, 64)), tile, (64, 64)), (64, 64))
    assert len(read) == 3 and torch.equal(read[-1], expected)
    [one] = prepare(toy_base, [request], loaded)
    assert one.controls[1].pictures() == {}, "there is none to look at yet"
    with pytest.raises(Invalid, match="there is none: ask for one by hires"):
        prepare(toy_base, [request.model_copy(update={"hires": None})], loaded)


def test_words_change_on_in_the_second_pass(toy_base):
    request = Request(prompt="[a:b:1.5]", dialect="a1111", steps=4, hires=HiresRequest(strength=1.0))
    [one] = prepare(toy_base, [request])
    assert [end for end, _ in one.script.parts[0]] == [4] and [end for end, _ in one.second.script.parts[0]] == [2, 4]


def test_a_second_pass_that_is_too_large_is_refused_before_anything_is_made(toy_base):
    with pytest.raises(Invalid, match="sides of at most 16384"):
        prepare(toy_base, [Request(size=(4096, 16), hires=HiresRequest(factor=8))])


def test_masks_and_a_second_pass_exclude_each_other(toy_base):
    with pytest.raises(Invalid, match="leave one out"):
        prepare(toy_base, [Request(edit=EditRequest(image=PICTURE, mask=MASK), hires=HiresRequest())])


def test_variations_turn_the_noise_by_a_share_of_the_angle(toy_base):
    plain, other = made(toy_base, Request(seed=3, steps=2)), made(toy_base, Request(seed=5, steps=2))
    ends = [made(toy_base, Request(seed=3, steps=2, variation=share, variation_seed=5)).latents for share in (0.0, 1.0)]
    assert torch.equal(ends[0], plain.latents) and relative(ends[1], other.latents) < 1e-4
    a, b = (torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (3, 5))
    half = turned(a, b, 0.5)
    assert abs(half.std() - 1) < 0.02 and abs(torch.cosine_similarity(half.flatten(), a.flatten(), 0) - 0.7) < 0.03
    column, towards = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [1.0]]])
    assert torch.allclose(turned(column, towards, 1 / 3), torch.tensor([[[3**0.5 / 2], [0.5]]]))

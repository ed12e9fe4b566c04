"""The base in two halves is the base; its taps are what it really emits; its branch is the stock ControlNet."""

import json
import shutil

import pytest
import torch

from conftest import draw_inputs, relative, stock_inputs
from controlkit.backbones import load_base
from controlkit.branch import ControlSpec
from controlkit.controls import new_control
from controlkit.errors import UserError

SIZES = {"square": (8, 8), "wide": (4, 16), "odd": (9, 13)}  # of latents


@pytest.fixture(params=["toy_base", "deep_base", "sd2_base", "xl_base"])
def base(request):
    return request.getfixturevalue(request.param)


def draw_residuals(encoded):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(f.shape, generator=generator) for f in (*encoded.skips, encoded.middle)]


def emitted(unet, inputs):
    """What the U-Net's own forward pass hands across: its skip connections in order, and the middle feature."""
    caught = []
    hooks = [unet.conv_in.register_forward_hook(lambda module, args, out: caught.append(out))]
    hooks += [b.register_forward_hook(lambda module, args, out: caught.extend(out[1])) for b in unet.down_blocks]
    hooks += [unet.mid_block.register_forward_hook(lambda module, args, out: caught.append(out))]
    rows, more = stock_inputs(inputs)
    unet(*rows, **more)
    for hook in hooks:
        hook.remove()
    return caught


# --- taps ---------------------------------------------------------------------------------------------------


def test_the_taps_are_what_the_unet_emits(base):
    side = 16
    features = emitted(base.unet, draw_inputs(base, side, side))
    described = [(t.channels, side * base.stride // t.stride, side * base.stride // t.stride) for t in base.branch_taps]
    assert described == [tuple(f.shape[1:]) for f in features]
    assert [tap.site for tap in base.branch_taps] == ["skip"] * (len(features) - 1) + ["middle"]
    assert len({tap.name for tap in base.branch_taps}) == len(features)


def test_sd_blocks_have_twelve_skips_and_a_middle(deep_base):
    assert len(deep_base.branch_taps) == 13
    assert [tap.stride // deep_base.stride for tap in deep_base.branch_taps] == [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8]


# --- the denoiser in two halves -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_encoder_then_decoder_is_the_unet(base, size):
    inputs = draw_inputs(base, *size)
    encoded = base.encode_noise(*inputs[:3])
    for ours, theirs in zip([*encoded.skips, encoded.middle], emitted(base.unet, inputs), strict=True):
        assert torch.equal(ours, theirs)
    rows, more = stock_inputs(inputs)
    assert torch.equal(base.decode_noise(encoded), base.unet(*rows, **more).sample)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_residuals_go_where_the_unet_takes_its_additional_ones(base, size):
    inputs = draw_inputs(base, *size)
    encoded = base.encode_noise(*inputs[:3])
    residuals = draw_residuals(encoded)
    ours = base.decode_noise(encoded, {tap.name: r for tap, r in zip(base.branch_taps, residuals, strict=True)})
    *down, middle = residuals
    rows, more = stock_inputs(inputs)
    more |= {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
    theirs = base.unet(*rows, **more).sample
    assert relative(ours, theirs) <= 1e-6
    assert relative(ours, base.decode_noise(encoded)) > 0.1


def test_each_tap_alone_moves_the_prediction_its_own_way(base):
    encoded = base.encode_noise(*draw_inputs(base)[:3])
    plain = base.decode_noise(encoded)
    one_by_one = zip(base.branch_taps, draw_residuals(encoded), strict=True)
    moved = [base.decode_noise(encoded, {tap.name: residual}) for tap, residual in one_by_one]
    everything = [plain, *moved]
    assert min(relative(a, b) for i, a in enumerate(everything) for b in everything[:i]) > 1e-4


# --- the branch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("taps", "size"), [("all", "wide"), ("all", "odd"), ("mid", "square")])
def test_a_copy_branch_is_the_stock_controlnet(base, drawn_joins, to_diffusers, taps, size):
    branch = drawn_joins(new_control(base, ControlSpec(taps=taps)), seed=3, base=base)
    *inputs, hint = draw_inputs(base, *SIZES[size])
    stock = to_diffusers(branch, base)
    rows, more = stock_inputs(inputs)
    with torch.no_grad():
        ours = branch(*inputs, branch.encode_hint(hint))
        theirs = stock(*rows, hint, **more, return_dict=False)
    for tap, residual in zip(base.branch_taps, [*theirs[0], theirs[1]], strict=True):
        if tap.name in ours:
            assert relative(ours[tap.name], residual) <= 1e-5
        else:
            assert residual.count_nonzero() == 0


def test_drawn_joins_speak_about_as_loud_as_the_skips(toy_base, drawn_joins):
    x, t, text, hint = draw_inputs(toy_base)
    branch = drawn_joins(new_control(toy_base))
    encoded = toy_base.encode_noise(x, t, text)
    plain = dict(zip([tap.name for tap in toy_base.branch_taps], [*encoded.skips, encoded.middle], strict=True))
    for name, residual in branch(x, t, text, branch.encode_hint(hint)).items():
        assert 0.1 <= residual.std() / plain[name].std() <= 1


# --- text ---------------------------------------------------------------------------------------------------


def test_words_beyond_the_window_are_cut_and_named(toy_base):
    kept = "a red apple" + ", on a teal background" * 5 + ", gold"  # 30 words of the toy's, and two marks: the window
    assert toy_base.cut_words(kept) == ""
    long = f"{kept} Navy Circle"
    assert toy_base.cut_words(long) == "navy circle"
    assert torch.equal(toy_base.encode_text([long]).tokens, toy_base.encode_text([kept]).tokens)
    assert not torch.equal(
        toy_base.encode_text([kept]).tokens, toy_base.encode_text([kept.removesuffix(", gold")]).tokens
    )


def test_every_prompt_becomes_a_window_of_tokens(toy_base):
    text = toy_base.encode_text(["", "a red apple", "apple " * 100])
    assert text.tokens.shape == (3, toy_base.window, toy_base.unet.config.cross_attention_dim)


# --- loading ------------------------------------------------------------------------------------------------


def test_a_loaded_base_is_frozen_float32(toy_base):
    assert (toy_base.name, toy_base.noise.prediction, toy_base.size, toy_base.stride) == ("toy", "v", 32, 4)
    for module in (toy_base.vae, toy_base.towers[0].encoder, toy_base.unet):
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in module.parameters())


def test_the_type_follows_the_weights_and_is_found_once(toy_folder, monkeypatch):
    base = load_base(toy_folder)
    assert base.dtype == torch.float32
    base.unet.half()
    assert base.dtype == torch.float16
    base.unet.conv_norm_out.float()  # before a question with this first weight: as in a narrowed base
    other = base.with_own_denoiser()
    assert other.dtype == torch.float32, "some of its weights are"
    asked = []
    parameters = torch.nn.Module.parameters

    def counted(module, recurse=True):
        for value in parameters(module, recurse):
            asked.append(value)
            yield value

    monkeypatch.setattr(torch.nn.Module, "parameters", counted)
    assert other.dtype == torch.float32 and len(asked) == 1, "a question at each step reads one weight"


def change_index(folder, text):
    (folder / "model_index.json").write_text(text)


def change_prediction(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))


def truncate_weights(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


BROKEN = {
    "without an index": (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
    "of another pipeline": (lambda f: change_index(f, '{"_class_name": "FluxPipeline"}'), "FluxPipeline.*expected"),
    "with a torn index": (lambda f: change_index(f, '{"_class'), "model_index.json"),
    "without a U-Net": (lambda f: shutil.rmtree(f / "unet"), "unet"),
    "with torn weights": (truncate_weights, "unet"),
    "of another prediction": (change_prediction, "sample.*epsilon"),
}


@pytest.mark.parametrize(("damage", "sentence"), BROKEN.values(), ids=BROKEN)
def test_a_folder_that_is_no_base_is_refused_with_a_reason(toy_folder, tmp_path, damage, sentence):
    folder = tmp_path / "broken"
    shutil.copytree(toy_folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=sentence) as refused:
        load_base(folder)
    assert str(folder) in str(refused.value)


def test_an_unknown_base_is_refused_with_what_is_known():
    with pytest.raises(UserError, match=r'no base "minni": .* a diffusers pipeline folder .* did you mean "mini"'):
        load_base("minni")


# --- the VAE and memory ----------------------------------------------------------------------------------------


def test_where_memory_does_not_hold_all_pictures_the_vae_takes_fewer_at_once_from_then_on(toy_folder, monkeypatch):
    base = load_base(toy_folder)
    rows = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    moments = base.encode_moments(rows)
    latents = moments.chunk(2, 1)[0]
    pictures = base.decode_latents(latents)
    tried = []
    for name in ("encode", "decode"):
        real = getattr(base.vae, name)

        def small(rows, real=real):
            tried.append(len(rows))
            if len(rows) > 2:
                raise torch.OutOfMemoryError("no room")
            return real(rows)

        monkeypatch.setattr(base.vae, name, small)
    assert relative([base.encode_moments(rows)], [moments]) < 1e-5
    assert tried == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert relative([base.decode_latents(latents)], [pictures]) < 1e-5 and tried[9:] == [1] * 7
    monkeypatch.setattr(base.vae, "encode", lambda rows: small(rows.repeat(3, 1, 1, 1)))
    with pytest.raises(torch.OutOfMemoryError):
        base.encode_moments(rows)


def test_a_vae_that_float16_overflows_is_not_computed_in_it(toy_folder):
    base = load_base(toy_folder)
    rows = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    single = base.encode_moments(rows)
    for upcast, format_ in ((True, torch.float32), (False, torch.float16)):
        base.vae.register_to_config(force_upcast=upcast)
        with torch.autocast("cpu", dtype=torch.float16):
            found = base.encode_moments(rows)
        assert found.dtype == format_ and torch.equal(found, single) == upcast

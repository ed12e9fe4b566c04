"""Every setting of a recipe changes the run, and in the way it should."""

import copy
import dataclasses
import itertools
import json
import sys
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from tiny_runs import CANNY, PLAIN, ended, equal, far, log_of, weights_of

from conftest import StandIn
from controlkit import train
from controlkit.backbones import Backbone, load_base
from controlkit.controls import new_control
from controlkit.data import Cached, CirclePairs
from controlkit.errors import UserError
from controlkit.formats import WEIGHTS, SavedControl, load_control, save_control
from controlkit.images import write_png
from controlkit.measure import Figure, obedience
from controlkit.train import objective, resolve, train_control
from controlkit.train.recipe import FORMATS, Recipe, parse_recipe, read_recipe
from controlkit.train.setup import new_branch

PROBED = {
    "base": "toy",
    "data": {"source": "emoji", "count": 4},
    "steps": 2,
    "batch": 2,
    "lr": 1e-3,
    "checkpoint_every": 1,
    "evaluation": {"every": 0},
}


SCENES = {"data": {"source": "scenes", "scenes": 8}}


PHOTOS = {"data": {"source": "photos"}}


MEASURED = {"evaluation": {"every": 2, "num": 2, "steps": 1}}


EVERY_STEP = {"steps": 3, "evaluation": {"every": 1, "num": 2, "steps": 1}}


SAMPLED = {"evaluation": {"every": 2, "num": 2, "steps": 1, "hints": ["photos/a circle a.png"]}}


XS = {"control": {"body": "xs"}}


@dataclasses.dataclass
class Seen:
    """All that can be seen of a run, read off its folder when it is asked for."""

    out: Path
    toy_base: Backbone
    records: list
    stages: list
    batches: list
    stored: int
    projects: list

    @cached_property
    def folders(self):
        """Of its control, or of several."""
        return sorted(path.parent for path in (self.out / "control").rglob(WEIGHTS))

    @cached_property
    def control(self):
        return load_control(self.folders[0], self.toy_base)

    @cached_property
    def hint_rows(self):
        held = load_file(next(self.out.glob("pairs*")))
        return [hint for name, rows in held.items() if name.endswith("hints") for hint in rows]

    @cached_property
    def tensors(self):
        return load_file(self.folders[0] / WEIGHTS)

    @property
    def base(self):
        return self.control.trained["base"]

    @property
    def controls(self):
        return len(self.folders)

    @property
    def edges(self):
        return sum(int((hint > 0).sum()) for hint in self.hint_rows)

    @property
    def hints(self):
        return sorted(hint.numpy().tobytes() for hint in self.hint_rows)

    @property
    def moments(self):
        held = load_file(next(self.out.glob("pairs*")))
        return [rows.numpy().tobytes() for name, rows in held.items() if name.endswith("moments")]

    @property
    def pairs(self):
        return len(self.hint_rows)

    @property
    def names(self):
        return self.tensors.keys()

    @property
    def weights(self):
        return {name: tensor.numpy().tobytes() for name, tensor in self.tensors.items()}

    @property
    def size(self):
        return sum(tensor.float().abs().sum().item() for tensor in self.tensors.values())

    @property
    def moved(self):
        recipe = read_recipe(self.out / "recipe.yaml")
        born = new_branch(recipe.control, resolve(recipe).specs, self.toy_base, recipe.seed).weights()
        own = self.control.branch.weights()
        return sum((value.float() - born[name].float()).abs().sum().item() for name, value in own.items())

    @property
    def parameters(self):
        return sum(value.numel() for value in self.control.branch.weights().values())

    @property
    def joins(self):
        return len(self.control.branch.joins)

    @property
    def channels(self):
        return self.control.branch.hint_encoder.convs[0].in_channels

    @property
    def losses(self):
        return [record.loss for record in self.records]

    @property
    def rows(self):
        return tuple(rows for rows, *_ in self.batches)

    @property
    def hints_read(self):
        return tuple(hints for _, hints, *_ in self.batches)

    @property
    def recomputed(self):
        return tuple(recomputed for *_, recomputed, _ in self.batches)

    @property
    def compiled(self):
        return tuple(compiled for *_, compiled in self.batches)

    @property
    def steps(self):
        return len(self.records)

    @property
    def evaluated(self):
        return [record.step for record in self.records if record.evaluation]

    @property
    def work(self):
        return {total for name, total in self.stages if name == "evaluating"}

    @property
    def checkpoints(self):
        return sorted(path.name for path in (self.out / "checkpoints").iterdir())

    @property
    def samples(self):
        return {path.name: path.read_bytes() for path in self.out.glob("samples/*")}

    @property
    def tracked(self):
        return [*(path.name for path in self.out.glob("tensorboard")), *self.projects]


def moved_less(before, after):
    return after < 0.99 * before


def moved_more(before, after):
    return after > 1.01 * before


def larger(before, after):
    return after > before


def changed(before, after):
    """The direction is not known beforehand."""
    return after != before


def becomes(value):
    return lambda before, after: before != after == value


def third_step(before, after):
    return before[:2] == after[:2] and before[2] != after[2]


SETTINGS = [  # key, another value, what of the run it must change and how, and in what recipe, where not the probed one
    ("base", "other", "base", becomes("other")),
    ("vae", "other", "moments", changed),
    ("size", 64, "hints", lambda before, after: [len(hint) for hint in after] == [4 * len(hint) for hint in before]),
    ("control.annotator", "scribble", "hints", changed),
    ("control.types", ["canny"], "names", lambda before, after: after > before),
    ("control.options", {"low": 900.0, "high": 1000.0}, "edges", moved_less),
    ("control.annotators", ["canny", "scribble"], "channels", becomes(6)),
    ("control.hints_as", "branches", "controls", becomes(2), {"control": {"annotators": ["canny", "scribble"]}}),
    ("control.channels", 1, "channels", becomes(1)),
    ("control.low", -1.0, "weights", changed),
    ("control.high", 2.0, "weights", changed),
    ("control.body", "conv", "names", lambda before, after: len(after) < len(before)),
    ("control.rank", 2, "weights", changed, {"control": {"body": "lora"}}),
    ("control.body", "xs", "names", changed),
    ("control.size_ratio", 0.25, "parameters", moved_less, XS),
    ("control.join", "gaussian", "losses", lambda before, after: after[0] != before[0]),  # not silent from the start
    ("control.taps", "mid", "joins", becomes(1)),
    ("control.start_from", "neighbour", "losses", lambda before, after: after[0] != before[0]),
    ("control.hint_cfg_scale", 3.0, "samples", changed, MEASURED | {"lr": 0.01}),
    ("data.source", "fill50k", "hints", changed),
    ("data.columns", {"caption": "said"}, "losses", changed, {"data": {"source": "named"}}),
    ("data.count", 5, "pairs", becomes(10)),
    ("data.variants", 1, "pairs", becomes(4)),
    ("data.scenes", 16, "pairs", larger, SCENES),
    ("data.visits", 2, "pairs", lambda before, after: after == 2 * before, SCENES),
    ("data.buckets", True, "hints", lambda before, after: len({*map(len, after)}) > len({*map(len, before)}), PHOTOS),
    ("data.flip", 1.0, "losses", changed),
    ("data.cache", False, "stored", becomes(0)),
    ("steps", 3, "steps", becomes(3)),
    ("batch", 3, "rows", becomes((3, 3))),
    ("noises_per_pair", 2, "hints_read", becomes((1, 1))),
    ("gradient_accumulation", 2, "rows", becomes((1, 1, 1, 1))),
    ("gradient_checkpointing", True, "recomputed", becomes((True, True))),
    ("optimizer", "muon", "weights", changed),
    ("betas", [0.5, 0.9], "weights", changed),
    ("epsilon", 1.0, "moved", moved_less),
    ("max_grad_norm", 1e-9, "moved", moved_less),  # below AdamW's epsilon
    ("ema", 0.5, "moved", moved_less),
    ("precision", "bf16", "losses", changed),
    ("compile", True, "compiled", lambda before, after: not any(before) and all(after[2::3])),
    ("lr", 2e-3, "moved", moved_more),
    ("warmup", 2, "moved", moved_less),
    ("cooldown", 1, "moved", moved_less),
    ("schedule", "cosine", "moved", moved_less),
    ("cycles", 2, "moved", moved_more, {"schedule": "cosine_with_restarts"}),
    ("power", 2.0, "moved", moved_less, {"schedule": "polynomial"}),
    ("max_minutes", 1e-9, "steps", becomes(1)),
    ("weight_decay", 1.0, "size", moved_less, {"lr": 0.05}),
    ("unfreeze_after", 1, "losses", third_step, {"steps": 3}),
    ("prompt_dropout", 1.0, "losses", changed),
    ("seed", 1, "losses", changed),
    ("checkpoint_every", 2, "checkpoints", becomes(["step-0000002"])),
    ("keep", 1, "checkpoints", becomes(["step-0000002"])),
    ("evaluation.every", 1, "evaluated", becomes([1, 2]), MEASURED),
    ("evaluation.num", 3, "work", lambda before, after: [*after] == [1.5 * work for work in before], MEASURED),
    ("evaluation.steps", 2, "work", lambda before, after: [*after] == [2 * work for work in before], MEASURED),
    ("evaluation.guidance", 1.0, "samples", changed, MEASURED),
    (
        "evaluation.hints",
        ["photos/a circle a.png"],
        "samples",
        lambda before, after: len(after) == len(before) + 1,
        MEASURED,
    ),
    ("evaluation.prompts", ["a", "b"], "samples", changed, SAMPLED),
    ("evaluation.target", 0.0, "steps", becomes(1), EVERY_STEP),
    ("evaluation.patience", 1, "steps", becomes(2), EVERY_STEP),
    ("tracking.to", ["tensorboard"], "tracked", becomes(["tensorboard"])),
    ("tracking.project", "mine", "tracked", becomes(["mine"]), {"tracking": {"to": ["trackio"]}}),
]


@pytest.fixture(scope="module")
def other_base(toy_folder):
    """The toy base with another U-Net."""
    other = load_base(toy_folder)
    other.unet.conv_out.weight.data *= 2
    other.name = "other"
    return other


@pytest.fixture(scope="module")
def other_vae(toy_folder):
    """The toy base with another VAE, and its own U-Net."""
    other = load_base(toy_folder)
    other.vae.quant_conv.weight.data *= 2
    return other


@pytest.fixture(scope="module")
def neighbour(toy_base, drawn_joins, tmp_path_factory):
    """The folder of a trained control, beside one of pictures of several shapes."""
    folder = tmp_path_factory.mktemp("controls") / "neighbour"
    lines = []
    for i, pair in enumerate(CirclePairs(48, 8)):
        write_png(folder.parent / "named" / f"{i}.png", pair.picture)
        lines.append(json.dumps({"file_name": f"{i}.png", "text": pair.prompt, "said": f"thing {i}"}))
        write_png(folder.parent / "photos" / f"a circle {'abcdefgh'[i]}.png", pair.picture[: 48 - 8 * (i % 4)])
    (folder.parent / "named" / "metadata.jsonl").write_text("\n".join(lines))
    save_control(folder, SavedControl(drawn_joins(new_control(toy_base)), CANNY), toy_base)
    return folder


@pytest.fixture
def trace(toy_base, other_base, other_vae, neighbour, fake_packages, tmp_path, monkeypatch):
    """``trace(key, value, within)`` runs the probed recipe, ``within`` changed, with one setting changed: ``Seen``."""
    bases = {("toy", None): toy_base, ("other", None): other_base, ("toy", "other"): other_vae}
    monkeypatch.setattr("controlkit.train.run.load_base", lambda name, vae=None: bases[name, vae])
    monkeypatch.chdir(neighbour.parent)

    def run(key=None, value=None, within=None):
        content, out, stages, batches = copy.deepcopy(PROBED), tmp_path / f"{key}", [], []

        def watched(base, branch, batch, predict):
            blocks = [getattr(block, "gradient_checkpointing", False) for block in base.unet.modules()]
            compiled = predict is not train.controlled
            batches.append((len(batch.t), len(batch.hints.get("", ())), any(blocks), compiled))
            return objective(base, branch, batch, predict)

        def falling(*scores):  # a toy's figures would not count
            fell = Figure(*[1 / (1 + len(batches))] * 3)
            ends = {"floor": Figure(0.1, 0.1, 0.1), "ceiling": Figure(0.9, 0.9, 0.9)}
            return dataclasses.replace(obedience(*scores), obedience=fell, **ends)

        stored = []
        monkeypatch.setattr("controlkit.train.run.open_store", lambda: stored.append(1) or nullcontext())
        monkeypatch.setattr("controlkit.train.gradients.objective", watched)
        monkeypatch.setattr("controlkit.train.evaluation.obedience", falling)
        monkeypatch.setitem(sys.modules, "trackio", trackio := StandIn())
        monkeypatch.setattr(torch, "compile", lambda function: lambda *given: function(*given))
        for section, values in (within or {}).items():
            content[section] = content.get(section, {}) | values if isinstance(values, dict) else values
        if key:
            *section, name = key.split(".")
            (content.setdefault(section[0], {}) if section else content)[name] = value
        records = list(train_control(parse_recipe(content), out, on_stage=lambda *stage: stages.append(stage)))
        return Seen(out, toy_base, records, stages, batches, len(stored), [one["project"] for one in trackio.begun])

    return run


@pytest.fixture(scope="module")
def remembered():
    """What several tests compare with, made once."""
    return {}


@pytest.mark.parametrize("setting", SETTINGS, ids=[key for key, *_ in SETTINGS])
def test_every_setting_changes_the_run_as_it_should(setting, trace, remembered):
    key, value, seen, how, within = (*setting, None)[:5]
    if str(within) not in remembered:
        remembered[str(within)] = trace(within=within)
    before, after = getattr(remembered[str(within)], seen), getattr(trace(key, value, within), seen)
    assert how(before, after), (before, after) if seen in ("moved", "work", "pairs") else ""


def test_no_setting_is_left_out():
    def keys(model, prefix=""):
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from keys(field.annotation, f"{name}.")
            else:
                yield prefix + name

    assert sorted(keys(Recipe)) == sorted({key for key, *_ in SETTINGS})


def test_gradients_of_parts_add_up_to_those_of_the_whole(tiny_recipe, toy_base, tmp_path):
    whole, log = ended(tiny_recipe(**PLAIN), tmp_path / "whole", toy_base)
    parts, log_of_parts = ended(tiny_recipe(**PLAIN, gradient_accumulation=2), tmp_path / "parts", toy_base)
    assert [one["loss"] for one in log] == pytest.approx([one["loss"] for one in log_of_parts], rel=1e-4)
    moved = far(whole, ended(tiny_recipe(**PLAIN, seed=1), tmp_path / "other", toy_base)[0])
    assert far(whole, parts) < 0.1 * moved


def test_a_batch_that_does_not_fit_in_memory_is_computed_in_more_parts_and_said_so(
    tiny_recipe, toy_base, tmp_path, monkeypatch
):
    log = ended(tiny_recipe(**PLAIN), tmp_path / "whole", toy_base)[1]
    room, real, said = 2, train.objective, []

    def crowded(base, branch, batch, predict):
        if len(batch.t) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(base, branch, batch, predict)

    monkeypatch.setattr("controlkit.train.gradients.objective", crowded)
    list(
        train_control(
            tiny_recipe(**PLAIN), tmp_path / "parts", toy_base, on_stage=lambda name, total: said.append(name)
        )
    )
    assert [one["loss"] for one in log_of(tmp_path / "parts")] == pytest.approx([one["loss"] for one in log], rel=1e-4)
    assert [words for words in said if "memory" in words] == [
        "out of memory: step 1 and the rest in 2 parts, the batch is still 4"
    ]
    room = 0
    with pytest.raises(UserError, match="does not hold even 1 pair"):
        list(train_control(tiny_recipe(**PLAIN), tmp_path / "none", toy_base))


def test_features_computed_anew_give_the_same_weights_and_leave_the_base_as_it_was(
    tiny_recipe, toy_base, tmp_path, monkeypatch
):
    kept = ended(tiny_recipe(**PLAIN), tmp_path / "kept", toy_base)[0]
    calls = []
    real = torch.utils.checkpoint.checkpoint

    def counted(*args, **more):
        calls.append(args)
        return real(*args, **more)

    monkeypatch.setattr("controlkit.backbones.unet.checkpoint", counted)
    anew = ended(tiny_recipe(**PLAIN, gradient_checkpointing=True), tmp_path / "anew", toy_base)[0]
    assert calls and far(kept, anew) < 1e-5
    assert not any(getattr(block, "gradient_checkpointing", False) for block in toy_base.unet.modules())


def test_an_average_is_what_is_saved_and_goes_on_exactly(tiny_recipe, toy_base, tmp_path):
    recipe = tiny_recipe(**PLAIN | {"steps": 6}, ema=0.9, checkpoint_every=2)
    whole, _ = ended(recipe, tmp_path / "whole", toy_base)
    assert far(whole, ended(tiny_recipe(**PLAIN | {"steps": 6}), tmp_path / "plain", toy_base)[0]) > 1e-5
    list(itertools.islice(train_control(recipe, tmp_path / "stopped", toy_base), 5))
    assert far(whole, ended(recipe, tmp_path / "stopped", toy_base)[0]) == 0


@pytest.mark.parametrize("name", ["muon", "adamw8bit", "adafactor", "prodigy"])
def test_other_optimizers_train_another_control_and_go_on_exactly(tiny_recipe, name, toy_base, tmp_path):
    recipe = tiny_recipe(
        **PLAIN | {"steps": 4, "lr": 1.0 if name == "prodigy" else 1e-2}, optimizer=name, checkpoint_every=2
    )
    whole, _ = ended(recipe, tmp_path / "whole", toy_base)
    assert far(whole, ended(tiny_recipe(**PLAIN | {"steps": 4}), tmp_path / "plain", toy_base)[0]) > 1e-4
    list(itertools.islice(train_control(recipe, tmp_path / "stopped", toy_base), 3))
    assert far(whole, ended(recipe, tmp_path / "stopped", toy_base)[0]) == 0


def test_what_compiling_gets_wrong_is_not_gone_on_with(tiny_recipe, toy_base, tmp_path, monkeypatch):
    """The loss is right, and some joins' gradients are zero: as with torch 2.13 on some CPUs."""

    def cut(place):
        def compiling(function):
            def wrong(base, branch, *rest):
                place(branch).requires_grad_(False)
                try:
                    return function(base, branch, *rest)
                finally:
                    place(branch).requires_grad_(True)

            return wrong

        return compiling

    kept = lambda function: lambda *given: function(*given)  # noqa: E731
    cases = {"join": cut(lambda branch: branch.joins["middle"]), "body": cut(lambda branch: branch.body), "right": kept}
    recipe = tiny_recipe(steps=2, compile=True, evaluation={"every": 0})
    plain, log = ended(recipe.model_copy(update={"compile": False}), tmp_path / "plain", toy_base)
    for name, compiling in cases.items():  # a body's gradient is there from the second step on
        monkeypatch.setattr(torch, "compile", compiling)
        said = []
        list(train_control(recipe, tmp_path / name, toy_base, lambda stage, total, said=said: said.append(stage)))
        assert any(line.startswith("not compiled: compiled, ") for line in said) == (name != "right")
        if name == "body":  # whose first step was without weight decay
            assert [line["loss"] for line in log_of(tmp_path / name)] == pytest.approx([line["loss"] for line in log])
        else:
            assert log_of(tmp_path / name) == log
            assert equal(weights_of(tmp_path / name), plain)


def test_pictures_of_another_size_than_the_base_s_are_trained_on_and_said(tiny_recipe, toy_base, tmp_path):
    said = []
    list(
        train_control(tiny_recipe(size=64, steps=1), tmp_path / "run", toy_base, lambda name, total: said.append(name))
    )
    assert any("pictures of 64 pixels" in line and "was trained on 32" in line for line in said)
    [cached] = Cached.read(next((tmp_path / "run").glob("pairs*")))
    assert cached.size == (64, 64) and toy_base.size == 32, "the caller's base is as it was"
    with pytest.raises(UserError, match="sides are multiples of"):
        toy_base.of_size(33)


def test_half_precision_learns_what_single_precision_does_and_goes_on_exactly(tiny_recipe, toy_base, tmp_path):
    single = ended(tiny_recipe(**PLAIN, precision="fp32"), tmp_path / "fp32", toy_base)
    for name in ("fp16", "bf16"):
        recipe = tiny_recipe(**PLAIN, precision=name)
        whole, log = ended(recipe, tmp_path / name, toy_base)
        assert [one["loss"] for one in log] == pytest.approx([one["loss"] for one in single[1]], rel=0.02)
        assert [one["loss"] for one in log] != [one["loss"] for one in single[1]]
        list(itertools.islice(train_control(recipe, tmp_path / "stopped" / name, toy_base), 2))
        assert equal(ended(recipe, tmp_path / "stopped" / name, toy_base)[0], whole)
        assert json.loads((tmp_path / name / "machine.json").read_text())["format"] == FORMATS[name]


def test_a_step_whose_gradients_overflow_is_left_out_and_the_loss_scaled_less(
    tiny_recipe, toy_base, tmp_path, monkeypatch
):
    real = torch.amp.GradScaler.get_scale(torch.amp.GradScaler("cpu"))
    recipe, seen = tiny_recipe(**PLAIN, precision="fp16"), []

    def spiked(*args):
        loss = objective(*args)
        seen.append(loss)
        return loss * (1e38 if len(seen) == 2 else 1.0)  # finite, and its gradient, scaled, is not

    monkeypatch.setattr("controlkit.train.gradients.objective", spiked)
    (tmp_path / "run").mkdir()
    list(train_control(recipe, tmp_path / "run", toy_base))
    state = load_file(tmp_path / "run" / "checkpoints" / "step-0000003" / "state.safetensors")
    assert state["scaler.scale"].item() == real / 2
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    counts = {value.item() for name, value in state.items() if name.startswith("optimizer") and name.endswith(".step")}
    assert counts == {2.0}

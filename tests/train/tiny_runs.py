"""What the tests of training read off a run's folder, and changes to ``tiny_recipe`` that several of them use."""

import json

import torch
from safetensors.torch import load_file

from controlkit.data import Cached, build_cache
from controlkit.files import OUTPUT
from controlkit.formats import WEIGHTS
from controlkit.images import HintSpec
from controlkit.measure import EvaluationPlan
from controlkit.sample import ControlRequest
from controlkit.train import resolve, train_control
from controlkit.train.evaluation import CONTROL, Evaluator
from controlkit.train.heldout import HeldoutLoss
from controlkit.train.ranks import Ranks

CANNY = HintSpec("canny")
PLAIN = {"steps": 3, "batch": 4, "lr": 1e-3, "evaluation": {"every": 0}}
UNION = {
    "control": {"types": ["canny", "depth", "pose", "inpaint"]},
    "data": {"source": "scenes", "scenes": 8, "count": 6, "visits": 4},
    "evaluation": {"every": 0},
}


def log_of(out):
    """The log without the one thing that differs between equal runs."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def weights_of(out):
    return load_file(out / "control" / WEIGHTS)


def ended(recipe, out, base):
    """The weights a run ends with, and its log."""
    list(train_control(recipe, out, base))
    return weights_of(out), log_of(out)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def far(a, b):
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def leftovers(out):
    """Files and folders a write left behind: hidden ones, but for the lock and the mark of an output."""
    return [str(path) for path in out.rglob(".*") if path not in (out / ".lock", out / OUTPUT)]


def assert_like(whole, out):
    """A run's outcome is the uninterrupted run's, to the bit."""
    assert log_of(out) == log_of(whole)
    assert equal(weights_of(out), weights_of(whole))
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == names
    for name in names:
        states = (load_file(run / "checkpoints" / name / "state.safetensors") for run in (whole, out))
        assert equal(*states)
    assert not leftovers(out)


def heldout_loss(recipe, base, pairs, out, ranks=None):
    """The held-out loss on these pairs, which the first process caches in a folder."""
    ranks, plan = ranks or Ranks(), resolve(recipe).batches
    if ranks.first:
        build_cache(base, pairs, plan.specs, out / "heldout.safetensors")
    ranks.wait()
    [cached] = Cached.read(out / "heldout.safetensors")
    return HeldoutLoss(base, base, cached, plan, ranks)


def evaluator_of(recipe, base, pairs, out, ranks=None):
    """What measures obedience of a control named as a run's, on these pairs."""
    control = ControlRequest(name=CONTROL, hint_cfg_scale=recipe.control.hint_cfg_scale)
    plan = EvaluationPlan(control, CANNY, list(pairs), recipe.evaluation.steps, recipe.evaluation.guidance)
    return Evaluator(base, base, plan, [], out, ranks or Ranks())

"""A run that several processes do together is the run that one does alone."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from controlkit.errors import UserError
from controlkit.formats import WEIGHTS
from controlkit.ranks import Ranks, ranks
from controlkit.recipe import parse_recipe
from controlkit.train import train_control

RECIPE = {
    "data": {"source": "fill50k", "count": 8},
    "steps": 2,
    "batch": 8,
    "draws": 2,
    "lr": 1e-3,
    "checkpoint_every": 1,
    "evaluation": {"every": 1, "num": 2, "steps": 1},
}

FIRST = "checkpoints/step-0000001/state.safetensors"


def together(recipe, out, count=2):
    """Run the command line in several processes, as `accelerate launch` would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "controlkit", "train", recipe, "--out", out, "--device", "cpu"]
    started = [
        subprocess.Popen(
            [*map(str, command)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=200) for process in started]
    return [process.returncode for process in started], said


def test_two_processes_do_what_one_does_and_one_of_them_speaks(toy_folder, toy_base, tmp_path):
    recipe = {"base": str(toy_folder)} | RECIPE
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "machine.json").write_text('{"threads": 1, "format": "float32"}')  # whatever pays here
    codes, said = together(tmp_path / "r.yaml", tmp_path / "two")
    assert codes == [0, 0], said
    assert "The control is in" in said[0][0] and said[1][0].strip() == ""
    list(train_control(parse_recipe(recipe), tmp_path / "one", toy_base))
    assert (tmp_path / "two" / "control" / WEIGHTS).is_file()
    # After one step AdamW's first moment is a tenth of the gradient.
    one, two = (
        {k: v for k, v in load_file(tmp_path / name / FIRST).items() if k.endswith("exp_avg")}
        for name in ("one", "two")
    )
    apart, size = (torch.cat([v.flatten() for v in of]).norm() for of in ([one[k] - two[k] for k in one], one.values()))
    assert len(one) > 20 and size > 0 and apart < 1e-5 * size
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [[yaml.safe_load(line)["loss"] for line in log] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 2


def test_means_are_over_all_and_alone_nothing_is_asked(monkeypatch):
    values = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    Ranks().mean(values)
    assert [value.tolist() for value in values] == [[1.0, 2.0], [[3.0]]]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.add_(torch.tensor([1.0, 0.0, 5.0])))
    Ranks(0, 2).mean(values)
    assert [value.tolist() for value in values] == [[1.0, 1.0], [[4.0]]]
    assert ranks(cpu=True) == Ranks(0, 1) and Ranks().told("x") == "x" and Ranks().any(True, torch.device("cpu"))


def test_a_batch_must_go_round(toy_base, tmp_path, monkeypatch):
    monkeypatch.setattr("controlkit.train.run.ranks", lambda cpu: Ranks(0, 3))
    with pytest.raises(UserError, match="2 draws of each pair, 1 equal parts and 3 processes"):
        next(train_control(parse_recipe(RECIPE), tmp_path / "run", toy_base))
    assert not (tmp_path / "run").exists()

"""A run that several processes do together is the run that one does alone."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import ControlNetModel
from safetensors.torch import load_file
from tiny_runs import evaluator_of, heldout_loss

from conftest import TINY, relative
from controlkit.controls import new_control
from controlkit.errors import UserError
from controlkit.formats import WEIGHTS, load_control
from controlkit.train import Record, evaluation, resolve, train_control, training_pairs
from controlkit.train import ranks as ranks_module
from controlkit.train.ranks import Ranks, connect_ranks
from controlkit.train.recipe import parse_recipe
from controlkit.train.state import TrainState
from processes import run_commands

RECIPE = TINY | {
    "steps": 2,
    "batch": 8,
    "noises_per_pair": 2,
    "checkpoint_every": 1,
    "evaluation": {"every": 1, "num": 2, "steps": 1},
}

FIRST = "checkpoints/step-0000001/state.safetensors"


def launch(recipe, out, count=2, before="pass", **more):
    """Run the command line in several processes, as `accelerate launch` would start them.

    ``before`` is code to run first, ``more`` belongs to the environment. Gives their exit codes, and what they wrote.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port it finds
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)} | more
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    arguments = ["train", recipe, "--out", out, "--device", "cpu"]
    ended = run_commands(arguments, ranks, recipe.with_name(f"{Path(out).name}-streams"), before)
    return [process.code for process in ended], [(process.out, process.err) for process in ended]


def test_two_processes_do_what_one_does_and_one_of_them_speaks(toy_folder, toy_base, tmp_path):
    recipe = {"base": str(toy_folder)} | RECIPE
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "machine.json").write_text('{"threads": 1, "format": "float32"}')  # whatever pays here
    codes, said = launch(tmp_path / "r.yaml", tmp_path / "two", ACCELERATE_USE_DEEPSPEED="true")
    assert codes == [0, 0], said
    assert "The control is in" in said[0][0] and said[1][0].strip() == ""
    assert "DeepSpeed was asked for, which is accepted and untested" in " ".join(said[0][0].split())
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
    drifts = [[yaml.safe_load(line)["colour_drift"] for line in log] for log in logs]
    assert drifts[1] == [pytest.approx(drift, abs=1e-3) for drift in drifts[0]]


@pytest.mark.parametrize(
    ("launcher", "code", "words"),
    [
        pytest.param(["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], 0, "; 2 processes",
                     marks=pytest.mark.slow),
        pytest.param(["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
                      "no", "--dynamo_backend", "no", "--cpu"], 1,
                     "asked for several processes and has started this one alone", marks=pytest.mark.slow),
        pytest.param(["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision",
                      "no", "--dynamo_backend", "no"], 0, "; 1 process", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_launcher_s_processes_take_part_or_it_says_that_they_do_not(launcher, code, words, toy_folder, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"base": str(toy_folder)} | RECIPE))
    command = [sys.executable, "-m", *launcher, "-m", "controlkit", "train", tmp_path / "r.yaml", "--out"]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "run"), "--device", "cpu"],
        capture_output=True, text=True, timeout=250,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "1000", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert words in " ".join((done.stdout + done.stderr).split())
    assert (tmp_path / "run" / "control").is_dir() is (code == 0)
    if code == 0:
        assert done.stdout.count("The control is in") == 1
        log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == [1, 2]


LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION",
            "SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # fmt: skip
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (ACCELERATE | {"MASTER_ADDR": "127.0.0.1"}, "accelerate launch` was asked for several processes"),
        ({"WORLD_SIZE": "2"}, "says that 2 processes take part .* not which of them"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "says that 4 processes take part .* not which of them"),
        ({"SLURM_STEP_NUM_TASKS": "3"}, "srun has started 3 tasks that do not know of each other"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "2 processes take part, and 1 found each other .LOCAL_RANK is not set"),
        ({}, ""),
        (ACCELERATE, ""),
        ({"MASTER_ADDR": "127.0.0.1"}, ""),
        (ACCELERATE | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"}, ""),
        ({"SLURM_NTASKS": "2"}, ""),
    ],
)
def test_one_that_was_launched_as_one_of_several_and_is_alone_is_refused(told, words, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    alone = type("State", (), {"process_index": 0, "num_processes": 1, "__init__": lambda self, cpu, timeout: None})
    monkeypatch.setattr("accelerate.PartialState", alone)
    with pytest.raises(UserError, match=f"{words}.*torchrun") if words else nullcontext():
        assert connect_ranks(cpu=True) == Ranks()


ELSEWHERE = """
import os
from controlkit.train import ranks
ranks._SEEN = 0.5
os.makedirs(f"{folder}/node-{{os.environ['RANK']}}")
os.chdir(f"{folder}/node-{{os.environ['RANK']}}")
"""


def test_machines_without_a_shared_folder_are_told_so(toy_folder, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"base": str(toy_folder)} | RECIPE))
    codes, said = launch(tmp_path / "r.yaml", "run", before=ELSEWHERE.format(folder=tmp_path))
    assert codes == [2, 2]
    for _, error in said:
        assert "run is not the same folder on every machine of this run" in " ".join(error.split())
        assert "Traceback" not in error
    assert not (tmp_path / "node-1" / "run").exists()


@pytest.mark.parametrize("apart", [[], [1], [1, 2]])
def test_a_folder_is_shared_where_all_see_what_the_first_writes(apart, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks_module, "_SEEN", 0.3)
    for name in "ab":
        (tmp_path / name).mkdir()

    def check(rank):
        try:
            rank.check_shared(tmp_path / ("b" if rank.index in apart else "a"))
        except UserError as error:
            return str(error)
        return ""

    told = in_threads(3, check)
    assert all(("is not the same folder" in words) is bool(apart) for words in told)
    assert not list(tmp_path.rglob(".*")), "nothing is left"


STRUCK = """
import os, signal
from controlkit.train.state import TrainState
step = TrainState.step
def struck(self, rate, number):
    if number == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    step(self, rate, number)
TrainState.step = struck
"""


def test_a_signal_to_one_process_stops_all_at_the_same_step(toy_folder, tmp_path):
    recipe = {"base": str(toy_folder)} | RECIPE | {"steps": 5, "checkpoint_every": 9, "evaluation": {"every": 0}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    codes, said = launch(tmp_path / "r.yaml", tmp_path / "run", before=STRUCK)
    assert codes == [130, 143], said
    assert "Stopped at step 2 of 5; run again to go on." in said[0][0]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002"]


KILLED = """
import os, signal
from controlkit.train.state import TrainState
step = TrainState.step
def dying(self, rate, number):
    if number == 3 and os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, rate, number)
TrainState.step = dying
"""


@pytest.fixture(scope="module")
def unkilled(toy_folder, tmp_path_factory):
    """A run of two processes that nothing ends early: its recipe and folder."""
    folder = tmp_path_factory.mktemp("unkilled")
    recipe = {"base": str(toy_folder)} | RECIPE | {"steps": 5, "checkpoint_every": 2, "evaluation": {"every": 0}}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert launch(folder / "r.yaml", folder / "run")[0] == [0, 0]
    return folder / "r.yaml", folder / "run"


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_others_and_costs_the_steps_since_the_checkpoint(rank, unkilled, tmp_path):
    recipe, whole = unkilled
    codes, said = launch(recipe, tmp_path / "run", before=KILLED.format(rank=rank))
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 2, "the other does not wait for it"
    told = " ".join(said[1 - rank][1].split())
    assert "Another process of the run has ended" in told and "Traceback" not in told
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002"]
    assert launch(recipe, tmp_path / "run")[0] == [0, 0]
    weights = [load_file(out / "control" / WEIGHTS) for out in (whole, tmp_path / "run")]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    logs = [(out / "log.jsonl").read_text().splitlines() for out in (whole, tmp_path / "run")]
    whole, run = ([(json.loads(line)["step"], json.loads(line)["loss"]) for line in log] for log in logs)
    assert whole == run and len(run) == 5


SIZES = """
from controlkit.train.state import TrainState
step, clip = TrainState.step, TrainState.clip
TrainState.clip = lambda self, most: clip(self, 1e-3)
def counted(self, *args):
    step(self, *args)
    whole = list(self.branch.parameters())
    first = [state["exp_avg"] for part in self.optimizer._parts for state in part.state.values()]
    local = [sum(p.to_local().numel() for p in of) / sum(p.numel() for p in of) for of in (whole, first)]
    print("shares", *local, flush=True)
TrainState.step = counted
"""


def test_shared_out_weights_go_on_from_one_process_and_end_as_its_own(toy_folder, toy_base, tmp_path, monkeypatch):
    clip = TrainState.clip
    monkeypatch.setattr(TrainState, "clip", lambda self, most: clip(self, 1e-3))  # a toy's gradients are never large
    recipe = {"base": str(toy_folder)} | RECIPE | {"steps": 3, "ema": 0.5, "gradient_accumulation": 2}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    run = train_control(parse_recipe(recipe), tmp_path / "one", toy_base)
    next(run)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    list(run)
    codes, said = launch(tmp_path / "r.yaml", tmp_path / "two", before=SIZES, ACCELERATE_USE_FSDP="true")
    assert codes == [0, 0], said
    assert "sharded over 2 processes" in " ".join(said[0][0].split())
    shares = [
        float(x) for out, _ in said for line in out.splitlines() if line.startswith("shares") for x in line.split()[1:]
    ]
    assert len(shares) == 8 and all(0.4 < share < 0.6 for share in shares), "each has its half, after each step"
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")
    ]
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["residuals"] == pytest.approx(one["residuals"], rel=1e-3, abs=1e-6)
    states = [load_file(tmp_path / n / "checkpoints" / "step-0000003" / "state.safetensors") for n in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    moments = [[v for k, v in state.items() if k.endswith("exp_avg")] for state in states]
    assert relative(*moments) < 1e-5
    saved = [load_file(tmp_path / n / "control" / WEIGHTS) for n in ("one", "two")]
    assert relative(*(list(weights.values()) for weights in saved)) < 1e-5
    stock = ControlNetModel.from_pretrained(tmp_path / "two" / "control").state_dict()
    assert all(torch.equal(stock[name], value) for name, value in saved[1].items())
    assert load_control(tmp_path / "two", toy_base).trained["step"] == 3


def test_an_optimizer_that_needs_whole_matrices_is_refused_where_weights_are_shared_out(
    toy_base, tmp_path, monkeypatch
):
    monkeypatch.setattr("controlkit.train.run.connect_ranks", lambda cpu: Ranks(0, 2, sharded=True))
    with pytest.raises(UserError, match="optimizer: muon does not work with sharded weights"):
        next(train_control(parse_recipe(RECIPE | {"optimizer": "muon"}), tmp_path / "run", toy_base))
    assert not (tmp_path / "run").exists()


def in_threads(count, function):
    """What ``function`` of its rank gives in each of several threads that stand for processes."""
    here, held = threading.Barrier(count, timeout=300), [None] * count

    class Thread(Ranks):
        def wait(self):
            here.wait()

        def broadcast(self, value):
            return self.gather(value)[0]

        def gather(self, value):
            held[self.index] = value
            here.wait()
            copied = list(held)
            here.wait()
            return copied

        def any(self, value):
            return any(self.gather(value))

    def run(rank):
        torch.set_num_threads(1)
        try:
            return function(rank)
        except BaseException:
            here.abort()  # the others wait for nothing then, and end with BrokenBarrierError
            raise

    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(run, Thread(index, count)) for index in range(count)]
    failed = [error for error in (future.exception() for future in running) if error]
    for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # the one that broke it, not those it left waiting
    return [future.result() for future in running]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_measure_what_one_does(count, toy_base, drawn_joins, tmp_path, monkeypatch):
    """Pairs are dealt out; with five there are more processes than pairs, and only some have any."""
    monkeypatch.setattr(evaluation, "maker", partial(evaluation.maker, batch=1))  # rounding depends on how many
    monkeypatch.setattr(sys.modules["controlkit.measure.evaluate"], "_AT_ONCE", 1)  # pictures are made together
    recipe = parse_recipe(RECIPE | {"evaluation": {"every": 1, "num": 3, "steps": 2}})
    pairs = training_pairs(resolve(recipe).data, toy_base)[1]
    branch = drawn_joins(new_control(toy_base))

    def figures(out, ranks):
        base, own = copy.deepcopy((toy_base, branch))  # processes share nothing
        loss = heldout_loss(recipe, base, pairs, out, ranks)
        evaluator = evaluator_of(recipe, base, pairs, out, ranks)
        work = []
        twice = [evaluator.measure(own, Record(step, 0.0, 0.0), work.append) for step in (1, 2)]
        return loss.measure(own), loss.residuals(own), *twice, sum(work)

    one = figures(tmp_path / "one", Ranks())
    told = in_threads(count, lambda rank: figures(tmp_path / "many", rank))
    for figures_of_one in told:
        assert figures_of_one[:-1] == one[:-1], "to the bit"
    assert sum(work for *_, work in told) == one[-1]
    for step in (1, 2):
        name = f"samples/step-{step:07d}.png"
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_where_one_has_not_enough_memory_all_measure_of_fewer_pairs_at_once(toy_base, drawn_joins, tmp_path):
    recipe = parse_recipe(RECIPE | {"evaluation": {"every": 1, "num": 3, "steps": 2}})
    pairs = training_pairs(resolve(recipe).data, toy_base)[1]
    branch = drawn_joins(new_control(toy_base))

    def measured(rank):
        base, own = copy.deepcopy((toy_base, branch))
        predict = base.predict

        def little(z, *inputs):
            if rank.index == 0 and len(z) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return predict(z, *inputs)

        base.predict = little
        return heldout_loss(recipe, base, pairs, tmp_path / "many", rank).measure(own)

    one = heldout_loss(recipe, toy_base, pairs, tmp_path / "one").measure(branch)
    for told in in_threads(2, measured):
        assert told[""] == pytest.approx(one[""], rel=1e-5)


def test_means_are_over_all_and_alone_nothing_is_asked(monkeypatch):
    values = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    Ranks().mean(values)
    assert [value.tolist() for value in values] == [[1.0, 2.0], [[3.0]]]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.add_(torch.tensor([1.0, 0.0, 5.0])))
    Ranks(0, 2).mean(values)
    assert [value.tolist() for value in values] == [[1.0, 1.0], [[4.0]]]
    assert connect_ranks(cpu=True) == Ranks(0, 1) and Ranks().broadcast("x") == "x" and Ranks().any(True)


def test_deepspeed_is_not_handed_the_run_and_sharding_takes_several(monkeypatch):
    seen = []

    class State:
        process_index, num_processes = 1, 2

        def __init__(self, cpu, timeout):
            seen.append(os.environ.get("ACCELERATE_USE_DEEPSPEED"))

    monkeypatch.setattr("accelerate.PartialState", State)
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, timeout: backend)
    for asked, count, sharded, notes in (("FSDP", "1", False, 0), ("FSDP", "2", True, 1), ("DEEPSPEED", "1", False, 1),
                                         ("DEEPSPEED", "2", False, 1)):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{asked}", "true")
            patch.setenv("WORLD_SIZE", count)
            patch.setenv("RANK", "1")
            found = connect_ranks(cpu=False)
            assert (found.count, found.sharded, len(found.notes)) == (int(count), sharded, notes)
            assert os.environ[f"ACCELERATE_USE_{asked}"] == "true"
    assert seen == [None, None], "accelerate would look for DeepSpeed"


def test_a_batch_must_go_round(toy_base, tmp_path, monkeypatch):
    monkeypatch.setattr("controlkit.train.run.connect_ranks", lambda cpu: Ranks(0, 3))
    with pytest.raises(UserError, match="pairs of 2 noises, 1 equal parts and 3 processes"):
        next(train_control(parse_recipe(RECIPE), tmp_path / "run", toy_base))
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus_are_refused_in_words(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes were started on a machine with 1 GPUs"):
        connect_ranks(cpu=False)

"""Run folders that a stranger sends, or that a disk has damaged: named in a sentence or cleaned, never a traceback."""

import json
import os
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from controlkit.errors import Invalid, UserError
from controlkit.train import train_control
from controlkit.train.checkpoints import go_back
from controlkit.train.ending import read_ending
from controlkit.train.watch import lines, page, read_run
from limits import limited

HOSTILE = "\x1b]0;owned\x07\x9b31m\u202e[link=file:///etc/passwd]x[/link]\n"
STATE = "checkpoints/step-0000003/state.safetensors"
LINE = {"step": 2, "loss": 1.0, "seconds": 0.1}
EVALUATED = {"obedience": 0.1, "obedience_interval": [0, 1], "is_meaningful": True, "verdict": HOSTILE}


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    return tiny_recipe(steps=3, checkpoint_every=2, evaluation={"every": 0})


@pytest.fixture(scope="module")
def begun(recipe, toy_base, tmp_path_factory):
    out = tmp_path_factory.mktemp("begun") / "run"
    list(train_control(recipe, out, toy_base))
    return out


@pytest.fixture
def run(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


def emptied(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def made_a_folder(path):
    path.unlink()
    path.mkdir()


def made_a_list(path):
    path.write_text("[1, null, {}]\n")


def made_deep(path):
    path.write_text("[" * 100_000)


def made_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def linked_away(path):
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGES = [emptied, cut, made_a_folder, made_a_list, made_deep, made_a_pipe, linked_away]


def in_words(action):
    """The error's one sentence, or "" where all went well."""
    try:
        with limited():
            action()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return str(error)
    except OSError as error:
        assert error.filename, "which the command line names, with what to do about it"
        return str(error)
    return ""


def look(run):
    seen = read_run(run)
    assert page(seen) and lines(seen) and seen.left >= 0


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["recipe.yaml", "log.jsonl", "machine.json", "ending.json", STATE, "tracking.json", ".lock"]
)
def test_every_file_of_a_run_may_be_damaged(name, damage, run, recipe, toy_base):
    (run / "tracking.json").write_text('{"name": "0123abcd", "sent": 2}')
    (run / ".lock").touch()
    damage(run / name)
    words = in_words(lambda: look(run))
    assert not words or name in words or (name == "recipe.yaml" and "holds no run" in words)
    words = in_words(lambda: next(train_control(recipe, run, toy_base), None))
    assert not words or str(run) in words


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("machine.json", {"threads": 10**9}),
        ("machine.json", {"threads": "2"}),
        ("machine.json", {"threads": -1}),
        ("machine.json", {"processes": 1e300}),
        ("machine.json", {"format": HOSTILE}),
        ("machine.json", {"rows": ["x"]}),
        ("log.jsonl", LINE | {"step": "2"}),
        ("log.jsonl", LINE | {"step": -1}),
        ("log.jsonl", LINE | {"step": 10**30}),
        ("log.jsonl", LINE | {"loss": None}),
        ("log.jsonl", LINE | {"seconds": -1}),
        ("log.jsonl", {"step": 2}),
        ("log.jsonl", LINE | {"obedience": 0.5}),
        ("log.jsonl", LINE | EVALUATED | {"obedience": 1e300}),
        ("log.jsonl", LINE | EVALUATED | {"obedience_interval": [0]}),
        ("log.jsonl", LINE | EVALUATED | {"verdict": {}}),
        ("log.jsonl", LINE | {"relative_loss": {"": []}}),
        ("log.jsonl", LINE | {"relative_loss": [1]}),
        ("log.jsonl", LINE | {"residuals": {"middle": "x"}}),
        ("log.jsonl", LINE | {"fidelity": 1}),
        ("log.jsonl", LINE | EVALUATED | {"fidelity": "0.2"}),
        ("log.jsonl", LINE | EVALUATED | {"is_meaningful": "yes"}),
        ("log.jsonl", LINE | {"colour_drift": {"red": "0.1"}}),
        ("log.jsonl", LINE | {"relative_loss": {"": ["1"]}}),
        ("log.jsonl", LINE | {"loss": "1"}),
        ("ending.json", {"step": 3, "reason": "x", "why": "", "verdict": None, "next": "", "words": []}),
        ("ending.json", {"step": 3, "reason": "steps", "why": 5, "verdict": None, "next": "", "words": []}),
        (
            "ending.json",
            {
                "step": 3,
                "reason": "steps",
                "why": "",
                "verdict": {"finding": "x", "why": ""},
                "next": "",
                "words": [],
            },
        ),
    ],
)
def test_values_that_no_run_wrote_are_named(name, value, run, recipe, toy_base):
    (run / name).write_text(json.dumps(value) + "\n")
    seen = in_words(lambda: look(run)) if name != "machine.json" else name
    resumed = in_words(lambda: list(train_control(recipe, run, toy_base)))
    assert name in seen and name in resumed, (seen, resumed)


@pytest.mark.parametrize("value", [{"max_minutes": "1e9"}, {"max_minutes": -1}, {"evaluation": []}, {"steps": True}])
def test_a_recipe_in_a_folder_that_watch_cannot_use_is_named(value, run):
    (run / "recipe.yaml").write_text(json.dumps({"steps": 3} | value))
    assert "recipe.yaml is no recipe that a run wrote" in in_words(lambda: look(run))


def test_words_of_a_log_and_an_ending_are_one_line_each(run):
    (run / "log.jsonl").write_text(json.dumps(LINE | EVALUATED) + "\n")
    (run / "ending.json").unlink()
    text = lines(read_run(run))[-1]
    assert text.isprintable() and "owned" in text
    ending = {"step": 2, "reason": "steps", "why": HOSTILE * 9, "verdict": None, "next": HOSTILE, "words": []}
    (run / "ending.json").write_text(json.dumps(ending))
    seen = read_run(run)
    assert len(seen.verdict.splitlines()) == 2 and all(line.isprintable() for line in lines(seen))
    assert "\x1b" not in page(seen) and "\u202e" not in page(seen)


@pytest.mark.parametrize(
    "change",
    [
        lambda held, facts: held.popitem(),
        lambda held, facts: held.update({name: x.ravel()[:0] for name, x in held.items() if name.endswith("exp_avg")}),
        lambda held, facts: held.pop("optimizer.0.3.exp_avg_sq"),
        lambda held, facts: held.pop(next(name for name in held if name.startswith("learning."))),
        lambda held, facts: held.update({"optimizer.9.0.exp_avg": next(iter(held.values()))}),
        lambda held, facts: held.update({"optimizer.x": next(iter(held.values()))}),
        lambda held, facts: facts.update(step="7"),
        lambda held, facts: facts.update(step="x"),
        lambda held, facts: facts.update(seconds="nan"),
        lambda held, facts: facts.update(last_step="-1e999"),
        lambda held, facts: facts.pop("base_digest"),
        lambda held, facts: facts.clear(),
    ],
)
def test_a_checkpoint_of_another_content_is_named(change, run, recipe, toy_base):
    from safetensors import safe_open

    with safe_open(run / STATE, "np") as file:
        facts = file.metadata()
    held = load_file(run / STATE)
    change(held, facts)
    save_file(held, run / STATE, facts)
    (run / "ending.json").unlink()
    words = in_words(lambda: list(train_control(recipe, run, toy_base)))
    assert "step-0000003" in words and "Delete" in words
    look(run)


def test_what_lies_beside_checkpoints_is_no_checkpoint_and_stays(run, recipe, toy_base):
    for name in ("step-x", "step-", "step-0000009.bak", "step-99999999999999"):
        (run / "checkpoints" / name).mkdir()
    go_back(run, 2)
    list(train_control(recipe, run, toy_base))
    assert read_ending(run).step == 3 and len(list((run / "checkpoints").iterdir())) == 6


@pytest.mark.parametrize("name", ["pairs", "checkpoints", "samples", "control"])
def test_what_is_in_the_way_of_a_run_is_named(name, run, recipe, toy_base):
    [*places] = run.glob(f"{name}*")
    for place in places:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    (run / name if name != "pairs" else places[0]).write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert str(run / name) in in_words(lambda: list(train_control(recipe, run, toy_base)))


@pytest.mark.parametrize("name", ["recipe.yaml", "log.jsonl", "ending.json", "machine.json", ".lock"])
def test_a_file_of_a_run_that_is_a_link_out_of_it_is_not_read(name, run, recipe, toy_base, tmp_path):
    (run / ".lock").touch()
    (run / name).rename(tmp_path / "away")
    (run / name).symlink_to(tmp_path / "away")
    held = (tmp_path / "away").read_bytes()
    if name not in ("machine.json", ".lock"):
        assert "leads out of its folder" in in_words(lambda: look(run))
    assert "leads out of its folder" in in_words(lambda: list(train_control(recipe, run, toy_base)))
    assert "leads out of its folder" in in_words(lambda: go_back(run, 1))
    assert (tmp_path / "away").read_bytes() == held


def test_a_lock_that_is_a_link_within_its_run_is_not_opened(run, recipe, toy_base):
    before = (run / "log.jsonl").read_bytes()
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to("log.jsonl")
    for words in (in_words(lambda: list(train_control(recipe, run, toy_base))), in_words(lambda: go_back(run, 2))):
        assert "cannot be locked" in words
    assert (run / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["pairs", "heldout"])
def test_a_cache_of_a_run_that_is_a_link_out_of_it_is_not_read(kind, run, recipe, toy_base, tmp_path):
    [*caches] = run.glob(f"{kind}-*.safetensors")
    for cache in caches:
        cache.rename(tmp_path / "away")
        cache.symlink_to(tmp_path / "away")
        assert "leads out of its folder" in in_words(lambda: list(train_control(recipe, run, toy_base)))
    assert caches or kind == "heldout"


@pytest.mark.parametrize("name", ["checkpoints", "samples"])
def test_links_of_a_stranger_s_run_are_not_followed_and_one_s_own_are(
    name, begun, run, recipe, toy_base, tmp_path, monkeypatch
):
    """The run lies where it was not begun, as a copy from anywhere does; where it was, a link is its owner's."""
    away = tmp_path / "away"
    (run / name).mkdir(exist_ok=True)
    (run / name).rename(away)
    (run / name).symlink_to(away)
    held = sorted(away.rglob("*"))
    assert "leads out of its folder" in in_words(lambda: list(train_control(recipe, run, toy_base)))
    assert sorted(away.rglob("*")) == held
    monkeypatch.setattr("controlkit.train.checkpoints.is_sealed", lambda word, place: place == str(run) and word)
    list(train_control(recipe, run, toy_base))


def test_a_run_that_another_process_began_meanwhile_is_not_mixed_with_this_one(run, tiny_recipe, recipe, toy_base):
    """The folder was empty when the run was prepared, and holds another recipe's once it is locked."""
    late = run.rename(run.with_name("late"))
    iterator = train_control(tiny_recipe(batch=4, evaluation={"every": 0}), run, toy_base)
    from controlkit.train import run as module

    prepare = module.prepare

    def slow(*values):
        prepared = prepare(*values)
        late.rename(run)
        return prepared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "prepare", slow)
        with pytest.raises(UserError, match="holds a run of another recipe"):
            next(iterator)
    assert read_ending(run) and not isinstance(read_ending(run), Invalid)

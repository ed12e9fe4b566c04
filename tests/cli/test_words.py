"""What a terminal is shown: names, captions, digests and verdicts of anybody's files, and never what they would do."""

import json
import logging
import os
import pickle
import sys
import warnings

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from controlkit import cli, hub
from controlkit.annotators import contract
from controlkit.backbones.unet import UNetBase
from controlkit.cli.shared import progress_bars, say_beside, say_table
from controlkit.controls import new_control
from controlkit.data import make_fill50k
from controlkit.data.layouts.rows import Problem
from controlkit.errors import LINE, Invalid, one_line, printable
from controlkit.files import write_atomic
from controlkit.formats import SavedControl, save_control
from controlkit.images import write_png
from controlkit.pages import Figure, Section, Table, render

HOSTILE = "\x1b]0;owned\x07\x9b31m\u202e\u2066\u200b[link=file:x]a[|red]\r\tb\nfake: line\x85c\u2028"
"""Sequences of a terminal (OSC, CSI as C1), turned writing, letters without width, markup, ends of lines."""


def shows(text, words="[link"):
    """Whether a terminal shows these words and does nothing."""
    assert all(letter.isprintable() or letter == "\n" for letter in text), ascii(text)
    assert not any(line.startswith("fake:") for line in text.splitlines())
    return "".join(words.split()) in "".join(text.split())  # wherever a line is broken


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("plain words", "plain words"),
        ("ein Äpfelchen, 苹果, תפוח 🍎", "ein Äpfelchen, 苹果, תפוח 🍎"),
        ("e\u0301 and ệ", "e\u0301 and ệ"),
        ("a\x1b[2Jb", "a?[2Jb"),
        ("a\x9b2Jb\x00\x7f", "a?2Jb??"),
        ("a\u202eb\u2069c\u200dd\ufeff", "a?b?c?d?"),
        ("a\nb\tc\x85d\u2028e\u3000f", "a b c d e f"),
        ("a" + "\u0301" * 100 + "b", "a" + "\u0301" * 4 + "b"),
        ("a\u3164\u2800b", "a??b"),
        ("\udce9\ue000\U000e0041", "???"),
        ("[red]a[/] :smile:", "[red]a[/] :smile:"),
        (5, "5"),
    ],
)
def test_words_from_anywhere_become_one_printable_line(given, wanted):
    assert printable(given) == wanted and printable(wanted) == wanted


def test_a_line_has_an_end():
    assert len(printable("a" * 10**6)) == LINE + 3 and len(printable("\x1b" * 10**6)) == LINE + 3
    assert printable("a" * 10**5, None) == "a" * 10**5 and len(one_line("a b\n" * 10**5)) == 203


def test_a_word_quoted_in_an_error_has_an_end():
    long = str(Invalid(f'There is no "{"ab" * 5000}" in {"/x" * 3000}.'))
    assert len(long) < 600 and long.endswith("x.") and long.count("...") == 2 and str(Invalid("a " * 400)) == "a " * 400
    assert str(pickle.loads(pickle.dumps(Invalid(long)))) == long
    assert len(str(Problem("missing hint", "a" * 4000, f"has none in {'b' * 4000}"))) < 600


@pytest.fixture
def hostile(toy_base, tmp_path):
    """A folder with a control and pictures, whose names and words are all hostile."""
    folder = tmp_path / HOSTILE
    trained = {"base": HOSTILE, "base_digest": HOSTILE, "base_difference": HOSTILE}
    save_control(folder / "c", SavedControl(new_control(toy_base), contract("canny"), trained), toy_base)
    list(make_fill50k(folder / "set", 4, 32))
    write_png(folder / f"{HOSTILE}.png", np.full((32, 32, 3), 9, np.uint8))
    for picture in (folder / "set").rglob("*.png"):
        picture.rename(picture.with_name(f"{HOSTILE}{picture.name}"))
    lines = [json.loads(line) for line in (folder / "set" / "prompt.json").read_text().splitlines()]
    named = ({k: v.replace("/", f"/{HOSTILE}") for k, v in line.items()} | {"prompt": HOSTILE} for line in lines)
    (folder / "set" / "prompt.json").write_text("".join(json.dumps(line) + "\n" for line in named))
    run = folder / "run"
    (run / "samples").mkdir(parents=True)
    (run / "recipe.yaml").write_text(json.dumps({"steps": 9, "data": {"source": HOSTILE}}))
    figures = {"colour_drift": {HOSTILE: 0.1}, "relative_loss": {HOSTILE: [1.0]}, "verdict": HOSTILE}
    (run / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "seconds": 1} | figures) + "\n")
    return folder


def commands(folder, base):
    """Command lines, one for each place at which words of files are shown."""
    picture, control, out = folder / f"{HOSTILE}.png", folder / "c", ["--out", folder / "out"]
    yield ["inspect", control]
    yield ["inspect", control, "--json"]
    yield ["inspect", folder / "nothing"]
    yield ["convert", control, folder / f"{HOSTILE}.safetensors", "--to", "cldm"]
    yield ["where", HOSTILE]
    yield ["annotate", "canny", picture, *out]
    yield ["annotate", HOSTILE, picture]
    prompt = f"{HOSTILE} " * 40
    yield ["generate", prompt, "--control", f"{control}={picture}", "--steps", 1, "--base", base, *out]
    yield ["generate", "x", "--control", f"{control}={folder / 'set'}", "--base", base]
    yield ["evaluate", control, "--base", base, "--data", "fill50k", "--num", 2, "--steps", 1]
    yield ["evaluate", control, "--base", base, "--data", folder / "nothing"]
    yield ["watch", folder / "run", "--once", "--html", folder / f"{HOSTILE}.html"]
    yield ["data", "doctor", folder / "set", "--annotator", "canny", "--base", base, *out]
    yield ["data", "build", folder / "set", "--annotator", "canny", "--out", folder / "built"]
    yield ["data", "build", folder / "set", "--annotator", HOSTILE, "--out", folder / "built2"]
    yield ["data", "make", "fill50k", "--count", 1, "--size", 32, "--out", folder / "made"]
    yield ["train", folder / "nothing.yaml", *out]
    recipe = folder / "r.yaml"
    recipe.write_text(json.dumps({"base": str(base), "data": {"source": str(folder / "set")}, "steps": 1, "batch": 2}))
    yield ["train", recipe, "--set", "evaluation.every=0", "--out", folder / "new"]
    yield ["train", recipe, "--set", f"{HOSTILE}=1", *out]
    yield ["train", recipe, HOSTILE, *out]
    yield [HOSTILE]
    yield ["generate", f"--{HOSTILE}"]
    yield ["generate", "--steps", HOSTILE]


def test_no_command_shows_more_than_words(run, hostile, toy_folder):
    for command in commands(hostile, toy_folder):
        code, out, err = run(*command)
        unnamed = (command[0] == "inspect" and code == 0) or "--steps" in command[:2] or "--json" in command
        assert shows(out + err) or unnamed, (command, out, err)
        assert "Traceback" not in err and (code in (0, 2)), (command, err)


def test_tables_bars_and_lines_beside_them_read_no_markup(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    say_table(HOSTILE, [HOSTILE], [[HOSTILE], ["[/]"]], "[/]:smile:")
    with progress_bars() as progress:
        progress.add_task(f"[/]{HOSTILE}", total=1, figures=f"[/]{HOSTILE}")
        say_beside(progress, f"[/]{HOSTILE}")
    shown = capsys.readouterr()
    assert shows(shown.out, "[/]:smile:") and shown.out.count("[link=file:x]a") == 4
    assert shows(shown.err, "[/]?]0;owned") and shown.err.count("[/]") == 2


def test_what_libraries_warn_and_log_is_a_line_too(run, monkeypatch, capsys):
    def command():
        warnings.simplefilter("always")
        warnings.warn(HOSTILE, RuntimeWarning, stacklevel=1)
        logging.getLogger("somebody").error("%s", HOSTILE)

    before = logging.getLogRecordFactory()
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(cli, "app", lambda *args, **more: command())
    logging.getLogger("somebody").addHandler(handler)
    try:
        _, _, err = run("x")
    finally:
        logging.getLogger("somebody").removeHandler(handler)
        logging.setLogRecordFactory(before)
    assert shows(err) and err.count("[link=file:x]a") == 2 and len(err.splitlines()) == 2


def test_a_mistake_of_ours_is_shown_without_what_it_quotes(capsys):
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        cli._show_crash(*sys.exc_info())
    assert shows(capsys.readouterr().err, "ValueError")


def test_a_page_s_words_are_neither_markup_nor_turned():
    words = f"{HOSTILE}\"><script>'onload=x javascript:alert(1)"
    picture = Figure("data:image/png;base64,AA==", words)
    page = render(words, words, [words, Table([words], [[words]]), Section(words, [[picture]], sheet=picture)], 5)
    assert all(letter.isprintable() or letter == "\n" for letter in page)
    assert "<script" not in page and "'onload" not in page and '"onload' not in page and "default-src 'none'" in page


def test_names_of_files_that_are_written_are_plain(run, toy_folder, hostile):
    control = hostile / "c"
    evil = control.rename(control.with_name("..\x1b]0;x\n" + "y" * 200))
    command = ["generate", "x", "--control", f"{evil}={hostile / f'{HOSTILE}.png'}", "--base", toy_folder]
    assert run(*command, "--steps", 1, "--out", hostile.parent / "out")[0] == 0
    [hint] = (hostile.parent / "out").glob("hint-*")
    assert hint.name.isascii() and hint.name.isprintable() and len(hint.name) < 80


# --- a file does not steer the program ----------------------------------------------------------------------------


@pytest.fixture
def edges(toy_base, tmp_path):
    save_control(tmp_path / "edges", SavedControl(new_control(toy_base), contract("canny")), toy_base)
    return tmp_path / "edges"


def told(folder, **trained):
    """Write this record of its training into a control's file, as anybody can."""
    file = folder / "diffusion_pytorch_model.safetensors"
    with safe_open(file, "pt") as held:
        metadata = held.metadata()
    save_file(load_file(file), file, metadata | {"controlkit.trained": json.dumps(trained)})


MEASURE = ["--num", 2, "--steps", 1]


@pytest.mark.parametrize("data", ["owner/dataset", "/etc", "../photos", "\x1b]0;x\x07", 5, ["emoji"], {"a": 1}])
def test_evaluate_does_not_open_what_a_stranger_s_control_names(data, run, toy_folder, edges, monkeypatch):
    monkeypatch.setattr("controlkit.data.pairs.folder_of", lambda source: pytest.fail("it was opened"))
    told(edges, data=data, recipe={"data": {"columns": {"image": "../x"}}})
    code, out, err = run("evaluate", edges, "--base", toy_folder, *MEASURE)
    assert code == 2 and "--data" in err and shows(out + err, "says that it was trained on")


@pytest.mark.parametrize("recipe", [{"size": 4096}, {"size": ["x"]}, []])
def test_evaluate_measures_at_the_base_s_size_whatever_a_stranger_s_control_says(
    recipe, run, toy_folder, edges, monkeypatch, tmp_path
):
    told(edges, data="fill50k", recipe=recipe)
    file = tmp_path / "report.json"
    code, _, err = run("evaluate", edges, "--base", toy_folder, *MEASURE, "--json", file)
    assert code == 0 and ("--size" in err) == isinstance(recipe, dict), err
    assert json.loads(file.read_text())["num"] == 2


@pytest.fixture
def trained(run, toy_folder, tmp_path, monkeypatch):
    """A run of this user's, on a folder of data that is named as the user names it."""
    monkeypatch.chdir(tmp_path)
    list(make_fill50k(tmp_path / "set", 6, 32))
    recipe = {"base": str(toy_folder), "data": {"source": "set"}, "steps": 1, "batch": 2, "evaluation": {"every": 0}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe | {"size": 64}))
    assert run("train", tmp_path / "r.yaml", "--out", tmp_path / "run")[0] == 0
    return tmp_path / "run"


def test_what_one_trained_oneself_is_measured_on_what_it_was_trained_on(
    run, toy_folder, trained, tmp_path, monkeypatch
):
    sizes = []
    of_size = UNetBase.of_size
    monkeypatch.setattr(UNetBase, "of_size", lambda base, size: sizes.append(size) or of_size(base, size))
    code, _, err = run("evaluate", trained, "--base", toy_folder, *MEASURE)
    assert code == 0 and sizes == [64], err
    assert run("convert", trained, tmp_path / "moved.safetensors", "--to", "cldm")[0] == 0
    code, _, err = run("evaluate", tmp_path / "moved.safetensors", "--base", toy_folder, *MEASURE, "--size", 32)
    assert code == 0 and sizes == [64, 32], err


def test_a_record_that_was_changed_is_a_stranger_s(run, toy_folder, trained, monkeypatch, tmp_path):
    file = trained / "control" / "diffusion_pytorch_model.safetensors"
    with safe_open(file, "pt") as held:
        record = json.loads(held.metadata()["controlkit.trained"])
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "elsewhere"))
    code, _, err = run("evaluate", trained, "--base", toy_folder, *MEASURE)
    assert code == 2 and 'trained on "set"' in err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    told(trained / "control", **record | {"data": "/etc"})
    code, _, err = run("evaluate", trained, "--base", toy_folder, *MEASURE)
    assert code == 2 and 'trained on "/etc"' in err


def test_the_key_of_seals_is_its_owner_s_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path))
    word = hub.seal({"a": 1})
    assert (tmp_path / "key").stat().st_mode & 0o77 == 0
    assert hub.is_sealed(word, {"a": 1}) and not hub.is_sealed(word, {"a": 2})
    for other in ("", None, 5, "é", word[:-1]):
        assert not hub.is_sealed(other, {"a": 1})
    (tmp_path / "key").write_bytes(b"")
    assert hub.seal({"a": 1}) == "" and not hub.is_sealed("", {"a": 1})


def png_with(path, settings):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", json.dumps(settings))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"controls": [{"name": "owner/control", "images": "/etc/passwd"}]},
            '"owner/control", the picture "/etc/passw',
        ),
        ({"controls": [{"name": "canny", "images": "private.png"}]}, 'the picture "private.png"'),
        ({"controls": [{"name": "./x.ckpt:canny", "images": {"canny": "a"}}]}, 'the control "./x.ckpt:canny"'),
        ({"controls": [{"name": HOSTILE, "images": "a"}]}, "[link=file"),
        ({"size": [16000, 16000]}, "16000 x 16000 pixels"),
        ({"steps": 1000}, "1000 steps"),
        ({"controls": [{"name": "canny", "images": {}, "region": "private.png"}]}, 'the picture "private.png"'),
        ({"prompt": "x <lora:/a/b:1>", "dialect": "a1111"}, 'the LoRA "/a/b"'),
        ({"base": "owner/base"}, 'the base "owner/base"'),
        ({"vae": "/etc", "lora": ["a.pt", "b=0.5"]}, 'the VAE "/etc", the LoRA "a.pt", the LoRA "b=0.5"'),
        ({"embedding": [HOSTILE]}, "the embedding"),
    ],
)
def test_a_stranger_s_png_is_asked_before_it_is_followed(asked, words, run, toy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("controlkit.cli.making.loaded_base", lambda *a, **b: pytest.fail("it was followed"))
    file = png_with(tmp_path / "p.png", {"prompt": "x", "seal": "0" * 32} | asked)
    code, out, err = run("generate", "--like", file)
    assert code == 2 and "--follow" in err and shows(out + err, words)


def test_a_stranger_s_png_of_words_alone_is_repeated_and_one_that_is_followed(run, toy_folder, tmp_path, edges):
    words = png_with(tmp_path / "w.png", {"prompt": "x", "steps": 1, "seed": 3})
    command = ["--base", toy_folder, "--out", tmp_path / "out"]
    assert run("generate", "--like", words, *command)[0] == 0
    control = {"name": str(edges), "images": str(words)}
    more = png_with(tmp_path / "m.png", {"prompt": "x", "steps": 1, "controls": [control]})
    assert run("generate", "--like", more, *command)[0] == 2
    assert run("generate", "--like", more, "--follow", *command)[0] == 0
    own = ["--control", f"{edges}={words}"]
    assert run("generate", "--like", more, *own, *command)[0] == 0, "whoever says it himself is not asked"


# --- places and terminals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", "cache", "./x", "~"])
def test_a_cache_that_is_no_absolute_path_is_the_home_s(given, tmp_path, monkeypatch):
    monkeypatch.delenv("CONTROLKIT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert hub.cache_dir() == tmp_path / ".cache" / "controlkit"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(hub.cache_dir()) == "/x/controlkit"
    monkeypatch.setenv("CONTROLKIT_CACHE", "")
    assert str(hub.cache_dir()) == "/x/controlkit"


@pytest.mark.parametrize("home", [None, "", "home", "/nowhere/at/all"])
def test_without_a_home_the_cache_goes_with_the_process(home, tmp_path, monkeypatch):
    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    hub._temporary_home.cache_clear()
    monkeypatch.chdir(tmp_path)
    for name in ("CONTROLKIT_CACHE", "XDG_CACHE_HOME", "HOME", "USER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    with pytest.warns(UserWarning, match="no home folder"):
        folder = hub.cache_dir()
    assert folder.is_absolute() and not folder.is_relative_to(tmp_path)
    hub.settle_places()
    assert os.environ["HOME"] and folder.is_relative_to(os.environ["HOME"]) and "HF_HOME" not in os.environ
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_seals_nothing_and_says_so_in_a_sentence(run, tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", b"")
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "file" / "cache"))
    assert hub.seal("x") == ""
    with pytest.raises(OSError, match="Not a directory"):
        hub.fetch_package(hub.Package("a", "1", ""))


def test_letters_that_a_terminal_does_not_have_are_replaced(run, tmp_path, monkeypatch):
    with (
        (tmp_path / "stdout").open("w", encoding="ascii") as out,
        (tmp_path / "stderr").open("w", encoding="ascii") as e,
    ):
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", e)
        monkeypatch.setattr(sys, "argv", ["controlkit", "where", "Äpfel ▁▂▃"])
        with pytest.raises(SystemExit):
            cli.main()
        with progress_bars() as progress:
            progress.add_task("Äpfel", total=1, figures="苹果")
        say_table("Äpfel", ["苹果"], [["▁"]], "ü")
        monkeypatch.undo()
    assert '"?pfel ???"' in (tmp_path / "stderr").read_text() and "?pfel" in (tmp_path / "stdout").read_text()


def test_a_locale_without_the_letters_of_a_name_is_told(monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    error = UnicodeEncodeError("ascii", "Äpfel", 0, 1, "ordinal not in range(128)")
    assert "LC_ALL=C.UTF-8" in cli._sentence(error) and "\\xc4pfel" in cli._sentence(error)

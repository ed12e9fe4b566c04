"""The direction of imports (the rooms are read from CONTRIBUTING.md), limits that the code keeps, generated pages."""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import controlkit

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "controlkit"
LINES, PARAMETERS = 60, 7  # of a function, at most

# What still breaks a rule; these lists may only become shorter. Functions over a limit:
LONG = {  # commands, whose options are parameters
    "cli/baselines.py train",
    "cli/bench.py sample",
    "cli/data.py build",
    "cli/data.py doctor",
    "cli/pictures.py generate",
    "cli/evaluating.py evaluate",
    "cli/reproduce.py reproduce",
    "cli/serve.py serve",
    "cli/verify.py verify",
    "cli/weights.py convert",
}
# Imports against the direction.
UPWARDS: set[str] = set()
# Docstrings that begin with "What".
WHAT: set[str] = set()

# Public names that no page of docs/ names.
UNDOCUMENTED: set[str] = set()
# Names in docs/paper.md that are not there.
MISSING: set[str] = set()


def hold(found, listed, rule):
    """Nothing breaks a rule but what is listed, and what is listed still breaks it."""
    assert not found - listed, f"{rule}: {sorted(found - listed)}"
    assert not listed - found, f"{rule}: no longer, take off the list: {sorted(listed - found)}"


def modules():
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def called(path):
    return path.relative_to(SOURCE).as_posix()


@cache
def tree_of(path):
    return ast.parse(path.read_text())


@cache
def rooms():
    """Lines of rooms, uppermost first, as CONTRIBUTING.md shows them: the one place where they are written down."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Which way imports go")[2]
    block = re.search(r"```\n(.*?)```", text, re.DOTALL).group(1)
    return [[name.strip() for name in line.split("·")] for line in block.splitlines()]


def room(name):
    return next(i for i, names in enumerate(rooms()) if name in names)


def imported(path):
    """Rooms that a module imports, wherever in it the import stands."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{called(path)}:{node.lineno}: imports are absolute"
            parts = (node.module or "").split(".")
            if parts[0] == "controlkit":
                yield from [parts[1]] if parts[1:] else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("controlkit.")]


def test_contributing_names_every_room_once():
    named = sorted(name for line in rooms() for name in line)
    there = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in modules()}
    assert named == sorted(there - {"__main__"})


def test_imports_go_one_way():
    found = {
        f"{called(path)} {other}"
        for path in modules()
        if path.name != "__main__.py"
        for own in [path.relative_to(SOURCE).parts[0].removesuffix(".py")]
        for other in set(imported(path)) - {own, "__version__"}
        if room(other) <= room(own)
    }
    hold(found, UPWARDS, "imports against the direction in CONTRIBUTING.md")


def test_the_branch_imports_torch_alone():
    tree = tree_of(SOURCE / "branch.py")
    names = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    names |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert names - set(sys.stdlib_module_names) == {"torch"}


def test_no_backbone_numbers_outside_their_adapter():
    for path in modules():
        if "backbones" not in path.parts:
            numbers = {n.value for n in ast.walk(tree_of(path)) if isinstance(n, ast.Constant)}
            assert not numbers & {320, 640, 1280, 768}, path


@pytest.mark.parametrize("path", [p for p in modules() if "backbones" not in p.parts], ids=called)
def test_only_backbones_know_the_u_net(path):
    """Elsewhere nobody names ``UNetBase`` or asks for a U-Net's parts; the ``Backbone`` protocol is asked instead."""
    for node in ast.walk(tree_of(path)):
        words = {getattr(node, key, None) for key in ("id", "attr", "name", "arg")}
        assert "UNetBase" not in words, f"{called(path)}:{getattr(node, 'lineno', 0)} names UNetBase"
        if isinstance(node, ast.Attribute) and ast.unparse(node) not in ("request.scheduler", "settings.scheduler"):
            assert node.attr not in ("unet", "scheduler", "scaling_factor"), (
                f"{called(path)}:{node.lineno} .{node.attr}"
            )
        if isinstance(node, ast.Constant):
            assert node.value != "scaling_factor", f"{called(path)}:{node.lineno}"


def control_classes():
    """Names of ``ControlNetwork`` and of all classes that derive from it."""
    found = {"ControlNetwork"}
    classes = [n for path in modules() for n in ast.walk(tree_of(path)) if isinstance(n, ast.ClassDef)]
    while more := {c.name for c in classes if found & {getattr(base, "id", "") for base in c.bases}} - found:
        found |= more
    return found


def test_no_kind_of_control_is_asked_for_outside_controls():
    kinds = control_classes()
    assert {"UnionBranch", "Adapter", "XSBranch", "MultiBranch", "ControlBranch"} <= kinds
    for path in modules():
        if "controls" in path.parts:
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                asked = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.args[1])}
                assert not asked & kinds, f"{called(path)}:{node.lineno}"


def functions(node, owner=(), method=False):
    """(qualified name, node, parameters without self) of all functions in a tree."""
    for child in ast.iter_child_nodes(node):
        name = (*owner, getattr(child, "name", ""))
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            given = child.args
            count = len([*given.posonlyargs, *given.args, *given.kwonlyargs])
            static = any(getattr(d, "id", "") == "staticmethod" for d in child.decorator_list)
            yield ".".join(name), child, count - (method and not static)
            yield from functions(child, name)
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, name, method=True)
        else:
            yield from functions(child, owner, method)


def test_functions_are_short_and_take_few_parameters():
    found = {
        f"{called(path)} {name}"
        for path in modules()
        for name, node, count in functions(tree_of(path))
        if node.end_lineno - node.lineno + 1 > LINES or count > PARAMETERS
    }
    hold(found, LONG, f"functions over {LINES} lines or {PARAMETERS} parameters")


def test_docstrings_say_what_a_thing_is_or_does():
    """In a noun phrase or an imperative; "What ..." is a riddle."""
    found = {
        f"{called(path)} {getattr(node, 'name', '')}"
        for path in [SOURCE / "__init__.py", *modules()]
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if re.match(r"Whats?\b", ast.get_docstring(node) or "")
    }
    hold(found, WHAT, 'docstrings that begin with "What"')


def test_every_public_name_loads_from_its_home_and_is_in_the_readme_or_docs():
    assert len(set(controlkit.__all__)) == len(controlkit.__all__)
    for name, home in controlkit._HOMES.items():
        assert getattr(controlkit, name) is getattr(importlib.import_module(f"controlkit.{home}"), name)
        assert name in dir(controlkit) and name in controlkit.__all__
    with pytest.raises(AttributeError):
        controlkit.no_such_name  # noqa: B018
    pages = [ROOT / "README.md", ROOT / "docs" / "use.md"]
    words = {word for page in pages for word in re.findall(r"\w+", page.read_text())}
    hold(set(controlkit._HOMES) - words, UNDOCUMENTED, "public names that neither README.md nor docs/use.md names")


def test_importing_the_package_and_asking_for_help_is_quick():
    code = "import sys, controlkit, controlkit.cli; print(bool({'torch', 'diffusers', 'cv2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if (ROOT / name).exists()]


def names_in(path):
    """Names that a module defines or assigns, those of classes as ``Class.name``."""
    found = set()
    for owner in [tree := tree_of(path), *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
        for node in owner.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            for one in targets:
                name = getattr(one, "id", getattr(one, "name", ""))
                found.add(name if owner is tree else f"{owner.name}.{name}")
    return found


def test_code_that_the_page_on_the_paper_names_is_there():
    """``docs/paper.md`` writes it as `module.py`: `name`, `Class.name`."""
    text = (ROOT / "docs" / "paper.md").read_text()
    missing = set()
    for module, names in re.findall(r"`(\w[\w/]*\.py)`: ((?:`[\w.]+`(?:, )?)+)", text):
        path = SOURCE / module
        there = names_in(path) if path.exists() else set()
        missing |= {f"{module} {name}" for name in re.findall(r"`([\w.]+)`", names) if name not in there}
    hold(missing, MISSING, "docs/paper.md names what is not there")


def test_the_readme_fits_on_three_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


@pytest.mark.parametrize("name", ["cli.md", "tree.md", "decisions.md", "annotators.md"])
def test_pages_that_are_generated_are_up_to_date(name):
    sys.path.insert(0, str(ROOT / "docs"))
    import generate

    assert (ROOT / "docs" / name).read_text() == generate.PAGES[name](), "run: make docs"


OPENS = (
    r"\b(torch\.load|safe_open|load_file|from_single_file|\w*pickle\.loads?|Unpickler|load_(lora|textual)\w*\(str)\("
)
OPENED = {  # files of the package itself, and a worker's results
    "tensors/reader.py": ["safe_open"],
    "mini/stored.py": ["load_file"],
    "formats/control.py": ["safe_open"],
    "data/workers.py": ["cloudpickle.loads"],
}


def test_files_of_weights_are_opened_at_one_door():
    """``tensors`` opens them: no other module gives a library the path of one, and nothing loads pickles."""
    found = {str(path.relative_to(SOURCE)): re.findall(OPENS, path.read_text()) for path in SOURCE.rglob("*.py")}
    assert {name: [one[0] for one in calls] for name, calls in found.items() if calls} == OPENED


def test_test_modules_have_names_of_their_own():
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    twice = [name for name, count in names.items() if count > 1]
    assert not twice, "pytest imports them by their names alone"


def test_nothing_tracked_is_a_pickle_and_the_tree_is_small():
    listed = tracked()
    assert not [p for p in listed if p.endswith((".pt", ".pth", ".ckpt", ".pkl", ".bin"))]
    sizes = {p: (ROOT / p).stat().st_size for p in listed}
    assert sum(sizes.values()) <= 50e6
    assert sum(size for p, size in sizes.items() if "/weights/" in p) <= 36e6

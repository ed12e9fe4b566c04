import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import controlkit

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "controlkit"

# A module may import only from rooms further down; modules of one room do not import each other.
ROOMS = [
    {"__main__"},
    {"cli"},
    {"train", "flags", "watch"},
    {"measure"},
    {"sample", "data"},
    {"formats"},
    {"adapter"},
    {"annotators", "backbones"},
    {"union"},
    {"mini"},
    {"branch"},
    {"images"},
    {"hub", "tensors", "maps"},
    {"recipe", "workers"},
    {"optimizers"},
    {"seeds", "precision", "ranks"},
    {"errors"},
]


def modules():
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room(name):
    return next(i for i, names in enumerate(ROOMS) if name in names)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "controlkit":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("controlkit.")]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for other in imported(path):
        assert other == own or room(other) > room(own), f"{own} may not import {other}"


def test_the_branch_imports_torch_alone():
    tree = ast.parse((SOURCE / "branch.py").read_text())
    names = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    names |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert names - set(sys.stdlib_module_names) == {"torch"}


def test_no_backbone_numbers_outside_their_adapter():
    for path in modules():
        if "backbones" not in path.parts:
            numbers = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
            assert not numbers & {320, 640, 1280, 768}, path


def test_the_public_surface_is_what_it_says():
    assert controlkit.__all__ == sorted(controlkit.__all__)
    for name in controlkit.__all__:
        assert getattr(controlkit, name) is not None
    with pytest.raises(AttributeError):
        controlkit.no_such_name  # noqa: B018


def test_importing_the_package_and_asking_for_help_is_quick():
    code = "import sys, controlkit, controlkit.cli; print(bool({'torch', 'diffusers', 'cv2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_readme_s_tree_is_the_repository_s():
    tree = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    named = {line.split()[0] for line in tree.splitlines() if line.strip()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {
        p for p in listed if p.endswith((".py", ".yaml", ".md")) and p.split("/")[0] in ("src", "recipes", "docs")
    }
    folders = {name for name in named if name.endswith("/")}
    missing = {p for p in wanted if p not in named and not any(p.startswith(folder) for folder in folders)}
    assert not missing, f"the README's tree lacks {sorted(missing)}"
    gone = {n for n in named if not any(p == n or p.startswith(n) for p in listed)}
    assert not gone, f"the README's tree names what is not there: {sorted(gone)}"


def test_the_command_line_s_reference_is_up_to_date():
    sys.path.insert(0, str(ROOT / "docs"))
    import generate

    assert (ROOT / "docs" / "cli.md").read_text() == generate.reference(), "run: make docs"


def test_nothing_tracked_is_a_pickle_and_the_tree_is_small():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [p for p in listed if p.endswith((".pt", ".pth", ".ckpt", ".pkl", ".bin"))]
    sizes = {p: (ROOT / p).stat().st_size for p in listed if (ROOT / p).exists()}
    assert sum(sizes.values()) <= 40e6
    assert sum(size for p, size in sizes.items() if "/weights/" in p) <= 36e6

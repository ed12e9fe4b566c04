"""Dependencies: ranges in pyproject.toml, pins in constraints.txt, and whether they fit together.

`make extras` asks pip the same of everything, which needs the package index; here only what is installed is read.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
OURS = [Requirement(text) for text in [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]]


@pytest.mark.parametrize("requirement", OURS, ids=str)
def test_every_requirement_has_a_pin_within_its_range(requirement):
    if requirement.name == "controlkit":
        assert requirement.extras <= set(EXTRAS)
        return
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("name", PINS)
def test_a_pinned_package_s_own_requirements_hold_for_the_other_pins(name):
    try:
        wanted = [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError:  # of an extra that the tests do without
        assert name in ("wandb", "trackio", "ai-edge-litert", "onnxruntime")
        return
    for other in wanted:
        pin = PINS.get(canonicalize_name(other.name))
        applies = other.marker is None or other.marker.evaluate(default_environment() | {"extra": ""})
        assert not (pin and applies) or other.specifier.contains(pin, prereleases=True), f"{name} needs {other}"


def test_make_extras_tries_every_extra():
    tried = re.search(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert sorted(tried.split(",")) == sorted(EXTRAS)


WITHOUT_EXTRAS = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
gone = {"numba", "llvmlite", "resvg_py"}
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *more: None if name.split(".")[0] in gone else find(name, *more)
)
from controlkit.cli import main
main()
"""
README = (ROOT / "README.md").read_text()
COMMANDS = re.search(r"After `make demo` these run.*?```sh\n(.*?)```", README, re.DOTALL).group(1).splitlines()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_readme_s_commands_run_after_make_demo_without_an_extra(tmp_path):
    """One after the other, as they stand there; what the extra ``world`` brings is not to be had."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "controlkit"
        line = [sys.executable, "-c", WITHOUT_EXTRAS, *arguments]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"

"""Write the pages of ``docs/`` that are generated; a test compares them.

``cli.md`` from the commands' help, ``tree.md`` from the files' first lines, the contents of ``decisions.md``, the table
in ``annotators.md`` from that of hints.
"""

import ast
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from controlkit.annotators import HintKind, all_kinds, makers_of
from controlkit.cli import app

DOCS = Path(__file__).parent
ROOT = DOCS.parent


def _section(command: Any, name: str) -> str:
    if hasattr(command, "commands"):
        return "".join(_section(command.commands[sub], f"{name} {sub}") for sub in sorted(command.commands))
    if hasattr(command, "name_kinds"):
        command.name_kinds()
    lines = [f"## {name}", "", (command.help or "").strip(), "", "| option | meaning |", "| --- | --- |"]
    for parameter in command.params:
        if "--help" in parameter.opts:
            continue
        is_argument = parameter.param_type_name == "argument"
        label = parameter.metavar or parameter.name.upper() if is_argument else ", ".join(parameter.opts)
        meaning = getattr(parameter, "help", None) or ""
        default = parameter.default
        if default not in (None, "", False, ()) and not callable(default) and not parameter.required:
            meaning += f" Default: `{default}`."
        lines.append(f"| `{label}` | {meaning.strip()} |")
    if command.epilog:
        lines += ["", command.epilog.strip()]
    return "\n".join([*lines, "", ""])


def reference() -> str:
    """The command line's whole reference as Markdown."""
    group = typer.main.get_command(app)
    head = "# The command line\n\nWritten by `make docs` from the commands' own help.\n\n"
    return head + _section(group, "controlkit").rstrip() + "\n"


def _first_line(path: Path) -> str:
    """A file about itself: the first sentence of a module's docstring or a YAML file's comment, or a page's heading."""
    text = path.read_text()
    if path.suffix == ".md":
        heading = text.partition("\n")[0]
        return heading.removeprefix("# ") if heading.startswith("# ") else "A table"
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    paragraph = " ".join(line.strip("# ") for line in text.strip().partition("\n\n")[0].splitlines())
    return re.split(r"\. |\.$", paragraph)[0].replace("``", "`").replace("|", "\\|")


def tree() -> str:
    """Every file of ``src/``, ``recipes/`` and ``docs/`` with its first line, as Markdown."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    lines = ["# The tree", "", "Written by `make docs` from the first line of each file.", ""]
    for top in ("src/controlkit", "recipes", "docs"):
        names = [n for n in listed if n.startswith(f"{top}/") and n.endswith((".py", ".yaml", ".md"))]
        lines += [f"## {top}", "", "| file | contents |", "| --- | --- |"]
        for name in sorted(names, key=lambda n: (n.count("/") > top.count("/") + 1, Path(n).parent, n)):
            if (ROOT / name).exists() and name != "docs/tree.md":
                lines.append(f"| `{name.removeprefix(f'{top}/')}` | {_first_line(ROOT / name)} |")
        lines.append("")
    return "\n".join(lines)


def _anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def decisions() -> str:
    """The log of decisions as it is, with a line for each entry on top."""
    head, _, log = (DOCS / "decisions.md").read_text().partition("\n## 20")
    head, log = head.partition("\n## Contents")[0].rstrip(), f"\n## 20{log}"
    entries = [heading.partition(": ") for heading in re.findall(r"^## (20.*)$", log, re.MULTILINE)]
    lines = [f"- {date}: [{title}](#{_anchor(f'{date}: {title}')})" for date, _, title in entries]
    return "\n".join([head, "", "## Contents", "", *lines, log])


def _option(kind: HintKind, name: str) -> str:
    """An option of an annotator with its default and range, as ``low 100 (0 to 10000)``."""
    info = kind.options.model_fields[name]
    ends = {key: getattr(one, key) for one in info.metadata for key in ("ge", "gt", "le", "lt") if hasattr(one, key)}
    words = {"ge": "{:g}", "gt": "above {:g}", "le": "{:g}", "lt": "below {:g}"}
    shown = [words[key].format(ends[key]) for key in ("ge", "gt", "le", "lt") if key in ends]
    return f"`{name}` {info.default:.4g} ({' to '.join(shown)})"


def _needs(kind: HintKind) -> str:
    """What an annotator needs besides the package."""
    needs = [f"the extra `{kind.extra}`"] * bool(kind.extra) + ["weights"] * bool(kind.lack)
    return ", ".join(needs + ["pictures of the embedded world"] * kind.own_world) or "nothing"


def annotators() -> str:
    """The page of annotators as it is, with a table of all of them at its end."""
    head = (DOCS / "annotators.md").read_text().partition("\n## All annotators")[0].rstrip()
    lines = ["| annotator | other names | hints of | options: default (range) | needs | thresholds of A1111 |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for kind in all_kinds():
        if not kind.is_made_here:
            continue
        thresholds = [f"{one.title}: {f'`{one.option}`' if one.option else 'not read'}" for one in kind.thresholds]
        cells = (
            f"`{kind.name}`",
            ", ".join(f"`{name}`" for name in kind.aliases),
            "all lines" if kind.any_lines else f"`{kind.contract_name}`",
            "; ".join(_option(kind, name) for name in kind.options.model_fields),
            _needs(kind),
            "; ".join(thresholds),
        )
        lines.append(f"| {' | '.join(cells)} |")
    given = ", ".join(f"`{kind.name}`" for kind in all_kinds() if not makers_of(kind.name))
    return "\n".join([head, "", "## All annotators", "", *lines, "", f"Given as files alone: {given}.", ""])


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": reference,
    "tree.md": tree,
    "decisions.md": decisions,
    "annotators.md": annotators,
}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / name).write_text(write())
        print(DOCS / name)

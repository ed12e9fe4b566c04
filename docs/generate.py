"""Write ``docs/cli.md`` from the commands' own help, so that the two cannot drift (a test compares them)."""

from pathlib import Path
from typing import Any

import typer

from controlkit.cli import app

TARGET = Path(__file__).parent / "cli.md"


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
    """The whole reference as Markdown."""
    group = typer.main.get_command(app)
    head = "# The command line\n\nWritten by `make docs` from the commands' own help.\n\n"
    return head + _section(group, "controlkit").rstrip() + "\n"


if __name__ == "__main__":
    TARGET.write_text(reference())
    print(TARGET)

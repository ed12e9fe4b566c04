"""Shared by several commands: options of one meaning, loading, progress, messages.

Whatever a command prints leaves through here, and only here it is made ``printable``: names, captions and verdicts come
from anybody's files. No text is read as rich's markup.
"""

import importlib
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from controlkit.errors import Invalid, printable
from controlkit.files import home_path

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, Task
    from rich.text import Text

    from controlkit.backbones import Backbone
    from controlkit.formats import SavedControl

BaseOption = Annotated[
    str,
    typer.Option(
        help="`mini`, `sd15`, `sd21`, `sdxl`, a diffusers folder, a .safetensors or .ckpt file, or a hub's name."
    ),
]
OutOption = Annotated[Path, typer.Option(help="Folder to write into; made if it is not there.")]
SizeOption = Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels; else the base's or picture's.")]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="KIND=NAME",
        help="What the column of `image`, `hint` or `caption` is called, where unusual; without a listing, which "
        "folder holds the pictures (`image=.`: all do) or the hints. Repeatable.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="`cpu`, `cuda`, or `auto`: cuda if there is one.")]
StepsOption = Annotated[int, typer.Option(help="Sampling steps.", min=1)]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE[=WEIGHT]", help="A LoRA, or a run's base-difference, merged into the base; repeatable."),
]
VaeOption = Annotated[
    str | None, typer.Option(help="Another VAE than the base's: a diffusers folder, a file, a hub's name.")
]
GuidanceOption = Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")]


def finite(value: float) -> float:
    """Check a number that an option gives: NaN is in every range that compares alone."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


class KindsCommand(TyperCommand):
    """A command whose help names kinds of hints: ``{annotators}`` and so on stand for what their table has.

    They are filled in when help is asked for, and not before, as reading the table takes seconds.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:  # click's, or typer's own copy of it
        """Write the help, kinds of hints filled in."""
        self.name_kinds()
        super().format_help(ctx, formatter)

    def name_kinds(self) -> None:
        """Fill the kinds of hints into the options' help."""
        from controlkit.annotators import all_kinds

        made = [kind for kind in all_kinds() if kind.is_made_here]
        options = [
            f"{', '.join(kind.options.model_fields)} ({kind.name})" for kind in made if kind.options.model_fields
        ]
        names = {
            "{annotators}": ", ".join(f"`{kind.name}`" for kind in made),
            "{options}": "; ".join(options),
            "{kinds}": ", ".join(f"`{kind.name}`" for kind in all_kinds()),
            "{truths}": ", ".join(f"`{kind.name}`" for kind in all_kinds() if kind.truth),
        }
        parameters: list[Any] = self.params
        for parameter in parameters:
            for place, text in names.items():
                parameter.help = (parameter.help or "").replace(place, text)


def terminal(stderr: bool = False) -> "Console":
    """Rich's console, for which brackets and colons are letters."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


@contextmanager
def progress_bars(disable: bool = False) -> Iterator["Progress"]:
    """Bars of long work, on stderr; a task's `figures` stand at its end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Words(TextColumn):
        def render(self, task: "Task") -> "Text":
            found = super().render(task)
            found.plain = printable(found.plain)
            return found

    names, figures = (Words(f"{{task.{what}}}", markup=False) for what in ("description", "fields[figures]"))
    columns, console = (names, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()), terminal(stderr=True)
    with Progress(*columns, figures, console=console, redirect_stdout=False, disable=disable) as progress:
        yield progress


def on_cuda(device: str) -> bool:
    """Whether ``cpu``, ``cuda`` or ``auto`` means the GPU here."""
    import torch

    return device != "cpu" and torch.cuda.is_available()


@contextmanager
def without_compiler() -> Iterator[None]:
    """Import diffusers without torch's compiler, which takes as long to import as a small picture takes to be made.

    diffusers tells the compiler of some of its functions. They are left as they are, for a process that compiles none;
    whoever asks for more of the compiler gets it. Packages that diffusers imports where they happen to be installed are
    left out, too: nothing that stands inside uses them.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    import torch

    def unchanged(function: Any = None, *_: object, **__: object) -> Any:
        return function or (lambda decorated: decorated)

    def of_the_compiler(name: str) -> Any:
        if name.startswith("__"):  # which is asked of every module
            raise AttributeError(name)
        sys.modules.pop("torch._dynamo", None)
        return getattr(importlib.import_module("torch._dynamo"), name)

    stand_in: Any = ModuleType("torch._dynamo")
    stand_in.disable = stand_in.allow_in_graph = stand_in.assume_constant_result = unchanged
    stand_in.__getattr__, stand_in.__path__ = of_the_compiler, [str(Path(torch.__file__).parent / "_dynamo")]
    sys.modules["torch._dynamo"] = stand_in
    try:
        from diffusers.utils import import_utils

        import_utils._peft_available = import_utils._bitsandbytes_available = False
        yield
    finally:
        if sys.modules.get("torch._dynamo") is stand_in:
            del sys.modules["torch._dynamo"]


def ready(device: str) -> str:
    """The device that is meant, and the libraries' own words and progress bars silenced."""
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    # diffusers imports it where it is installed, and it misses kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if device not in ("cpu", "cuda", "auto"):
        raise Invalid(f'--device is "{device}"; expected cpu, cuda or auto.')
    if device == "auto":
        device = "cuda" if on_cuda(device) else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise Invalid("--device is cuda, and this machine or this build of torch has none: use cpu or auto.")
    return device


def loaded_base(name: str, device: str, compiles: bool = False, **options: Any) -> "Backbone":
    """The base, on the device that is meant; ``compiles``: whether the command compiles, as training may.

    With an option ``waits`` its weights wait in the machine's memory until they are placed.
    """
    waits = options.pop("waits", False)
    with nullcontext() if compiles or options.get("loras") else without_compiler():
        from controlkit.backbones import load_base
        from controlkit.precision import weights_type

        device = ready(device)
        if not waits:
            return load_base(name, device, **options)
        if options.get("dtype") == "auto":
            options["dtype"] = weights_type(device)
        return load_base(name, **options).place(None, device)


def loaded_control(name: str, base: "Backbone", annotator: str | None = None) -> "SavedControl":
    """The control; what is to be known about it, and whether it was trained on this base, as notes."""
    from controlkit.sample import load

    saved, notes = load(name, base, annotator)
    for note in notes:
        warn(note)
    return saved


def check_folder(out: Path) -> None:
    """Refuse a file where a folder is to be written."""
    if out.exists() and not out.is_dir():
        raise Invalid(f"--out is {out}, which is a file; expected a folder, or a name for a new one.")


def say(text: str) -> None:
    """A line of result, to stdout."""
    print(printable(text), flush=True)  # a pipe shows each line as it comes


def say_json(values: Mapping[str, Any]) -> None:
    """Figures for other programs, to stdout: letters beyond ASCII are written by their numbers."""
    print(json.dumps(values, indent=2), flush=True)


def say_beside(progress: "Progress", text: str) -> None:
    """``say`` while bars are shown: above them where they are in the same terminal."""
    if progress.console.is_terminal and sys.stdout.isatty():
        progress.print(printable(text))
    else:
        say(text)


def say_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> None:
    """A table of results, to stdout."""
    from rich.table import Table

    table = Table(*map(printable, head), title=printable(title), caption=printable(caption))
    for row in rows:
        table.add_row(*map(printable, row))
    terminal().print(table)


def complain(text: str) -> None:
    """A line of its own, to stderr."""
    print(printable(text), file=sys.stderr)


def warn(text: str) -> None:
    """A line of what is to be known besides, to stderr."""
    complain(f"note: {text}")


def split_lora(text: str) -> tuple[Path, float]:
    """FILE[=WEIGHT] as (path, weight)."""
    path, equals, weight = text.rpartition("=")
    whole = home_path(text)
    if not equals or whole.exists():
        return whole, 1.0
    try:
        factor = float(weight)
    except ValueError:
        factor = math.nan
    if not abs(factor) <= 100:  # so written, it holds for nan as well
        raise Invalid(f'--lora is "{text}"; expected FILE or FILE=WEIGHT, -100 to 100, such as style.safetensors=0.7.')
    return home_path(path), factor


def key_values(given: Sequence[str] | None, option: str, example: str) -> dict[str, str]:
    """KEY=VALUE of a repeatable option, by key."""
    pairs = [(one, *one.partition("=")[::2]) for one in given or []]
    if wrong := [one for one, key, value in pairs if not (key and value)]:
        raise Invalid(f'{option} is "{wrong[0]}"; expected {example}.')
    return {key: value for _, key, value in pairs}


def parse_columns(given: Sequence[str] | None) -> dict[str, str]:
    """``--column``'s names of columns or folders, by the kind of what they hold."""
    return key_values(given, "--column", "KIND=NAME, such as image=photo")


def parse_size(text: str | None) -> tuple[int, int] | None:
    """WxH, or one number for both, as (height, width)."""
    from controlkit.images import MOST_SIDE

    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    try:
        sides = int(height or width), int(width)
    except ValueError:
        sides = (0, 0)
    if not 0 < min(sides) <= max(sides) <= MOST_SIDE:
        raise Invalid(
            f'--size is "{text}"; expected WIDTHxHEIGHT in pixels, such as 96x64, or one number, up to {MOST_SIDE}.'
        )
    return sides

"""The command line: parses, calls the library, shows. Nothing is computed here.

Heavy imports stand inside the commands, so that ``controlkit --help`` answers at once.
"""

import errno
import sys

import typer

from controlkit.cli import data, pictures, runs, weights
from controlkit.errors import UserError

app = typer.Typer(
    name="controlkit",
    help="Train, run and measure spatial control for text-to-image diffusion (ControlNet).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (pictures, runs, weights):
    app.add_typer(commands.app)
app.add_typer(data.app, name="data")


_PLACES = (  # errors of a path or a disk, which the user can mend
    errno.ENOSPC,
    errno.EIO,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


def main() -> None:
    """Run the command line; what the user can mend is one sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"controlkit: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _PLACES:
            raise
        place = f" ({error.filename})" if error.filename else ""
        typer.echo(
            f"controlkit: {error.strerror}{place}. Make room, mend the permissions, or choose another path.",
            err=True,
        )
        sys.exit(2)
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # not imported for this alone
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        typer.echo(
            f"controlkit: The device's memory does not hold this ({str(error).splitlines()[0]}). Take fewer or smaller "
            "pictures at once, or another device (--device cpu).",
            err=True,
        )
        sys.exit(2)

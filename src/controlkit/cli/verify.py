"""Verification of a base and a control that somebody has."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from controlkit.cli.shared import (
    DeviceOption,
    StepsOption,
    VaeOption,
    check_folder,
    loaded_base,
    progress_bars,
    say,
    say_table,
    warn,
)
from controlkit.errors import Invalid, Unsupported

if TYPE_CHECKING:
    from controlkit.backbones import Backbone
    from controlkit.formats import SavedControl

app = typer.Typer()
_FORMATS = ("fp32", "bf16", "fp16")


@app.command(
    epilog="Examples:\n\n    controlkit verify mini canny --out out/verify\n\n"
    "    controlkit verify sd15 control_v11p_sd15_canny.pth --out out/verify\n\n"
    "    controlkit verify sdxl.safetensors union.safetensors:depth --dtype fp16 --out out/verify"
)
def verify(
    base: Annotated[str, typer.Argument(help="The base: as `--base` of other commands.")],
    control: Annotated[
        str | None, typer.Argument(help="A control of it: a file, a folder, a hub's name; of a Union, FILE:TYPE.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for `verify.html` and `verify.json`.")] = Path("out/verify"),
    hint: Annotated[
        str | None,
        typer.Option(help="The kind of the control's hints, such as `canny`; by default what its file or name says."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Pictures: `photographs` (of scikit-image), `scenes`, `emoji`, `fill50k`, or a folder."),
    ] = None,
    num: Annotated[int, typer.Option(help="Pictures to measure obedience on; fewer than 2 measure none.", min=0)] = 8,
    shown: Annotated[int, typer.Option(help="Pictures to make the figures of.", min=1, max=16)] = 2,
    steps: StepsOption = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.", min=1, max=100)] = 7.0,
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels.", min=8, max=4096)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="Of the weights: `fp32`, `bf16`, `fp16`.")] = "fp32",
    vae: VaeOption = None,
    device: DeviceOption = "auto",
) -> None:
    """See whether real weights work: the paper's figures in small, each compared with diffusers, and obedience.

    Makes pictures with a prompt and without, under the four prompts of the paper's Figure 8, and at several scales;
    compares each one's latents with those of diffusers' own pipeline from the same noise; measures obedience on the
    photographs that scikit-image ships. Writes one page to look at, and JSON beside it, without paths and names of this
    machine. The exit code is 1 if a check fails.
    """
    from controlkit.formats.convert import DTYPES
    from controlkit.precision import settle_threads
    from controlkit.verify import VerifyPlan, write_verification
    from controlkit.verify import verify as run

    check_folder(out)
    if dtype not in _FORMATS:
        raise Invalid(f'--dtype is "{dtype}"; expected {", ".join(_FORMATS)}.')
    model = loaded_base(base, device, vae=vae, dtype=DTYPES[dtype])
    if size:
        model = model.of_size(size)
    settle_threads(model.networks().values())
    saved = _control(control, model, hint) if control else None
    plan = VerifyPlan(data, num, shown, steps, guidance, seed)
    with progress_bars() as progress:
        task = progress.add_task("verifying", total=None, figures="")
        done = run(model, saved, plan, lambda name: progress.update(task, advance=1, figures=name))
    write_verification(out, done)
    rows = [[one.state, one.name, one.measured, one.expected] for one in done.checks]
    say_table(done.sentence(), ("result", "check", "measured", "expected"), rows, done.subject.note)
    say(f"{out / 'verify.html'} shows the pictures; it and {out / 'verify.json'} can be attached to a report.")
    if done.failed:
        raise typer.Exit(1)


def _control(name: str, base: "Backbone", hint: str | None) -> "SavedControl":
    """The control, with hints of the kind that is named, or that its file or its name says."""
    from controlkit.sample import load
    from controlkit.verify import kind_in_name

    saved, notes = load(name, base, hint)
    if not hint and not saved.hint.annotator and (found := kind_in_name(name)):
        say(f"Its hints are taken for {found}, as its name says; --hint KIND names another kind.")
        saved, notes = load(name, base, found)
    for note in notes:
        warn(note)
    if saved.branch.hint_types:
        raise Unsupported(f'"{name}" is a Union: verify one of its types, as {name}:TYPE.')
    if not saved.hint.annotator:
        raise Invalid(f'"{name}" does not say what its hints are: name their kind by --hint, such as --hint canny.')
    return saved

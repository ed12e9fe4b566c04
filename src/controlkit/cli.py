"""The command line: parses, calls the library, shows. Nothing is computed here.

Heavy imports stand inside the commands, so that ``controlkit --help`` answers at once.
"""

import errno
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlkit.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from controlkit.backbones import UNetBase
    from controlkit.formats import SavedControl

app = typer.Typer(
    name="controlkit",
    help="Train, run and measure spatial control for text-to-image diffusion (ControlNet).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Make and look at training data.", no_args_is_help=True)
make_app = typer.Typer(help="Draw a data set.", no_args_is_help=True)
app.add_typer(data_app, name="data")
data_app.add_typer(make_app, name="make")

BaseOption = Annotated[str, typer.Option(help="`mini`, or a diffusers pipeline folder.")]
OutOption = Annotated[Path, typer.Option(help="Folder to write into; made if it is not there.")]
DeviceOption = Annotated[str, typer.Option(help="`cpu`, `cuda`, or `auto`: cuda if there is one.")]
StepsOption = Annotated[int, typer.Option(help="Sampling steps.", min=1)]
GuidanceOption = Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")]


@contextmanager
def _progress() -> Iterator["Progress"]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}")) as progress:
        yield progress


def _load_base(name: str, device: str) -> "UNetBase":
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from controlkit.backbones import load_base

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UserError(f'--device is "{device}"; expected cpu, cuda or auto.')
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and this machine or this build of torch has none: use cpu or auto.")
    return load_base(name, device)


def _load_control(name: str, base: "UNetBase") -> "SavedControl":
    from controlkit.formats import load_control

    saved = load_control(name, base)
    trained_on = saved.trained.get("base_digest", base.digest)
    if trained_on != base.digest:
        _warn(f'"{name}" was trained on other weights ({trained_on}) than those of "{base.name}" ({base.digest})')
    return saved


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is {out}, which is a file; expected a folder, or a name for a new one.")


def _say(text: str) -> None:
    typer.echo(text)


def _warn(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


@app.command(
    epilog="Examples:\n\n"
    '    controlkit generate "a cat face, on a teal background" --control canny=cat.png --out out\n\n'
    '    controlkit generate "a red apple" --control canny=photo.jpg --scale 0.8 --num 4 --seed 7 --out out'
)
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help='What to make. Left out: a plain prompt for any picture. `""`: no prompt at all.'),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=IMAGE", help="A control, shipped or a folder, and its picture; repeatable."),
    ] = None,
    out: OutOption = Path("out"),
    base: BaseOption = "mini",
    hint: Annotated[bool, typer.Option("--hint", help="The pictures are hints already: do not annotate them.")] = False,
    scale: Annotated[list[float] | None, typer.Option(help="Strength of each control; one value serves all.")] = None,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 4.0,
    negative: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count on.", min=0, max=2**62)] = 0,
    num: Annotated[int, typer.Option(help="How many pictures.", min=1)] = 1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels; the base's own by default.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Make pictures from a prompt, steered by pictures.

    Writes each picture as a PNG with its settings embedded, each hint, and `grid.png` with all of them side by side.
    """
    from controlkit import sample
    from controlkit.annotators import annotate, drawn_hint
    from controlkit.images import grid, read_picture, write_png
    from controlkit.precision import number_format

    _check_folder(out)
    asked = [_split_control(text) for text in control or []]
    scales = _scales(scale or [1.0], len(asked))
    pictures = [read_picture(path) for _, path in asked]
    model = _load_base(base, device)
    settings = sample.Settings(steps, guidance, _parse_size(size))
    sides = sample.picture_size(model, settings)
    saved = [_load_control(name, model) for name, _ in asked]
    prompt = sample.PLAIN_PROMPT if prompt is None else prompt
    for text in (prompt, negative):
        if cut := model.cut_words(text):
            _warn(f'the prompt is longer than the {model.window} tokens "{model.name}" reads; cut off: "{cut}"')
    hints = []
    for picture, kept in zip(pictures, saved, strict=True):
        hints.append((drawn_hint if hint else annotate)(picture, kept.hint, sides))
    controls = [sample.Control(s.branch, s.hint, k) for s, k in zip(saved, scales, strict=True)]
    jobs = [sample.Job(prompt, seed + i, tuple(hints), negative) for i in range(num)]
    facts: dict[str, Any] = {"prompt": prompt, "negative": negative, "base": base, "steps": steps, "guidance": guidance}
    facts |= {"controls": [{"name": n, "scale": k, "hint": hint} for (n, _), k in zip(asked, scales, strict=True)]}
    facts |= {"width": sides[1], "height": sides[0], "format": number_format(model.device.type)}
    made = []
    with _progress() as progress:
        task = progress.add_task("generating", total=num * steps, figures="")
        for result in sample.generate(model, jobs, controls, settings, on_step=lambda n: progress.advance(task, n)):
            write_png(out / f"picture-{result.job.seed}.png", result.pixels, facts | {"seed": result.job.seed})
            made.append(result.pixels)
    for i, ((name, _), picture) in enumerate(zip(asked, hints, strict=True)):
        write_png(out / f"hint-{i}-{Path(name).name}.png", picture)
    labels = [f"hint: {Path(name).name}" for name, _ in asked] + [f"seed {job.seed}" for job in jobs]
    write_png(out / "grid.png", grid([[*hints, *made]], labels), facts | {"seed": seed})
    _say(f"{num} picture{'s' if num > 1 else ''} in {out}; side by side in {out / 'grid.png'}")


def _split_control(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UserError(f'--control is "{text}"; expected NAME=IMAGE, such as canny=photo.png.')
    return name, Path(path)


def _scales(given: list[float], controls: int) -> list[float]:
    if len(given) not in (1, controls):
        raise UserError(
            f"--scale was given {len(given)} times for {controls} controls; expected once, or once for each."
        )
    return given * controls if len(given) == 1 else given


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    try:
        sides = int(height or width), int(width)
    except ValueError:
        sides = (0, 0)
    if min(sides) <= 0:
        raise UserError(f'--size is "{text}"; expected WIDTHxHEIGHT in pixels, such as 96x64, or one number.')
    return sides


@app.command(epilog="Example:\n\n    controlkit annotate canny photo.png drawing.jpg --out hints")
def annotate(
    annotator: Annotated[str, typer.Argument(metavar="ANNOTATOR", help="`canny` or `scribble`.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to annotate.")],
    out: OutOption = Path("out"),
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Annotate at this size; the picture's by default.")
    ] = None,
) -> None:
    """Turn pictures into hints: `OUT/NAME.png` for each, white on black."""
    from controlkit.annotators import annotate as annotate_picture
    from controlkit.annotators import annotator as find
    from controlkit.images import read_picture, write_png

    contract = find(annotator).hint()
    sides = _parse_size(size)
    _check_folder(out)
    if len({path.stem for path in images}) < len(images):
        raise UserError("Two of the pictures have the same name, and one hint would overwrite the other: rename one.")
    targets = [out / f"{path.stem}.png" for path in images]
    read = {path.resolve() for path in images}
    if clash := next((target for target in targets if target.resolve() in read), None):
        raise UserError(f"A hint would overwrite the picture {clash}: give another --out.")
    pictures = [read_picture(path) for path in images]
    for target, picture in zip(targets, pictures, strict=True):
        write_png(target, annotate_picture(picture, contract, sides), {"annotator": annotator})
        _say(str(target))


@app.command(
    epilog="Examples:\n\n    controlkit train recipes/smoke.yaml --out runs/smoke\n\n"
    "    controlkit train recipes/canny.yaml --out runs/canny     # again, to go on after an interruption"
)
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe: YAML; see `recipes/`.")],
    out: OutOption,
    device: DeviceOption = "auto",
) -> None:
    """Train a control, and say in words whether control was found.

    Run the same command again to go on from the last checkpoint. `OUT/log.jsonl` holds a record a line,
    `OUT/samples` pictures, `OUT/control` the result.
    """
    from controlkit.train import read_recipe, train_control

    settings = read_recipe(recipe)
    base = _load_base(settings.base, device)
    with _progress() as progress:
        main_task = progress.add_task("training", total=settings.steps, figures="")
        side = progress.add_task("", total=1, visible=False, figures="")

        def stage(name: str, total: int) -> None:
            progress.reset(side, total=total, description=name, visible=True)

        def advance(count: int) -> None:
            progress.advance(side, count)

        mean = 0.0
        words = ""
        for record in train_control(settings, out, base, stage, advance):
            mean = record.loss if mean == 0.0 else 0.98 * mean + 0.02 * record.loss
            rate = settings.batch / record.seconds
            progress.update(side, visible=False)
            progress.update(main_task, completed=record.step, figures=f"loss {mean:.4f}  {rate:.0f} pictures/s")
            if seen := record.evaluation:
                words = record.verdict or ""
                range_ = f"fidelity {seen.fidelity.mean:.3f} between {seen.floor.mean:.3f} and {seen.ceiling.mean:.3f}"
                shown = f"obedience {seen.obedience}" if seen.counts else range_
                progress.print(f"step {record.step}: {shown} - {words}", highlight=False)
    _say(f"{words + '. ' if words else ''}The control is in {out / 'control'}; the log in {out / 'log.jsonl'}.")


@app.command(epilog="Example:\n\n    controlkit evaluate canny --num 64 --json canny.json")
def evaluate(
    control: Annotated[str, typer.Argument(help="A shipped control, a control folder, or a run's folder.")],
    base: BaseOption = "mini",
    num: Annotated[int, typer.Option(help="Pictures to measure on.", min=2)] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    data: Annotated[
        str | None, typer.Option(help="`emoji`, `fill50k` or a folder; by default what the control was trained on.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Strength of the control.")] = 1.0,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 4.0,
    device: DeviceOption = "auto",
) -> None:
    """Measure whether a control is obeyed: fidelity, floors, ceiling, obedience; and CLIP-score and FID beside it.

    Held-out pairs, seeds 0..N-1; 95% intervals by a paired bootstrap. Obedience 0 is no control, 1 is all the VAE
    lets through.
    """
    from rich.console import Console
    from rich.table import Table

    from controlkit.data import evaluation_pairs
    from controlkit.images import write_atomic
    from controlkit.measure import evaluate as measure
    from controlkit.sample import Control, Settings

    if json_file and json_file.is_dir():
        raise UserError(f"--json is {json_file}, which is a folder; expected a file to write.")
    model = _load_base(base, device)
    saved = _load_control(control, model)
    pairs, real = evaluation_pairs(data or str(saved.trained.get("data", "emoji")), model.size, num)
    with _progress() as progress:
        task = progress.add_task("measuring", total=3 * len(pairs) * steps, figures="")
        report = measure(
            model,
            Control(saved.branch, saved.hint, scale),
            pairs,
            real,
            Settings(steps, guidance),
            on_step=lambda n: progress.advance(task, n),
        )
    used = ", ".join(f"{key} {value}" for key, value in report["settings"].items() if value is not None)
    table = Table(
        title=f"{control} on {base}: {report['metric']}, {report['num']} pictures, {report['seconds']:.0f} s",
        caption=used,
    )
    for name in ("figure", "mean", "95% interval"):
        table.add_column(name)
    for name, figure in report.items():
        if isinstance(figure, dict) and "mean" in figure:
            table.add_row(name, f"{figure['mean']:.3f}", f"{figure['low']:.3f} to {figure['high']:.3f}")
    Console().print(table)
    if json_file:
        write_atomic(json_file, (json.dumps(report, indent=2) + "\n").encode())
    if not report["counts"]:
        _warn("floor and ceiling are too close, or the ceiling too low, for this obedience to mean much")
    if not report["quality_kept"]:
        _warn("quality fell: CLIP-score under 95%, or FID over 110%, of the same base without control")


@app.command(epilog="Example:\n\n    controlkit where canny")
def where(name: Annotated[str, typer.Argument(help="`mini`, `canny`, `scribble`, `referee`")]) -> None:
    """Print the folder of what is shipped; the base and its controls are ordinary diffusers folders."""
    from controlkit.hub import where as find

    _say(str(find(name)))


@make_app.command(epilog="Example:\n\n    controlkit data make fill50k --count 1000 --out fill50k")
def fill50k(
    out: OutOption,
    count: Annotated[int, typer.Option(help="Pairs to draw.", min=1)] = 50_000,
    size: Annotated[int, typer.Option(help="Side in pixels; the original's is 512.", min=32)] = 512,
    seed: Annotated[int, typer.Option(help="Another seed draws another set.")] = 0,
) -> None:
    """Draw the original repository's tutorial set: circles, their outlines, and `prompt.json`."""
    from controlkit.data import make_fill50k

    _check_folder(out)
    with _progress() as progress:
        task = progress.add_task("drawing", total=count, figures="")
        for done in make_fill50k(out, count, size, seed):
            progress.update(task, completed=done)
    _say(f"{count} pairs in {out}; listed in {out / 'prompt.json'}")


_PLACES = (  # errors of a path or a disk, which the user can mend
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
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

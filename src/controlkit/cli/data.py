"""Data sets: drawn, examined, captioned, written anew."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from controlkit.cli.shared import (
    BaseOption,
    ColumnOption,
    DeviceOption,
    KindsCommand,
    OutOption,
    check_folder,
    finite,
    loaded_base,
    parse_columns,
    parse_size,
    progress_bars,
    ready,
    say,
)
from controlkit.errors import Invalid, nearest, one_line

if TYPE_CHECKING:
    from controlkit.data import Listing, Over, Report

app = typer.Typer(help="Make and look at training data.", no_args_is_help=True)
make_app = typer.Typer(help="Draw a data set.", no_args_is_help=True)
app.add_typer(make_app, name="make")

CaptionerOption = Annotated[str, typer.Option(help="The captioner's model: a BLIP's folder, or a hub's name.")]
ReplaceOption = Annotated[
    str, typer.Option(help="What the captioner may put its words over: `nothing`, `names` (of files), `all`.")
]
WorkersOption = Annotated[int, typer.Option(help="Processes; several need Ray (the extra `scale`).", min=1)]


def _over(replace: str) -> "Over":
    """The value of ``--replace``, checked."""
    from typing import get_args

    from controlkit.data import Over

    if replace not in get_args(Over):
        raise Invalid(f'--replace is "{replace}": {nearest(replace, get_args(Over))}')
    return cast("Over", replace)


def _follow(words: str, total: int, done: Iterable[int]) -> None:
    """Show a bar while work is done that yields how much of it is done so far."""
    with progress_bars() as progress:
        task = progress.add_task(words, total=total, figures="")
        for count in done:
            progress.update(task, completed=count)


@app.command(
    cls=KindsCommand,
    epilog="Examples:\n\n    controlkit data doctor fill50k --annotator canny\n\n"
    "    controlkit data doctor photos && controlkit train canny.yaml --out runs/canny",
)
def doctor(
    path: Annotated[Path, typer.Argument(help="A data set's folder, in any layout that `train` reads.")],
    annotator: Annotated[
        str | None,
        typer.Option(
            help="The kind of the hints, to compare them with, or to show what will be made: {kinds}. Of several, "
            "`canny+depth`."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the contact sheet and `report.json`.")] = Path("out/doctor"),
    channels: Annotated[
        int | None, typer.Option(help="Channels the hints should have; three, or three of each, by default.", min=1)
    ] = None,
    low: Annotated[float, typer.Option(help="The least value that hints of floats may have.", callback=finite)] = 0.0,
    high: Annotated[
        float, typer.Option(help="The largest value that hints of floats may have.", callback=finite)
    ] = 1.0,
    column: ColumnOption = None,
    base: BaseOption = "mini",
    size: Annotated[
        int | None, typer.Option(help="Side of the training pictures in pixels; the base's by default.", min=1)
    ] = None,
    workers: WorkersOption = 1,
) -> None:
    """Say what a data set is and what is wrong with it; exit code 1 if nothing should train on it.

    Opens every picture: counts, missing or extra pairs, sizes, unreadable files, duplicates, captions, hints.
    """
    from controlkit.annotators import contract
    from controlkit.data import add_up, examine, read_listing, sheet_rows
    from controlkit.files import mark_output, write_atomic
    from controlkit.images import grid, write_png

    check_folder(out)
    made_by = contract(annotator) if annotator else None
    if low >= high:
        raise Invalid(f"--low is {low:g} and --high {high:g}; expected --low below --high.")
    if made_by:
        made_by = replace(made_by, channels=channels or made_by.channels, low=low, high=high)
    elif (channels, low, high) != (None, 0.0, 1.0):
        raise Invalid("--channels, --low and --high say what hints should be: say of what kind, too, by --annotator.")
    listing = read_listing(path, parse_columns(column))
    model = loaded_base(base, "cpu")
    with progress_bars() as progress:
        task = progress.add_task("opening", total=len(listing.rows), figures="")
        found = progress.track(
            examine(listing, made_by, workers, size or model.size), total=len(listing.rows), task_id=task
        )
        report = add_up(listing, found, made_by, model.cut_words)
    _say_report(path, listing, report, annotator)
    mark_output(out, "data doctor")
    if report.shown:
        write_png(out / "sheet.png", grid(sheet_rows(report)))
    write_atomic(out / "report.json", (json.dumps(report.to_json(), indent=2) + "\n").encode())
    say(f"Training {'may' if report.may_train else 'may not'} start. All of it, and a contact sheet: {out}")
    if not report.may_train:
        raise typer.Exit(1)


def _say_report(path: Path, listing: "Listing", report: "Report", annotator: str | None) -> None:
    """Print what the doctor found, in a few lines."""
    from collections import Counter

    facts = report.to_json()
    say(f"{path}: {facts['rows']} pairs ({facts['layout']}), {facts['with_hints']} with hints of their own")
    sizes = [f"{count} of {size}" for size, count in facts["picture_sizes"].items()]
    more = f", and {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""
    say(f"pictures: {', '.join(sizes[:5])}{more}")
    if (cut := facts["cropped_away"]) and cut["most"] > 0.01:
        say(f"cut away to make squares: {cut['mean']:.0%} of a picture, at most {cut['most']:.0%} (see data.buckets)")
    words = facts["caption_words"]
    say(f"captions: {words['least']} to {words['most']} words, {words['median']} in the middle; {words['none']} empty")
    if first := next((row for row in listing.rows if row.prompt), None):
        origin = "from the file's name: " if first.named else ""
        say(f'the first: {origin}"{one_line(first.prompt)}"')
    if not facts["with_hints"] and not annotator:
        say("hints: none; training makes them by its annotator (--annotator canny here shows what they will be)")
    if facts["hint_mean_grey"] is not None:
        say(f"hints: mean grey {facts['hint_mean_grey']:.3f} (0 black, 1 white)")
    for (kind, fatal), count in Counter((p.kind, p.fatal) for p in report.problems).items():
        example = next(p for p in report.problems if (p.kind, p.fatal) == (kind, fatal))
        often = f"{count} times; the first: " if count > 1 else ""
        say(f"{'problem' if fatal else 'note'}: {kind}, {often}{example}")


@make_app.command(epilog="Example:\n\n    controlkit data make fill50k --count 1000 --out fill50k")
def fill50k(
    out: OutOption,
    count: Annotated[int, typer.Option(help="Pairs to draw.", min=1)] = 50_000,
    size: Annotated[int, typer.Option(help="Side in pixels; the original's is 512.", min=32)] = 512,
    seed: Annotated[int, typer.Option(help="Another seed draws another set.")] = 0,
) -> None:
    """Draw the original repository's tutorial set: circles, their outlines, and `prompt.json`."""
    from controlkit.data import make_fill50k

    check_folder(out)
    _follow("drawing", count, make_fill50k(out, count, size, seed))
    say(f"{count} pairs in {out}; listed in {out / 'prompt.json'}")


@make_app.command(
    cls=KindsCommand, epilog="Example:\n\n    controlkit data make scenes --count 100 --hint depth --out scenes"
)
def scenes(
    out: OutOption,
    count: Annotated[int, typer.Option(help="Scenes to draw.", min=1)] = 1000,
    size: Annotated[int, typer.Option(help="Side in pixels.", min=32)] = 256,
    seed: Annotated[int, typer.Option(help="Another seed draws another set.")] = 0,
    hint: Annotated[str, typer.Option(help="The hints that `prompt.json` names: {truths} or `edges`.")] = "depth",
) -> None:
    """Draw scenes about which everything is known: solids and figures, with depth, normals, labels, poses, edges.

    Each picture with its hints as pictures, its exact truth (`truth/N.npz`), and captions in several wordings.
    """
    from controlkit.data import make_scenes

    check_folder(out)
    _follow("drawing", count, make_scenes(out, count, size, seed, hint))
    say(f"{count} scenes in {out}; listed in {out / 'prompt.json'} and {out / 'metadata.jsonl'}")


@app.command(
    epilog="Examples:\n\n    controlkit data caption photos\n\n"
    "    controlkit data caption photos --replace names --captioner models/blip-large"
)
def caption(
    path: Annotated[Path, typer.Argument(help="A folder of pictures, alone or beside a folder of hints.")],
    captioner: CaptionerOption = "Salesforce/blip-image-captioning-base",
    replace: ReplaceOption = "nothing",
    device: DeviceOption = "auto",
    column: ColumnOption = None,
) -> None:
    """Caption the pictures that have none, by BLIP: `NAME.txt` beside each, where trainers look for it.

    What people wrote stays as it is, unless `--replace all` is given. Run again to go on after an interruption.
    """
    from controlkit.data import load_captioner, sound_listing, unwritten, write_captions

    over = _over(replace)
    listing = sound_listing(path, parse_columns(column))
    places = unwritten(listing, over)
    named = sum(row.named and bool(row.prompt) for row in listing.rows)
    if not places:
        more = f"; {named} of them are their files' names: --replace names has them captioned" if named else ""
        say(f"All {len(listing.rows)} pictures have captions{more}.")
        return
    model = load_captioner(captioner, ready(device))
    _follow("captioning", len(places), write_captions(listing, model, places))
    first = Path(listing.rows[places[0]].picture.name).with_suffix(".txt")
    say(
        f"{len(places)} captions written, {len(listing.rows) - len(places)} left as they were. "
        f'The first, {first}: "{first.read_text(encoding="utf-8").strip()}"'
    )


@app.command(
    cls=KindsCommand,
    epilog="Examples:\n\n    controlkit data build photos --annotator canny --size 512 --out photos-canny\n\n"
    "    controlkit data build fill50k --annotator canny --layout webdataset --out shards\n\n"
    "    controlkit data build photos --annotator canny --captions blip --out photos-canny",
)
def build(
    path: Annotated[Path, typer.Argument(help="A data set's folder, in any layout that `train` reads.")],
    out: OutOption,
    annotator: Annotated[str, typer.Option(help="The kind of the hints, made where there are none: {kinds}.")],
    layout: Annotated[
        str, typer.Option(help="`metadata` (the datasets library), `prompt.json`, `paired` (kohya), `webdataset`.")
    ] = "metadata",
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Size in pixels; the pictures' own by default.")
    ] = None,
    captions: Annotated[
        str, typer.Option(help="`own`: the set's own; `blip`: a captioner's where it has none.")
    ] = "own",
    captioner: CaptionerOption = "Salesforce/blip-image-captioning-base",
    replace: ReplaceOption = "nothing",
    device: DeviceOption = "auto",
    column: ColumnOption = None,
    workers: WorkersOption = 1,
) -> None:
    """Write a data set anew in another layout, with hints made where it has none, and captions if asked for.

    Run again to go on after an interruption; until it is whole, nothing reads the folder as a data set.
    """
    from controlkit.annotators import contract
    from controlkit.data import Captioning, build_set, load_captioner, sound_listing, wanting

    check_folder(out)
    over = _over(replace)
    if captions not in ("own", "blip"):
        raise Invalid(f'--captions is "{captions}": {nearest(captions, ("own", "blip"))}')
    listing = sound_listing(path, parse_columns(column))
    model = load_captioner(captioner, ready(device)) if captions == "blip" else None
    with progress_bars() as progress:
        bare = len(wanting(listing.rows, over)) if model else 0
        side = progress.add_task("captioning", total=bare, visible=bool(bare), figures="")
        task = progress.add_task("writing", total=len(listing.rows), figures="")

        captioning = Captioning(model, over, lambda count: progress.advance(side, count)) if model else None
        for done in build_set(listing, out, layout, contract(annotator), parse_size(size), captioning, workers):
            progress.update(task, completed=done)
    say(f"{len(listing.rows)} pairs in {out} ({layout})")

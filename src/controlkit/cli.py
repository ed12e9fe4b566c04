"""The command line: parses, calls the library, shows. Nothing is computed here.

Heavy imports stand inside the commands, so that ``controlkit --help`` answers at once.
"""

import errno
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from controlkit.errors import UserError, nearest, one_line

if TYPE_CHECKING:
    from rich.progress import Progress

    from controlkit.backbones import UNetBase
    from controlkit.data import Finding, Over
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

BaseOption = Annotated[
    str,
    typer.Option(
        help="`mini`, `sd15`, `sd21`, `sdxl`, a diffusers folder, a .safetensors or .ckpt file, or a hub's name."
    ),
]
OutOption = Annotated[Path, typer.Option(help="Folder to write into; made if it is not there.")]
DeviceOption = Annotated[str, typer.Option(help="`cpu`, `cuda`, or `auto`: cuda if there is one.")]
CaptionerOption = Annotated[str, typer.Option(help="The captioner's model: a BLIP's folder, or a hub's name.")]
ReplaceOption = Annotated[
    str, typer.Option(help="What the captioner may put its words over: `nothing`, `names` (of files), `all`.")
]
WorkersOption = Annotated[int, typer.Option(help="Processes; several need Ray (the extra `scale`).", min=1)]
StepsOption = Annotated[int, typer.Option(help="Sampling steps.", min=1)]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE[=WEIGHT]", help="A LoRA, or a run's base-difference, merged into the base; repeatable."),
]
GuidanceOption = Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")]


@contextmanager
def _progress(disable: bool = False) -> Iterator["Progress"]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), disable=disable) as progress:
        yield progress


def _on_cuda(device: str) -> bool:
    """Whether ``cpu``, ``cuda`` or ``auto`` means the GPU here."""
    import torch

    return device != "cpu" and torch.cuda.is_available()


def _ready(device: str) -> str:
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
        raise UserError(f'--device is "{device}"; expected cpu, cuda or auto.')
    if device == "auto":
        device = "cuda" if _on_cuda(device) else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and this machine or this build of torch has none: use cpu or auto.")
    return device


def _load_base(name: str, device: str, **options: Any) -> "UNetBase":
    from controlkit.backbones import load_base

    return load_base(name, _ready(device), **options)


def _over(replace: str) -> "Over":
    """What ``--replace`` says."""
    from typing import get_args

    from controlkit.data import Over

    if replace not in get_args(Over):
        raise UserError(f'--replace is "{replace}": {nearest(replace, get_args(Over))}')
    return cast("Over", replace)


def _load_control(name: str, base: "UNetBase", annotator: str | None = None) -> "SavedControl":
    import torch

    from controlkit.formats import load_control

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        saved = load_control(name, base, annotator)
    for note in notes:
        if note.category is UserWarning:
            _warn(str(note.message))
    trained_on = saved.trained.get("base_digest")
    # A digest takes seconds on a large base, and bfloat16's rounding gives another.
    comparable = trained_on and base.dtype != torch.bfloat16
    if difference := saved.trained.get("base_difference"):
        if comparable and trained_on == base.digest:
            _warn(f'"{name}" was trained together with its base: merge what that learnt by --lora .../{difference}')
    elif comparable and trained_on != base.digest:
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
    '    controlkit generate "a red apple" --control canny=photo.jpg --scale 0.8 --num 4 --seed 7 --out out\n\n'
    '    controlkit generate "a castle" --base sdxl.safetensors --control union.safetensors:canny=a.png '
    "--control union.safetensors:depth=b.png\n\n"
    '    controlkit generate "a castle" --base sd15 --control control_v11p_sd15_canny.pth=photo.jpg --annotator canny'
)
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help='What to make. Left out: a plain prompt for any picture. `""`: no prompt at all.'),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=IMAGE",
            help="A control (a shipped name, a file or a folder) and its picture; repeatable. "
            "Of a Union: NAME:TYPE=IMAGE, once for each type.",
        ),
    ] = None,
    out: OutOption = Path("out"),
    base: BaseOption = "mini",
    hint: Annotated[bool, typer.Option("--hint", help="The pictures are hints already: do not annotate them.")] = False,
    annotator: Annotated[
        list[str] | None,
        typer.Option(help="What makes the hints of a control that does not say; one value serves all."),
    ] = None,
    scale: Annotated[list[float] | None, typer.Option(help="Strength of each control; one value serves all.")] = None,
    guess: Annotated[bool, typer.Option("--guess", help="Guess mode: control without a prompt.")] = False,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 4.0,
    hint_guidance: Annotated[
        list[float] | None,
        typer.Option(
            help="How many times guidance counts each control's hint; one value serves all. 1 is as other tools do it; "
            "--guidance's, as often as the prompt. By default what the control says, or 1."
        ),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count on.", min=0, max=2**62)] = 0,
    num: Annotated[int, typer.Option(help="How many pictures.", min=1)] = 1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels; the base's own by default.")] = None,
    lora: LoraOption = None,
    embedding: Annotated[
        list[Path] | None,
        typer.Option(help="A textual inversion; in a prompt it is its file's name. Repeatable."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the base's weights: `fp32`, `bf16` or `fp16`.")] = "fp32",
    device: DeviceOption = "auto",
) -> None:
    """Make pictures from a prompt, steered by pictures.

    Writes each picture as a PNG with its settings embedded, each hint, and `grid.png` with all of them side by side.
    """
    from controlkit import sample
    from controlkit.annotators import annotate, contract, drawn_hint
    from controlkit.formats.convert import DTYPES
    from controlkit.images import grid, read_hint, read_picture, write_png
    from controlkit.precision import number_format
    from controlkit.union import UnionBranch

    _check_folder(out)
    asked = _grouped([_split_control(text) for text in control or []])
    scales = _one_each("--scale", scale or [1.0], len(asked))
    guidances = _one_each("--hint-guidance", hint_guidance or [None], len(asked))
    annotators = _one_each("--annotator", annotator or [None], len(asked))
    if annotator and not any(not given.typed for given in asked):
        raise UserError("--annotator says what makes a control's hints; none was given, or a Union's types say it.")
    for name in filter(None, annotators):
        contract(name)
    if dtype not in DTYPES:
        raise UserError(f'--dtype is "{dtype}": {nearest(dtype, DTYPES)}')
    for given in asked:
        for path in given.pictures.values():
            if path.suffix.lower() == ".npy" and not hint:
                raise UserError(f"{path} is an array, and arrays are hints already: say so by --hint.")
            (read_hint if hint else read_picture)(path)
    added = {"loras": [_split_lora(text) for text in lora or []], "embeddings": embedding or []}
    model = _load_base(base, device, dtype=DTYPES[dtype], **added)
    settings = sample.Settings(steps, guidance, _parse_size(size))
    sides = sample.picture_size(model, settings)
    prompt = sample.PLAIN_PROMPT if prompt is None else prompt
    for text in (prompt, negative or ""):
        if cut := model.cut_words(text):
            _warn(f'the prompt is longer than the {model.window} tokens "{model.name}" reads; cut off: "{cut}"')
    controls, hints, labels, shown = [], [], [], []
    for given, k, counted, made_by in zip(asked, scales, guidances, annotators, strict=True):
        saved = _load_control(given.name, model, "" if given.typed else made_by)
        if isinstance(saved.branch, UnionBranch) and not given.typed:
            raise UserError(
                f'"{given.name}" is a Union: say of which type the hint is, as {given.name}:TYPE=IMAGE. Types: '
                f"{', '.join(saved.branch.types)}."
            )
        if isinstance(saved.branch, UnionBranch):
            saved.branch.check_types(given.pictures)
        elif given.typed:
            raise UserError(f'"{given.name}" is no Union and has no types: give it as {given.name}=IMAGE.')
        read = {}
        for kind, path in given.pictures.items():
            rule = saved.contract_of(kind) if kind else saved.hint  # a Union's types say what makes them
            picture = (read_hint if hint else read_picture)(path, masked=rule.mark is not None)
            read[kind] = (drawn_hint if hint else annotate)(picture, rule, sides)
            shown.append(rule.picture(read[kind]))
        controls.append(sample.Control.of(saved, k, guess, counted))
        hints.append(read if given.typed else read[""])
        labels += [f"{Path(given.name).name}{f':{kind}' if kind else ''}" for kind in read]
    jobs = [sample.Job(prompt, seed + i, tuple(hints), negative) for i in range(num)]
    facts: dict[str, Any] = {"prompt": prompt, "negative": negative, "base": base, "steps": steps, "guidance": guidance}
    facts["controls"] = [
        {"name": given.name, "scale": control.scale, "hint": hint, "hint_guidance": control.guidance}
        for given, control in zip(asked, controls, strict=True)
    ]
    facts |= {"width": sides[1], "height": sides[0], "format": number_format(model.device.type), "guess": guess}
    facts |= {"lora": lora or [], "embedding": [path.stem for path in embedding or []], "dtype": dtype}
    made = []
    with _progress() as progress:
        task = progress.add_task("generating", total=num * steps, figures="")
        for result in sample.generate(model, jobs, controls, settings, on_step=lambda n: progress.advance(task, n)):
            write_png(out / f"picture-{result.job.seed}.png", result.pixels, facts | {"seed": result.job.seed})
            made.append(result.pixels)
    for i, (label, picture) in enumerate(zip(labels, shown, strict=True)):
        write_png(out / f"hint-{i}-{label.replace(':', '-')}.png", picture)
    columns = [f"hint: {label}" for label in labels] + [f"seed {job.seed}" for job in jobs]
    write_png(out / "grid.png", grid([[*shown, *made]], columns), facts | {"seed": seed})
    _say(f"{num} picture{'s' if num > 1 else ''} in {out}; side by side in {out / 'grid.png'}")


@dataclass(frozen=True)
class _Asked:
    """A control as asked for: its pictures by type, or under "" where it has none."""

    name: str
    pictures: dict[str, Path]

    @property
    def typed(self) -> bool:
        return "" not in self.pictures


def _split_control(text: str) -> tuple[str, str, Path]:
    """NAME[:TYPE]=IMAGE as (name, type, path)."""
    from controlkit.union import TYPES

    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UserError(f'--control is "{text}"; expected NAME=IMAGE, such as canny=photo.png.')
    file, colon, kind = name.rpartition(":")
    typed = bool(colon) and (kind in TYPES or not Path(name).exists())
    return (file, kind, Path(path)) if typed else (name, "", Path(path))


def _grouped(asked: list[tuple[str, str, Path]]) -> list[_Asked]:
    """A Union's types under one control, in the order they came; others as they are."""
    found: list[_Asked] = []
    for name, kind, path in asked:
        same = next((one for one in found if kind and one.typed and one.name == name), None)
        if same is None:
            found.append(_Asked(name, {kind: path}))
        elif kind in same.pictures:
            raise UserError(f"--control {name}:{kind} was given twice; expected one picture for a type.")
        else:
            same.pictures[kind] = path
    return found


def _split_lora(text: str) -> tuple[Path, float]:
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise UserError(f'--lora is "{text}"; expected FILE or FILE=WEIGHT, such as style.safetensors=0.7.') from None


def _one_each(option: str, given: list, controls: int) -> list:
    """What was given for each control, or once for all."""
    if len(given) not in (1, controls):
        raise UserError(
            f"{option} was given {len(given)} times for {controls} controls; expected once, or once for each."
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
    annotator: Annotated[
        str,
        typer.Argument(
            metavar="ANNOTATOR", help="`canny`, `softedge`, `scribble`, `lineart`, `mlsd`, `tile` or `inpaint`."
        ),
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to annotate.")],
    out: OutOption = Path("out"),
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Annotate at this size; the picture's by default.")
    ] = None,
) -> None:
    """Turn pictures into hints: `OUT/NAME.png` for each; lines are white on black."""
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
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Examples:\n\n    controlkit train recipes/smoke.yaml --out runs/smoke\n\n"
    "    controlkit train --pretrained_model_name_or_path mini --train_data_dir photos --annotator canny "
    "--resolution 128 --output_dir runs/photos\n\n"
    "    controlkit train recipes/canny.yaml --set data.source=photos --set batch=16 --out runs/photos\n\n"
    "    controlkit train recipes/canny.yaml --out runs/canny     # again, to go on after an interruption",
)
def train(
    context: typer.Context,
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe: YAML; see `recipes/`. Or, instead, train_controlnet.py's flags.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; give the same one to go on.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A value in place of the recipe's; repeatable."),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train a control, and say in words whether control was found.

    Run the same command again to go on from the last checkpoint. `OUT/log.jsonl` holds a record a line,
    `OUT/samples` pictures, `OUT/control` the result.
    """
    from controlkit.data import read_listing, trained_count
    from controlkit.flags import read_flags
    from controlkit.ranks import ranks
    from controlkit.recipe import parse_recipe, put, read_recipe
    from controlkit.train import train_control

    given = [*([str(recipe)] if recipe else []), *context.args]
    if given and given[0].startswith("--"):
        asked = read_flags(given, lambda folder: trained_count(len(read_listing(folder).rows)))
        for change in changes or []:
            put(asked.recipe, change)
        settings, out = parse_recipe(asked.recipe, "What the flags ask for"), out or asked.out
        notes = asked.notes
    elif context.args:
        raise UserError(f'"{context.args[0]}" is no option of train: see `controlkit train --help`.')
    elif not given or not out:
        raise UserError("Expected a recipe and --out, the run's folder; see `controlkit train --help`.")
    else:
        asked, settings, notes = None, read_recipe(Path(given[0]), changes or []), []
    together = ranks(cpu=not _on_cuda(device))
    for note in notes if together.first else []:
        _warn(note)
    base = _load_base(settings.base, device)
    if asked and asked.resolution != base.size:
        raise UserError(f'"{base.name}" makes pictures of {base.size} pixels: expected --resolution {base.size}.')
    with _progress(disable=not together.first) as progress:
        main_task = progress.add_task("training", total=settings.steps, figures="")
        side = progress.add_task("", total=1, visible=False, figures="")

        def stage(name: str, total: int) -> None:
            if not total:  # no work, but something to know
                progress.print(name, highlight=False)
                return
            progress.reset(side, total=total, description=name, visible=True)

        def advance(count: int) -> None:
            progress.advance(side, count)

        mean = 0.0
        words = ""
        for record in train_control(settings, out, base, stage, advance, foreseen=True):
            if not together.first:
                continue
            mean = record.loss if mean == 0.0 else 0.98 * mean + 0.02 * record.loss
            rate = settings.batch / record.seconds
            progress.update(side, visible=False)
            progress.update(main_task, completed=record.step, figures=f"loss {mean:.4f}  {rate:.0f} pictures/s")
            if record.relative:
                means = {kind: sum(quarters) / len(quarters) for kind, quarters in record.relative.items()}
                told = ", ".join(f"{kind} {mean:.3f}".strip() for kind, mean in means.items())
                progress.print(f"step {record.step}: loss relative to no control {told}", highlight=False)
            if record.residuals:
                low, high = min(record.residuals.values()), max(record.residuals.values())
                told = f"residuals {low:.3g} to {high:.3g} of what they are added to"
                if record.drift:
                    told += "; colours " + ", ".join(f"{name} {value:+.3f}" for name, value in record.drift.items())
                progress.print(f"step {record.step}: {told}", highlight=False)
            if seen := record.evaluation:
                words = record.verdict or ""
                range_ = f"fidelity {seen.fidelity.mean:.3f} between {seen.floor.mean:.3f} and {seen.ceiling.mean:.3f}"
                shown = f"obedience {seen.obedience}" if seen.counts else range_
                progress.print(f"step {record.step}: {shown} - {words}", highlight=False)
    if together.first:
        _say(f"{words + '. ' if words else ''}The control is in {out / 'control'}; the log in {out / 'log.jsonl'}.")


@app.command(
    epilog="Examples:\n\n    controlkit watch runs/canny\n\n    controlkit watch runs/canny --html run.html --once"
)
def watch(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    html: Annotated[Path | None, typer.Option(help="Write it as one HTML file, too.")] = None,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2)] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and do not wait for the run's end.")] = False,
) -> None:
    """Look at a run while it goes on: its loss, the loss relative to no control, obedience, and what was said of it.

    Reads the run's folder alone, so it does not matter where the run goes on. Ends with the run.
    """
    import time

    from rich.live import Live
    from rich.text import Text

    from controlkit.images import write_atomic
    from controlkit.watch import lines, page, read_run

    seen = read_run(run)
    with Live(refresh_per_second=4) as live:
        while True:
            live.update(Text("\n".join(lines(seen))))
            if html:
                write_atomic(html, page(seen).encode())
            if once or seen.ended:
                break
            time.sleep(every)
            seen = read_run(run)
    if html:
        _say(str(html))


@app.command(epilog="Example:\n\n    controlkit evaluate canny --num 64 --json canny.json")
def evaluate(
    control: Annotated[str, typer.Argument(help="A shipped control, a control folder, or a run's folder.")],
    base: BaseOption = "mini",
    num: Annotated[int, typer.Option(help="Pictures to measure on.", min=2)] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="`emoji`, `scenes`, `fill50k` or a folder; by default what the control was trained on."),
    ] = None,
    annotator: Annotated[
        str | None, typer.Option(help="What makes the hints of a control that does not say it itself.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Strength of the control.")] = 1.0,
    lora: LoraOption = None,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 4.0,
    hint_guidance: Annotated[
        float | None,
        typer.Option(help="How many times guidance counts the hint; by default what the control says, or 1."),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure whether a control is obeyed: fidelity, floors, ceiling, obedience; and CLIP-score and FID beside it.

    Held-out pairs, seeds 0..N-1; 95% intervals by a paired bootstrap. Obedience 0 is no control, 1 is all the VAE
    lets through.
    """
    from rich.console import Console
    from rich.table import Table

    from controlkit.data import TRUTHS, evaluation_pairs
    from controlkit.images import write_atomic
    from controlkit.measure import evaluate as measure
    from controlkit.measure import metric_of
    from controlkit.sample import Control, Settings
    from controlkit.union import UnionBranch

    if json_file and json_file.is_dir():
        raise UserError(f"--json is {json_file}, which is a folder; expected a file to write.")
    model = _load_base(base, device, loras=[_split_lora(text) for text in lora or []])
    saved = _load_control(control, model, annotator)
    if isinstance(saved.branch, UnionBranch):
        raise UserError(f'"{control}" is a Union: measure one of its types, as {control}:TYPE.')
    metric_of(saved.hint)
    kind, source = saved.hint.annotator, data or str(saved.trained.get("data", "emoji"))
    if source == "world":  # what is known of scenes alone is measured there, the rest on emoji
        source = "scenes" if kind in TRUTHS else "emoji"
    pairs, real = evaluation_pairs(source, model.size, num, person=kind == "pose")
    with _progress() as progress:
        task = progress.add_task("measuring", total=3 * len(pairs) * steps, figures="")
        report = measure(
            model,
            Control.of(saved, scale, guidance=hint_guidance),
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
    if report.get("observer"):
        told = ", ".join(f"{name} {value:.3f}" for name, value in report["observer"].items())
        _say(f"Read off the pictures by the observer, whose own figures on held-out scenes are: {told}.")
    if json_file:
        write_atomic(json_file, (json.dumps(report, indent=2) + "\n").encode())
    if not report["counts"]:
        _warn("floor and ceiling are too close, or the ceiling too low, for this obedience to mean much")
    if not report["quality_kept"]:
        _warn("quality fell: CLIP-score under 95%, or FID over 110%, of the same base without control")


@app.command(
    epilog="Examples:\n\n    controlkit inspect control_v11p_sd15_canny.pth\n\n    controlkit inspect canny --json"
)
def inspect(
    file: Annotated[str, typer.Argument(help="A file of weights, a control's folder, or a shipped name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, tensors by name.")] = False,
) -> None:
    """Say what a file of weights is: format, base, channels of its hints, what is missing, and whether it runs.

    Told from the names and shapes in it, never from the file's own name; nothing in it is run.
    """
    from controlkit.formats import describe, shipped_controls, shipped_folder
    from controlkit.hub import shipped_names

    found = describe(shipped_folder(file) if file in {*shipped_names(), *shipped_controls()} else Path(file))
    _say(json.dumps(found.to_json(), indent=2) if as_json else found.sentence())


@app.command(
    epilog="Examples:\n\n    controlkit convert canny canny.safetensors --to cldm --dtype fp16\n\n"
    "    controlkit convert control_v11p_sd15_canny.pth sd15-canny --to diffusers\n\n"
    "    controlkit convert canny small.safetensors --to control-lora --base mini --rank 32\n\n"
    "    controlkit convert canny tuned --to diffusers --base mini --transfer-to runs/style-3d\n\n"
    "    controlkit convert mini fresh --to diffusers --attach"
)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A control, of any format; with --attach, a base.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A folder, or a .safetensors file.")],
    to: Annotated[
        str,
        typer.Option(help="`diffusers`, `union` (folders), `cldm` (for ComfyUI and A1111), `control-lora` (files)."),
    ],
    dtype: Annotated[str | None, typer.Option(help="`fp16`, `bf16` or `fp32`; as stored by default.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base the control belongs to: for Control-LoRAs, differences, transfers.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="A Control-LoRA's; by default the least that keeps 95% of the difference.", min=1)
    ] = None,
    attach: Annotated[bool, typer.Option("--attach", help="Make a fresh, silent branch for the base SRC.")] = False,
    transfer_to: Annotated[
        str | None, typer.Option(help="Another base: move the control there, + (its weights - the base's).")
    ] = None,
    annotator: Annotated[str | None, typer.Option(help="What makes the hints, where the source does not say.")] = None,
) -> None:
    """Write a control in another format; or attach a fresh one to a base, or transfer one to another base.

    The result is whole or absent. Its metadata says what is known: base, hints, configuration.
    """
    from controlkit import formats

    if attach:
        if rank is not None or transfer_to is not None or base is not None:
            raise UserError("--attach makes a fresh branch for the base SRC: no --base, --rank or --transfer-to.")
        done = formats.attach(_load_base(source, "cpu"), target, to, dtype, annotator=annotator or "")
    else:
        models = {name: _load_base(name, "cpu") for name in dict.fromkeys((base, transfer_to)) if name}
        own, other = (models.get(name) if name else None for name in (base, transfer_to))
        with _progress() as progress:
            task = progress.add_task("decomposing", visible=False, figures="")

            def on_tensor(count: int, total: int) -> None:
                progress.update(task, completed=count, total=total, visible=True)

            done = formats.convert(source, target, to, dtype, own, rank, other, annotator, on_tensor)
    for note in done.notes:
        _warn(note)
    _say(f"{done.path}: {formats.describe(done.path).sentence()}")


@app.command(epilog="Example:\n\n    controlkit where canny")
def where(name: Annotated[str, typer.Argument(help="`mini`, `union`, `canny`, `depth`, `referee`, ...")]) -> None:
    """Print the folder of what is shipped; the base and its controls are ordinary diffusers folders.

    A control that is a type of a Union lies in the Union's folder; `controlkit convert canny DST --to diffusers` takes
    it out as an ordinary ControlNet.
    """
    from controlkit.formats import shipped_folder

    _say(str(shipped_folder(name)))


@data_app.command(
    epilog="Examples:\n\n    controlkit data doctor fill50k --annotator canny\n\n"
    "    controlkit data doctor photos && controlkit train canny.yaml --out runs/canny"
)
def doctor(
    path: Annotated[Path, typer.Argument(help="A data set's folder, in any layout that `train` reads.")],
    annotator: Annotated[
        str | None,
        typer.Option(
            help="What the hints are, or what will make them: they are held against it. Of several, `canny+depth`."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the contact sheet and `report.json`.")] = Path("out/doctor"),
    channels: Annotated[
        int | None, typer.Option(help="Channels the hints should have; three, or three of each, by default.", min=1)
    ] = None,
    low: Annotated[float, typer.Option(help="The least value that hints of floats may have.")] = 0.0,
    high: Annotated[float, typer.Option(help="The largest value that hints of floats may have.")] = 1.0,
    workers: WorkersOption = 1,
) -> None:
    """Say what a data set is and what is wrong with it; exit code 1 if nothing should train on it.

    Opens every picture: counts, missing or extra pairs, sizes, unreadable files, duplicates, captions, hints.
    """
    from collections import Counter

    from controlkit.annotators import contract
    from controlkit.data import add_up, examine, read_listing, sheet_rows
    from controlkit.images import grid, write_atomic, write_png

    _check_folder(out)
    made_by = contract(annotator) if annotator else None
    if made_by:
        made_by = replace(made_by, channels=channels or made_by.channels, low=low, high=high)
    elif (channels, low, high) != (None, 0.0, 1.0):
        raise UserError("--channels, --low and --high say what hints should be: say of what kind, too, by --annotator.")
    listing = read_listing(path)
    with _progress() as progress:
        task = progress.add_task("opening", total=len(listing.rows), figures="")

        def opened() -> Iterator["Finding"]:
            for finding in examine(listing, made_by, workers):
                progress.advance(task)
                yield finding

        report = add_up(listing, opened(), made_by)
    facts = report.to_json()
    _say(f"{path}: {facts['rows']} pairs ({facts['layout']}), {facts['with_hints']} with hints of their own")
    _say("pictures: " + ", ".join(f"{count} of {size}" for size, count in list(facts["picture_sizes"].items())[:5]))
    words = facts["caption_words"]
    _say(f"captions: {words['least']} to {words['most']} words, {words['median']} in the middle; {words['none']} empty")
    said = [row for row in listing.rows if row.prompt]
    if said:
        origin = "from the file's name: " if said[0].named else ""
        _say(f'the first: {origin}"{one_line(said[0].prompt)}"')
    if not facts["with_hints"] and not annotator:
        _say("hints: none; training makes them by its annotator (--annotator canny here shows what they will be)")
    if facts["hint_mean_grey"] is not None:
        _say(f"hints: mean grey {facts['hint_mean_grey']:.3f} (0 black, 1 white)")
    for (kind, fatal), count in Counter((p.kind, p.fatal) for p in report.problems).items():
        first = next(p for p in report.problems if (p.kind, p.fatal) == (kind, fatal))
        often = f"{count} times; the first: " if count > 1 else ""
        _say(f"{'problem' if fatal else 'note'}: {kind}, {often}{first}")
    if report.shown:
        write_png(out / "sheet.png", grid(sheet_rows(report)))
    write_atomic(out / "report.json", (json.dumps(facts, indent=2) + "\n").encode())
    _say(f"Training {'may' if report.may_train else 'may not'} start. All of it, and a contact sheet: {out}")
    if not report.may_train:
        raise typer.Exit(1)


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


@make_app.command(epilog="Example:\n\n    controlkit data make scenes --count 100 --hint depth --out scenes")
def scenes(
    out: OutOption,
    count: Annotated[int, typer.Option(help="Scenes to draw.", min=1)] = 1000,
    size: Annotated[int, typer.Option(help="Side in pixels.", min=32)] = 256,
    seed: Annotated[int, typer.Option(help="Another seed draws another set.")] = 0,
    hint: Annotated[
        str, typer.Option(help="`depth`, `normal`, `seg`, `pose` or `edges`: the hints that `prompt.json` names.")
    ] = "depth",
) -> None:
    """Draw scenes about which everything is known: solids and figures, with depth, normals, labels, poses, edges.

    Each picture with its hints as pictures, its exact truth (`truth/N.npz`), and captions in several wordings.
    """
    from controlkit.data import make_scenes

    _check_folder(out)
    with _progress() as progress:
        task = progress.add_task("drawing", total=count, figures="")
        for done in make_scenes(out, count, size, seed, hint):
            progress.update(task, completed=done)
    _say(f"{count} scenes in {out}; listed in {out / 'prompt.json'} and {out / 'metadata.jsonl'}")


@data_app.command(
    epilog="Examples:\n\n    controlkit data caption photos\n\n"
    "    controlkit data caption photos --replace names --captioner models/blip-large"
)
def caption(
    path: Annotated[Path, typer.Argument(help="A folder of pictures, alone or beside a folder of hints.")],
    captioner: CaptionerOption = "Salesforce/blip-image-captioning-base",
    replace: ReplaceOption = "nothing",
    device: DeviceOption = "auto",
) -> None:
    """Caption the pictures that have none, by BLIP: `NAME.txt` beside each, where trainers look for it.

    What people wrote stays as it is, unless `--replace all` is given. Run again to go on after an interruption.
    """
    from controlkit.data import check_beside, load_captioner, read_listing, unwritten, wanting, write_captions

    over = _over(replace)
    listing = read_listing(path)
    if fatal := [problem for problem in listing.problems if problem.fatal]:
        raise UserError(f"{fatal[0]}. `controlkit data doctor {path}` lists all that is wrong with it.")
    check_beside(listing)
    places = wanting(listing.rows, over)
    places = places if over == "all" else unwritten(listing, places)
    named = sum(row.named and bool(row.prompt) for row in listing.rows)
    if not places:
        more = f"; {named} of them are their files' names: --replace names has them captioned" if named else ""
        _say(f"All {len(listing.rows)} pictures have captions{more}.")
        return
    model = load_captioner(captioner, _ready(device))
    with _progress() as progress:
        task = progress.add_task("captioning", total=len(places), figures="")
        for done in write_captions(listing, model, places):
            progress.update(task, completed=done)
    first = Path(listing.rows[places[0]].picture.name).with_suffix(".txt")
    _say(
        f"{len(places)} captions written, {len(listing.rows) - len(places)} left as they were. "
        f'The first, {first}: "{first.read_text(encoding="utf-8").strip()}"'
    )


@data_app.command(
    epilog="Examples:\n\n    controlkit data build photos --annotator canny --size 512 --out photos-canny\n\n"
    "    controlkit data build fill50k --annotator canny --layout webdataset --out shards\n\n"
    "    controlkit data build photos --annotator canny --captions blip --out photos-canny"
)
def build(
    path: Annotated[Path, typer.Argument(help="A data set's folder, in any layout that `train` reads.")],
    out: OutOption,
    annotator: Annotated[str, typer.Option(help="What the hints are, or, where there are none, what makes them.")],
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
    workers: WorkersOption = 1,
) -> None:
    """Write a data set anew in another layout, with hints made where it has none, and captions if asked for.

    Run again to go on after an interruption; until it is whole, nothing reads the folder as a data set.
    """
    from controlkit.annotators import contract
    from controlkit.data import build_set, load_captioner, read_listing, wanting

    _check_folder(out)
    over = _over(replace)
    if captions not in ("own", "blip"):
        raise UserError(f'--captions is "{captions}": {nearest(captions, ("own", "blip"))}')
    listing = read_listing(path)
    if fatal := [problem for problem in listing.problems if problem.fatal]:
        raise UserError(f"{fatal[0]}. `controlkit data doctor {path}` lists all that is wrong with it.")
    model = load_captioner(captioner, _ready(device)) if captions == "blip" else None
    with _progress() as progress:
        bare = len(wanting(listing.rows, over)) if model else 0
        side = progress.add_task("captioning", total=bare, visible=bool(bare), figures="")
        task = progress.add_task("writing", total=len(listing.rows), figures="")

        def captioned(count: int) -> None:
            progress.advance(side, count)

        sized = _parse_size(size)
        for done in build_set(listing, out, layout, contract(annotator), sized, model, over, captioned, workers):
            progress.update(task, completed=done)
    _say(f"{len(listing.rows)} pairs in {out} ({layout})")


_PLACES = (  # errors of a path or a disk, which the user can mend
    errno.ENOSPC,
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

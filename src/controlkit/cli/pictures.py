"""Pictures from prompts and hints; hints from pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from controlkit.cli.shared import (
    BaseOption,
    DeviceOption,
    GuidanceOption,
    KindsCommand,
    LoraOption,
    OutOption,
    StepsOption,
    VaeOption,
    check_folder,
    loaded_base,
    loaded_control,
    parse_size,
    progress_bars,
    say,
    split_lora,
    warn,
)
from controlkit.errors import Invalid, UserError, nearest

app = typer.Typer()


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
    hint_cfg: Annotated[
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
    vae: VaeOption = None,
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

    check_folder(out)
    asked = _grouped([_split_control(text) for text in control or []])
    scales = _one_each("--scale", scale or [1.0], len(asked))
    guidances = _one_each("--hint-cfg", hint_cfg or [None], len(asked))
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
    added = {"loras": [split_lora(text) for text in lora or []], "embeddings": embedding or [], "vae": vae}
    model = loaded_base(base, device, dtype=DTYPES[dtype], **added)
    settings = sample.SamplingSettings(steps, guidance, parse_size(size))
    sides = sample.picture_size(model, settings)
    prompt = sample.PLAIN_PROMPT if prompt is None else prompt
    for text in (prompt, negative or ""):
        if cut := model.cut_words(text):
            warn(f'the prompt is longer than the {model.window} tokens "{model.name}" reads; cut off: "{cut}"')
    controls, hints, labels, shown = [], [], [], []
    for given, k, counted, made_by in zip(asked, scales, guidances, annotators, strict=True):
        saved = loaded_control(given.name, model, "" if given.typed else made_by)
        if saved.branch.hint_types and not given.typed:
            raise UserError(
                f'"{given.name}" is a Union: say of which type the hint is, as {given.name}:TYPE=IMAGE. Types: '
                f"{', '.join(saved.branch.hint_types)}."
            )
        if saved.branch.hint_types:
            saved.branch.check_types(given.pictures)
        elif given.typed:
            raise UserError(f'"{given.name}" is no Union and has no types: give it as {given.name}=IMAGE.')
        read = {}
        for kind, path in given.pictures.items():
            rule = saved.contract_of(kind) if kind else saved.hint  # a Union's types say what makes them
            picture = (read_hint if hint else read_picture)(path, masked=rule.mask_value is not None)
            read[kind] = (drawn_hint if hint else annotate)(picture, rule, sides)
            shown.append(rule.picture(read[kind]))
        controls.append(sample.Control.of(saved, k, guess, counted))
        hints.append(read if given.typed else read[""])
        labels += [f"{Path(given.name).name}{f':{kind}' if kind else ''}" for kind in read]
    jobs = [sample.Job(prompt, seed + i, tuple(hints), negative) for i in range(num)]
    facts: dict[str, Any] = {"prompt": prompt, "negative": negative, "base": base, "steps": steps, "guidance": guidance}
    facts["controls"] = [
        {"name": given.name, "scale": control.scale, "hint": hint, "hint_cfg_scale": control.hint_cfg_scale}
        for given, control in zip(asked, controls, strict=True)
    ]
    facts |= {"width": sides[1], "height": sides[0], "format": number_format(model.device.type), "guess": guess}
    facts |= {"lora": lora or [], "embedding": [path.stem for path in embedding or []], "dtype": dtype}
    made = []
    with progress_bars() as progress:
        task = progress.add_task("generating", total=num * steps, figures="")
        for result in sample.generate(model, jobs, controls, settings, on_step=lambda n: progress.advance(task, n)):
            write_png(out / f"picture-{result.job.seed}.png", result.pixels, facts | {"seed": result.job.seed})
            made.append(result.pixels)
    for i, (label, picture) in enumerate(zip(labels, shown, strict=True)):
        write_png(out / f"hint-{i}-{label.replace(':', '-')}.png", picture)
    columns = [f"hint: {label}" for label in labels] + [f"seed {job.seed}" for job in jobs]
    write_png(out / "grid.png", grid([[*shown, *made]], columns), facts | {"seed": seed})
    say(f"{num} picture{'s' if num > 1 else ''} in {out}; side by side in {out / 'grid.png'}")


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
    from controlkit.controls.union import TYPES

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


def _one_each(option: str, given: list, controls: int) -> list:
    """What was given for each control, or once for all."""
    if len(given) not in (1, controls):
        raise UserError(
            f"{option} was given {len(given)} times for {controls} controls; expected once, or once for each."
        )
    return given * controls if len(given) == 1 else given


@app.command(
    cls=KindsCommand,
    epilog="Examples:\n\n    controlkit annotate canny photo.png drawing.jpg --out hints\n\n"
    "    controlkit annotate canny photo.png --option low=50 --option high=100 --out hints",
)
def annotate(
    annotator: Annotated[
        str,
        typer.Argument(metavar="ANNOTATOR", help="The kind of hint to make: {annotators}."),
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to annotate.")],
    out: OutOption = Path("out"),
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Annotate at this size; the picture's by default.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the annotator: {options}. Repeatable."),
    ] = None,
) -> None:
    """Turn pictures into hints: `OUT/NAME.png` for each; lines are white on black."""
    from controlkit.annotators import annotate as annotate_picture
    from controlkit.annotators import annotator as find
    from controlkit.images import read_picture, write_png

    contract = find(annotator).spec(**_options(option or []))
    sides = parse_size(size)
    check_folder(out)
    if len({path.stem for path in images}) < len(images):
        raise UserError("Two of the pictures have the same name, and one hint would overwrite the other: rename one.")
    targets = [out / f"{path.stem}.png" for path in images]
    read = {path.resolve() for path in images}
    if clash := next((target for target in targets if target.resolve() in read), None):
        raise UserError(f"A hint would overwrite the picture {clash}: give another --out.")
    pictures = [read_picture(path) for path in images]
    for target, picture in zip(targets, pictures, strict=True):
        made_by = {"annotator": annotator, "options": contract.options}
        write_png(target, annotate_picture(picture, contract, sides), made_by)
        say(str(target))


def _options(given: list[str]) -> dict[str, str]:
    """The values of ``--option``, by key."""
    pairs = [one.partition("=") for one in given]
    if wrong := [one for one, (key, _, value) in zip(given, pairs, strict=True) if not (key and value)]:
        raise Invalid(f'--option is "{wrong[0]}"; expected KEY=VALUE, such as low=50.')
    return {key: value for key, _, value in pairs}

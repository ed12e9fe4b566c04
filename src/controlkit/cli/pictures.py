"""Pictures from prompts and hints; hints from pictures."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlkit.cli.shared import (
    BaseOption,
    DeviceOption,
    GuidanceOption,
    KindsCommand,
    LoraOption,
    OutOption,
    SizeOption,
    StepsOption,
    VaeOption,
    check_folder,
    key_values,
    loaded_base,
    parse_size,
    progress_bars,
    say,
    split_lora,
    warn,
)
from controlkit.errors import Invalid, NotFound, nearest, one_line
from controlkit.files import home_path
from controlkit.hub import is_sealed, seal

if TYPE_CHECKING:
    from controlkit.backbones import Backbone
    from controlkit.sample import ControlRequest, Prepared, Request

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n"
    '    controlkit generate "a cat face, on a teal background" --control canny=cat.png --out out\n\n'
    '    controlkit generate "a red apple" --control canny=photo.jpg,scale=0.8,end=0.6 --num-images 4 --seed 7\n\n'
    '    controlkit generate "a castle" --base sdxl.safetensors --control union.safetensors:canny=a.png '
    "--control union.safetensors:depth=b.png\n\n"
    '    controlkit generate "a castle" --base sd15 --control control_v11p_sd15_canny.pth=photo.jpg,annotator=canny'
)
def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help='What to make. Left out: a plain prompt for any picture. `""`: no prompt.')
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=IMAGE[,KEY=VALUE...]",
            help="A control (a shipped name, a file, a folder, a hub's name), its picture, and its own settings: "
            "`scale`, `start` and `end` (shares of the steps), `mode` (`balanced`, `prompt`, `control`), `by-step` and "
            "`by-tap` (factors, as 1/0.5/0), `region` (a picture, light where it acts), `cfg-weights`, `cond-only`, "
            "`guess`, `hint-cfg`, `annotator`, `ready`; repeatable. "
            "Of a Union: NAME:TYPE=IMAGE, once for each type, each with a `scale` of its own.",
        ),
    ] = None,
    request: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file with the whole request: prompts, seed, size, steps, guidance, controls; or a PNG that "
            "this command wrote, whose request is repeated (its base, LoRAs and VAE are options still)."
        ),
    ] = None,
    out: OutOption = Path("out"),
    base: BaseOption = "mini",
    hint_ready: Annotated[
        bool, typer.Option("--hint-ready", help="All pictures are hints already: do not annotate them.")
    ] = False,
    annotator: Annotated[
        str | None, typer.Option(help="What makes the hints of controls that do not say; a control's own goes first.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Scale of every control that has none of its own.")] = 1.0,
    guess: Annotated[bool, typer.Option("--guess", help="Guess mode: control without a prompt.")] = False,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 4.0,
    guidance_rescale: Annotated[
        float, typer.Option(help="How far guidance keeps the spread of the prediction, 0 to 1.")
    ] = 0.0,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="`DDIM`, `DDPM`, `Euler`, `Euler a`, `DPM++ 2M`, `DPM++ 2M SDE`, `DPM++ 3M`, `UniPC`, `DEIS`, `LCM`, "
            "`TCD`; after it `Karras`, `Exponential`, `Beta` or `SGM Uniform`. By default the base's own."
        ),
    ] = None,
    hint_cfg: Annotated[
        float | None,
        typer.Option(
            help="How many times guidance counts the hint of every control that has no `hint-cfg` of its own. 1 is as "
            "other tools do it; --guidance's, as often as the prompt. By default what the control says, or 1."
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    dialect: Annotated[
        str,
        typer.Option(
            help="How prompts are read: `plain`; `a1111`, with `(word:1.2)`, `[a:b:0.5]`, `[a|b]`, `AND`, `BREAK`, "
            "`<lora:NAME:0.8>`; `comfy`, with `(word:1.2)`."
        ),
    ] = "plain",
    clip_skip: Annotated[
        int | None,
        typer.Option(
            help="Layers of the text encoder left out, as the dialect counts: `plain` from 0, `a1111` from 1, `comfy` "
            "from -1."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count on.")] = 0,
    num_images: Annotated[int, typer.Option(help="How many pictures.", min=1, max=10_000)] = 1,
    size: SizeOption = None,
    lora: LoraOption = None,
    lora_dir: Annotated[Path, typer.Option(help="Where LoRAs that a prompt names are looked for.")] = Path(),
    vae: VaeOption = None,
    embedding: Annotated[
        list[Path] | None, typer.Option(help="A textual inversion; in a prompt it is its file's name. Repeatable.")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Open, fetch and spend what the request in another's PNG asks for."),
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the base's weights: `fp32`, `bf16`, `fp16`; or `auto`: half precision on a GPU, and on a CPU "
            "where that is faster."
        ),
    ] = "auto",
    memory: Annotated[
        str,
        typer.Option(
            help="`fast`: everything on the GPU; `balanced`: one part at a time, large pictures decoded in tiles; "
            "`low`: one layer at a time, tiles of 512 pixels; `auto`: the first that fits."
        ),
    ] = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Make pictures from a prompt, steered by pictures.

    Writes each picture as a PNG with its request embedded, each hint, and `grid.png` with all of them side by side.
    """
    from controlkit import sample
    from controlkit.formats.convert import DTYPES
    from controlkit.precision import number_format
    from controlkit.prompts import without_loras

    check_folder(out)
    if dtype not in ("auto", *DTYPES):
        raise Invalid(f'--dtype is "{dtype}": {nearest(dtype, ("auto", *DTYPES))}')
    if memory not in sample.MEMORY:
        raise Invalid(f'--memory is "{memory}": {nearest(memory, sample.MEMORY)}')
    if request:
        first = _read_request(context, request, follow)
    else:
        shared = {"scale": scale, "guess": guess, "ready": hint_ready, "hint_cfg_scale": hint_cfg}
        if dialect == "a1111" and prompt is not None:
            prompt, named = without_loras(prompt)
            lora = [*(lora or []), *(f"{lora_named(name, lora_dir)}={scale:g}" for name, scale in named)]
        first = sample.Request(
            prompt=sample.PLAIN_PROMPT if prompt is None else prompt,
            negative_prompt=negative_prompt,
            dialect=dialect,
            clip_skip=clip_skip,
            scheduler=scheduler,
            guidance_rescale=guidance_rescale,
            seed=seed,
            size=parse_size(size),
            steps=steps,
            guidance=guidance,
            controls=control_requests(control or [], shared, annotator),
        )
    if first.seed + num_images > 2**64:
        raise Invalid(f"--seed is {first.seed}, and {num_images} seeds from there go beyond the largest, {2**64 - 1}.")
    for one in first.controls:
        sample.check_pictures(one)
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto"), "embeddings": embedding or [], "vae": vae}
    options["waits"] = True
    model = loaded_base(base, device, loras=[split_lora(text) for text in lora or []], **options)
    requests = [first.model_copy(update={"seed": first.seed + i}) for i in range(num_images)]
    prepared = sample.prepare(model, requests)
    for line in plan.lines() if (plan := sample.plan_memory(model, prepared, memory)) else ():
        say(line)
    used = next(name for name, one in DTYPES.items() if one == model.dtype)
    facts = {"base": base, "format": number_format(model.device.type), "dtype": used, "lora": lora or [], "vae": vae}
    _make(model, prepared, out, facts | {"embedding": [path.stem for path in embedding or []]})


def lora_named(name: str, folder: Path) -> Path:
    """The file of a LoRA that a prompt names: a path, or a file in the folder, with or without its ending."""
    from controlkit.tensors import PICKLES

    there = sorted(path for path in home_path(folder).glob("*") if path.suffix.lower() in (".safetensors", *PICKLES))
    near = [path for path in there if name in (path.name, path.stem)]
    if not near and not home_path(name).is_file():
        words = nearest(name, [path.stem for path in there]) if there else "there is none in it"
        raise NotFound(f'The prompt names the LoRA "{name:.80}", which is not in {folder} (--lora-dir): {words}')
    return near[0] if near else home_path(name)


def _make(base: "Backbone", prepared: "Sequence[Prepared]", out: Path, facts: Mapping[str, Any]) -> None:
    """Sample, and write the pictures, the hints and all of them side by side."""
    from controlkit.files import mark_output
    from controlkit.images import grid, write_png
    from controlkit.precision import settle_threads
    from controlkit.sample import generate, pictures

    for note in dict.fromkeys(note for one in prepared for note in one.notes):
        warn(note)
    settled = {one.request.seed: json.loads(one.settled().to_json()) for one in prepared}
    settled = {number: asked | {"seal": seal(asked)} for number, asked in settled.items()}
    height, width = prepared[0].settings.size or (base.size, base.size)
    facts = {**facts, "width": width, "height": height, "threads": settle_threads(base.networks().values())}
    made = []
    with progress_bars() as progress:
        total = sum(one.settings.steps for one in prepared)
        task = progress.add_task("generating", total=total, figures="")
        for picture in pictures(generate(base, prepared), lambda count: progress.advance(task, count)):
            seed = picture.request.seed
            mark_output(out, "generate")
            write_png(out / f"picture-{seed}.png", picture.pixels, settled[seed] | facts)
            made.append(picture.pixels)
    shown = [
        (f"{Path(asked.name).name}{f':{kind}' if kind else ''}", hint)
        for asked, control in zip(prepared[0].request.controls, prepared[0].controls, strict=True)
        for kind, hint in control.pictures().items()
    ]
    for i, (label, hint) in enumerate(shown):
        name = re.sub(r"[^\w.-]", "-", label)[:60]
        write_png(out / f"hint-{i}-{name}.png", hint)
    columns = [f"hint: {one_line(label)}" for label, _ in shown] + [f"seed {seed}" for seed in settled]
    row = [*(hint for _, hint in shown), *made]
    write_png(out / "grid.png", grid([row], columns), next(iter(settled.values())) | facts)
    say(f"{len(made)} picture{'s' if len(made) > 1 else ''} in {out}; side by side in {out / 'grid.png'}")


IN_REQUEST = (
    "prompt", "control", "hint_ready", "annotator", "scale", "guess", "steps", "guidance", "hint_cfg",
    "negative_prompt", "seed", "size", "dialect", "clip_skip", "scheduler",
    "guidance_rescale",
)  # fmt: skip
"""Parameters of ``generate`` that a request's file says instead."""


def _read_request(context: typer.Context, file: Path, follow: bool) -> "Request":
    """The request in a file. Who names a JSON text asks for what it says; a PNG's settings nobody sees."""
    from controlkit.images import read_settings
    from controlkit.sample import Request

    sources = {name: context.get_parameter_source(name) for name in IN_REQUEST}
    if also := [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]:
        raise Invalid(f"--request holds the whole request: leave out {', '.join(also)}, or write it into {file}.")
    if not file.is_file():
        raise NotFound(f"There is no request at {file}: expected a JSON file, or a PNG that generate wrote.")
    try:
        if file.suffix.lower() != ".png":
            return Request.from_json(file.read_bytes())
        held = read_settings(file)
        asked = {key: value for key, value in held.items() if key in Request.model_fields}
        found = Request(**asked)
    except Invalid as error:
        raise Invalid(f"{file}: {error}") from None
    if not follow and not is_sealed(held.get("seal"), asked) and (named := ", ".join(_beyond(found))):
        raise Invalid(f"{file} was not made here, and asks for {named}. If you want that, add --follow.")
    return found


_USUAL = {"side": 1024, "steps": 100}
"""Sizes and steps that a stranger's request may ask for."""


def _beyond(request: "Request") -> Iterator[str]:
    """In words, all that a request has the program open, fetch or spend; of a stranger's it is asked for."""
    from controlkit.formats import shipped_controls

    for control in request.controls:
        if control.name.partition(":")[0] not in shipped_controls():
            yield f'the control "{one_line(control.name)}"'
        yield from (f'the picture "{one_line(one)}"' for one in control.images.values() if isinstance(one, Path))
    if max(request.size or (0,)) > _USUAL["side"]:
        yield "{1} x {0} pixels".format(*request.size or ())
    if request.steps > _USUAL["steps"]:
        yield f"{request.steps} steps"


KEYS = {"hint-cfg": "hint_cfg_scale"} | {
    key: key.replace("-", "_")
    for key in (
        "scale", "start", "end", "annotator", "guess", "ready", "mode", "by-step", "by-tap", "cond-only", "cfg-weights",
        "region",
    )
}  # fmt: skip
"""Settings of a control on the command line -> ``ControlRequest``'s."""
FLAGS = ("guess", "ready", "cond-only", "cfg-weights")
"""Those that stand without a value."""


def control_requests(
    given: Sequence[str], shared: Mapping[str, Any], annotator: str | None = None
) -> tuple["ControlRequest", ...]:
    """The controls that ``--control`` options ask for; a Union's types under one, in the order they came.

    ``shared``: settings of those that have none of their own; ``annotator``: of those whose hints have no type.
    """
    from controlkit.sample import ControlRequest

    found: list[tuple[str, dict[str, Path], dict[str, Any]]] = []
    for text in given:
        name, kind, path, own = split_control(text)
        if kind and "scale" in own:
            own["scales"] = {kind: own.pop("scale")}
        same = next((one for one in found if kind and "" not in one[1] and one[0] == name), None)
        if same is None:
            found.append((name, {kind: path}, own))
            continue
        _, images, settings = same
        if kind in images:
            raise Invalid(f"--control {name}:{kind} was given twice; expected one picture for a type.")
        own["scales"] = settings.get("scales", {}) | own.get("scales", {})
        if twice := [key for key in own.keys() - {"scales"} if settings.get(key, own[key]) != own[key]]:
            raise Invalid(f'--control {name} has two values of "{twice[0]}": a Union\'s types share one.')
        images[kind] = path
        settings |= own
    if annotator and all("" not in images for _, images, _ in found):
        raise Invalid("--annotator says what makes a control's hints; none was given, or a Union's types say it.")
    return tuple(
        ControlRequest(name=name, images=images, **{**shared, "annotator": annotator if "" in images else None, **own})
        for name, images, own in found
    )


def split_control(text: str) -> tuple[str, str, Path, dict[str, Any]]:
    """NAME[:TYPE]=IMAGE[,KEY=VALUE...] as (name, type, path, settings).

    Settings are taken off the end as long as their keys are known, so that a path may hold commas and equals signs. The
    name ends at the first equals sign before which there is a control's name or a path that exists; else at the first.
    """
    from controlkit.controls import TYPES
    from controlkit.formats import shipped_controls

    known = shipped_controls()

    def is_there(name: str) -> bool:
        return name in known or home_path(name).exists()

    def parted(name: str) -> tuple[str, str]:
        """A name as (name, type)."""
        file, colon, kind = name.rpartition(":")
        return (file, kind) if colon and (kind in TYPES or not is_there(name)) else (name, "")

    ends = [place for place, letter in enumerate(text) if letter == "="]
    end = next((one for one in ends if is_there(text[:one]) or is_there(parted(text[:one])[0])), ends[0] if ends else 0)
    name, path = text[:end], text[end + 1 :]
    settings: dict[str, Any] = {}
    while path and not home_path(path).exists():
        head, _, last = path.rpartition(",")
        key, equals, value = last.partition("=")
        if not head or key not in KEYS or bool(equals) == (key in FLAGS):
            break
        if KEYS[key] in settings:
            raise Invalid(f'--control {name} has "{key}" twice.')
        settings[KEYS[key]] = value if equals else True
        path = head
    if not (name and path):
        raise Invalid(
            f'--control is "{text}"; expected NAME=IMAGE, such as canny=photo.png or canny=photo.png,scale=0.8.'
        )
    last = path.rpartition(",")[2]
    key = last.partition("=")[0]
    if "," in path and key.replace("-", "_").isidentifier() and not home_path(path).exists():
        raise Invalid(f'--control {name} has no setting "{last}": {nearest(key, KEYS)}')
    return *parted(name), home_path(path), settings


@app.command(
    cls=KindsCommand,
    epilog="Examples:\n\n    controlkit annotate canny photo.png drawing.jpg --out hints\n\n"
    "    controlkit annotate canny photo.png --option low=50 --option high=100 --out hints",
)
def annotate(
    annotator: Annotated[str, typer.Argument(metavar="ANNOTATOR", help="The kind of hint to make: {annotators}.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to annotate.")],
    out: OutOption = Path("out"),
    size: SizeOption = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the annotator: {options}. Repeatable.")
    ] = None,
) -> None:
    """Turn pictures into hints: `OUT/NAME.png` for each; lines are white on black."""
    from controlkit.annotators import annotate as annotate_picture
    from controlkit.annotators import annotator as find
    from controlkit.annotators import is_empty
    from controlkit.images import read_picture, write_png

    contract = find(annotator).spec(**key_values(option, "--option", "KEY=VALUE, such as low=50"))
    sides = parse_size(size)
    check_folder(out)
    if len({path.stem for path in images}) < len(images):
        raise Invalid("Two of the pictures have the same name, and one hint would overwrite the other: rename one.")
    targets = [out / f"{path.stem}.png" for path in images]
    read = {os.path.realpath(path) for path in images}  # Path.resolve raises for links in a circle
    if clash := next((target for target in targets if os.path.realpath(target) in read), None):
        raise Invalid(f"A hint would overwrite the picture {clash}: give another --out.")
    pictures = [read_picture(path) for path in images]
    for target, picture in zip(targets, pictures, strict=True):
        hint = annotate_picture(picture, contract, sides)
        write_png(target, hint, {"annotator": annotator, "options": contract.options})
        say(str(target))
        if is_empty(hint, contract):
            warn(f"{target} is empty: {annotator} finds nothing in that picture")

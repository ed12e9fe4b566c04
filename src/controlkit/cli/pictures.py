"""Pictures from prompts and hints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from controlkit.cli.jobs import run_jobs, with_places
from controlkit.cli.matrix import MOST, axes_of, matrix
from controlkit.cli.requests import KEYS, asked_for
from controlkit.cli.shared import (
    BaseOption,
    DeviceOption,
    GuidanceOption,
    LoraOption,
    OutOption,
    SizeOption,
    StepsOption,
    VaeOption,
    check_folder,
    say,
)
from controlkit.errors import Invalid
from controlkit.files import home_path

if TYPE_CHECKING:
    from controlkit.sample import Memory

app = typer.Typer()

_ALONE = ("prompts", "grid", "like", "auto_prompt", "preview")
"""Options of ``generate`` that are not for ``--jobs``."""


@app.command(
    epilog="Examples:\n\n"
    '    controlkit generate "a cat face, on a teal background" --control canny=cat.png --out out\n\n'
    '    controlkit generate "a red apple" --control canny=photo.jpg,scale=0.8,end=0.6 --num-images 4 --seed 7\n\n'
    '    controlkit generate "a castle" --base sdxl.safetensors --control union.safetensors:canny=a.png '
    "--control union.safetensors:depth=b.png\n\n"
    "    controlkit generate --like out/picture-7.png --seed 8 --scale 0.7\n\n"
    '    controlkit generate "a castle" --control canny=cat.png --grid seed=1,2 --grid scale=0,0.5,1\n\n'
    '    controlkit generate "a cat face, 3d style" --init-image cat.png --strength 0.6 --control canny\n\n'
    '    controlkit generate "a red hat" --init-image cat.png --mask hat.png --margin 32\n\n'
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
            "`by-tap` (factors, as 1/0.5/0), `region` (a picture, light where it acts), `resize` (`crop`, `stretch`, "
            "`fill`), `passes` (`both`, `first`, `second`), `cfg-weights`, `cond-only`, `guess`, `hint-cfg`, "
            "`annotator`, `ready`; repeatable. Of a Union: NAME:TYPE=IMAGE, once for each type, each with a `scale` of "
            "its own. NAME alone reads the picture of --init-image.",
        ),
    ] = None,
    request: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file with the whole request: prompts, seed, size, steps, guidance, controls. Base, LoRAs, VAE "
            "and embeddings are options still."
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="Repeat a PNG that this command wrote, to the pixel: its request, base, LoRAs, VAE, embeddings and "
            "number format; options given beside it replace a part. Of a PNG that A1111 wrote: prompts, sampler, "
            "steps, seed, size, as far as they can be read."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file with a prompt a line, each made with all other settings."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            help="Make pictures with each of these values: of a setting (`seed`, `steps`, `guidance`, `scheduler`, "
            "`prompt`, `clip-skip`, ...), of one of all controls (`scale`, `start`, `end`, `mode`, ...), or of one "
            "control (`NAME.scale`). Repeatable: all combinations, the last key as columns of `grid.png`. A value with "
            'commas stands in "double quotes", or has a backslash before each.',
        ),
    ] = None,
    auto_prompt: Annotated[
        bool,
        typer.Option(
            "--auto-prompt",
            help="Make each picture with a plain prompt, caption it, and make it again with the caption as its prompt.",
        ),
    ] = False,
    captioner: Annotated[
        str | None,
        typer.Option(
            help="Of --auto-prompt: a BLIP's folder, or a hub's name. By default, for bases of `mini`'s world, its "
            "referee chooses a caption; else Salesforce/blip-image-captioning-base."
        ),
    ] = None,
    jobs: Annotated[
        Path | None,
        typer.Option(
            help="Many pictures: a file with a request as JSON on each line, whose keys go before the options; or a "
            "folder, each of whose pictures goes into the --control that has none. Started again, goes on."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Of --jobs: processes, each with a base; several need Ray (the extra `scale`).", min=1)
    ] = 1,
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
    guider: Annotated[
        str, typer.Option(help="`cfg`; or `apg`, which keeps colours from glaring at high guidance.")
    ] = "cfg",
    speed: Annotated[
        str,
        typer.Option(
            help="`exact`; or `fast` and `turbo`, in which some steps reuse an earlier step's encoder and controls: "
            "other pictures, as good on average."
        ),
    ] = "exact",
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
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count on. -1 draws one.")] = 0,
    num_images: Annotated[int, typer.Option("--num-images", "--num", help="How many pictures.", min=1, max=MOST)] = 1,
    size: SizeOption = None,
    init_image: Annotated[
        Path | None, typer.Option(help="A picture to be changed; where it is transparent, it is made anew.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How far it is changed, 0 to 1: the share of the steps. By default 1 with a mask, else 0.75."
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="A picture, light where the picture is made anew; all else stays as it is, to the pixel."),
    ] = None,
    mask_blur: Annotated[
        int | None, typer.Option(help="Pixels outside the mask over which new passes into old; by default none.")
    ] = None,
    outpaint: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS", help="Pixels to be added above,right,below,left of the picture, or one number for all."
        ),
    ] = None,
    fill: Annotated[
        bool, typer.Option("--fill", help="Fill what is masked with the colours around it before it is changed.")
    ] = False,
    margin: Annotated[
        int | None,
        typer.Option(
            help="Work only on what is masked and so many pixels around it, at --size, and paste it back into the "
            "picture, which keeps its size."
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            help="How the picture comes to --size: `crop` (the default), `stretch`, or `fill`, whose rest is made anew."
        ),
    ] = None,
    hires: Annotated[
        float | None,
        typer.Option(help="Make the picture so many times as large in a second pass, which changes the scaled one."),
    ] = None,
    hires_strength: Annotated[float | None, typer.Option(help="--strength of the second pass; by default 0.7.")] = None,
    hires_steps: Annotated[int | None, typer.Option(help="--steps of the second pass; by default as many.")] = None,
    tile: Annotated[
        int | None,
        typer.Option(help="Make larger pictures in overlapping tiles of so many pixels, a size the base knows."),
    ] = None,
    variation: Annotated[
        float, typer.Option(help="How far the noise is turned towards that of --variation-seed, 0 to 1.")
    ] = 0.0,
    variation_seed: Annotated[
        int, typer.Option(help="Seed of the first variation; with --num-images the others count on from it.")
    ] = 0,
    lora: LoraOption = None,
    lora_dir: Annotated[Path, typer.Option(help="Where LoRAs that a prompt names are looked for.")] = Path(),
    vae: VaeOption = None,
    embedding: Annotated[
        list[Path] | None, typer.Option(help="A textual inversion; in a prompt it is its file's name. Repeatable.")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Open, fetch and spend what another's PNG asks for (--like)."),
    ] = False,
    preview: Annotated[
        int, typer.Option(help="Write `preview.png` every so many steps: rough pictures of the unfinished ones.", min=0)
    ] = 0,
    taesd: Annotated[
        Path | None,
        typer.Option(
            help="A TAESD for previews of full size: a folder or file of diffusers' AutoencoderTiny. Else colours are "
            "guessed from the latents, at their size."
        ),
    ] = None,
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

    Writes each picture as a PNG with its request embedded, each hint, and `grid.png` with all of them side by side. The
    request is in the text field `controlkit` as JSON, and in `parameters` as A1111 writes it.
    """
    from controlkit.backbones.taesd import load_taesd
    from controlkit.cli import making
    from controlkit.sample import check_pictures, plan_memory, prepare

    check_folder(out)
    if taesd and not preview:
        raise Invalid("--taesd shows previews: give --preview N, too.")
    if (workers if jobs is None else num_images) > 1:
        raise Invalid("--workers goes with --jobs alone, and --num-images without it alone: leave it out.")
    if jobs and (clash := [name for name in _ALONE if context.params[name]]):
        raise Invalid(f"--jobs says which pictures are made: leave out --{clash[0].replace('_', '-')}.")
    if jobs and home_path(jobs).is_dir():
        context.params["control"] = with_places(control or [], KEYS)
    asked = asked_for(context)
    loads, pictures = asked.loads, matrix(asked.request, axes_of(grid or [], prompts, num_images, asked.request))
    if auto_prompt and (prompts or grid or request or like or prompt is not None):
        others = "the prompt, --prompts, --grid, --request and --like"
        raise Invalid(f"--auto-prompt captions what the default prompt gives: leave out {others}.")
    load = making.loader(loads, memory)
    if jobs:
        return run_jobs(home_path(jobs), asked.request, out, loads.facts(), load, device, workers)
    controls = [control for one in pictures.requests() for control in one.controls]
    for control_asked in {(one.annotator, one.ready, str(one.images)): one for one in controls}.values():
        check_pictures(control_asked)
    for edited in dict.fromkeys(one.edit for one in pictures.requests() if one.edit):
        check_pictures(edited)
    model = load(device)
    previewer = load_taesd(taesd, model) if taesd else None
    prepared = prepare(model, pictures.requests())
    for line in plan.lines() if (plan := plan_memory(model, prepared, cast("Memory", memory))) else ():
        say(line)
    output = making.Output(out, making.as_loaded(loads, model), making.facts_of(model, asked), preview, previewer)
    if auto_prompt:
        count = making.write_captioned(model, prepared, pictures, output, captioner)
    else:
        count = making.write_all(model, prepared, pictures, output, asked.batch if len(prepared) == 1 else 0)
    drawn = f", seed {asked.request.seed}" if context.params["seed"] == -1 else ""
    say(f"{count} picture{'s' if count > 1 else ''} in {out}{drawn}; side by side in {out / 'grid.png'}")

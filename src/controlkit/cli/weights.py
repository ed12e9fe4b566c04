"""Files of weights: what they are, other formats, where the shipped ones lie."""

from pathlib import Path
from typing import Annotated

import typer

from controlkit.cli.shared import loaded_base, progress_bars, say, say_json, warn
from controlkit.errors import Invalid

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n    controlkit inspect control_v11p_sd15_canny.pth\n\n    controlkit inspect canny --json"
)
def inspect(
    file: Annotated[str, typer.Argument(help="A file of weights, a control's folder, or a shipped name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, tensors by name.")] = False,
) -> None:
    """Say what a file of weights is: format, base, channels of its hints, what is missing, and whether it runs.

    Read from the names and shapes in it, never from the file's own name; nothing in it is run.
    """
    from controlkit.formats import describe, named_path

    found = describe(named_path(file))
    if as_json:
        say_json(found.to_json())
    else:
        say(found.sentence())


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
    prefix: Annotated[
        str | None,
        typer.Option(help="Of names in `cldm`: `control_model` by default; `none`, which kohya's trainer wants."),
    ] = None,
) -> None:
    """Write a control in another format; or attach a fresh one to a base, or transfer one to another base.

    The result is whole or absent. Its metadata says what is known: base, hints, configuration.
    """
    from controlkit import formats

    if attach:
        if rank is not None or transfer_to is not None or base is not None:
            raise Invalid("--attach makes a fresh branch for the base SRC: no --base, --rank or --transfer-to.")
        options = formats.WriteOptions(dtype, prefix=prefix)
        done = formats.attach(loaded_base(source, "cpu"), target, to, annotator=annotator or "", options=options)
    else:
        models = {name: loaded_base(name, "cpu") for name in dict.fromkeys((base, transfer_to)) if name}
        own, other = (models.get(name) if name else None for name in (base, transfer_to))
        with progress_bars() as progress:
            task = progress.add_task("decomposing", visible=False, figures="")

            def on_tensor(count: int, total: int) -> None:
                progress.update(task, completed=count, total=total, visible=True)

            options = formats.WriteOptions(dtype, rank, on_tensor, prefix)
            done = formats.convert(source, target, to, own, other, annotator, options)
    for note in done.notes:
        warn(note)
    say(f"{done.path}: {formats.describe(done.path).sentence()}")


@app.command(epilog="Example:\n\n    controlkit where canny")
def where(name: Annotated[str, typer.Argument(help="`mini`, `union`, `canny`, `depth`, `referee`, ...")]) -> None:
    """Print the folder of what is shipped; the base and its controls are ordinary diffusers folders.

    A control that is a type of a Union lies in the Union's folder; `controlkit convert canny DST --to diffusers` takes
    it out as an ordinary ControlNet.
    """
    from controlkit.formats import shipped_folder

    say(str(shipped_folder(name)))

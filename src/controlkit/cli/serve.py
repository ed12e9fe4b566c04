"""The command that serves the HTTP API."""

from pathlib import Path
from typing import Annotated

import typer

from controlkit.cli.shared import BaseOption, DeviceOption, LoraOption, VaeOption, on_cuda, say
from controlkit.errors import Invalid
from controlkit.files import home_path

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n    controlkit serve\n\n    controlkit serve --base sd15 --controls models/ControlNet\n\n"
    "    CONTROLKIT_TOKEN=... controlkit serve --host 0.0.0.0"
)
def serve(
    base: BaseOption = "mini",
    host: Annotated[
        str, typer.Option(help="Address to listen on. By default this machine alone; others need --token.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 7860 is where A1111's clients look.", min=1, max=65535)
    ] = 7860,
    token: Annotated[
        str,
        typer.Option(
            envvar="CONTROLKIT_TOKEN",
            show_envvar=False,
            help="What clients must send: as a bearer token (OpenAI's API key), or as the password of basic "
            "authentication. Better given by the variable CONTROLKIT_TOKEN: options are seen by other users.",
        ),
    ] = "",
    controls: Annotated[
        Path | None, typer.Option(help="A folder of controls that may be asked for by name, beside the shipped ones.")
    ] = None,
    loras: Annotated[
        Path | None,
        typer.Option(
            help="A folder of LoRAs that prompts may name, as `<lora:NAME:0.8>`; looked through at each request."
        ),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="A folder of textual inversions; each is written in a prompt as its file's name."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Web pages that may ask, such as http://localhost:3000; repeatable."),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder of the queue and the pictures; by default one a port in the cache.")
    ] = None,
    lora: LoraOption = None,
    vae: VaeOption = None,
    dtype: Annotated[str, typer.Option(help="Of the base's weights: `fp32`, `bf16`, `fp16` or `auto`.")] = "auto",
    memory: Annotated[str, typer.Option(help="`fast`, `balanced`, `low` or `auto`, as `generate` has it.")] = "auto",
    device: DeviceOption = "auto",
    workers: Annotated[
        int, typer.Option(help="Processes, each with a base; by default one for each GPU, or one.", min=0, max=64)
    ] = 0,
    ray: Annotated[
        bool,
        typer.Option("--ray", help="Run on Ray Serve, with a replica for each worker, on a cluster where Ray has one."),
    ] = False,
) -> None:
    """Serve pictures over HTTP, by the APIs of A1111 and OpenAI and by one of its own (docs/api.md).

    Accepted jobs are kept on the disk and outlive a restart. Ctrl-C ends the server.
    """
    from controlkit.cli import making
    from controlkit.cli.requests import Loads
    from controlkit.hub import cache_dir
    from controlkit.serve import Folders, Settings, serve_replicas
    from controlkit.serve import serve as run

    named = {"controls": controls, "loras": loras, "embeddings": embeddings}
    folders = {name: home_path(path) if path else None for name, path in named.items()}
    for name, path in folders.items():
        if path and not path.is_dir():
            raise Invalid(f"--{name} is {named[name]}; expected a folder.")
    folder = home_path(state).absolute() if state else cache_dir() / "serve" / str(port)
    settings = Settings(folder, host, port, token, tuple(allow_origin or ()), folders=Folders(**folders))
    loads = Loads.of({"base": base, "lora": lora, "vae": vae, "dtype": dtype})
    load = making.loader(loads, memory, merges=loras is not None)
    start = serve_replicas if ray else run
    start(settings, load, _devices(device, workers), lambda url: say(f"serving {base} at {url}"))


def _devices(device: str, workers: int) -> list[str]:
    """The device of each worker; GPUs in turn."""
    import torch

    count = torch.cuda.device_count() if on_cuda(device) else 0
    if not count:
        return [device] * (workers or 1)
    return [f"cuda:{i % count}" for i in range(workers or count)]

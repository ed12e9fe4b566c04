"""A1111's API: ``/sdapi/v1`` and the ControlNet extension's ``/controlnet``, as clients use them."""

import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import psutil
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from controlkit import __version__
from controlkit.annotators import makers_of
from controlkit.annotators.people import draw_people, people_from_json
from controlkit.backbones.schedulers import SPACINGS
from controlkit.decoding import settings_texts
from controlkit.errors import Invalid
from controlkit.files import parse_json
from controlkit.images import png_bytes
from controlkit.sample import infotext
from controlkit.serve import incoming
from controlkit.serve.catalogue import TYPES, module_named, module_names, module_sliders, modules, most_side
from controlkit.serve.front import JOB, Front, Handler, as_base64, body_of, named, schema_of
from controlkit.serve.loras import told_loras
from controlkit.serve.orders import Annotation
from controlkit.serve.pictures import (
    DEFAULTS,
    IMAGE_ONLY,
    SCRIPTS,
    TEXT_ONLY,
    UPSCALERS,
    Asked,
    clip_skip,
    read,
)
from controlkit.serve.queue import Job
from controlkit.serve.settings import Limits

_UNITS = 3
"""Control units that clients are told of; more are taken."""
_EMPTY_LISTS = (
    "hypernetworks", "prompt-styles", "face-restorers", "realesrgan-models", "sd-vae", "sd-modules",
    "latent-upscale-modes", "extensions",
)  # fmt: skip
_DETECT = {
    "controlnet_module": "none", "controlnet_input_images": None, "controlnet_images": None,
    "controlnet_processor_res": -1, "controlnet_threshold_a": -1, "controlnet_threshold_b": -1,
    "controlnet_masks": None, "low_vram": False,
}  # fmt: skip


class A1111(Front):
    """The routes of A1111's API."""

    api = "a1111"

    def router(self) -> APIRouter:
        """All routes, for an application."""
        found = APIRouter(tags=["a1111"])
        text, image = (body_of(schema_of(DEFAULTS | more)) for more in (TEXT_ONLY, IMAGE_ONLY))
        posts: dict[str, tuple[Handler, dict[str, Any]]] = {
            "/sdapi/v1/txt2img": (self.txt2img, text),
            "/sdapi/v1/img2img": (self.img2img, image),
            "/sdapi/v1/interrupt": (self.interrupt, {}),
            "/sdapi/v1/skip": (self.skip, {}),
            "/sdapi/v1/options": (self.set_options, body_of({"sd_model_checkpoint": {"type": "string"}})),
            "/sdapi/v1/png-info": (self.png_info, body_of({"image": {"type": "string"}}, ["image"])),
            "/controlnet/detect": (self.detect, body_of(schema_of(_DETECT))),
            "/controlnet/render_openpose_json": (self.render_poses, {}),
        }
        for name in ("refresh-checkpoints", "refresh-vae", "refresh-loras", "unload-checkpoint", "reload-checkpoint"):
            posts[f"/sdapi/v1/{name}"] = (self.nothing, {})
        gets: dict[str, Handler] = {
            f"/sdapi/v1/{name}": getattr(self, name.replace("-", "_"))
            for name in ("progress", "options", "cmd-flags", "samplers", "schedulers", "upscalers", "sd-models",
                         "memory", "scripts", "script-info")
        } | {f"/controlnet/{name}": getattr(self, name)
             for name in ("version", "model_list", "module_list", "control_types", "settings")}  # fmt: skip
        gets |= {f"/sdapi/v1/{name}": self.nothing_listed for name in _EMPTY_LISTS}
        gets |= {"/sdapi/v1/embeddings": self.embeddings, "/sdapi/v1/loras": self.loras}
        for path, (handler, more) in posts.items():
            found.add_api_route(path, self.guarded(handler), methods=["POST"], openapi_extra=more)
        for path, handler in gets.items():
            found.add_api_route(path, self.guarded(handler), methods=["GET"])
        return found

    def refusal(self, status: int, sentence: str, kind: str) -> Response:
        """An error as A1111 says it."""
        return JSONResponse({"error": kind, "detail": sentence, "body": "", "errors": sentence}, status)

    def __init__(self, desk: Any) -> None:
        super().__init__(desk)
        self._options: dict[str, Any] = {}
        """Settings that clients changed; they hold until the server ends."""
        self._interrupted: set[str] = set()

    # --- pictures -------------------------------------------------------------------------------------------------

    async def txt2img(self, http: HttpRequest) -> Response:
        """Make pictures from a prompt."""
        return await self._generate(http, is_edit=False)

    async def img2img(self, http: HttpRequest) -> Response:
        """Change a picture."""
        return await self._generate(http, is_edit=True)

    async def _generate(self, http: HttpRequest, is_edit: bool) -> Response:
        data = await http.body()
        asked: Asked = await self.apart(self._read_generate, data, is_edit)
        job = await self.made(asked.order)
        result, names = job.result, [*job.result["pictures"], *job.result["hints"]]
        images = [as_base64(data) for data in await self.files(job, names if asked.send else [])]
        answer = {
            "images": images,
            "parameters": _echo(asked.fields),
            "info": json.dumps(self._info(asked, job)),
        }
        notes = [*asked.ignored, *result["notes"]]
        return JSONResponse(answer, headers=named(notes) | {JOB: job.id})

    def _read_generate(self, data: bytes, is_edit: bool) -> Asked:
        body = incoming.fields_of(data)
        return read(body, is_edit, self.catalogue, self.desk.limits, {"clip_skip": clip_skip(self._options)})

    def _info(self, asked: Asked, job: Job) -> dict[str, Any]:
        """A1111's ``info``, all its keys."""
        request, result, order = asked.order.request, job.result, asked.order
        count = len(result["pictures"])
        seeds, subseeds = ([pair[i] for pair in order.seeds[:count]] or [order.seeds[0][i]] for i in (0, 1))
        strength = request.edit.strength if request.edit else request.hires.strength if request.hires else None
        negative = request.negative_prompt or ""
        return {
            "prompt": request.prompt,
            "all_prompts": [request.prompt] * len(seeds),
            "negative_prompt": negative,
            "all_negative_prompts": [negative] * len(seeds),
            "seed": seeds[0],
            "all_seeds": seeds,
            "subseed": subseeds[0],
            "all_subseeds": subseeds,
            "subseed_strength": request.variation,
            "width": result["width"],
            "height": result["height"],
            "sampler_name": _sampler_of(request.scheduler or str(self.catalogue.facts["sampler"])),
            "cfg_scale": request.guidance,
            "steps": request.steps,
            "batch_size": incoming.whole(asked.fields, "batch_size", 1, 1, count or 1 << 16),
            "restore_faces": False,
            "face_restoration_model": None,
            "sd_model_name": self.catalogue.base,
            "sd_model_hash": self.catalogue.base_hash,
            "sd_vae_name": None,
            "sd_vae_hash": None,
            "seed_resize_from_w": -1,
            "seed_resize_from_h": -1,
            "denoising_strength": strength,
            "extra_generation_params": {},
            "index_of_first_image": 0,
            "infotexts": result["texts"],
            "styles": [],
            "job_timestamp": _stamp(job.begun),
            "clip_skip": request.clip_skip or 1,
            "is_using_inpainting_conditioning": False,
            "version": f"controlkit {__version__}",
        }

    # --- work on the way --------------------------------------------------------------------------------------------

    async def progress(self, http: HttpRequest) -> Response:
        """How far the job at work is, with all nine values of ``state``."""
        running = self.desk.queue.running()
        job = next((one for one in running if one.api == self.api), running[0] if running else None)
        at = self.desk.progress.get(job.id) if job else None
        skip = http.query_params.get("skip_current_image", "false").lower() in ("true", "1")
        self._interrupted &= {one.id for one in running}
        state = {
            "skipped": False,
            "interrupted": bool(self._interrupted),
            "stopping_generation": bool(self._interrupted),
            "job": job.kind if job else "",
            "job_count": len(running),
            "job_timestamp": _stamp(job.begun if job else None),
            "job_no": 0,
            "sampling_step": at.step if at else 0,
            "sampling_steps": at.steps if at else 0,
        }
        return JSONResponse(
            {
                "progress": round(at.share, 4) if at else 0.0,
                "eta_relative": round(at.seconds_left, 3) if at else 0.0,
                "state": state,
                "current_image": as_base64(at.preview) if at and at.preview and not skip else None,
                "textinfo": None,
                "current_task": job.id if job else None,
            }
        )

    async def interrupt(self, http: HttpRequest) -> Response:
        """Have what this API's clients wait for end with what there is."""
        self._stop()
        return JSONResponse({})

    async def skip(self, http: HttpRequest) -> Response:
        """The same: all pictures of a job are made at once."""
        self._stop()
        return JSONResponse(None)

    def _stop(self) -> None:
        self._interrupted |= {job.id for job in self.desk.queue.running() if job.api == self.api}
        self.desk.interrupt(self.api)

    # --- settings and lists -----------------------------------------------------------------------------------------

    async def options(self, http: HttpRequest) -> Response:
        """The settings that clients ask for."""
        return JSONResponse(
            {
                "sd_model_checkpoint": self.catalogue.base_title,
                "sd_checkpoint_hash": self.catalogue.base_hash,
                "sd_vae": "Automatic",
                "CLIP_stop_at_last_layers": self._options.get("CLIP_stop_at_last_layers", 1),
                "samples_format": "png",
                "enable_pnginfo": True,
                "samples_save": False,
                "show_progress_every_n_steps": 1,
                "live_previews_enable": True,
                "control_net_unit_count": _UNITS,
            }
        )

    async def set_options(self, http: HttpRequest) -> Response:
        """Change settings; a model that this server does not have is refused, others that mean nothing are named."""
        given = await incoming.json_fields(http)
        self.catalogue.check_base(incoming.text(given, "sd_model_checkpoint"))
        clip_skip(given)
        taken = {key: given[key] for key in ("CLIP_stop_at_last_layers",) if given.get(key) is not None}
        self._options |= taken
        unread = [str(key) for key in given if key not in (*taken, "sd_model_checkpoint")]
        return JSONResponse(None, headers=named(unread))

    async def nothing(self, http: HttpRequest) -> Response:
        """Take a request that has nothing to do here, as all is loaded."""
        return JSONResponse(None)

    async def nothing_listed(self, http: HttpRequest) -> Response:
        """A list of which there is nothing here."""
        return JSONResponse([])

    async def embeddings(self, http: HttpRequest) -> Response:
        """Textual inversions that the base was given, and those that do not fit it."""
        return JSONResponse(self.catalogue.facts["embeddings"])

    async def loras(self, http: HttpRequest) -> Response:
        """LoRAs that prompts may name, as the folder has them now."""
        return JSONResponse(await self.apart(told_loras, self.catalogue.loras))

    async def cmd_flags(self, http: HttpRequest) -> Response:
        """The flags of the command line that clients look for."""
        return JSONResponse({"api": True, "listen": not self.desk.settings.is_local, "nowebui": True})

    async def samplers(self, http: HttpRequest) -> Response:
        """Samplers, with the names that older clients give them."""
        found = []
        for kind, spacings in self.catalogue.samplers.items():
            aliases = [f"k_{kind.lower().replace(' ', '_').replace('+', 'p')}", *(f"{kind} {one}" for one in spacings)]
            found.append({"name": kind, "aliases": aliases, "options": {}})
        return JSONResponse(found)

    async def schedulers(self, http: HttpRequest) -> Response:
        """The ways in which steps are spread."""
        rows = ["Automatic", *SPACINGS]
        return JSONResponse(
            [
                {
                    "name": name.lower().replace(" ", "_"),
                    "label": name,
                    "aliases": None,
                    "default_rho": -1.0,
                    "need_inner_model": False,
                }
                for name in rows
            ]
        )

    async def upscalers(self, http: HttpRequest) -> Response:
        """The ways to enlarge a picture before a second pass."""
        empty = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
        return JSONResponse([{"name": name, **empty} for name in UPSCALERS])

    async def sd_models(self, http: HttpRequest) -> Response:
        """The base."""
        one = self.catalogue
        return JSONResponse(
            [
                {
                    "title": one.base_title,
                    "model_name": one.base,
                    "hash": one.base_hash,
                    "sha256": None,
                    "filename": one.base,
                    "config": None,
                }
            ]
        )

    async def memory(self, http: HttpRequest) -> Response:
        """The machine's memory in bytes."""
        now = psutil.virtual_memory()
        return JSONResponse({"ram": {"free": now.available, "used": now.used, "total": now.total}, "cuda": {}})

    async def scripts(self, http: HttpRequest) -> Response:
        """Scripts by their titles."""
        return JSONResponse({"txt2img": list(SCRIPTS), "img2img": list(SCRIPTS)})

    async def script_info(self, http: HttpRequest) -> Response:
        """The arguments of the one script."""
        units = [{"label": "unit", "value": None, "minimum": None, "maximum": None, "step": None, "choices": None}]
        return JSONResponse(
            [
                {"name": SCRIPTS[0], "is_alwayson": True, "is_img2img": is_edit, "args": units * _UNITS}
                for is_edit in (False, True)
            ]
        )

    async def png_info(self, http: HttpRequest) -> Response:
        """The settings in a PNG."""
        body = await incoming.json_fields(http)
        if not body.get("image"):
            return JSONResponse({"info": "", "items": {}, "parameters": {}})
        return JSONResponse(await self.apart(_settings_in, incoming.picture_bytes(body["image"], "image")))

    # --- the ControlNet extension -------------------------------------------------------------------------------------

    async def version(self, http: HttpRequest) -> Response:
        """The version of the extension's API."""
        return JSONResponse({"version": 3})

    async def model_list(self, http: HttpRequest) -> Response:
        """Controls, each with a hash."""
        return JSONResponse({"model_list": self.catalogue.titles()})

    async def module_list(self, http: HttpRequest) -> Response:
        """Annotators and their sliders."""
        names = module_names()
        detail: dict[str, Any] = {"none": {"model_free": False, "sliders": []}}
        detail |= {n: {"model_free": False, "sliders": module_sliders(modules()[n.lower()])} for n in names[1:]}
        return JSONResponse({"module_list": names, "module_detail": detail})

    async def control_types(self, http: HttpRequest) -> Response:
        """Annotators and controls by A1111's types of control."""
        every = {"module_list": module_names(), "model_list": ["None", *self.catalogue.titles()]}
        found: dict[str, Any] = {"All": every | {"default_option": "none", "default_model": "None"}}
        for title, kind in TYPES.items():
            made = [name for one in makers_of(kind) for name in (one.name, *one.aliases)]
            fitting = self.catalogue.titles(kind)
            found[title] = {
                "module_list": ["none", *made],
                "model_list": ["None", *fitting],
                "default_option": made[0] if made else "none",
                "default_model": fitting[0] if fitting else "None",
            }
        return JSONResponse({"control_types": found})

    async def settings(self, http: HttpRequest) -> Response:
        """How many units clients may show."""
        return JSONResponse({"control_net_unit_count": _UNITS})

    async def detect(self, http: HttpRequest) -> Response:
        """Hints of pictures. ``controlnet_images`` stands for ``controlnet_input_images``, as webuiapi sends it."""
        orders, notes = await self.apart(_annotations, await http.body(), self.desk.limits)
        images = list[str]()
        for order in orders:
            if isinstance(order, Annotation):
                job = await self.made(order)
                [order] = await self.files(job, job.result["pictures"])
            images.append(as_base64(order))
        return JSONResponse({"images": images, "info": "Success"}, headers=named(notes))

    async def render_poses(self, http: HttpRequest) -> Response:
        """Pictures of poses in OpenPose's JSON."""
        return JSONResponse(await self.apart(_poses, await http.body(), self.desk.limits))


def _sampler_of(name: str) -> str:
    """A scheduler's name without the word on how its steps are spread."""
    return next((name.removesuffix(f" {one}") for one in SPACINGS if name.endswith(f" {one}")), name)


def _stamp(seconds: float | None) -> str:
    """A time as A1111 writes it; "0" where there is none."""
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds)) if seconds else "0"


def _echo(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request without its pictures, as A1111 sends them back."""
    found = {**fields, "init_images": None, "mask": None, "firstpass_image": None, "latent_mask": None}
    return {key: found[key] for key in fields} | {"alwayson_scripts": {}}


def _settings_in(data: bytes) -> dict[str, Any]:
    texts = settings_texts(data, "image")
    words = texts.get("parameters", "")
    held: dict[str, Any] = {}
    try:
        held = infotext.read(words)[0] if words else {}
    except Invalid:
        held = {}
    return {"info": words, "items": texts, "parameters": held}


def _annotations(data: bytes, limits: Limits) -> tuple[list[Annotation | bytes], list[str]]:
    """The orders of a body of ``detect``, and notes; of the module ``none`` the pictures themselves, as PNGs."""
    body = incoming.fields_of(data)
    notes = [str(key) for key in body if key not in _DETECT]
    given = body.get("controlnet_input_images") or body.get("controlnet_images")
    if not given:
        raise Invalid("No image selected: send some in controlnet_input_images, as base64.")
    images = incoming.listed({"controlnet_input_images": given}, "controlnet_input_images", limits.pictures_given)
    name = incoming.text(body, "controlnet_module", "none")
    if not name.strip():
        raise Invalid('The module is "": expected one of /controlnet/module_list.')
    kind = module_named(name)
    pixels = [incoming.picture(one, f"controlnet_input_images[{i}]", limits) for i, one in enumerate(images)]
    if kind is None:
        return [png_bytes(one) for one in pixels], notes
    numbers = [incoming.number(body, f"controlnet_threshold_{one}", -1, -1e9, 1e9) for one in "ab"]
    options: dict[str, float] = {}
    if max(numbers) >= 0 and kind.thresholds:
        try:
            options = kind.of_thresholds(*numbers)
        except Invalid as error:
            notes.append(f"thresholds are the defaults: {error}")
    sides = [_side(body, one, limits, notes) for one in pixels]
    return [
        Annotation(annotator=kind.name, options=options, picture=one, side=side)
        for one, side in zip(pixels, sides, strict=True)
    ], notes


def _side(body: Mapping[str, Any], pixels: np.ndarray, limits: Limits, notes: list[str]) -> int | None:
    """The shorter side of a picture's hint; None is as the picture's. One that is out of range is the nearest."""
    key = "controlnet_processor_res"
    side = incoming.whole(body, key, -1, -1, 1 << 16)
    if side <= 0:
        return None
    taken = min(max(side, 64), most_side(limits, pixels.shape))
    if taken != side:
        notes.append(f"{key} {side} is taken as {taken}")
    return taken


def _poses(data: bytes, limits: Limits) -> dict[str, Any]:
    """Poses in OpenPose's JSON, drawn."""
    body = parse_json(data, "the request's body")
    poses = body if isinstance(body, list) else [body]
    if len(poses) > limits.pictures_given:
        raise Invalid(f"There are {len(poses)} poses; expected at most {limits.pictures_given}.")
    images = []
    for pose in poses:
        people, size = people_from_json(pose)
        if max(size) > limits.side:
            raise Invalid(f"The canvas is {size[1]}x{size[0]}; this server draws sides of at most {limits.side}.")
        images.append(as_base64(png_bytes(draw_people(people, size))))
    return {"images": images, "info": "Success"}

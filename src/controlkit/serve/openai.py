"""OpenAI's API: ``/v1/images/generations`` and ``/v1/images/edits``, with hints and controls as further fields."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from controlkit.errors import Invalid, nearest, one_line
from controlkit.sample.request import ControlRequest, EditRequest, Request
from controlkit.serve import incoming
from controlkit.serve.catalogue import check_limits
from controlkit.serve.front import JOB, Front, as_base64, body_of, named
from controlkit.serve.orders import Pictures, drawn_seed

_COMMON: dict[str, Any] = {
    "prompt": {"type": "string", "maxLength": 20_000},
    "model": {"type": "string", "description": "The base's name, or any other: there is one."},
    "n": {"type": "integer", "minimum": 1, "default": 1},
    "size": {"type": "string", "description": "WIDTHxHEIGHT in pixels, or auto: the base's own."},
    "response_format": {"type": "string", "enum": ["b64_json", "url"]},
    "negative_prompt": {"type": "string"},
    "seed": {"type": "integer", "minimum": 0},
    "steps": {"type": "integer", "minimum": 1, "default": 20},
    "guidance": {"type": "number", "minimum": 0, "default": 4.0},
    "control": {"type": "string", "description": "The name of a control."},
    "hint": {"type": "string", "description": "Its picture, as base64 or a data: URL."},
    "hint_ready": {"type": "boolean", "description": "Whether that is a hint already.", "default": False},
    "control_scale": {"type": "number", "default": 1.0},
}
"""Fields of both routes that are read; those from ``negative_prompt`` on are ours."""
_EDIT = _COMMON | {
    "image": {"type": "string", "format": "binary"},
    "mask": {"type": "string", "format": "binary", "description": "Transparent where the picture is made anew."},
    "strength": {"type": "number", "minimum": 0, "maximum": 1},
}
_FILES = ("image", "image[]", "mask", "hint")


@dataclass
class Asked:
    """A request as it was read."""

    order: Pictures
    ignored: list[str]
    by_url: bool
    """Whether pictures are asked for by their addresses."""


class OpenAI(Front):
    """The routes of OpenAI's API."""

    api = "openai"

    def router(self) -> APIRouter:
        """All routes, for an application."""
        found = APIRouter(tags=["openai"])
        generations = body_of(_COMMON, ["prompt"])
        edits = body_of(_EDIT, ["prompt", "image"], "multipart/form-data")
        for path, handler, more in (
            ("/v1/images/generations", self.generations, generations),
            ("/v1/images/edits", self.edits, edits),
        ):
            found.add_api_route(path, self.guarded(handler), methods=["POST"], openapi_extra=more)
        return found

    def refusal(self, status: int, sentence: str, kind: str) -> Response:
        """An error as OpenAI says it; its clients know 400 for what is wrong with a request."""
        status = 400 if status == 422 else status
        kinds = {503: "server_error", 500: "server_error", 507: "server_error"}
        error = {"message": sentence, "type": kinds.get(status, "invalid_request_error"), "param": None, "code": kind}
        return JSONResponse({"error": error}, status)

    async def generations(self, http: HttpRequest) -> Response:
        """Make pictures from a prompt."""
        data = await http.body()
        return await self._answer(http, await self.apart(lambda: self._read(incoming.fields_of(data), None)))

    async def edits(self, http: HttpRequest) -> Response:
        """Change a picture: where its mask, or the picture itself, is transparent; or the whole of it."""
        fields, files = await self._form(http)
        return await self._answer(http, await self.apart(self._read_edit, fields, files))

    async def _form(self, http: HttpRequest) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
        """The fields and files of a form."""
        if not http.headers.get("content-type", "").startswith(("multipart/form-data", "application/x-www-form")):
            raise Invalid("The body is no form: expected multipart/form-data with prompt and image.")
        limits = self.desk.limits
        fields: dict[str, Any] = {}
        files: dict[str, list[bytes]] = {}
        try:
            bounds = {"max_files": limits.pictures_given, "max_fields": 100, "max_part_size": limits.body}
            async with http.form(**bounds) as form:
                for key, value in form.multi_items():
                    if isinstance(value, UploadFile):
                        files.setdefault(key.removesuffix("[]"), []).append(await value.read())
                    else:
                        fields[key.removesuffix("[]")] = value
        except (HTTPException, MultiPartException, ValueError, KeyError) as error:
            raise Invalid(f"The form cannot be read ({one_line(getattr(error, 'detail', error))}).") from None
        return fields, files

    def _read_edit(self, fields: Mapping[str, Any], files: Mapping[str, list[bytes]]) -> Asked:
        limits = self.desk.limits
        given = {key: several[0] for key, several in files.items()}
        for key in ("image", "mask", "hint"):
            if key not in given and fields.get(key):
                given[key] = incoming.picture_bytes(fields[key], key)
        if "image" not in given:
            raise Invalid("There is no image: send the picture to be changed as the file image.")
        if len(files.get("image", [])) > 1:
            raise Invalid(f"There are {len(files['image'])} images; expected one, which is changed.")
        if unknown := sorted(files.keys() - {"image", "mask", "hint"}):
            raise Invalid(f'The form has a file "{one_line(unknown[0])}": {nearest(unknown[0], _FILES)}')
        pixels = incoming.decoded(given["image"], "image", limits, None)
        strength = incoming.number(fields, "strength", -1, 0, 1)
        edit = EditRequest(
            image=np.ascontiguousarray(pixels[..., :3]),
            mask=_mask(pixels, given.get("mask"), limits),
            strength=None if strength < 0 else strength,
        )
        hint = incoming.decoded(given["hint"], "hint", limits) if "hint" in given else None
        plain = {key: value for key, value in fields.items() if key not in ("image", "mask", "hint", "strength")}
        return self._read(plain, edit, hint)

    def _read(self, body: Mapping[str, Any], edit: EditRequest | None, hint: np.ndarray | None = None) -> Asked:
        limits, known = self.desk.limits, _COMMON
        ignored = [str(key) for key in body if key not in known]
        prompt = incoming.text(body, "prompt")
        if "prompt" not in body:
            raise Invalid("There is no prompt.")
        count = incoming.whole(body, "n", 1, 1, limits.count)
        steps = incoming.whole(body, "steps", 20, 1, limits.steps)
        size = self._size(incoming.text(body, "size"), edit)
        check_limits(limits, *(size or (1, 1)), steps, count)
        style = incoming.text(body, "response_format") or "b64_json"
        if style not in ("b64_json", "url"):
            raise Invalid(f'response_format is "{one_line(style)}"; expected b64_json or url.')
        negative = incoming.text(body, "negative_prompt")
        request = Request(
            prompt=prompt,
            negative_prompt=negative or None,
            size=(size[1], size[0]) if size else None,
            steps=steps,
            guidance=incoming.number(body, "guidance", 4.0, 0, 1000),
            controls=self._controls(body, hint, edit is not None),
            edit=edit,
        )
        seed = incoming.whole(body, "seed", -1, -1, 2**64 - 1)
        first = drawn_seed() if seed < 0 else seed
        seeds = tuple(((first + i) % 2**64, 0) for i in range(count))
        return Asked(Pictures(request=request, seeds=seeds), ignored, style == "url")

    def _size(self, text: str, edit: EditRequest | None) -> tuple[int, int] | None:
        """(width, height) of ``WIDTHxHEIGHT``, rounded down to what the base makes; None of a picture's own shape."""
        if text in ("", "auto"):
            own = int(self.catalogue.facts["size"])
            return None if edit else (own, own)
        width, _, height = text.lower().partition("x")
        if not (width.isdecimal() and height.isdecimal() and len(text) < 16 and int(width) and int(height)):
            raise Invalid(f'size is "{one_line(text)}"; expected WIDTHxHEIGHT in pixels, such as 512x512, or auto.')
        return self.catalogue.floored(int(width)), self.catalogue.floored(int(height))

    def _controls(
        self, body: Mapping[str, Any], hint: np.ndarray | None, has_picture: bool
    ) -> tuple[ControlRequest, ...]:
        name = incoming.text(body, "control")
        if hint is None and body.get("hint"):
            hint = incoming.picture(body["hint"], "hint", self.desk.limits)
        if not name:
            if hint is not None:
                raise Invalid("There is a hint and no control: name one by control.")
            return ()
        if hint is None and not has_picture:
            raise Invalid(f'The control "{one_line(name)}" needs a picture: send one as hint, in base64.')
        control = self.catalogue.control_named(name)
        if control["types"]:
            raise Invalid(f'"{control["name"]}" is a Union, which /v1/generate takes; here expected one of its types.')
        ready = incoming.truth(body, "hint_ready", False)
        scale = incoming.number(body, "control_scale", 1.0, -100, 100)
        images = {} if hint is None else {"": hint}
        return (ControlRequest(name=control["name"], images=images, ready=ready and hint is not None, scale=scale),)

    async def _answer(self, http: HttpRequest, asked: Asked) -> Response:
        job = await self.made(asked.order)
        names = job.result["pictures"]
        if asked.by_url:
            data = [{"url": str(http.url_for("picture", job=job.id, name=name))} for name in names]
        else:
            data = [{"b64_json": as_base64(one)} for one in await self.files(job, names)]
        return JSONResponse(
            {"created": int(job.ended or time.time()), "data": data},
            headers=named([*asked.ignored, *job.result["notes"]]) | {JOB: job.id},
        )


def _mask(pixels: np.ndarray, given: bytes | None, limits: Any) -> np.ndarray | None:
    """A mask, light where the picture is made anew: where a mask's file, or else the picture, is transparent.

    A mask's file without transparency is read by its light.
    """
    if given is None:
        clear = pixels[..., 3]
    else:
        mask = incoming.decoded(given, "mask", limits, None)
        clear = mask[..., 3]
        if clear.min() == 255:
            return np.ascontiguousarray(mask[..., :3])
    if clear.min() == 255:
        return None
    return np.ascontiguousarray(np.repeat((255 - clear)[..., None], 3, axis=2))

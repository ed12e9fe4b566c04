"""Our own API: ``/v1``, whose requests are those of the library, and whose jobs can be watched and cancelled."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from controlkit.annotators import all_kinds
from controlkit.errors import Invalid, NotFound, nearest, one_line
from controlkit.sample.request import ControlRequest, EditRequest, HiresRequest, Request
from controlkit.serve import incoming
from controlkit.serve.catalogue import check_limits, most_side
from controlkit.serve.front import Front, as_base64, body_of
from controlkit.serve.loras import check_loras
from controlkit.serve.orders import Annotation, Evaluation, Order, Pictures, drawn_seed
from controlkit.serve.queue import Job
from controlkit.serve.settings import Limits

_PICTURE = {"type": "string", "description": "A picture as base64, or as a data: URL."}
_PICTURES = ("region", "image", "mask")
"""Keys of pictures in a request; ``images`` has several."""
_OWN = ("num_images", "wait")
_EVALUATION = {
    "control": {"type": "string"},
    "num": {"type": "integer", "minimum": 2, "maximum": 256, "default": 32},
    "steps": {"type": "integer", "minimum": 1, "default": 20},
    "guidance": {"type": "number", "minimum": 0, "default": 4.0},
    "scale": {"type": "number", "default": 1.0},
}
_ANNOTATION = {
    "annotator": {"type": "string"},
    "image": _PICTURE,
    "options": {"type": "object", "additionalProperties": {"type": "number"}},
    "side": {"type": "integer", "minimum": 1, "description": "The hint's shorter side in pixels."},
    "wait": {"type": "boolean", "default": False},
}


class V1(Front):
    """The routes of our own API."""

    api = "v1"

    def router(self) -> APIRouter:
        """All routes, for an application."""
        found = APIRouter(tags=["v1"])
        posts = {
            "/v1/generate": (self.generate, body_of(_generate_schema())),
            "/v1/annotate": (self.annotate, body_of(_ANNOTATION, ["annotator", "image"])),
            "/v1/evaluate": (self.evaluate, body_of(_EVALUATION, ["control"])),
            "/v1/jobs/{job}/cancel": (self.cancel, {}),
        }
        gets = {
            "/v1/models": self.models,
            "/v1/annotators": self.annotators,
            "/v1/jobs": self.jobs,
            "/v1/jobs/{job}": self.job,
            "/v1/jobs/{job}/events": self.events,
        }
        for path, (handler, more) in posts.items():
            found.add_api_route(path, self.guarded(handler), methods=["POST"], openapi_extra=_in_path(path) | more)
        for path, handler in gets.items():
            found.add_api_route(path, self.guarded(handler), methods=["GET"], openapi_extra=_in_path(path))
        found.add_api_route(
            path := "/v1/jobs/{job}/files/{name}",
            self.guarded(self.picture),
            methods=["GET"],
            name="picture",
            openapi_extra=_in_path(path),
        )
        return found

    def refusal(self, status: int, sentence: str, kind: str) -> Response:
        """An error: its kind, and a sentence."""
        return JSONResponse({"error": {"message": sentence, "type": kind, "code": status}}, status)

    # --- jobs asked for -----------------------------------------------------------------------------------------------

    async def generate(self, http: HttpRequest) -> Response:
        """Make pictures: the fields of a ``Request``, ``num_images`` and ``wait``."""
        data = await http.body()
        return await self._asked(*await self.apart(self._read_generate, data))

    async def annotate(self, http: HttpRequest) -> Response:
        """Make a hint of a picture."""
        data = await http.body()
        return await self._asked(*await self.apart(self._read_annotate, data))

    async def evaluate(self, http: HttpRequest) -> Response:
        """Measure a control, as ``controlkit evaluate`` does."""
        body = await incoming.json_fields(http)
        _check_keys(body, _EVALUATION, "evaluate")
        control = self.catalogue.control_named(incoming.text(body, "control"))
        order = Evaluation(
            control=control["name"],
            num=incoming.whole(body, "num", 32, 2, 256),
            steps=incoming.whole(body, "steps", 20, 1, self.desk.limits.steps),
            guidance=incoming.number(body, "guidance", 4.0, 0, 1000),
            scale=incoming.number(body, "scale", 1.0, -100, 100),
        )
        return await self._asked(order, False)

    async def _asked(self, order: Order, waits: bool) -> Response:
        """The job of an order: with its pictures when it is done, or at once."""
        if not waits:
            job = await self.apart(self.desk.accept, order, self.api)
            return JSONResponse(self._told(job), 202)
        job = await self.made(order)
        told = self._told(job)
        told["images"] = [as_base64(data) for data in await self.files(job, job.result.get("pictures", []))]
        return JSONResponse(told)

    def _read_generate(self, data: bytes) -> tuple[Order, bool]:
        body = incoming.fields_of(data)
        limits = self.desk.limits
        known = {*Request.model_fields, *_OWN}
        _check_keys(body, known, "generate")
        asked = {key: _with_pictures(value, key, limits) for key, value in body.items() if key not in _OWN}
        seed = incoming.whole(asked, "seed", -1, -1, 2**64 - 1)
        asked["seed"] = drawn_seed() if seed < 0 else seed
        request = Request(**asked)
        count = incoming.whole(body, "num_images", 1, 1, limits.count)
        height, width = self.catalogue.size_of(request)
        factor, second = (request.hires.factor, request.hires.steps or 1) if request.hires else (1, 1)
        check_limits(limits, round(width * factor), round(height * factor), max(request.steps, second), count)
        self.catalogue.check_made(request)
        if len(request.controls) > limits.controls:
            raise Invalid(f"There are {len(request.controls)} controls; expected at most {limits.controls}.")
        if request.edit and sum(request.edit.outpaint) > 2 * limits.side:
            raise Invalid(f"outpaint adds {sum(request.edit.outpaint)} pixels; expected at most {2 * limits.side}.")
        controls = [
            one.model_copy(update={"name": self.catalogue.control_named(one.name)["name"]}) for one in request.controls
        ]
        request = request.model_copy(update={"controls": tuple(controls)})
        seeds = [((request.seed + i) % 2**64, (request.variation_seed + i) % 2**64) for i in range(count)]
        order = Pictures(request=request, seeds=tuple(seeds), shows_hints=True)
        check_loras(order.loras, self.catalogue.loras, limits.loras)
        return order, incoming.truth(body, "wait", False)

    def _read_annotate(self, data: bytes) -> tuple[Order, bool]:
        body = incoming.fields_of(data)
        _check_keys(body, _ANNOTATION, "annotate")
        names = {name: kind for kind in all_kinds() if kind.is_made_here for name in (kind.name, *kind.aliases)}
        name = incoming.text(body, "annotator")
        if name not in names:
            raise NotFound(f'There is no annotator "{one_line(name)}": {nearest(name, names)}')
        options = body.get("options") or {}
        if not isinstance(options, Mapping):
            raise Invalid(f"options is {incoming.kind_of(options)}; expected keys and numbers.")
        side = incoming.whole(body, "side", 0, 0, self.desk.limits.side)
        pixels = incoming.picture(body.get("image"), "image", self.desk.limits)
        if side > (most := most_side(self.desk.limits, pixels.shape)):
            shape = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise Invalid(f"side is {side}; expected at most {most} for a picture of {shape}, or its hint is too long.")
        kind = names[name]
        order = Annotation(annotator=kind.name, options=kind.checked(options), picture=pixels, side=side or None)
        return order, incoming.truth(body, "wait", False)

    # --- jobs looked at -----------------------------------------------------------------------------------------------

    async def jobs(self, http: HttpRequest) -> Response:
        """The newest hundred jobs, the newest first."""
        found = await self.apart(self.desk.queue.newest, 100)
        return JSONResponse({"jobs": [self._told(job) for job in found]})

    async def job(self, http: HttpRequest) -> Response:
        """A job as it stands."""
        return JSONResponse(self._told(await self._found(http)))

    async def cancel(self, http: HttpRequest) -> Response:
        """Cancel a job that has not ended."""
        job = await self._found(http)
        return JSONResponse(self._told(await self.apart(self.desk.cancel, job.id)))

    async def picture(self, http: HttpRequest) -> Response:
        """A picture that a job made."""
        job, name = await self._found(http), str(http.path_params["name"])
        if name not in (*job.result.get("pictures", []), *job.result.get("hints", [])):
            raise NotFound(f'The job left no file "{one_line(name)}".')
        [data] = await self.files(job, [name])
        return Response(data, media_type="image/png")

    async def events(self, http: HttpRequest) -> Response:
        """News of a job as server-sent events until it has ended: ``state``, ``step``, ``preview``."""
        job = await self._found(http)
        return StreamingResponse(self._news(job.id), media_type="text/event-stream")

    async def _news(self, name: str) -> AsyncIterator[bytes]:
        shown, state = b"", ""
        async for job in self.desk.news(name):
            at = self.desk.progress.get(name)
            if job.state != state or job.has_ended:
                state = job.state
                yield _event("state", self._told(job))
            if at and at.step:
                yield _event("step", {"step": at.step, "steps": at.steps, "share": round(at.share, 4)})
                if at.preview and at.preview is not shown:
                    shown = at.preview
                    yield _event("preview", {"image": as_base64(shown)})

    async def _found(self, http: HttpRequest) -> Job:
        name = str(http.path_params["job"])
        job = await self.apart(self.desk.queue.get, name)
        if job is None:
            raise NotFound(f'There is no job "{one_line(name)}"; those that ended are kept for a while.')
        return job

    def _told(self, job: Job) -> dict[str, Any]:
        """A job as clients see it."""
        at = self.desk.progress.get(job.id)
        found = {
            "id": job.id,
            "kind": job.kind,
            "state": job.state,
            "share": 1.0 if job.state == "done" else round(at.share, 4) if at else 0.0,
            "accepted": job.accepted,
            "begun": job.begun,
            "ended": job.ended,
        }
        if job.state == "waiting":
            found["before"] = self.desk.queue.waiting_before(job)
        if job.fault:
            found["error"] = {"type": job.fault, "message": job.error}
        files = {
            key: [f"/v1/jobs/{job.id}/files/{n}" for n in job.result.get(key, [])] for key in ("pictures", "hints")
        }
        more = {
            key: job.result[key]
            for key in ("texts", "notes", "width", "height", "report", "seconds")
            if key in job.result
        }
        return found | ({**files, **more} if job.state == "done" else {})

    # --- names --------------------------------------------------------------------------------------------------------

    async def models(self, http: HttpRequest) -> Response:
        """The base and the controls, as OpenAI lists models; with what each control reads."""
        base = {"id": self.catalogue.base, "object": "model", "created": 0, "owned_by": "controlkit", "kind": "base"}
        controls = [
            {"id": one["name"], "object": "model", "created": 0, "owned_by": "controlkit", "kind": "control",
             "annotator": one["annotator"], "types": list(one["types"])}
            for one in self.catalogue.controls.values()
        ]  # fmt: skip
        return JSONResponse({"object": "list", "data": [base, *controls]})

    async def annotators(self, http: HttpRequest) -> Response:
        """Annotators with their options as sliders."""
        made = [kind for kind in all_kinds() if kind.is_made_here]
        rows = [
            {"name": kind.name, "makes": kind.contract_name, "aliases": list(kind.aliases), "options": kind.sliders,
             "lacks": kind.lacks()}
            for kind in made
        ]  # fmt: skip
        return JSONResponse({"annotators": rows})


def _check_keys(body: Mapping[str, Any], known: Any, route: str) -> None:
    """``Invalid`` for a key that is not known, with the nearest one."""
    if unknown := [str(key) for key in body if key not in known]:
        raise Invalid(f'{route} has no "{one_line(unknown[0])}": {nearest(unknown[0], known)}')


def _with_pictures(value: Any, key: str, limits: Limits) -> Any:
    """A value of a request in which every picture is decoded. No text stays that could be read as a path."""
    if key == "controls":
        return [_with_pictures(one, "control", limits) for one in incoming.listed({key: value}, key, 64)]
    if not isinstance(value, Mapping):
        return value
    found = dict(value)
    for name in _PICTURES:
        if found.get(name) is not None:
            found[name] = incoming.picture(found[name], name, limits, None)
    if (images := found.get("images")) is not None:
        several = images if isinstance(images, Mapping) else {"": images}
        if len(several) > limits.pictures_given:
            raise Invalid(f"images has {len(several)} pictures; expected at most {limits.pictures_given}.")
        found["images"] = {
            str(kind): _plain(incoming.picture(one, "images", limits, None)) for kind, one in several.items()
        }
    return found


def _plain(pixels: Any) -> Any:
    """A picture (H, W, 4) without its fourth channel where nothing is transparent."""
    return pixels[..., :3] if pixels[..., 3].min() == 255 else pixels


def _event(kind: str, values: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(values)}\n\n".encode()


def _in_path(path: str) -> dict[str, Any]:
    """The parameters in a route's path, for OpenAPI."""
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    found = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
    return {"parameters": found} if found else {}


def _generate_schema() -> dict[str, Any]:
    """The fields of ``generate``: a ``Request``'s, with texts in the place of pictures."""
    known = {one: _fields_of(one) for one in (ControlRequest, EditRequest, HiresRequest, Request)}
    found = known[Request]
    found["controls"] = {"type": "array", "items": {"type": "object", "properties": known[ControlRequest]}}
    found["edit"] = {"type": "object", "properties": known[EditRequest], "required": ["image"]}
    found["hires"] = {"type": "object", "properties": known[HiresRequest]}
    found["num_images"] = {"type": "integer", "minimum": 1, "default": 1}
    found["wait"] = {"type": "boolean", "default": False, "description": "Answer when the pictures are made."}
    return found


_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def _fields_of(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if name in _PICTURES:
            found[name] = _PICTURE
        elif name == "images":
            found[name] = {"type": "object", "additionalProperties": _PICTURE}
        else:
            kind = _JSON_TYPES.get(type(info.default))
            found[name] = {"type": kind, "default": info.default} if kind else {}
    return found

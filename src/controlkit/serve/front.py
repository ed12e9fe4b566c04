"""The front that all APIs share: bodies read beside the event loop, jobs waited for, errors as answers."""

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from controlkit.errors import NotFound, UserError, printable
from controlkit.serve.catalogue import Catalogue
from controlkit.serve.desk import Desk
from controlkit.serve.orders import Order
from controlkit.serve.queue import Job, QueueFull

T = TypeVar("T")
Handler = Callable[[HttpRequest], Awaitable[Response]]

_STATUS = {"NotFound": 404, "Invalid": 422, "Mismatch": 422, "Unsupported": 422, "TooLarge": 413, "OutOfRoom": 507}
_AT_ONCE = 4
"""Bodies that are decoded at once: each may hold pictures of a gigabyte's growth."""
IGNORED = "X-ControlKit-Ignored"
"""The header that names what of a request nothing reads."""
JOB = "X-ControlKit-Job"

log = logging.getLogger(__name__)


class Failed(Exception):  # noqa: N818  # carried to the answer
    """A job that ended without what was asked for."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.error or "The job was cancelled.")
        self.job = job

    @property
    def status(self) -> int:
        """The status of the answer."""
        return 409 if self.job.state == "cancelled" else _STATUS.get(self.job.fault, 500)


def status_of(error: UserError) -> int:
    """The status of an answer that says this error."""
    if isinstance(error, QueueFull):
        return 503
    kinds = (kind.__name__ for kind in type(error).__mro__)
    return next((_STATUS[kind] for kind in kinds if kind in _STATUS), 422)


class Front:
    """An API's routes; what they share."""

    api = ""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._decoding = asyncio.Semaphore(_AT_ONCE)

    @cached_property
    def catalogue(self) -> Catalogue:
        """All that can be asked for by name."""
        return Catalogue(self.desk.facts, self.desk.settings.folders.loras)

    def router(self) -> APIRouter:
        """All routes, for an application."""
        raise NotImplementedError

    async def apart(self, read: Callable[..., T], *values: Any) -> T:
        """Run a function that decodes pictures in a thread of its own, a few at once."""
        async with self._decoding:
            return await asyncio.to_thread(read, *values)

    async def made(self, order: Order) -> Job:
        """The job of an order, when it is done; ``Failed`` where it failed or was cancelled."""
        job = await self.desk.ended(await asyncio.to_thread(self.desk.accept, order, self.api))
        if job.state != "done":
            raise Failed(job)
        return job

    async def files(self, job: Job, names: Sequence[str]) -> list[bytes]:
        """The bytes of files that a job left; ``NotFound`` where they were deleted."""
        folder = self.desk.queue.files_of(job.id)
        try:
            return await asyncio.to_thread(lambda: [(folder / Path(name).name).read_bytes() for name in names])
        except OSError:
            raise NotFound("The pictures of this job are not kept any more: ask for it again.") from None

    def refusal(self, status: int, sentence: str, kind: str) -> Response:
        """The answer that says an error in this API."""
        return JSONResponse({"detail": sentence, "error": kind}, status)

    def guarded(self, handler: Handler) -> Handler:
        """A handler whose errors that a client can mend become answers."""

        @wraps(handler)
        async def answer(http: HttpRequest) -> Response:
            try:
                return await handler(http)
            except Failed as error:
                return self.refusal(error.status, str(error), error.job.fault or "Cancelled")
            except UserError as error:
                more = {"Retry-After": "5"} if isinstance(error, QueueFull) else {}
                response = self.refusal(status_of(error), str(error), type(error).__name__)
                response.headers.update(more)
                return response
            except ClientDisconnect:
                return Response(status_code=400)

        return answer


def named(values: Sequence[str]) -> dict[str, str]:
    """The header that names what was not read, in ASCII and of bounded length; none where all was."""
    if not values:
        return {}
    words = (one.strip() or '""' for one in dict.fromkeys(values))
    text = printable("; ".join(words), 2000).encode("ascii", "replace").decode().strip()
    log.info("ignored: %s", text)
    return {IGNORED: text}


def as_base64(data: bytes) -> str:
    """Bytes as a text in base64."""
    return base64.b64encode(data).decode()


def body_of(
    properties: Mapping[str, Any], required: Sequence[str] = (), media: str = "application/json"
) -> dict[str, Any]:
    """A route's body in OpenAPI."""
    schema = {"type": "object", "properties": dict(properties), "required": list(required)}
    if not required:
        del schema["required"]
    return {"requestBody": {"required": bool(required), "content": {media: {"schema": schema}}}}


_TYPES: tuple[tuple[type, str], ...] = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"))


def schema_of(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with defaults, as properties in OpenAPI."""
    found: dict[str, Any] = {}
    for key, value in defaults.items():
        name = next((name for kind, name in _TYPES if isinstance(value, kind)), None)
        found[key] = {"type": name, "default": value} if name else {}
    return found

"""The guard before every route: Host, Origin, token, the size of bodies; and headers that answers have."""

import base64
import binascii
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from controlkit.serve.settings import Settings, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN = ("/healthz",)
"""Routes that need no token."""
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)


_PREFLIGHT = (
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, content-type"),
    (b"access-control-max-age", b"600"),
)
"""Of an answer to a page that is allowed by name, which asks before it sends."""


class Guard:
    """An ASGI application before another one, which sees no request that is refused here."""

    def __init__(self, app: App, settings: Settings, refused: Callable[[str], None] = lambda reason: None) -> None:
        self.app, self.settings, self._refused = app, settings, refused
        self._held = 0
        """Bytes of bodies of requests that are being answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with the reason why not."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # web sockets are not spoken
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        if fault := self._fault(scope, headers):
            self._refused(fault[1])
            await _answer(send, *fault)
            return
        if scope["method"] == "OPTIONS" and (cors := self._cors(scope)):
            await send({"type": "http.response.start", "status": 204, "headers": [*cors, *_PREFLIGHT, *_HEADERS]})
            await send({"type": "http.response.body"})
            return
        await self._bounded(scope, receive, send)

    def _fault(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        """(status, reason, sentence) where a request is refused."""
        host = headers.get("host", "")
        if sum(key.lower() == b"host" for key, _ in scope["headers"]) != 1 or not self._is_own(host):
            return 421, "host", f"This server does not answer as {host[:100]!a}: ask for it by its own address."
        origin = headers.get("origin")
        if origin is not None and not self._may_ask(origin, host):
            return 403, "origin", "A page of another site may not ask this server; see --allow-origin."
        if origin is None and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return 403, "origin", "A page of another site may not ask this server; see --allow-origin."
        is_open = scope["path"] in _OPEN or scope["method"] == "OPTIONS"
        if self.settings.token and not is_open and not self._knows(headers.get("authorization", "")):
            return 401, "token", "Send the server's token: Authorization: Bearer TOKEN."
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15:
            return 400, "size", "Content-Length is no number."
        if int(length) > self.settings.limits.body:
            return 413, "size", f"The body has {length} bytes; expected at most {self.settings.limits.body}."
        if headers.get("content-encoding", "identity") != "identity":
            return 415, "size", "The body is packed; send it as it is."
        return None

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this server: pages elsewhere can have their name lead here (DNS rebinding).

        Beyond this machine names cannot be known; the token, which such a page has not, is asked for there.
        """
        name = _name_of(host)
        return bool(name) and (not self.settings.is_local or is_loopback(name))

    def _may_ask(self, origin: str, host: str) -> bool:
        if origin in self.settings.origins:
            return True
        parts = urlsplit(origin)
        return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()

    def _knows(self, authorization: str) -> bool:
        """Whether the token came: as Bearer's (OpenAI's clients), or as the password of Basic (A1111's)."""
        scheme, _, given = authorization.partition(" ")
        given = given.strip()
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("latin-1").partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.encode("latin-1", "replace"), self.settings.token.encode())

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; one whose body is longer than it may be, whatever its head said, is refused.

        So is one that came while others' bodies take all the room there is for them.
        """
        read, refusal, limits = 0, 0, self.settings.limits

        async def counted() -> MutableMapping[str, Any]:
            nonlocal read, refusal
            message = await receive()
            size = len(message.get("body", b""))
            read, self._held = read + size, self._held + size
            if read > limits.body:
                refusal = 413
            elif self._held > limits.bodies:
                refusal = 503
            return {"type": "http.disconnect"} if refusal else message

        async def headed(message: MutableMapping[str, Any]) -> None:
            if refusal:  # in the place of whatever is said of half a body
                if message["type"] == "http.response.start":
                    self._refused("size")
                    words = {
                        413: f"The body has over {limits.body} bytes.",
                        503: "Too much is sent at once: ask again.",
                    }
                    await _answer(send, refusal, "size", words[refusal])
                return
            if message["type"] == "http.response.start":
                names = {key.lower() for key, _ in message.get("headers", [])}
                more = [one for one in _HEADERS if one[0] not in names] + self._cors(scope)
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        try:
            await self.app(scope, counted, headed)
        finally:
            self._held -= read

    def _cors(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Headers that let a page read an answer: one that is allowed by name, and no other."""
        origin = next((value for key, value in scope["headers"] if key.lower() == b"origin"), b"")
        if origin.decode("latin-1") not in self.settings.origins:
            return []
        return [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]


def _name_of(host: str) -> str:
    """The name or address in a Host header, without its port; "" where it is none."""
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018  # raises for what is no port
    except ValueError:
        return ""
    plain = not (parts.path or parts.query or parts.fragment or parts.username is not None)
    return (parts.hostname or "").rstrip(".") if plain else ""


async def _answer(send: Send, status: int, reason: str, sentence: str) -> None:
    body = json.dumps({"error": {"message": sentence, "type": reason, "code": status}, "detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *_HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="controlkit", Basic realm="controlkit"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

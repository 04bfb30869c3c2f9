"""One HTTP request and its answer, over ASGI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any, TypeVar

from spectune.serving.api_error import ApiError
from spectune.serving.bounds import Bounds

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Made = TypeVar("Made")


class ClientLeft(Exception):  # noqa: N818 - nothing failed
    """Nobody waits for the answer any more."""


class Call:
    """A request.

    Attributes:
        headers: the last of each name, which is in lower case.
        status: of the answer; 0 until that has begun.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method, self.path = str(scope["method"]), str(scope["path"])
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.status = 0
        self._receive, self._send = receive, send

    async def body(self, bounds: Bounds) -> bytes:
        """The whole body. Raises ApiError: it is no JSON by its type (415), too long (413) or too slow (408); and
        ClientLeft."""
        kind = self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":  # a form on some web page cannot send that unasked
            raise ApiError(415, "expected the header Content-Type: application/json")
        length = self.headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > bounds.max_body_bytes:
            raise _too_long(bounds)
        found = bytearray()
        try:
            async with asyncio.timeout(bounds.receive_seconds):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    found += message.get("body", b"")
                    if len(found) > bounds.max_body_bytes:
                        raise _too_long(bounds)
                    if not message.get("more_body", False):
                        return bytes(found)
        except TimeoutError:
            said = f"the body did not come within {bounds.receive_seconds:g} seconds"
            raise ApiError(408, said, headers={"connection": "close"}) from None

    async def while_there(self, work: Coroutine[Any, Any, Made]) -> Made:
        """What `work` gives; it is cancelled where the client leaves. Raises ClientLeft."""
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(self._left())
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientLeft
            return working.result()
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def answer(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send JSON, or text as it is."""
        text = isinstance(content, str)
        data = content.encode() if isinstance(content, str) else as_json(content)
        kind = "text/plain; version=0.0.4; charset=utf-8" if text else "application/json"
        await self.begin(status, {"content-type": kind, "content-length": str(len(data)), **(headers or {})})
        await self.part(data, more=False)

    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        named = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": named})

    async def part(self, data: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def as_json(content: Any) -> bytes:
    """In ASCII: what a client sent may hold half characters, which no UTF-8 has."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def _too_long(bounds: Bounds) -> ApiError:
    said = f"the body is longer than {bounds.max_body_bytes:,} bytes"
    return ApiError(413, said, code="request_too_large", headers={"connection": "close"})

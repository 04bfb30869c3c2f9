"""The HTTP side: which addresses there are, who may ask, and how an answer is sent."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Literal

from spectune.serving.api_error import ApiError
from spectune.serving.catalogue import Entry
from spectune.serving.desk import Desk
from spectune.serving.http_call import Call, ClientLeft, Receive, Scope, Send, as_json
from spectune.serving.wanted import Wanted, read_json, wanted

log = logging.getLogger("spectune")

_MODELS = "/v1/models"
_STREAM = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
#: for the last words to a client that may not listen
_LAST_WORDS = 1.0
#: what a request that ended without an answer is counted as, as nginx does it
_CLIENT_LEFT = 499

Endpoint = Callable[[Call], Awaitable[None]]


class Application:
    """The server as an ASGI application.

    Args:
        api_key: what `Authorization: Bearer` has to have under /v1; None: nothing.
        hosts: names that the Host header may have; empty: any.
    """

    def __init__(self, desk: Desk, api_key: str | None = None, hosts: Iterable[str] = ()) -> None:
        self._desk = desk
        self._key = None if api_key is None else api_key.encode()
        self._hosts = frozenset(host.lower() for host in hosts)
        self._endpoints: dict[str, tuple[str, Endpoint]] = {
            "/health": ("GET", self._health), "/metrics": ("GET", self._metrics), _MODELS: ("GET", self._models),
            "/v1/chat/completions": ("POST", self._chat), "/v1/completions": ("POST", self._completion),
        }  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        call, began = Call(scope, receive, send), time.monotonic()
        try:
            async with asyncio.timeout(self._desk.bounds.request_seconds):
                self._check(call)
                await self._endpoint(call)(call)
        except ClientLeft:
            call.status = _CLIENT_LEFT
        except TimeoutError:
            await _fail(call, ApiError(504, "the answer took too long; ask for fewer tokens", code="timeout"))
        except ApiError as error:
            await _fail(call, error)
        except Exception:
            log.exception("a request failed")
            await _fail(call, ApiError(500, "an error of the server; its log says more", code="internal_error"))
        finally:
            path = call.path if call.path in self._endpoints else "other"
            self._desk.counters.count("requests_total", path=path, code=str(call.status or _CLIENT_LEFT))
            self._desk.counters.took("request_seconds", time.monotonic() - began)

    def _check(self, call: Call) -> None:
        """Raises ApiError: another host is meant (by a web page that reached this machine under a name of its own), or
        the key is not there."""
        host = call.headers.get(b"host", b"").decode("latin-1").lower()
        name, _, port = host.rpartition(":")
        if self._hosts and (name if port.isdigit() else host).strip("[]") not in self._hosts:
            raise ApiError(403, "this server answers to the names of this machine alone", code="wrong_host")
        if self._key is not None and call.path.startswith("/v1"):
            kind, _, given = call.headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given.strip(), self._key) or kind.lower() != b"bearer":
                raise ApiError(
                    401, "incorrect API key; send it as Authorization: Bearer KEY", code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )  # fmt: skip

    def _endpoint(self, call: Call) -> Endpoint:
        """Raises ApiError: there is none (404), or not for this method (405)."""
        inside = call.path.startswith(f"{_MODELS}/")
        method, endpoint = ("GET", self._model) if inside else self._endpoints.get(call.path, ("", None))
        if endpoint is None:
            raise ApiError(
                404, f"there is nothing here; expected one of {', '.join(self._endpoints)}", code="unknown_url"
            )
        if call.method != method:
            raise ApiError(405, f"expected {method}", code="wrong_method", headers={"allow": method})
        return endpoint

    async def _health(self, call: Call) -> None:
        state = self._desk.state
        await call.answer({"status": state}, 200 if state == "ok" else 503)

    async def _metrics(self, call: Call) -> None:
        await call.answer(await asyncio.to_thread(self._desk.counters.text))

    async def _models(self, call: Call) -> None:
        entries = await asyncio.to_thread(self._desk.catalogue.entries)
        await call.answer({"object": "list", "data": [_shown(entry) for entry in entries]})

    async def _model(self, call: Call) -> None:
        name = call.path.removeprefix(f"{_MODELS}/")
        await call.answer(_shown(await asyncio.to_thread(self._desk.entry, name)))

    async def _chat(self, call: Call) -> None:
        await self._write(call, "chat")

    async def _completion(self, call: Call) -> None:
        await self._write(call, "completion")

    async def _write(self, call: Call, kind: Literal["chat", "completion"]) -> None:
        bounds = self._desk.bounds
        asked = wanted(read_json(await call.body(bounds)), kind, bounds)
        await call.while_there(self._stream(call, asked) if asked.stream else self._whole(call, asked))

    async def _whole(self, call: Call, asked: Wanted) -> None:
        async with contextlib.aclosing(self._desk.pieces(asked)) as coming:
            answer = await anext(coming)
            pieces = [piece async for found in coming for piece in found]
        await call.answer(answer.whole(pieces))

    async def _stream(self, call: Call, asked: Wanted) -> None:
        """Server-sent events. What goes wrong before the first piece has a status of its own."""
        async with contextlib.aclosing(self._desk.pieces(asked)) as coming:
            answer = await anext(coming)
            async for pieces in coming:
                events = [event for piece in pieces if (event := answer.event(piece)) is not None]
                if not call.status:
                    await call.begin(200, _STREAM)
                    events = [*answer.first_events(), *events]
                if events:
                    await call.part(_events(events))
        await call.part(_events(answer.last_events()) + b"data: [DONE]\n\n", more=False)


async def _fail(call: Call, error: ApiError) -> None:
    """Answer with an error. In the middle of a stream it is an event, and no [DONE] follows."""
    if not call.status:
        await call.answer(error.body, error.status, error.headers)
        return
    async with asyncio.timeout(_LAST_WORDS):
        await call.part(_events([error.body]), more=False)


def _events(found: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + as_json(event) + b"\n\n" for event in found)


def _shown(entry: Entry) -> dict[str, Any]:
    return {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "spectune"}

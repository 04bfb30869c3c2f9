"""A server from its first socket to its last answer."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from spectune.errors import ConfigError, InterruptedRun, SpectuneError, first_line
from spectune.serving.application import Application
from spectune.serving.bounds import Bounds
from spectune.serving.catalogue import Catalogue
from spectune.serving.counters import Counters
from spectune.serving.desk import Desk
from spectune.serving.worker import Worker

if TYPE_CHECKING:
    from spectune.serving.loaded import Loaded

log = logging.getLogger("spectune")

#: names under which a machine reaches itself
LOCAL = ("localhost", "127.0.0.1", "::1")
#: how long after the last moment for an answer a connection is cut, whatever is still to be sent
_GRACE = 5.0


@dataclass(frozen=True)
class Serving:
    """What is served, and to whom.

    Attributes:
        load: makes the model; called on the worker's thread, while the server answers already.
        host: as it was given.
        api_key: None: nobody is asked for one.
        note: is told what the user should know.
        started: gets what stops the server, from any thread, as SIGTERM does.
        unfinished: is given the exit code where the worker's thread is still at work at the end: at its imports, at a
            file, or at a step that takes long.
    """

    load: Callable[[], Loaded]
    catalogue: Catalogue
    host: str = "127.0.0.1"
    api_key: str | None = None
    bounds: Bounds = field(default_factory=Bounds)
    note: Callable[[str], None] = lambda text: None
    started: Callable[[Callable[[], None]], None] = lambda stop: None
    unfinished: Callable[[int], None] = lambda code: None


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises ConfigError: it cannot be had."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(1024)
        except BaseException:
            found.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"--host {host} --port {port}: {reason}; give an address of this machine and a port that is free "
            "(0: any that is)"
        ) from error
    return found


def address_of(listening: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def serve(serving: Serving, listening: socket.socket) -> int:
    """Serve until a signal comes, or until it cannot go on. Running requests end first, up to a limit.

    Returns:
        The exit code: 0 after SIGTERM, 130 after Ctrl-C.

    Raises:
        SpectuneError: the model could not be loaded, or stopped writing.
    """
    return asyncio.run(_serve(serving, listening))


async def _serve(serving: Serving, listening: socket.socket) -> int:
    counters, loop = Counters(), asyncio.get_running_loop()
    desk = Desk(serving.catalogue, serving.bounds, counters)
    hosts = {*LOCAL, serving.host} if serving.api_key is None and is_local(serving.host) else set()
    server = Server(Application(desk, serving.api_key, hosts), serving.bounds)

    def loaded(found: Loaded) -> None:
        desk.loaded(found)
        serving.note("ready")

    def failed(error: BaseException) -> None:
        desk.failed(error)
        server.should_exit = True

    def stop() -> None:
        server.should_exit = True
        desk.stop_taking()

    def call(action: Callable[..., None], *given: Any) -> None:
        """On this loop's thread, from any."""
        with contextlib.suppress(RuntimeError):  # it is closed: nobody is left to be told
            loop.call_soon_threadsafe(action, *given)

    worker = Worker(serving.load, partial(call, desk.delivered), partial(call, loaded), partial(call, failed))
    _describe(counters, desk, worker)
    with _signals(server, stop) as came:
        desk.open(worker)
        serving.started(partial(call, stop))
        await server.serve(sockets=[listening])
        desk.close()
        ended = await asyncio.to_thread(worker.stop)
    if desk.failure is not None:
        if isinstance(desk.failure, SpectuneError | KeyboardInterrupt):
            raise desk.failure
        raise SpectuneError(f"the server stopped: {first_line(desk.failure)}") from desk.failure
    code = InterruptedRun.exit_code if signal.SIGINT in came else 0
    if not ended:
        serving.unfinished(code)
    return code


class Server(uvicorn.Server):
    """uvicorn, with connections that cannot be held open, and signals that are ours."""

    def __init__(self, app: Application, bounds: Bounds) -> None:
        class Connection(TimedConnection):
            limits = bounds

        super().__init__(uvicorn.Config(
            app, http=Connection, ws="none", lifespan="off", loop="asyncio", interface="asgi3", log_config=None,
            log_level="critical", access_log=False, server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(bounds.drain_seconds)),
        ))  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class TimedConnection(H11Protocol):
    """A connection that has to send the headers of a request within a time, and is cut where an answer is not taken."""

    limits = Bounds()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._headers: asyncio.TimerHandle | None = None
        self._answer: asyncio.TimerHandle | None = None
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
        else:
            self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()
            whole = self.limits.request_seconds + _GRACE
            self._answer = self.loop.call_later(whole, self.transport.abort)
        elif self.cycle is None or self.cycle.response_complete:
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_headers(self) -> None:
        if self._headers is None:
            self._headers = self.loop.call_later(self.limits.receive_seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        for timer in (self._headers, self._answer):
            if timer is not None:
                timer.cancel()
        self._headers = self._answer = None


@contextlib.contextmanager
def _signals(server: Server, stop: Callable[[], None]) -> Iterator[list[int]]:
    """Inside, the first signal ends the server when its requests have ended, a second one at once."""
    from spectune.training.interrupt import stopping_signals

    came: list[int] = []
    loop = asyncio.get_running_loop()

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        server.force_exit = len(came) > 1
        loop.call_soon_threadsafe(stop)

    try:
        before = {number: signal.signal(number, note) for number in stopping_signals()}
    except ValueError:  # in another thread than the main one, which signals never reach
        before = {}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(counters: Counters, desk: Desk, worker: Worker) -> None:
    counters.describe(
        requests_total="Requests by path and code.", request_seconds="From a request to the end of its answer.",
        first_token_seconds="From a request's order to the first token of its answer.",
        tokens_total="Tokens of prompts, and tokens written.", refused_total="Requests that were refused, by reason.",
        abandoned_total="Choices that nobody waited for any more.", ready="Whether the model is loaded.",
        running_rows="Choices that are being written.", waiting_choices="Choices that wait for a row.",
        deltas_on_device="Deltas on the model.", deltas_in_host_memory="Deltas that were set aside.",
        delta_device_bytes="Memory of deltas and their tables on the device.", delta_loads="Deltas read from disk.",
    )  # fmt: skip
    counters.gauge("ready", lambda: desk.state == "ok")
    counters.gauge("running_rows", lambda: worker.running)
    counters.gauge("waiting_choices", lambda: max(0, desk.choices - worker.running))
    of_bank: dict[str, Callable[[Any], float]] = {
        "deltas_on_device": lambda bank: len(bank.on_device()), "delta_loads": lambda bank: bank.loads,
        "deltas_in_host_memory": lambda bank: len(bank.in_host_memory()),
        "delta_device_bytes": lambda bank: bank.device_bytes,
    }  # fmt: skip
    for name, read in of_bank.items():
        counters.gauge(name, partial(_of_bank, desk, read))


def _of_bank(desk: Desk, read: Callable[[Any], float]) -> float:
    return 0 if desk.bank is None else read(desk.bank)

"""`spectune serve`: a base and its deltas behind OpenAI's HTTP interface."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spectune.cli import options
from spectune.cli.base_and_deltas import loader, what_is_asked
from spectune.cli.console import note, work
from spectune.errors import ConfigError
from spectune.sizes import bytes_of

if TYPE_CHECKING:
    from spectune.serving.catalogue import Catalogue
    from spectune.serving.server import Serving

Deltas = Annotated[
    Path | None,
    typer.Option(
        help="Folder of deltas and runs: each is a model of its folder's name, loaded when first asked for. Or a "
        "comparison's: each arm is one."
    ),
]
ServedRun = Annotated[
    Path | None,
    typer.Option("--run", help="A run's folder, or a saved delta's: a model of its folder's name.",
                 show_default="the newest under runs/, where neither --model nor --deltas is given"),
]  # fmt: skip
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="SPECTUNE_API_KEY", help="What clients have to send as their API key.", show_default="none"),
]
Base = Annotated[
    str | None,
    typer.Option("--model", help="Base: a hub id, a local folder, or spectune-tiny (embedded).",
                 show_default="that of the run or the deltas, else spectune-tiny"),
]  # fmt: skip
Host = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of this machine's.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is any that is free.")]
Rows = Annotated[int | None, typer.Option(min=1, help="Answers written at once.", show_default="16, on a GPU 64")]
Queue = Annotated[int, typer.Option(min=1, help="Answers that are written or wait; more get a 429.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of new tokens of an answer.")]
RequestTimeout = Annotated[float, typer.Option(min=1, help="Seconds for a request, waiting included.")]
ShutdownTimeout = Annotated[float, typer.Option(min=1, help="Seconds for running requests at the end.")]
DeviceMemory = Annotated[
    str | None,
    typer.Option(help="Memory for deltas on the device, such as 8GiB.",
                 show_default="2GiB, on a GPU a quarter of what the base leaves"),
]  # fmt: skip
WarmUp = Annotated[
    bool,
    typer.Option(help="On a GPU, compile and record decoding steps before the first request: slower to start, then "
                      "faster."),
]  # fmt: skip
_EXTRA = ("uvicorn",)


def serve(
    run: ServedRun = None,
    model: Base = None,
    deltas: Deltas = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    max_rows: Rows = None,
    max_queue: Queue = 512,
    max_new_tokens: NewTokens = 4096,
    request_timeout: RequestTimeout = 600.0,
    shutdown_timeout: ShutdownTimeout = 30.0,
    device_memory: DeviceMemory = None,
    warm_up: WarmUp = True,
    device: options.Device = None,
    dtype: options.Dtype = None,
    base_precision: options.BasePrecision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing_weights: options.AllowMissingWeights = False,
) -> None:
    """Serve a base and any number of its deltas over HTTP as OpenAI's API does: /v1/models, /v1/chat/completions and
    /v1/completions, with streaming; /health and /metrics (Prometheus). `model` of a request is the base or a delta:
    requests for different deltas, of any methods, are answered in one batch.

    A prompt goes to the model exactly as a training row's prompt did, as `spectune generate` has it; token ids go as
    they are. Needs: pip install "spectune[serve]".

    Ctrl-C and SIGTERM let running requests end.

    \b
    Examples:
      spectune serve
      spectune serve --model Qwen/Qwen3-0.6B --deltas deltas --port 8080
      SPECTUNE_API_KEY=... spectune serve --deltas runs --host 0.0.0.0
      curl localhost:8000/v1/models
    """
    _check_extra()
    memory: int | Literal["auto"] = "auto" if device_memory is None else bytes_of(device_memory, "--device-memory")
    api_key = None if api_key is None else api_key.strip()  # of a file, the end of its line
    if api_key is not None and (not api_key.isascii() or not api_key.isprintable() or not api_key):
        raise ConfigError("--api-key is empty or has letters beyond ASCII, which no header holds; expected a key")
    from spectune.serving.bounds import Bounds
    from spectune.serving.server import Serving

    bounds = Bounds(
        max_rows, max_queue, max_new_tokens, request_seconds=request_timeout, drain_seconds=shutdown_timeout
    )
    how = {
        "device": device or "auto", "dtype": dtype or "auto", "base_precision": base_precision,
        "trust_remote_code": trust_remote_code, "allow_missing_weights": allow_missing_weights,
    }  # fmt: skip
    with work():
        what = what_is_asked(run, model, deltas)
        catalogue = what.catalogue(deltas)
        held = memory if catalogue.has_deltas else None
        load = loader(what.base, how, max_rows, held, catalogue if warm_up else None)
        code = _run(Serving(load, catalogue, host, api_key, bounds, note, unfinished=_leave), port)
    raise typer.Exit(code)


def _run(serving: Serving, port: int) -> int:
    """Serve until a signal comes; the exit code."""
    from spectune.serving import server

    listening = server.listen(serving.host, port)
    names = f"{serving.catalogue.base}{' and its deltas' if serving.catalogue.has_deltas else ''}"
    note(f"serving {names} at {server.address_of(listening)}/v1 (Ctrl-C stops it)")
    if serving.api_key is None and not server.is_local(serving.host):
        note(
            f"warning: anybody who reaches {serving.host} may use this server: set SPECTUNE_API_KEY, or leave out "
            "--host"
        )
    _say_where_empty(serving.catalogue)
    return server.serve(serving, listening)


def _say_where_empty(catalogue: Catalogue) -> None:
    if catalogue.deltas is not None and not any(entry.delta for entry in catalogue.entries()):
        note(
            f"{catalogue.deltas} holds no delta and no run yet that writes text (folders with adapter_config.json or a "
            "run's best/, right below it, or a comparison's runs): what comes right below it is served"
        )


def _leave(code: int) -> None:
    """End the process: a thread that is in the middle of imports or of a kernel would be waited for, or crash it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(code)


def _check_extra() -> None:
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'spectune serve needs {missing[0]}, which is not installed: pip install "spectune[serve]"')

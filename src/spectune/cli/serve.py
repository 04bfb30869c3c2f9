"""`spectune serve`: a base and its deltas behind OpenAI's HTTP interface."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from spectune.cli import options
from spectune.cli.base_and_deltas import loader, settings_of, what_is_asked
from spectune.cli.console import note, work
from spectune.errors import ConfigError
from spectune.sizes import bytes_of

Deltas = Annotated[
    Path | None,
    typer.Option(help="Folder of deltas and runs: each is a model of its folder's name, loaded when first asked for."),
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
_EXTRA = ("uvicorn",)


def serve(
    run: ServedRun = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Base: a hub id, a local folder, or spectune-tiny (embedded).",
                     show_default="that of the run or the deltas, else spectune-tiny"),
    ] = None,
    deltas: Deltas = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is any that is free.")] = 8000,
    api_key: ApiKey = None,
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Answers written at once.", show_default="16, on a GPU 64")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Answers that are written or wait; more get a 429.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens of an answer.")] = 4096,
    request_timeout: Annotated[float, typer.Option(min=1, help="Seconds for a request, waiting included.")] = 600.0,
    shutdown_timeout: Annotated[float, typer.Option(min=1, help="Seconds for running requests at the end.")] = 30.0,
    device_memory: Annotated[str, typer.Option(help="Memory for deltas on the device, such as 2GiB.")] = "2GiB",
    device: options.Device = None,
    dtype: options.Dtype = None,
    base_precision: options.BasePrecision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing_weights: options.AllowMissingWeights = False,
) -> None:  # fmt: skip
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
    memory = bytes_of(device_memory, "--device-memory")
    if api_key is not None and (not api_key.strip() or not api_key.isascii()):
        raise ConfigError("--api-key is empty or has letters beyond ASCII, which no header holds; expected a key")
    from spectune.serving.bounds import Bounds
    from spectune.serving.catalogue import Catalogue
    from spectune.serving.server import Serving, address_of, is_local, listen
    from spectune.serving.server import serve as run_server

    with work():
        what = what_is_asked(run, model, deltas)
        catalogue = Catalogue(what.name, deltas, what.named, settings_of, what.settings)
        bounds = Bounds(
            max_rows, max_queue, max_new_tokens, request_seconds=request_timeout, drain_seconds=shutdown_timeout
        )
        how = {
            "device": device or "auto", "dtype": dtype or "auto", "base_precision": base_precision,
            "trust_remote_code": trust_remote_code, "allow_missing_weights": allow_missing_weights,
        }  # fmt: skip
        listening = listen(host, port)
        served = what.name if not catalogue.has_deltas else f"{what.name} and its deltas"
        note(f"serving {served} at {address_of(listening)}/v1 (Ctrl-C stops it)")
        if api_key is None and not is_local(host):
            note(f"warning: anybody who reaches {host} may use this server: set SPECTUNE_API_KEY, or leave out --host")
        load = loader(what.base, how, max_rows, memory if catalogue.has_deltas else None)
        code = run_server(Serving(load, catalogue, host, api_key, bounds, note), listening)
    raise typer.Exit(code)


def _check_extra() -> None:
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'spectune serve needs {missing[0]}, which is not installed: pip install "spectune[serve]"')

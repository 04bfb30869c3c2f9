"""`spectune serve`: a base and its deltas behind OpenAI's HTTP interface."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.console import import_libraries, note, work
from spectune.errors import ConfigError, DataError
from spectune.sizes import bytes_of

if TYPE_CHECKING:
    from spectune.cli.runs import Run
    from spectune.serving.loaded import Loaded

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
        what = _what(run, model, deltas)
        catalogue = Catalogue(what.name, deltas, what.named, _settings_of, what.settings)
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
        load = _loader(what.base, how, max_rows, memory if catalogue.has_deltas else None)
        code = run_server(Serving(load, catalogue, host, api_key, bounds, note), listening)
    raise typer.Exit(code)


@dataclass(frozen=True)
class _What:
    """What is served: the base, its name, how its prompts are made, and deltas by name."""

    base: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[str, Path] = field(default_factory=dict)


def _what(run: Path | None, model: str | None, deltas: Path | None) -> _What:
    """Raises ConfigError, DataError: as the flags' own commands do; a run has a head, which writes no text."""
    from spectune.cli.input_rows import run_on
    from spectune.cli.runs import RUNS, find_run
    from spectune.embedded import NAME as TINY

    if deltas is not None and not deltas.is_dir():
        raise DataError(f"--deltas {deltas} is not a folder; expected one whose folders are deltas or runs")
    if run is None and model is None:
        if deltas is not None:
            return _base_of_deltas(deltas)
        try:
            found = find_run(None)
        except ConfigError:  # there is none yet
            return _What(TINY, TINY)
        note(f"the newest run under {RUNS}/: {found.folder}")
    else:
        found = run_on(run, model)
    return _of_run(found)


def _of_run(found: Run) -> _What:
    if found.labels is not None:
        raise ConfigError(f"{found.name} has a head, which gives labels and writes no text: spectune generate runs it")
    name = _base_name(found.base)
    if found.delta_folder is None:
        return _What(found.base, name)
    folder = found.folder.absolute()
    own = folder.parent.name if folder.name == "best" else folder.name
    if (found.delta / "config.json").is_file():  # a fully tuned base is a base
        return _What(str(found.delta), own, found.config)
    return _What(found.base, name, {}, {own: found.delta})


def _base_of_deltas(deltas: Path) -> _What:
    """The base that the first of the deltas names."""
    from spectune.cli.runs import find_run
    from spectune.embedded import NAME as TINY
    from spectune.serving.catalogue import delta_in

    first = next((folder for folder in sorted(deltas.iterdir()) if delta_in(folder) is not None), None)
    if first is None:
        return _What(TINY, TINY)
    base = find_run(first).base
    note(f"base: {base}, as {first} has it")
    return _What(base, _base_name(base))


def _base_name(base: str) -> str:
    """What a base is called: its hub id, or the name of its folder."""
    return Path(base).absolute().name if Path(base).is_dir() else base


def _settings_of(delta: Path) -> Mapping[str, Any]:
    from spectune.cli.runs import find_run

    return find_run(delta).config


def _loader(base: str, how: Mapping[str, Any], rows: int | None, memory: int | None) -> Callable[[], Loaded]:
    """Loads the base; `memory`: of the bank of its deltas, None where there is none."""

    def load() -> Loaded:
        import_libraries()
        from spectune.serving.loaded import Loaded
        from spectune.storage import load as load_base

        model, tokenizer = load_base(base, **how)
        if memory is None:
            return Loaded.of(model, tokenizer, None, rows)
        from spectune.storage import Bank

        return Loaded.of(model, tokenizer, Bank(model, device_memory=memory), rows)

    return load


def _check_extra() -> None:
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'spectune serve needs {missing[0]}, which is not installed: pip install "spectune[serve]"')

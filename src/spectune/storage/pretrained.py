"""The one place where transformers is asked to read a config, a tokenizer or a model, and is told whether code that
comes with a base may run. Whatever a library raises becomes one sentence that names what was read. Nothing here
imports torch."""

import contextlib
import os
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, try_to_load_from_cache

from spectune.errors import DataError, OutOfMemoryError, SpectuneError, first_line, is_out_of_memory
from spectune.files.local_folder import check_local

#: seconds that the hub may take to answer at all
PATIENCE = 5
TRUST = (
    "it runs with this machine's rights, so read it, and then say --trust-remote-code (trust_remote_code=True); "
    "nothing else lets it run"
)


def from_pretrained(kind: Any, source: str, file: str, *, trust_remote_code: bool, **options: Any) -> Any:
    """`kind.from_pretrained(source)`, which never asks on standard input.

    Args:
        file: what of the base is read, in words: files' names.

    Raises:
        DataError: the base is not there, cannot be read, or needs code of its own that may not run.
        OutOfMemoryError: memory ran out.
    """
    check_local(source)
    with reading(source, file):
        _refuse_unreachable(source)
        return kind.from_pretrained(source, trust_remote_code=bool(trust_remote_code), **options)


@contextlib.contextmanager
def reading(source: str, file: str) -> Iterator[None]:
    """What libraries raise inside is one of our errors: as `from_pretrained` has it."""
    try:
        yield
    except SpectuneError:
        raise
    except BaseException as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"out of memory while {file} of {source} was read ({first_line(error)}). Take a smaller base, "
                "--dtype bfloat16, or a machine with more memory."
            ) from error
        # a panic of a library in Rust is no Exception; neither is the exit of code that comes with a base
        if not isinstance(error, Exception | SystemExit) and type(error).__name__ != "PanicException":
            raise
        raise _unreadable(source, file, error) from error


def _unreadable(source: str, file: str, error: BaseException) -> DataError:
    said = first_line(error)
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return DataError(f"the base {source!r} needs code of its own, which comes with it: {TRUST}")
    if isinstance(error, ImportError):
        return DataError(f"the base {source!r}: {file} needs a package that is not here ({said})")
    if not isinstance(error, OSError | ValueError):
        said = f"{type(error).__name__}: {said}"
    if Path(source).is_dir():
        inside = ", ".join(sorted(os.listdir(source))[:12]) or "nothing"
        return DataError(
            f"{source} is a folder, but no base that transformers can load: {file} cannot be read, or does not fit the "
            f"other files ({said}). It holds: {inside}. Expected config.json, *.safetensors and a tokenizer, all whole."
        )
    if cached_file(source, "config.json") is not None:
        return DataError(
            f"the base {source!r} is in the hub's cache, but cannot be loaded: {file} cannot be read, or does not fit "
            f"the other files ({said}). Remove it there (hf cache rm), so that it is fetched again."
        )
    return DataError(
        f"the base {source!r} is neither a local folder nor to be had from the hub ({said}).\n"
        "What to do: give a local folder that holds config.json, weights and tokenizer; or set HF_HOME to a cache "
        "that has the model (with HF_HUB_OFFLINE=1 where there is no network); or check the name and log in "
        "(HF_TOKEN) if the model is gated. --model spectune-tiny works everywhere."
    )


def fetch_weights(source: str) -> None:
    """Have the hub's cache hold the weights' files of a base that is no local folder, as transformers would."""
    if Path(source).is_dir():
        return
    from transformers.utils import hub

    fetched: Any = hub.cached_file
    shards: Any = hub.get_checkpoint_shard_files
    absent = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")}
    with reading(source, "its weights"):
        for name in ("model.safetensors", "pytorch_model.bin"):
            if fetched(source, name, **absent) is not None:
                return
            if (index := fetched(source, f"{name}.index.json", **absent)) is not None:
                shards(source, index)
                return


def cached_file(source: str, file: str) -> Path | None:
    """Where the hub's cache has a file of a base; None where it has not."""
    with contextlib.suppress(Exception):  # no name that the hub could have
        found = try_to_load_from_cache(source, file)
        return Path(found) if isinstance(found, str) else None
    return None


def _refuse_unreachable(source: str) -> None:
    """Raise at once what transformers would raise after half a minute of retries. Raises ValueError: the name is no hub
    id. Raises OSError: the hub cannot be reached, and the cache does not have the base."""
    if Path(source).exists():
        return
    cached = isinstance(try_to_load_from_cache(source, "config.json"), str)  # checks the id, too
    if cached or constants.HF_HUB_OFFLINE or urllib.request.getproxies():  # a proxy looks names up by itself
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection(
            (hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443)), timeout=PATIENCE
        ).close()
    except OSError as error:
        raise ConnectionError(f"no connection to {hub.hostname}: {error.strerror or error}") from error

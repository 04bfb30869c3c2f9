"""What is known of a base without its weights: its config and its tokenizer. Nothing here imports torch."""

import os
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, try_to_load_from_cache
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from spectune import embedded
from spectune.errors import DataError, first_line
from spectune.files.local_folder import check_local

#: seconds that the hub may take to answer at all
PATIENCE = 5


def source_of(name: str | Path) -> str:
    """The folder or hub id that a base is read from."""
    return str(embedded.MODEL_FOLDER) if str(name) == embedded.NAME else str(name)


def positions_of(config: Any) -> int | None:
    """Positions of a base with this config; None where there is no limit."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else int(context)


def load_config(name: str | Path) -> Any:
    """The config alone of a hub id, a folder, or `"spectune-tiny"`; no weights are read. Raises DataError."""
    source = source_of(name)
    return read(source, lambda: AutoConfig.from_pretrained(source))


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone of a hub id, a folder, or `"spectune-tiny"`; no weights are read. Raises DataError."""
    source = source_of(name)
    tokenizer: PreTrainedTokenizerBase = read(source, lambda: AutoTokenizer.from_pretrained(source))
    # without files transformers makes an empty tokenizer of the model's type, which knows its special tokens alone
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise DataError(
            f"{source!r} has no tokenizer: the one that transformers made of it knows {len(tokenizer)} tokens, all of "
            "them special. Save the base's tokenizer there: tokenizer.save_pretrained(folder)."
        )
    return tokenizer


def read(source: str, reading: Callable[[], Any]) -> Any:
    """What `reading` gives. Raises DataError: the base is not there, or cannot be read."""
    check_local(source)
    try:
        _refuse_unreachable(source)
        return reading()
    except (OSError, ValueError, KeyError) as error:
        if Path(source).is_dir():
            inside = ", ".join(sorted(os.listdir(source))[:12]) or "nothing"
            raise DataError(
                f"{source} is a folder, but no base that transformers can load ({first_line(error)}). It holds: "
                f"{inside}. Expected config.json, *.safetensors and a tokenizer."
            ) from error
        raise DataError(
            f"the base {source!r} is neither a local folder nor to be had from the hub ({first_line(error)}).\n"
            "What to do: give a local folder that holds config.json, weights and tokenizer; or set HF_HOME to a cache "
            "that has the model (with HF_HUB_OFFLINE=1 where there is no network); or check the name and log in "
            "(HF_TOKEN) if the model is gated. --model spectune-tiny works everywhere."
        ) from error


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

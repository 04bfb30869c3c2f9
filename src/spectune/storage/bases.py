"""Loading bases: a model object, a local folder, a hub id, or the embedded `spectune-tiny`."""

import os
import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, try_to_load_from_cache
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spectune import embedded
from spectune.errors import ConfigError, DataError, first_line
from spectune.files.local_folder import check_local
from spectune.objectives import CAUSAL_LM
from spectune.storage.base_precision import base_dtype, check_precision, quantise_base
from spectune.storage.devices import resolve_device

TINY = embedded.NAME
#: seconds that the hub may take to answer at all
PATIENCE = 5


def load(
    name: str | Path | PreTrainedModel,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    base_precision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base and its tokenizer, in evaluation mode.

    Args:
        name: a hub id, a local folder, `"spectune-tiny"`, or a loaded model (whose tokenizer is then looked up by
            the name it was loaded from).
        device: "auto", "cpu", "cuda", "mps" or a torch device.
        dtype: "auto" is float32 on the CPU and the checkpoint's own type on CUDA; or "float32", "bfloat16",
            "float16", or a torch dtype.
        base_precision: "fp8", "nf4" or "int8": the weights of the layers' linears are stored so, for methods that
            leave the base frozen (see docs/quantised-bases.md); None leaves them in `dtype`. With fp8 or nf4 "auto" is
            bfloat16 on CUDA. The weights are read to the host first and go to the device one by one.

    Raises:
        ConfigError: a precision that this device or this base cannot take, or one for a model that is loaded already.
        DataError: the base cannot be found or read; the message lists what to do.
    """
    check_precision(base_precision)
    if isinstance(name, PreTrainedModel):
        if base_precision is not None:
            raise ConfigError(
                f"base_precision = {base_precision} is for a base that is loaded by name, and a model was given: "
                "quantise that one with spectune.storage.quantise_base(model, precision)"
            )
        return name, load_tokenizer(str(name.config._name_or_path))
    source = str(embedded.MODEL_FOLDER) if str(name) == TINY else str(name)
    place = resolve_device(device)
    config = _read(source, lambda: AutoConfig.from_pretrained(source))
    if base_precision is not None and getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"base_precision = {base_precision}: {source} is quantised already; leave base_precision out")
    resolved = base_dtype(dtype, place, getattr(config, "dtype", None), base_precision)
    model = _read(source, lambda: CAUSAL_LM.auto_class.from_pretrained(source, dtype=resolved))
    if base_precision is not None:
        quantise_base(model, base_precision, device=place)
    return model.to(place).eval(), load_tokenizer(source)


def load_config(name: str | Path) -> Any:
    """The config alone of a hub id, a folder, or `"spectune-tiny"`; no weights are read. Raises DataError."""
    source = str(embedded.MODEL_FOLDER) if str(name) == TINY else str(name)
    return _read(source, lambda: AutoConfig.from_pretrained(source))


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone of a hub id, a folder, or `"spectune-tiny"`; no weights are read. Raises DataError."""
    source = str(embedded.MODEL_FOLDER) if str(name) == TINY else str(name)
    tokenizer: PreTrainedTokenizerBase = _read(source, lambda: AutoTokenizer.from_pretrained(source))
    # without files transformers makes an empty tokenizer of the model's type, which knows its special tokens alone
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise DataError(
            f"{source!r} has no tokenizer: the one that transformers made of it knows {len(tokenizer)} tokens, all of "
            "them special. Save the base's tokenizer there: tokenizer.save_pretrained(folder)."
        )
    return tokenizer


def _read(source: str, read: Any) -> Any:
    check_local(source)
    try:
        _refuse_unreachable(source)
        return read()
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

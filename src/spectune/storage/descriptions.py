"""What is known of a base without its weights: its config and its tokenizer. Nothing here imports torch."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from spectune import embedded
from spectune.errors import DataError
from spectune.files.local_folder import check_local
from spectune.files.own_code import OwnCode
from spectune.storage.base_config import check_described
from spectune.storage.base_files import check_tokenizer, read_config
from spectune.storage.pretrained import TRUST, from_pretrained, reading

#: what a tokenizer is tried on
_TRIED = "A line of text, 1.\n"


def source_of(name: str | Path) -> str:
    """The folder or hub id that a base is read from."""
    return str(embedded.MODEL_FOLDER) if str(name) == embedded.NAME else str(name)


def positions_of(config: Any) -> int | None:
    """Positions of a base with this config; None where there is no limit."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else int(context)


def load_config(name: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The config alone of a hub id, a folder, or `"spectune-tiny"`; no weights are read.

    Args:
        trust_remote_code: code that comes with the base may run, where it needs any.

    Raises:
        DataError: there is no such base, its config is damaged or describes no model, or it needs code of its own.
        OutOfMemoryError: memory ran out.
    """
    source = source_of(name)
    check_local(source)
    found = read_config(source)
    config = from_pretrained(AutoConfig, source, "config.json", trust_remote_code=trust_remote_code)
    check_described(config, f"{source}: config.json")
    if (code := getattr(config, "auto_map", None)) is not None:
        if trust_remote_code:
            config.auto_map = OwnCode(code)
        elif "model_type" not in found:  # the class was found by its name in the code
            raise DataError(f"the base {source!r} needs code of its own, which comes with it: {TRUST}")
    return config


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer alone of a hub id, a folder, or `"spectune-tiny"`; no weights are read. Arguments and errors as
    `load_config` has them."""
    source = source_of(name)
    check_local(source)
    check_tokenizer(source)
    file = "its tokenizer (tokenizer.json, tokenizer_config.json and so on)"
    tokenizer: PreTrainedTokenizerBase = from_pretrained(
        AutoTokenizer, source, file, trust_remote_code=trust_remote_code
    )
    with reading(source, file):
        # without files transformers makes an empty tokenizer of the model's type, which knows its special tokens alone
        known, special = set(tokenizer.get_vocab()), set(tokenizer.all_special_tokens)
        ids = tokenizer(_TRIED)["input_ids"]
        tokenizer.decode(ids)
        _check_tokenizer(tokenizer)
    if known <= special:
        raise DataError(
            f"{source!r} has no tokenizer: the one that transformers made of it knows {len(known)} tokens, all of "
            "them special. Save the base's tokenizer there: tokenizer.save_pretrained(folder)."
        )
    return tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where settings of a tokenizer have types that it was given by a file, and cannot have."""
    template = tokenizer.chat_template
    if not isinstance(template, str | dict | None):
        raise ValueError(f"chat_template is a {type(template).__name__}, expected text")
    if isinstance(template, dict) and not all(isinstance(text, str) for text in template.values()):
        raise ValueError("chat_template has entries that are no text")
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not length > 0:
        raise ValueError(f"model_max_length is {str(length)[:60]!a}, expected a number above 0")
    if tokenizer.padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {str(tokenizer.padding_side)[:60]!a}, expected left or right")

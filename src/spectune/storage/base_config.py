"""`config.json` as it stands in a base's folder: what no model can have, and what would fetch code."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spectune.errors import DataError, some

#: of a model: its parts, each of which is an object in memory, as each label is; its sizes; and its positions. The
#: largest known have a tenth of them.
MOST_PARTS, MOST_LABELS, MOST_SIZE, MOST_POSITIONS = 2**12, 2**17, 2**24, 2**40
_MOST = (
    (re.compile(r"(^|_)(layers?|blocks?|experts|heads?|stages|groups)(_per_\w+)?$"), MOST_PARTS),
    (re.compile(r"(^|_)labels$"), MOST_LABELS),
    (re.compile(r"positions?$|embeddings$|max_"), MOST_POSITIONS),
    (re.compile(r"(size|dim|rank|hidden|inner|width|embd|d_model|d_ff|d_kv)$"), MOST_SIZE),
)
#: what every model has at least one of
_ONE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
#: the same in raw configs of some types
_ALSO_ONE = ("n_layer", "n_layers", "n_head", "n_heads", "n_embd", "d_model", "n_positions", "n_ctx")
_SWITCHES = ("is_encoder_decoder", "is_decoder", "tie_word_embeddings", "add_cross_attention")
#: where a config says by which kernel attention, experts and so on are computed
_KERNELS = re.compile(r"^_?\w*implementation(_internal)?$|^kernel_config$|^use_kernels$")
#: token ids and lists of them
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_COPY = "copy it again from where it was written"


def check_config(found: Mapping[str, Any], path: Path) -> None:
    """Raise DataError where a config has numbers that no model has, of parts that a library would begin to make; names
    a kernel of the hub, which is code; or says what is its own code in another form than transformers writes."""
    problems = [problem for key, value in _entries(found, "") if (problem := _problem(key, value)) is not None]
    code = found.get("auto_map")
    if code is not None and not (isinstance(code, dict) and all(_is_code(value) for value in code.values())):
        problems.append("auto_map is no object of names")
    quantised = found.get("quantization_config")
    if quantised is not None and not isinstance(quantised, dict):
        problems.append(f"quantization_config is a {type(quantised).__name__}, expected an object")
    if problems:
        raise DataError(f"{path} describes no base that can be loaded: {some(problems)}; {_COPY}")


def check_described(config: Any, path: str) -> None:
    """Raise DataError where a config that transformers has read lacks a size, or has one of another type."""
    try:
        text = config.get_text_config()
        sizes = {name: getattr(text, name, None) for name in _ONE}
    except Exception as error:  # configs are code, of many authors
        raise DataError(f"{path}: {type(error).__name__}: {error}; {_COPY}") from error
    problems = [
        f"{name} is {str(value)[:40]}"
        for name, value in sizes.items()
        if value is not None and not isinstance(value, list) and (type(value) is not int or value < 1)
        if not (name == "max_position_embeddings" and value == -1)  # without a limit
    ]
    if problems:
        raise DataError(f"{path}: {some(problems)}, expected a whole number of one or more; {_COPY}")


def _entries(found: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in found.items():
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{key}.")
        yield f"{prefix}{key}", value


def _problem(place: str, value: Any) -> str | None:
    key = place.rpartition(".")[2]
    if _KERNELS.match(key) and _of_hub(value):
        return f"{place} is {str(value)[:100]!a}, which is code from the hub; take it out"
    if key in _IDS:
        ids = value if isinstance(value, list) else [] if value is None else [value]
        return None if all(type(i) is int for i in ids) else f"{place} is {str(value)[:60]!a}, expected a token's id"
    if key in _SWITCHES and not isinstance(value, bool | None):
        return f"{place} is {str(value)[:60]!a}, expected true or false"
    if isinstance(value, bool) or not isinstance(value, int | float) or not key.isascii():
        return None
    most = next((most for pattern, most in _MOST if pattern.search(key)), None)
    least = -1 if key.startswith(("num_", "n_")) else -MOST_PARTS  # -1 is none, in some; others count from the end
    if key in _ONE + _ALSO_ONE:
        least = 1
    if most is not None and not least <= value <= most:
        return f"{place} is {value}, expected {least:,} to {most:,}"
    return None


def _of_hub(value: Any) -> bool:
    """Whether a kernel is named by its repository; of a mapping, any."""
    if isinstance(value, dict):
        return any(_of_hub(inner) for inner in value.values())
    return isinstance(value, str) and "/" in value


def _is_code(value: Any) -> bool:
    return all(item is None or isinstance(item, str) for item in (value if isinstance(value, list) else [value]))

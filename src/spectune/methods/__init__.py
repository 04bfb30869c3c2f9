"""One method, one file. `METHODS` is the whole registration: tests, plan, command line and docs iterate over it."""

from typing import Any

from pydantic import ValidationError

from spectune.deltas import Method
from spectune.errors import ConfigError, did_you_mean
from spectune.methods.adapter import BottleneckAdapter
from spectune.methods.bitfit import BitFit
from spectune.methods.dora import DoRA
from spectune.methods.full import FullFineTuning
from spectune.methods.ia3 import IA3
from spectune.methods.ln import LNTuning
from spectune.methods.lora import LoRA
from spectune.methods.miss import MiSS
from spectune.methods.oft import OFT
from spectune.methods.prefix import PrefixTuning
from spectune.methods.prompt import PromptTuning

#: the spectrum that every textbook compares, and what `--quick` runs
SPECTRUM: tuple[type[Method], ...] = (FullFineTuning, BottleneckAdapter, PrefixTuning, PromptTuning, LoRA, BitFit)
METHODS: tuple[type[Method], ...] = (*SPECTRUM, DoRA, IA3, OFT, MiSS, LNTuning)

BY_NAME: dict[str, type[Method]] = {str(method.model_fields["name"].default): method for method in METHODS}


def method_from_name(name: str, **fields: Any) -> Method:
    """The method called `name` (`"lora"`) with some of its fields set. Raises ConfigError: no such method, no such
    field (both with the nearest name), or a value out of range."""
    if name not in BY_NAME:
        raise ConfigError(f"no method {name!r}{did_you_mean(name, BY_NAME, 0.5)}; there are: {', '.join(BY_NAME)}")
    method = BY_NAME[name]
    try:
        return method(**fields)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                known = [field for field in method.model_fields if field != "name"]
                lines.append(
                    f"{name} has no setting {key!r}{did_you_mean(key, known, 0.5)}; it has: {', '.join(known)}"
                )
            else:
                lines.append(f"{name}.{key} = {problem['input']!r}: {problem['msg']}")
        raise ConfigError("\n".join(lines)) from None


def method_from_dict(fields: dict[str, Any]) -> Method:
    """The inverse of `method.model_dump()`: the field `name` selects the method."""
    rest = dict(fields)
    return method_from_name(str(rest.pop("name", "")), **rest)


__all__ = [
    "BY_NAME", "IA3", "METHODS", "OFT", "SPECTRUM", "BitFit", "BottleneckAdapter", "DoRA", "FullFineTuning", "LNTuning",
    "LoRA", "MiSS", "PrefixTuning", "PromptTuning", "method_from_dict", "method_from_name",
]  # fmt: skip

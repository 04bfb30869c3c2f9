"""Packages whose names are imported when they are first used, so that what needs no torch does not import it."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(package: str, public: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package; `public`: its names, by the file that has them."""

    def get(name: str) -> Any:
        for file, names in public.items():
            if name in names:
                value = getattr(importlib.import_module(file), name)
                setattr(sys.modules[package], name, value)  # the next look-up does not come here
                return value
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get

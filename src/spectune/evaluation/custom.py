"""A metric of the user's own, by import path: `package.module:function` or `file.py:function`.

The function is `f(prediction: str, references: list[str], row: dict) -> float`, called once for each written row;
`prediction` has no outer spaces, `row` holds what the data row held (`prompt`, `completion`, `label`, further columns
..., and `origin`, its file and line). The metric is the mean over rows, and higher is better unless the function has an
attribute `higher_is_better = False`.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from spectune.data import Row
from spectune.errors import ConfigError, first_line

_SIGNATURE = "expected f(prediction: str, references: list[str], row: dict) -> float"


@dataclass(frozen=True)
class CustomMetric:
    """A function of one written row. `source` is its import path as it was given."""

    name: str
    source: str
    function: Callable[[str, list[str], dict[str, Any]], float]
    higher_is_better: bool = True

    @property
    def code_sha256(self) -> str | None:
        """The digest of the file that defines the function; None where Python cannot find it."""
        try:
            file = inspect.getsourcefile(inspect.unwrap(self.function))
            return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except (TypeError, OSError):
            return None

    def __call__(self, prediction: str, references: tuple[str, ...], row: Row) -> float:
        """The value for one row. Raises ConfigError, naming row and function: it failed, or gave no finite number."""
        where = f"metric {self.source} on {row.origin}"
        try:
            value = float(self.function(prediction, list(references), row_dict(row)))
        except Exception as error:  # it is the user's code: whatever it raises
            raise ConfigError(f"{where} failed: {type(error).__name__}: {first_line(error)}; {_SIGNATURE}") from error
        if not math.isfinite(value):
            raise ConfigError(f"{where} is {value}; expected a finite number")
        return value


def load_metric(source: str) -> CustomMetric:
    """The function at an import path; modules are looked for in the working directory, too. Raises ConfigError: there
    is no such file, module or function, or it cannot be imported."""
    place, _, name = source.rpartition(":")
    if not place or not name:
        raise ConfigError(f"metric {source!r}: expected package.module:function or file.py:function")
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # importing runs the user's code
        raise ConfigError(f"metric {source}: {place} cannot be imported: {first_line(error)}") from error
    finally:
        sys.path[:] = before
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, [key for key in vars(module) if not key.startswith("_")], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"metric {source}: {place} has no function {name!r}{hint} {_SIGNATURE}")
    return CustomMetric(name, source, function, bool(getattr(function, "higher_is_better", True)))


def row_dict(row: Row) -> dict[str, Any]:
    """A row as a metric gets it: what it holds, and no key for what it lacks."""
    own = ("shape", "unlearned")  # how it was read, which is not in the data
    fields = {key: value for key, value in asdict(row).items() if value not in (None, (), {}) and key not in own}
    columns: dict[str, Any] = fields.pop("columns", {})
    if arguments := fields.pop("template_kwargs", None):
        fields["chat_template_kwargs"] = arguments
    return columns | {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"spectune_metric_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {path.absolute()}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

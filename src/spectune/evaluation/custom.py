"""A metric of the user's own, by import path: `package.module:function` or `file.py:function`.

The function is `f(prediction: str, references: list[str], row: dict) -> float`, called once for each written row;
`prediction` has no outer spaces, `row` holds what the data row held (`prompt`, `completion`, `label`, further columns
..., and `origin`, its file and line). The metric is the mean over rows, and higher is better unless the function has an
attribute `higher_is_better = False`.
"""

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

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

    @classmethod
    def named(cls, source: str) -> Self:
        """The metric by its name alone: nothing is imported. Raises ConfigError: it is no import path."""
        return cls(_parted(source)[1], source, _not_imported)

    @property
    def imported(self) -> bool:
        return self.function is not _not_imported

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
        with _run(f"{where} failed", _SIGNATURE):
            value = float(self.function(prediction, list(references), row_dict(row)))
        if not math.isfinite(value):
            raise ConfigError(f"{where} is {value}; expected a finite number")
        return value


def load_metric(source: str) -> CustomMetric:
    """The function at an import path; modules are looked for in the working directory, too. Raises ConfigError: there
    is no such file, module or function, or it cannot be imported."""
    place, name = _parted(source)
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        with _run(f"metric {source}: {place} cannot be imported"):
            module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    finally:
        sys.path[:] = before
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, [key for key in vars(module) if not key.startswith("_")], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"metric {source}: {place} has no function {name!r}{hint} {_SIGNATURE}")
    with _run(f"metric {source}: its attribute higher_is_better cannot be read"):
        higher = bool(getattr(function, "higher_is_better", True))
    return CustomMetric(name, source, function, higher)


def row_dict(row: Row) -> dict[str, Any]:
    """A row as a metric gets it: what it holds, and no key for what it lacks."""
    own = ("shape", "unlearned")  # how it was read, which is not in the data
    fields = {key: value for key, value in asdict(row).items() if value not in (None, (), {}) and key not in own}
    columns: dict[str, Any] = fields.pop("columns", {})
    if arguments := fields.pop("template_kwargs", None):
        fields["chat_template_kwargs"] = arguments
    return columns | {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


@contextlib.contextmanager
def _run(failed: str, expected: str = "") -> Iterator[None]:
    """Inside, the user's code runs. Whatever it raises, sys.exit() and what libraries panic with too, is a ConfigError;
    Ctrl-C stays what it is."""
    try:
        yield
    except BaseException as error:
        if type(error) is KeyboardInterrupt:
            raise
        # of what cannot be imported its own words say enough
        kind = "" if isinstance(error, ImportError | OSError) else f"{type(error).__name__}: "
        raise ConfigError(f"{failed}: {kind}{first_line(error)}" + (f"; {expected}" if expected else "")) from error


def _parted(source: str) -> tuple[str, str]:
    """Module or file, and function. Raises ConfigError: it is no such path."""
    place, _, name = source.rpartition(":")
    if not place or not name:
        raise ConfigError(f"metric {source!r}: expected package.module:function or file.py:function")
    return place, name


def _not_imported(prediction: str, references: list[str], row: dict[str, Any]) -> float:
    raise AssertionError("the metric's code was not imported")


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"spectune_metric_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {path.absolute()}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

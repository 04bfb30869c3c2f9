"""Settings from a YAML file, `--set` and flags, each with the place it came from, so that an error can name it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectune.cli import known_keys
from spectune.cli.given import Given, shown, validated
from spectune.cli.synonyms import SYNONYMS, suggest
from spectune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from yaml.nodes import MappingNode, Node

    from spectune.data import Source
    from spectune.deltas import Method
    from spectune.training import TrainingConfig

#: Keys of the command itself; everything else is the training's or a method's.
RUN_KEYS = frozenset(
    {"model", "data", "valid", "test", "retain", "output_dir", "method", "methods", "device", "dtype", "base_precision"}
    | {"trust_remote_code", "allow_missing_weights"}
    # which rows of the data were held out, where that is not by the run's own seed
    | {"split_seed"}
    # a comparison's
    | {"arms", "preset", "seeds", "fractions", "metric", "generate_rows", "choice_normalization", "together"}
    # what a run's config.yaml says of its rows, for the commands that write with it; training works it out anew
    | {"row_shape", "prompt_ends_with", "row_system", "row_tools", "row_template_kwargs", "row_answers", "row_labels"}
)
#: keys that may be a mapping of their own
MAPPINGS = ("columns", "row_template_kwargs", "data", "valid", "test")
#: the keys of an entry that names data, with their defaults
_ENTRY: dict[str, Any] = {"path": None, "weight": 1.0, "name": None}
#: the keys that name a command's methods
NAMING = ("methods", "method", "method.name")


@dataclass
class Settings:
    """Everything the user gave, by key; a block's keys are dotted (`method.r`). Later sources win over earlier ones."""

    given: dict[str, Given] = field(default_factory=dict)

    @classmethod
    def collect(cls, config: Path | None, assignments: Sequence[str] | None, flags: Mapping[str, Any]) -> Settings:
        """Read the file, then `--set`, then the flags that are not None. Raises ConfigError: the file is missing or not
        YAML, or an assignment is not `key=value`."""
        given = {} if config is None else _read_yaml(config)
        for assignment in assignments or ():
            given |= _parse_assignment(assignment)
        for key in MAPPINGS:
            _gather(given, key)
        shown = {key: "--" + key.replace("_", "-") for key, value in flags.items() if value is not None}
        return cls(given | {key: Given(flags[key], where) for key, where in shown.items()})

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the command itself."""
        return self.given[key].value if key in self.given else default

    @property
    def base(self) -> str:
        """The base's name: as given, else the embedded one."""
        return self.text("model") or "spectune-tiny"

    @property
    def placement(self) -> dict[str, Any]:
        """How the base is loaded, as `spectune.load` takes it: device and dtype, "auto" where they were left open;
        what its frozen weights are stored in, None where that is `dtype`; and what of it is allowed."""
        return {
            "device": self.text("device") or "auto", "dtype": self.text("dtype") or "auto",
            "base_precision": self.text("base_precision"), **own_code(self),
            "allow_missing_weights": _switch(self, "allow_missing_weights"),
        }  # fmt: skip

    def text(self, key: str) -> str | None:
        """A key of the command itself that has to be text. Raises ConfigError: it is something else."""
        value = _text(self.given.get(key))
        if value is not None and not isinstance(value, str | Path):
            raise self._unexpected(key, "text")
        return None if value is None else str(value)

    def rows(self, key: str) -> str | list[Source] | None:
        """A key that names data, as `spectune.data.load_rows` takes it: a file, or several with weights.

        An entry is `FILE`, `FILE=WEIGHT` or, in YAML, `{path: FILE, weight: 2, name: web}`. Raises ConfigError: it is
        something else, or a weight is no number above 0.
        """
        values, words = (
            found if isinstance(found, list) else [] if found is None else [found]
            for found in (self.get(key), _text(self.given.get(key)))
        )
        found = [self._source(key, *entry) for entry in zip(values, words, strict=True)]
        if not found:
            return None
        if len(found) == 1 and found[0].weight == 1 and found[0].name is None:
            return str(found[0].data)
        return found

    def _source(self, key: str, entry: Any, words: Any) -> Source:
        """`words`: the same, with its numbers as they were written."""
        from spectune.data import Source

        if isinstance(entry, str | Path):
            given: dict[Any, Any] = _weighted(str(words))
        elif isinstance(entry, dict):
            given = {**words, **{name: entry[name] for name in ("weight", "name") if name in entry}}
        else:
            raise self._unexpected(key, "a file, or a list of files such as [a.jsonl, {path: b.jsonl, weight: 2}]")
        where = self.given[key].where
        if unknown := [str(name) for name in given if name not in _ENTRY]:
            hints = "; ".join(f"{name!r}: {suggest(name, _ENTRY)}" for name in unknown)
            raise ConfigError(f"{where}: {key} has an entry with unknown keys: {hints}")
        if not isinstance(given.get("path"), str):
            raise ConfigError(f"{where}: {key} has the entry {shown(entry)}; expected {{path: FILE, weight: 2}}")
        try:
            return Source(
                given["path"], *(given.get(name, default) for name, default in _ENTRY.items() if name != "path")
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def whole(self, key: str) -> int | None:
        """A key of the command itself that has to be a whole number. Raises ConfigError: it is something else."""
        value = self.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self._unexpected(key, "a whole number")

    def numbers(self, key: str) -> list[float]:
        """A key of the command itself that has to be numbers: a list, or text with commas. Raises ConfigError: it is
        something else."""
        value = self.get(key, [])
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        try:
            return [float(part) for part in parts]
        except (TypeError, ValueError):
            raise self._unexpected(key, "numbers such as 0.1,0.3,1 or 100,1000") from None

    def _unexpected(self, key: str, expected: str) -> ConfigError:
        return ConfigError(f"{self.given[key].where}: {key} is {shown(self.get(key))}; expected {expected}.")

    def training(self) -> TrainingConfig:
        """The training config. Raises ConfigError: a value does not fit; every one that does not is listed."""
        from spectune.training import TrainingConfig

        chosen = {key: given for key, given in self.given.items() if key in TrainingConfig.model_fields}
        config: TrainingConfig = validated(TrainingConfig, chosen)
        return config

    def check(self, names: Sequence[str] = ()) -> None:
        """Check, without importing torch, that the methods of those names are there, that every key given is known, and
        that the training's values fit. With no name keys may be any method's. Raises ConfigError."""
        self.by_method(names)
        self.training()

    def methods(self, names: Sequence[str]) -> list[Method]:
        """The methods of those names, each with the keys given for it; also checks that every key given is known.

        `r=8` and `method.r=8` reach every method named that has such a field, `lora.r=8` reaches LoRA alone. With no
        name the keys are only checked, for commands that train nothing. Raises ConfigError: a name, a key or a value is
        wrong.
        """
        chosen = self.by_method(names)
        if not names:
            return []
        from spectune.methods import BY_NAME

        return [validated(BY_NAME[name], chosen[name]) for name in names]

    def by_method(self, names: Sequence[str]) -> dict[str, dict[str, Given]]:
        """The keys given for each method named."""
        from spectune.training import TrainingConfig

        there = known_keys.names()
        for name in names:
            if name not in there:
                raise ConfigError(f"there is no method {name!r}; {suggest(name, there)}")
        plain = set(TrainingConfig.model_fields) | RUN_KEYS
        fields = {name: known_keys.fields(name) for name in there}
        chosen: dict[str, dict[str, Given]] = {name: {} for name in names}
        meant = list(dict.fromkeys(names)) or list(there)
        problems = []
        for key, given in self.given.items():
            if key in plain or key == "method.name":
                continue
            block, _, inner = key.rpartition(".")
            if block in there:  # one method's own block; a file may hold blocks of methods that this run leaves out
                targets = [block] if inner in fields[block] else []
                candidates: set[str] = set(fields[block])
            else:
                targets = [name for name in meant if inner in fields[name]] if block in ("", "method") else []
                candidates = set().union(*(fields[name] for name in meant)) | (plain if block == "" else set())
            if not targets:
                hint = suggest(inner, candidates)
                other = inner if SYNONYMS.get(inner, inner) in candidates else SYNONYMS.get(inner, inner)
                if owners := [name for name in there if other in fields[name] and block in ("", "method")]:
                    hint = f"{other!r} belongs to {' and '.join(owners)}, and this command has {', '.join(meant)}"
                problems.append(f"{given.where}: unknown key {key!r}; {hint}")
            for name in targets:
                if name in chosen:
                    chosen[name][inner] = given
        if problems:
            raise ConfigError("\n".join(problems))
        return chosen

    def method_names(self, default: Sequence[str]) -> list[str]:
        """The methods that the user named, by `--methods a,b`, `--method a`, or the file's `method(s)`. Raises
        ConfigError: what names them is neither text nor a list of names."""
        for key in (key for key in NAMING if key in self.given):
            value = self.given[key].text
            names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
            if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
                raise self._unexpected(key, "names such as lora,bitfit")
            if twice := ", ".join(sorted({name for name in names if names.count(name) > 1})):
                # both would have the same settings, and the same folder
                raise ConfigError(f"{self.given[key].where}: {twice} is named more than once; name each method once.")
            return names
        return list(default)


def runs_together(settings: Settings) -> int | str | None:
    """How many runs share a pass, at most: "auto", a number, or None where each is trained by itself. Raises
    ConfigError: it is something else."""
    value = settings.get("together")
    if value is None or value is False:
        return None
    if value is True or value == "auto":
        return "auto"
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    expected = "expected auto, or how many runs share a pass: 4, say"
    raise ConfigError(f"{settings.given['together'].where}: together is {shown(value)}; {expected}.")


def own_code(settings: Settings) -> dict[str, bool]:
    """Whether Python code that comes with the base may run: an argument of what reads its config or tokenizer."""
    return {"trust_remote_code": _switch(settings, "trust_remote_code")}


def _switch(settings: Settings, key: str) -> bool:
    """A key of the command itself that is on or off. Raises ConfigError: it is something else."""
    value = settings.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{settings.given[key].where}: {key} is {shown(value)}; expected true or false.")
    return bool(value)


def _text(given: Given | None) -> Any:
    """The value of a key that is text, or made of text: numbers in it as they were written."""
    return None if given is None else given.text


def _weighted(text: str) -> dict[str, Any]:
    """A file and its weight: `b.jsonl=0.5`; a file that is there by that whole name has none."""
    path, equals, weight = text.rpartition("=")
    if not equals or os.path.exists(text):
        return {"path": text}
    try:
        return {"path": path, "weight": float(weight)}
    except ValueError:  # a name that is no file's is a hub's, whatever it holds
        return {"path": path, "weight": weight} if os.path.exists(path) else {"path": text}


def _gather(given: dict[str, Given], name: str) -> None:
    """The entries of a mapping, such as `columns.prompt=question` or those of a block `data:`, as one key."""
    parts = {key: given.pop(key) for key in [key for key in given if key.startswith(f"{name}.")]}
    if not parts:
        return
    whole = given.get(name)
    base = whole if whole is not None and isinstance(whole.value, dict) else Given({}, "")
    inner = {key.removeprefix(f"{name}."): part for key, part in parts.items()}
    value, words = ({key: getattr(part, kind) for key, part in inner.items()} for kind in ("value", "text"))
    given[name] = Given(base.value | value, next(iter(parts.values())).where, base.text | words)


def parse_value(raw: str, where: str) -> Given:
    """A value as it stands behind `KEY=`: what YAML has for it; text as it is written, spaces and colons too."""
    from spectune.files.core_yaml import YamlError, compose_yaml, yaml_value

    try:
        node = compose_yaml(raw)
        value, words = (None, None) if node is None else (yaml_value(node), yaml_value(node, in_words=True))
    except YamlError:  # then it is text
        return Given(raw, where)
    as_written = isinstance(value, str | dict) and raw.strip()[:1] not in ("'", '"')
    if as_written or (value is None and raw.strip() not in ("null", "~")):
        return Given(raw, where)  # a separator of `: ` is no YAML, and ` ` would be null
    return Given(value, where, words)


def _parse_assignment(text: str) -> dict[str, Given]:
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {text}: expected KEY=VALUE, such as --set learning_rate=1e-3")
    return {key: parse_value(raw, f"--set {text}")}


def _read_yaml(path: Path) -> dict[str, Given]:
    from yaml.nodes import MappingNode

    from spectune.files.core_yaml import YamlError, compose_yaml
    from spectune.files.metadata import MAX_YAML_BYTES
    from spectune.files.regular import read_bounded

    try:
        content = read_bounded(path, MAX_YAML_BYTES, links=True)
        if content is None:
            raise ConfigError(f"--config {path}: there is no such file")
        node = compose_yaml(content.decode("utf-8"))
    except DataError as error:  # a pipe, a device, a folder, a file without an end
        raise ConfigError(f"--config {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except YamlError as error:
        raise ConfigError(f"--config {path}: not YAML: {error}") from error
    if node is None:
        return {}
    if not isinstance(node, MappingNode):
        raise ConfigError(f"{path}: expected keys with values, such as `learning_rate: 1e-3`")
    return _flatten(node, path, "")


def _flatten(node: MappingNode, path: Path, prefix: str) -> dict[str, Given]:
    """A mapping's keys with their lines; blocks become dotted keys."""
    from yaml.nodes import MappingNode, ScalarNode

    from spectune.files.plain_values import is_text

    found: dict[str, Given] = {}
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, ScalarNode):
            raise ConfigError(f"{where}: a key is a list or a block; expected text, such as `learning_rate: 1e-3`")
        key = prefix + key_node.value
        if not is_text(key):
            raise ConfigError(f"{where}: the key {key!a} is no Unicode text; expected a name")
        if key in found:
            raise ConfigError(f"{where}: {key!r} is there twice, first at {found[key].where}")
        if isinstance(value_node, MappingNode):
            found.update(_flatten(value_node, path, key + "."))
        else:
            found[key] = _value_of(value_node, where, key)
    return found


def _value_of(node: Node, where: str, key: str) -> Given:
    from spectune.files.core_yaml import YamlError, yaml_value

    try:
        return Given(yaml_value(node), where, yaml_value(node, in_words=True))
    except YamlError as error:
        raise ConfigError(f"{where}: {key}: its value cannot be read: {error}") from error

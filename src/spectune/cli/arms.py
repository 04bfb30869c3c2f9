"""The arms of a comparison as they are given: `--methods lora:r=8,lora:task_type=SEQ_CLS`, or `arms:` in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectune.cli import known_keys
from spectune.cli.given import Given, shown, validated
from spectune.cli.settings import NAMING, parse_value
from spectune.cli.synonyms import suggest
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spectune.cli.settings import Settings
    from spectune.comparing import Arm

#: the keys of an arm that are no settings of its method
_OWN = ("name", "method", "task_type")


@dataclass(frozen=True)
class GivenArm:
    """A method, its name where it has one of its own, and its own settings by key."""

    method: str
    name: str
    given: Mapping[str, Given]

    @property
    def plain(self) -> bool:
        return not self.name and not self.given


def given_arms(settings: Settings, default: Sequence[str]) -> list[GivenArm]:
    """The arms that the user named. Raises ConfigError: an entry is none, has keys that its method has not, or comes
    twice without a difference."""
    if (entries := settings.given.get("arms")) is not None and not any(key in settings.given for key in NAMING):
        if not isinstance(entries.value, list) or not all(isinstance(entry, dict) for entry in entries.value):
            raise ConfigError(f"{entries.where}: arms is {shown(entries.value)}; expected a list of {{method: lora}}")
        arms = [_of_entry(*entry, entries.where) for entry in zip(entries.value, entries.text, strict=True)]
    else:
        arms = [_of_word(word, settings) for word in _words(settings, default)]
    problems = [problem for arm in arms for problem in _unknown(arm)]
    seen = list[tuple[Any, ...]]()
    for arm in arms:
        key = arm.method, arm.name, sorted((name, shown(given.value)) for name, given in arm.given.items())
        if key in seen:
            where = next(
                (settings.given[name].where for name in (*NAMING, "arms") if name in settings.given), "--methods"
            )
            problems.append(f"{where}: {arm.method} is named more than once; name each method once.")
        seen.append(key)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return arms


def names_of(arms: Sequence[GivenArm]) -> list[str]:
    """The methods of arms, each once."""
    return list(dict.fromkeys(arm.method for arm in arms))


def arms_of(settings: Settings, arms: Sequence[GivenArm]) -> list[Arm]:
    """The arms as `spectune.compare` takes them. Raises ConfigError: a setting is wrong."""
    from spectune.comparing import Arm
    from spectune.methods import BY_NAME

    found, by_method = [], settings.by_method(names_of(arms))
    for arm in arms:
        chosen = by_method[arm.method] | {k: v for k, v in arm.given.items() if k not in _OWN}
        method = validated(BY_NAME[arm.method], chosen)
        task_type = str(arm.given["task_type"].value) if "task_type" in arm.given else "auto"
        found.append(Arm(arm.name or arm.method, method, task_type))
    return found


def _words(settings: Settings, default: Sequence[str]) -> list[str]:
    for key in NAMING:
        if (given := settings.given.get(key)) is not None:
            value = given.text
            words = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
            if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
                raise ConfigError(f"{given.where}: {key} is {shown(value)}; expected names such as lora,bitfit.")
            return words
    return list(default)


def _of_word(word: str, settings: Settings) -> GivenArm:
    """`lora`, or `lora:r=8+use_rslora=true`."""
    method, _, rest = word.partition(":")
    where, given = (
        next((settings.given[k].where for k in NAMING if k in settings.given), "--methods"),
        {},
    )
    for part in rest.split("+") if rest else ():
        key, equals, raw = part.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{where}: {word}: expected METHOD:KEY=VALUE+KEY=VALUE, such as lora:r=8+use_rslora=true")
        given[key.strip()] = parse_value(raw, where)
    return GivenArm(method.strip(), "", given)


def _of_entry(entry: dict[Any, Any], words: dict[Any, Any], where: str) -> GivenArm:
    """`words`: the same, with its numbers as they were written."""
    method, name = words.get("method"), words.get("name")
    if not isinstance(method, str):
        raise ConfigError(
            f"{where}: the arm {shown(entry)} has no method; expected {{name: LoRA r8, method: lora, r: 8}}"
        )
    given = {key: Given(value, where, words[key]) for key, value in entry.items() if key not in ("name", "method")}
    return GivenArm(method, "" if name is None else str(name), given)


def _unknown(arm: GivenArm) -> list[str]:
    """A sentence for each key that the arm's method has not."""
    there = known_keys.names()
    if arm.method not in there:
        return [f"there is no method {arm.method!r}; {suggest(arm.method, there)}"]
    fields = {*known_keys.fields(arm.method), "task_type"}
    return [
        f"{given.where}: arm {arm.method} has the unknown key {key!r}; {suggest(key, fields)}"
        for key, given in arm.given.items()
        if key not in fields
    ]

"""Which linears `target_modules` names, and names that say exactly a set of them; by PEFT's rules.

A text is one regular expression that matches a whole module path, in a list each entry is a path or the end of one.
Patterns may come from anybody's folder: they are matched in bounded time (`regex`, which can be told when to stop).
"""

import difflib
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import regex

from spectune.deltas.target_parameters import expert_words
from spectune.errors import ConfigError, some
from spectune.families import Family, Linear, OtherModule

Number = TypeVar("Number", int, float)

ALL_LINEAR = "all-linear"
#: for all patterns on all paths of one search together
MATCH_SECONDS = 2.0
#: no pattern that names modules is longer, and one that is takes long to compile
MOST_CHARACTERS = 20_000

#: a pattern that is a name or a path: only its dots stand for any character
_NAME = re.compile(r"[\w.]+")
#: what Python's `re` takes as it is written, and `regex` might not: an escaped character or a set, left alone, and a
#: brace that begins no repetition (`a{e}` is text to the one, and "about an a" to the other)
_BRACE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<brace>\{)(?!(?:\d+(?:,\d*)?|,\d*)\})", re.DOTALL)


def checked_pattern(pattern: str) -> str:
    """A regular expression as Python's `re` has it. Raises ValueError: it is none, or too long to be one."""
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"{pattern[:80]!r}... has {len(pattern):,} characters, at most {MOST_CHARACTERS:,} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of sets in sets, which are to mean something else one day
            re.compile(pattern)
        _compiled(pattern)
    except (re.error, regex.error, FutureWarning) as error:
        raise ValueError(f"{pattern[:80]!r} is no regular expression: {error}") from None
    except (RecursionError, OverflowError, MemoryError):
        raise ValueError(f"{pattern[:80]!r} is nested too deep, or repeats too often, to be matched") from None
    return pattern


def _compiled(pattern: str) -> Any:
    return regex.compile(_BRACE.sub(lambda found: r"\{" if found["brace"] else found[0], pattern))


class Search:
    """Patterns on paths, with `seconds` for all of them together. Raises ConfigError where that is not enough."""

    def __init__(self, seconds: float = MATCH_SECONDS) -> None:
        self.left = self.seconds = seconds
        self._compiled: dict[str, Any] = {}

    def whole(self, pattern: str, path: str) -> bool:
        """Whether a pattern matches a whole path."""
        return self._match(pattern, path) is not None

    def end(self, pattern: str, path: str) -> bool:
        """Whether a pattern matches a path or what follows one of its dots: PEFT's rule for ranks by pattern."""
        if _NAME.fullmatch(pattern) and not path.endswith(pattern.rpartition(".")[2]):
            return False  # most patterns are names, of which a config may hold one for each module
        return self._match(rf"(.*\.)?({pattern})$", path, pattern) is not None

    def group(self, pattern: str, path: str) -> str | None:
        """What the first group of a pattern that matches a whole path took in; None where it does not match."""
        found = self._match(pattern, path)
        return None if found is None else str(found[1])

    def first(self, patterns: Mapping[str, Number], path: str, default: Number) -> Number:
        """The value of the first pattern that matches a path or its end, as PEFT has ranks and alphas."""
        return next((value for key, value in patterns.items() if self.end(key, path)), default)

    def _match(self, pattern: str, path: str, shown: str = "") -> Any:
        started = time.perf_counter()
        if pattern not in self._compiled:
            self._compiled[pattern] = _compiled(pattern)
        try:
            found = self._compiled[pattern].fullmatch(path, timeout=max(self.left, 1e-3))
        except TimeoutError:
            raise ConfigError(
                f"the pattern {(shown or pattern)[:80]!r} is not matched in {self.seconds:g} seconds (it was at "
                f"{path!r}): it repeats what is repeated itself. Write it without that, or give a list of names."
            ) from None
        self.left -= time.perf_counter() - started
        return found


def ends_with(path: str, name: str) -> bool:
    """Whether a name is a path, or the end of it after a dot."""
    return path == name or path.endswith(f".{name}")


def checked_targets(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """`target_modules` as a field's value, for a validator. Raises ValueError: it names nothing, or is no pattern."""
    if not value or (not isinstance(value, str) and not all(value)):
        raise ValueError("empty: nothing would be trained")
    if isinstance(value, tuple):
        return value
    return ALL_LINEAR if value.lower() == ALL_LINEAR else checked_pattern(value)


def targets(family: Family, wanted: str | tuple[str, ...]) -> list[Linear]:
    """The linears that `target_modules` names.

    Raises:
        ConfigError: a name matches no linear (with the nearest real one); it also matches the head, the embeddings or
            another module that text goes through and that is not adapted; a pattern takes too long.
    """
    if wanted == ALL_LINEAR:
        return list(family.linears)
    search = Search()
    found = [linear for linear in family.linears if _named(wanted, linear.path, search)]
    beyond = [other for other in _beyond(family, wanted, search) if other.of_text]
    if beyond:
        where = ", ".join(_described(family, other.path) for other in beyond[:3])
        more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
        raise ConfigError(
            f"target_modules = {_shown(wanted)} also names {where}{more}: only linears inside the layers are adapted. "
            "Leave it out of the names"
            + (" (a text is a pattern for whole paths)" if isinstance(wanted, str) else "")
            + (f"; {words}" if (words := expert_words(family, wanted)) else "")
        )
    if isinstance(wanted, str):
        if not found:
            raise ConfigError(_nothing_matched(family, wanted))
        return found
    missing = [name for name in wanted if not any(ends_with(linear.path, name) for linear in found)]
    if missing:
        raise ConfigError(_names_missing(family, missing))
    return found


def left_out(family: Family, wanted: str | tuple[str, ...]) -> str | None:
    """A sentence on the modules of other towers that `target_modules` matches too, where nothing is adapted; None where
    there are none."""
    others = [] if wanted == ALL_LINEAR else [other.path for other in _beyond(family, wanted, Search())]
    if not others:
        return None
    return (
        f"target_modules = {_shown(wanted)} also names {len(others)} modules that text does not go through, where "
        f"nothing is trained: {some(others)}"
    )


def check_patterns(field: str, patterns: Iterable[str], paths: Sequence[str]) -> None:
    """Raise ConfigError for a pattern of ranks or alphas that matches none of the targets' paths, or that takes too
    long on one of them: what is matched here in time is so later."""
    search = Search()
    for key in patterns:
        if not [path for path in paths if search.end(key, path)]:
            near = difflib.get_close_matches(key, sorted({path.rpartition(".")[2] for path in paths}), n=1, cutoff=0)
            raise ConfigError(
                f"{field}: {key!r} matches none of the targets" + (f"; the nearest is {near[0]!r}" if near else "")
            )


def exact_names(wanted: Sequence[str], others: Iterable[str]) -> str | tuple[str, ...]:
    """Names that match the wanted paths and none of the others, where each is a path or the end of one: short ones
    where these do. A text, one regular expression, where a wanted path is itself the end of another one."""
    taken = {ending for path in others for ending in _ends(path)}
    if any(path in taken for path in wanted):
        return "|".join(re.escape(path) for path in wanted)
    # one that begins with a layer's number would be right, and read like none
    free = {path: [end for end in _ends(path) if end not in taken and not end[:1].isdigit()] for path in wanted}
    return tuple(sorted({ends[0] if ends else path for path, ends in free.items()}))


def peft_targets(paths: Sequence[str], family: Family) -> str | list[str]:
    """`target_modules` with which PEFT wraps the linears at `paths` and no other module: a list (which vLLM wants),
    short where that is exact."""
    wanted = set(paths)
    others = [linear.path for linear in family.linears if linear.path not in wanted]
    names = exact_names(paths, [*others, *(other.path for other in family.others)])
    return names if isinstance(names, str) else list(names)


def same_targets(wanted: str | tuple[str, ...], paths: Sequence[str], family: Family) -> str | tuple[str, ...]:
    """`target_modules` that names the linears at `paths`: as it was given where it does so, else exact names."""
    try:
        if [linear.path for linear in targets(family, wanted)] == list(paths):
            return wanted
    except ConfigError:
        pass
    names = peft_targets(paths, family)
    return names if isinstance(names, str) else tuple(names)


def endings(linears: Iterable[Linear]) -> list[str]:
    """The last names of linears' paths, each once."""
    return sorted({linear.path.rpartition(".")[2] for linear in linears})


def _ends(path: str) -> Iterator[str]:
    """The ends of a path after a dot, the shortest first, and the path itself."""
    parts = path.split(".")
    yield from (".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1))


def _named(wanted: str | tuple[str, ...], path: str, search: Search) -> bool:
    if isinstance(wanted, str):
        return search.whole(wanted, path)
    return any(ends_with(path, name) for name in wanted)


def _beyond(family: Family, wanted: str | tuple[str, ...], search: Search) -> list[OtherModule]:
    return [other for other in family.others if other.has_matrix and _named(wanted, other.path, search)]


def _described(family: Family, path: str) -> str:
    known = {family.head: "the head", family.embedding: "the token embeddings"}
    return f"{path} ({known[path]})" if path in known else path


def _shown(wanted: str | tuple[str, ...]) -> str:
    return repr(wanted if isinstance(wanted, str) else list(wanted))[:200]


def _nothing_matched(family: Family, wanted: str) -> str:
    """Why a text matches nothing: it is a name, several names, or "all-linear" written otherwise."""
    if re.sub(r"[^a-z]", "", wanted.lower()) in ("all", "linear", "linears", "alllinear", "alllinears"):
        return f"target_modules = {wanted!r} matches no linear; did you mean {ALL_LINEAR!r}, which is all of them?"
    names = [name for name in re.findall(r"[\w.-]+", wanted) if any(ends_with(t.path, name) for t in family.linears)]
    if names:
        meant = list(dict.fromkeys(names))
        return (
            f"target_modules = {wanted!r} is a text, and so one regular expression for whole module paths, as in PEFT: "
            f"it matches none, such as {next(t.path for t in family.linears if ends_with(t.path, meant[0]))!r}. "
            f"For every linear of that name write a list: target_modules={meant!r}"
        )
    if words := expert_words(family, wanted):
        return f"target_modules = {wanted!r} matches no linear of this {family.model_type} model: {words}"
    near = difflib.get_close_matches(wanted, [linear.path for linear in family.linears], n=1, cutoff=0)
    return (
        f"target_modules: {wanted!r} matches the whole path of no linear of this {family.model_type} model"
        + (f"; the nearest is {near[0]!r}" if near else "")
        + f"\nIts linears end in: {', '.join(endings(family.linears))}"
    )


def _names_missing(family: Family, missing: Sequence[str]) -> str:
    known = endings(family.linears)
    lines = []
    for name in missing:
        elsewhere = [other.path for other in family.others if other.has_matrix and ends_with(other.path, name)]
        if name.lower() == ALL_LINEAR:
            lines.append(f"target_modules: {ALL_LINEAR!r} stands in a list; write it alone, as a text")
        elif words := expert_words(family, name):
            lines.append(f"target_modules: {name!r} matches no linear of this {family.model_type} model: {words}")
        elif elsewhere:
            lines.append(f"target_modules: {name!r} names only modules that text does not go through: {elsewhere[0]}")
        else:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            lines.append(
                f"target_modules: {name!r} matches no linear of this {family.model_type} model"
                + (f"; the nearest is {near[0]!r}" if near else "")
            )
    return "\n".join(lines) + f"\nIts linears end in: {', '.join(known)}"

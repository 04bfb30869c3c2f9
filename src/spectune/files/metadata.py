"""Reading what says something of other files: JSON, YAML and JSON lines, ours or anybody's, each with a size, a depth
and a type; and the seal, by which a record of ours tells that it is as it was written.

Whatever is wrong is one DataError that names the file. Nothing here waits, runs code, or allocates more than some
times the size that was agreed.
"""

import enum
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from spectune.errors import DataError
from spectune.files.core_yaml import YamlError, compose_yaml, yaml_value
from spectune.files.plain_values import MAX_DEPTH, check_plain, whole_number
from spectune.files.regular import opened, read_bounded
from spectune.files.strict_json import strict_json

#: no record is longer; of a longer file nothing is read
MAX_JSON_BYTES = 16 * 2**20
#: YAML takes a hundred times as long to read
MAX_YAML_BYTES = 2**20
#: of JSON lines, each and all together
MAX_LINE_BYTES, MAX_LINES_BYTES = 16 * 2**20, 2**30
#: of a sealed record: the digest of everything else in it
SEAL = "sha256"
_NUMBER = re.compile("0|[1-9][0-9]{0,17}", re.ASCII)
#: what to do about a damaged file, where nobody says more
AGAIN = "copy it again from where it was written"
M = TypeVar("M", bound=BaseModel)


class Seal(enum.Enum):
    """What a record says of its own content. `ABSENT`: an earlier version wrote it, or somebody changed it on purpose
    and took the seal out."""

    ABSENT = "absent"
    RIGHT = "right"
    WRONG = "wrong"


def read_json(
    path: Path, most: int = MAX_JSON_BYTES, *, what: str = "", again: str = AGAIN, links: bool = False,
    non_finite: bool = False, any_integer: bool = False,
) -> dict[str, Any] | None:  # fmt: skip
    """An object out of a JSON file, None where there is no file.

    Args:
        most: bytes that are read.
        what: it should be, such as "a run's result", and `again`: what to do where it is damaged, for the message.
        links: the file may be a link to anywhere: the user named it.
        non_finite: NaN and infinity are allowed, as transformers writes them.
        any_integer: integers may be longer than 64 bits, for who checks the range of each field.

    Raises:
        DataError: it is no regular file, too long, not UTF-8, no JSON (NaN and infinite numbers are none), too deep,
            holds a key twice or an integer that no program takes, or no object.
    """
    content = read_bounded(path, most, links=links)
    how = {"non_finite": non_finite, "any_integer": any_integer}
    return None if content is None else json_object(content, str(path), what, again, **how)


def json_object(
    content: bytes, where: str, what: str = "", again: str = AGAIN, *, non_finite: bool = False,
    any_integer: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """An object out of JSON text. Raises DataError as `read_json` does; `where` names what the text is of."""
    try:
        text = content.decode("utf-8")
        numbers: dict[str, Any] = {} if non_finite else {"parse_constant": _no_number, "parse_float": _finite}
        if not any_integer:
            numbers["parse_int"] = whole_number
        found = json.loads(text, object_pairs_hook=_object, **numbers)
        check_plain(found)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"is not readable JSON ({_said(error)})", what, again) from error
    if not isinstance(found, dict):
        raise _damaged(where, f"holds a {type(found).__name__}, expected an object", what, again)
    return found


def read_yaml(
    path: Path, most: int = MAX_YAML_BYTES, *, what: str = "", again: str = AGAIN, links: bool = False,
    texts: Container[str] = (),
) -> dict[str, Any] | None:  # fmt: skip
    """A mapping out of a YAML file, by the core rules of YAML 1.2; None where there is no file, {} where it is empty.
    `texts`: keys whose values are text, in which a number is the word that it is written as. Raises DataError as
    `read_json` does; also for tags that are no plain types, and aliases that grow."""
    content = read_bounded(path, most, links=links)
    if content is None:
        return None
    try:
        node = compose_yaml(content.decode("utf-8"))
        found, words = (None, None) if node is None else (yaml_value(node), yaml_value(node, in_words=True))
    except (YamlError, UnicodeDecodeError) as error:
        raise _damaged(str(path), f"is not readable YAML ({_said(error)})", what, again) from error
    if found is not None and not isinstance(found, dict):
        raise _damaged(str(path), f"holds a {type(found).__name__}, expected keys with values", what, again)
    return {key: (words or {})[key] if key in texts else value for key, value in (found or {}).items()}


def read_lines(
    path: Path, *, what: str = "", again: str = AGAIN, most: int = MAX_LINES_BYTES, longest: int = MAX_LINE_BYTES,
    torn: bool = False, skipped: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:  # fmt: skip
    """The objects of a file of JSON lines, each with the number of its line, from 1; lines without a word are left out.

    Args:
        what, again: of each line, for messages, see `read_json`.
        torn: a last line without its end may be what a kill left, and is then no fault; nothing comes of it.
        skipped: is told of each damaged line, and the reading goes on; by default it is an error.

    Raises:
        DataError: `file:line`: there is no such file, it is no regular one or too long, or a line is too long or no
            object (see `read_json`).
    """
    with opened(path) as file:
        if file is None:
            raise DataError(f"{path} cannot be read: there is no such file")
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise DataError(f"{path} has {size:,} bytes; at most {most:,} are read of such a file: it is damaged")
        number = 0
        while line := file.readline(longest + 1):
            number += 1
            if len(line) > longest:
                raise DataError(f"{path}:{number} is longer than {longest:,} bytes: it is damaged")
            if not line.strip():
                continue
            try:
                found = json_object(line, f"{path}:{number}", what, again)
            except DataError as error:
                if torn and not line.endswith(b"\n"):
                    return
                if skipped is None:
                    raise
                skipped(str(error))
            else:
                yield number, found


def read_record(
    path: Path, kind: type[M], *, what: str = "", again: str = AGAIN, warn: Callable[[str], None] | None = None
) -> M | None:
    """A record of ours as its model; None where there is no file.

    Args:
        what, again: for the message, see `read_json`.
        warn: is told of a seal that is wrong: of a record that is only shown. By default that is an error.

    Raises:
        DataError: as `read_json`; or it does not fit the model, or, looked at last, its seal is wrong.
    """
    content = read_json(path, what=what, again=again)
    return None if content is None else record_of(content, path, kind, what=what, again=again, warn=warn)


def record_of(
    content: Mapping[str, Any], path: Path, kind: type[M], *, what: str = "", again: str = AGAIN,
    warn: Callable[[str], None] | None = None,
) -> M:  # fmt: skip
    """The same of content that was read. Raises DataError."""
    try:
        found = kind.model_validate(without_seal(content))
    except ValidationError as error:
        as_what = f" as {what}" if what else ""
        raise DataError(f"{path} cannot be read{as_what} ({first_problem(error)}). {_sentence(again)}") from error
    check_seal(path, content, again, warn=warn)
    return found


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as JSON will give it back (numbers that are not finite are null), with its seal."""
    plain = without_seal(json.loads(strict_json(content, indent=None)))
    return {**plain, SEAL: content_sha256(plain)}


def seal_of(content: Mapping[str, Any]) -> Seal:
    """Whether a record that was read is as it was sealed."""
    if SEAL not in content:
        return Seal.ABSENT
    return Seal.RIGHT if content[SEAL] == content_sha256(without_seal(content)) else Seal.WRONG


def without_seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """A record's content, as it was given to be sealed."""
    return {key: value for key, value in content.items() if key != SEAL}


def broken_seal(path: Path, content: Mapping[str, Any]) -> list[str]:
    """A line, for a list of what is wrong, where a record is not as it was sealed."""
    return [f"{path}: its content does not fit its key {SEAL!r}"] if seal_of(content) is Seal.WRONG else []


def check_seal(
    path: Path, content: Mapping[str, Any], again: str = AGAIN, *, warn: Callable[[str], None] | None = None
) -> None:
    """Raise DataError where a record is not as it was written, or tell `warn` of it. The last of all checks: what is
    wrong in particular says more."""
    if seal_of(content) is not Seal.WRONG:
        return
    said = f"{path} is not as it was written: its content does not fit its key {SEAL!r}"
    if warn is None:
        raise DataError(f"{said}. {_sentence(again)} If it was changed on purpose, take that key out")
    warn(said)


def number_of(name: str, prefix: str) -> int | None:
    """`N` of a name such as `checkpoint-N`, as it is written by us; None of any other name."""
    digits = name.removeprefix(prefix)
    return int(digits) if name.startswith(prefix) and _NUMBER.fullmatch(digits) else None


def numbered(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    """The entries of a folder whose names are `prefix` and a number, in the numbers' order."""
    found = ((number_of(path.name, prefix), path) for path in folder.glob(f"{prefix}*"))
    return sorted((number, path) for number, path in found if number is not None)


def first_problem(error: ValidationError) -> str:
    """What is wrong with a file's content, on one line: the first place, and how many more there are."""
    first, *others = error.errors(include_url=False, include_input=False)
    place = ".".join(map(str, first["loc"]))[:200]
    more = f", and {len(others)} more like it" if others else ""
    return f"{place}: {first['msg']}{more}" if place else f"{first['msg']}{more}"


def content_sha256(plain: Mapping[str, Any]) -> str:
    """The SHA-256 of what a JSON object says, however it is written: keys sorted, no white space, UTF-8."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!a} stands twice in one object")
    return found


def _damaged(where: str, problem: str, what: str, again: str) -> DataError:
    if not what:
        return DataError(f"{where} {problem}; {again}")
    return DataError(f"{where} cannot be read as {what}: it {problem}. {_sentence(again)}")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text[:40])


def _said(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"
    if isinstance(error, RecursionError):
        return f"lists and objects are nested more than {MAX_DEPTH} deep"
    return " ".join(str(error).split())[:400]

"""Files that nobody should write and anybody may: each is made at a path, by name. None takes space or time to make."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

#: makes a hostile file at a path, or something else that lies there; returns the path
Maker = Callable[[Path], Path]

#: past the bounds of every reader of metadata
_HUGE = 2**40


def holding(content: bytes) -> Maker:
    """A maker of files with this content."""

    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _sparse(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(_HUGE)
    return path


def _link(target: str) -> Maker:
    def make(path: Path) -> Path:
        path.symlink_to(target if target else path.name)
        return path

    return make


#: what is no regular file with an end, whatever it should hold
NO_FILES: dict[str, Maker] = {
    "a pipe": _pipe,
    "a folder": _folder,
    "a sparse file": _sparse,
    "a device without an end": _link("/dev/zero"),
    "a link to nowhere": _link("nowhere"),
    "a link to itself": _link(""),
    "a file of /proc": _link("/proc/self/mem"),
}

_LAUGHS = "\n".join(
    f"{k}: &{k} [{','.join([f'*{before}'] * 10)}]" for before, k in zip("abcdefgh", "bcdefghi", strict=True)
)

#: texts that are no JSON object of ours
JSON_TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "half": b'{"a": [1, 2',
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep lists": b'{"a": ' + b"[" * 200_000,
    "deep and whole": b'{"a": ' + b"[" * 800 + b"]" * 800 + b"}",
    "deep objects": b'{"a":' * 100_000,
    "a list": b"[]",
    "text": b'"a"',
    "null": b"null",
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "a number past all floats": b'{"a": 1e999}',
    "an integer of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "an integer of 30 digits": b'{"a": ' + b"9" * 30 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "half a surrogate pair": b'{"a": "\\ud800"}',
    "half a surrogate pair in a key": b'{"\\udfff": 1}',
    "a byte order mark": b'\xef\xbb\xbf{"a": 1}',
}

#: texts that are no settings
YAML_TEXTS: dict[str, bytes] = {
    "half": b"seed: [1, 2",
    "not UTF-8": b"model: \xff\xfe",
    "deep lists": b"seed: " + b"[" * 2_000,
    "deep blocks": b"- " * 2_000 + b"x",
    "deep and whole": b"seed: " + b"[" * 150 + b"]" * 150,
    "a list": b"- seed",
    "text": b"seed",
    "a billion laughs": b"a: &a [x, x]\n" + _LAUGHS.encode(),
    "an alias in itself": b"seed: &a [*a]",
    "an alias of nothing": b"seed: *nobody",
    "a tag that runs code": b"seed: !!python/object/apply:os.system ['exit 1']",
    "a tag of a date": b"seed: !!timestamp 2024-01-31",
    "a number past all floats": b"learning_rate: 1e999",
    "an integer of 5000 digits": b"seed: " + b"9" * 5000,
    "a key twice": b"seed: 1\nseed: 2",
    "a key twice inside": b"arms: [{method: lora, method: bitfit}]",
    "a key that is a list": b"[a]: 1",
    "half a surrogate pair": b'separator: "\\ud800"',
    "half a surrogate pair in a key": b'"\\ud800": 1',
    "a byte of nothing": b"seed: \x00",
    "two documents": b"seed: 1\n---\nseed: 2",
}

HOSTILE_JSON = NO_FILES | {name: holding(text) for name, text in JSON_TEXTS.items()}
HOSTILE_YAML = NO_FILES | {name: holding(text) for name, text in YAML_TEXTS.items()}

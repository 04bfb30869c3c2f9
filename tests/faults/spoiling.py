"""Ways to damage a file: bytes, JSON, and what is no file at all. Each is seeded and says what it did."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

#: damages a file in place; None where the file has nothing of the sort
Blow = Callable[[Random, Path], str | None]


def own_copy(path: Path) -> bytes:
    """The file's bytes; what stands there is taken away, so that nothing else with these bytes is written to."""
    raw = path.read_bytes()
    path.unlink()
    return raw


# -- bytes -----------------------------------------------------------------------------------------------------------


def flip(random: Random, path: Path) -> str | None:
    raw = bytearray(own_copy(path))
    if not raw:
        path.write_bytes(raw)
        return None
    place, bit = random.randrange(len(raw)), random.randrange(8)
    raw[place] ^= 1 << bit
    path.write_bytes(raw)
    return f"bit {bit} of byte {place} flipped"


def truncate(random: Random, path: Path) -> str | None:
    raw = own_copy(path)
    length = random.choice([0, 1, 8, len(raw) // 2, max(len(raw) - 1, 0), random.randrange(len(raw) + 1)])
    path.write_bytes(raw[:length])
    return f"cut to {min(length, len(raw))} of {len(raw)} bytes"


def zeros(random: Random, path: Path) -> str:
    raw = bytearray(own_copy(path))
    start = random.randrange(len(raw) + 1)
    length = min(random.choice([1, 16, 4096]), len(raw) - start)
    raw[start : start + length] = bytes(length)
    path.write_bytes(raw)
    return f"{length} zero bytes at {start}"


def noise(random: Random, path: Path) -> str:
    raw = bytearray(own_copy(path))
    start = random.randrange(len(raw) + 1)
    junk = random.randbytes(random.choice([1, 3, 64]))
    raw[start : start + random.choice([0, len(junk)])] = junk
    path.write_bytes(raw)
    return f"{len(junk)} bytes of noise at {start}"


def longer(random: Random, path: Path) -> str:
    raw = own_copy(path)
    path.write_bytes(raw + random.choice([b"\0", b"x" * 100, raw]))
    return "bytes put at its end"


BYTES: list[Blow] = [flip, flip, flip, truncate, truncate, zeros, noise, longer]


# -- what is no file -------------------------------------------------------------------------------------------------


def fifo(random: Random, path: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "is a FIFO"


def device(random: Random, path: Path) -> str:
    path.unlink()
    target = random.choice(["/dev/zero", "/dev/urandom", "/dev/null", "/dev/full"])
    path.symlink_to(target)
    return f"links to {target}"


def sparse(random: Random, path: Path) -> str:
    raw = own_copy(path)
    path.write_bytes(raw)
    size = random.choice([2**33, 2**37])
    os.truncate(path, size)
    return f"is sparse, of {size} bytes"


def folder(random: Random, path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "is a folder"


def gone(random: Random, path: Path) -> str:
    path.unlink()
    return "is gone"


def link(random: Random, path: Path) -> str:
    kind = random.choice(["dangling", "loop", "outside"])
    path.unlink()
    path.symlink_to({"dangling": "nowhere", "loop": path.name, "outside": "/etc/hostname"}[kind])
    return f"is a link: {kind}"


def unreadable(random: Random, path: Path) -> str:
    """Without the right to read it, which the administrator always has: then it is empty, too."""
    own_copy(path)
    path.write_bytes(b"")
    path.chmod(0)
    return "may not be read"


NODES: list[Blow] = [fifo, device, sparse, folder, gone, link, unreadable]


# -- JSON ------------------------------------------------------------------------------------------------------------

DEEP, HUGE = 100_000, 3_000_000
OTHER_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2.5, 1e308, 10**12, 10**30, -(10**18), "", "x", "0", "NaN", "\u202e\x1b[2J", "../../x",
    "/etc/passwd", [], [1], [[]], ["x"] * 3, {}, {"a": 1}, float("nan"), float("inf"), 2**31, 2**63, "A" * 5000,
]  # fmt: skip


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where each value of a JSON document stands, containers among them."""
    found = [path] if path else []
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        found += places(value, (*path, key))
    return found


def one_of(random: Random, known: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """A place, often one at the top: large tables (a vocabulary) would take all blows otherwise."""
    top = [place for place in known if len(place) == 1]
    return random.choice(top if top and random.random() < 0.5 else known)


def held(content: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    """The container of a place, and its key there."""
    for key in path[:-1]:
        content = content[key]
    return content, path[-1]


def parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def changed(path: Path, content: Any) -> None:
    path.unlink()
    path.write_text(json.dumps(content, indent=2), encoding="utf-8", errors="surrogatepass")


def other_value(random: Random, path: Path) -> str | None:
    content = parsed(path)
    if not (known := places(content)):
        return None
    place = one_of(random, known)
    holder, key = held(content, place)
    value = random.choice(OTHER_VALUES)
    old, holder[key] = holder[key], value
    changed(path, content)
    return f"{'.'.join(map(str, place))}: {brief(old)} is now {brief(value)}"


def other_number(random: Random, path: Path) -> str | None:
    """A number of the same type, as an accident or a forger would leave it."""
    content = parsed(path)
    numbers = [p for p in places(content) if type((h := held(content, p))[0][h[1]]) in (int, float)]
    if not numbers:
        return None
    place = random.choice(numbers)
    holder, key = held(content, place)
    old = holder[key]
    holder[key] = random.choice([old + 1, -old, old * 1000, 0, 99]) if isinstance(old, int) else old * 1.01 + 0.01
    changed(path, content)
    return f"{'.'.join(map(str, place))}: {brief(old)} is now {brief(holder[key])}"


def without_key(random: Random, path: Path) -> str | None:
    content = parsed(path)
    known = [place for place in places(content) if isinstance(held(content, place)[0], dict)]
    if not known:
        return None
    place = one_of(random, known)
    holder, key = held(content, place)
    del holder[key]
    changed(path, content)
    return f"{'.'.join(map(str, place))} is gone"


def other_document(random: Random, path: Path) -> str:
    name, text = random.choice(
        [
            ("a list", b"[]"), ("null", b"null"), ("a number", b"1"), ("a text", b'"x"'), ("an empty object", b"{}"),
            ("not JSON", b"{'a': 1}"), ("not UTF-8", b'{"a": "\xff\xfe"}'), ("UTF-16", '{"a": 1}'.encode("utf-16")),
            ("only a mark", b"\xef\xbb\xbf"), ("NaN", b'{"a": NaN}'), ("deep", b'{"a":' * DEEP + b"1" + b"}" * DEEP),
            ("deep list", b"[" * DEEP), ("huge", b'{"a": "' + b"x" * (HUGE * 20) + b'"}'),
            ("many keys", b"{" + b",".join(b'"%d": 1' % n for n in range(HUGE // 20)) + b"}"),
            ("a large number", b'{"a": ' + b"9" * 100_000 + b"}"), ("half a surrogate", b'{"a": "\\ud83d"}'),
        ]
    )  # fmt: skip
    path.unlink()
    path.write_bytes(text)
    return f"is {name}"


def deep_value(random: Random, path: Path) -> str | None:
    """A value that is nested past what a parser's stack takes, in a document that is otherwise whole."""
    content = parsed(path)
    keys = [key for key in content if isinstance(key, str)] if isinstance(content, dict) else []
    if not keys:
        return None
    key = random.choice(keys)
    content[key] = "@@"
    levels = random.choice([90, 300, 900, 5000, DEEP])
    text = json.dumps(content).replace('"@@"', "[" * levels + "]" * levels)
    path.unlink()
    path.write_text(text)
    return f"{key} is nested {levels} levels"


def twice(random: Random, path: Path) -> str | None:
    content = parsed(path)
    if not isinstance(content, dict) or not content:
        return None
    key = random.choice(sorted(content))
    value = random.choice(OTHER_VALUES)
    text = json.dumps(content)
    path.unlink()
    path.write_text(text[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}")
    return f"{key} stands there twice"


def same_meaning(random: Random, path: Path) -> str | None:
    """Other white space: what it says is what it said."""
    content = parsed(path)
    if content is None:
        return None
    path.unlink()
    path.write_text(json.dumps(content, indent=random.choice([None, 1, 7])))
    return "white space"


JSON: list[Blow] = [other_value, other_value, other_value, other_number, other_number, without_key, without_key,
                    other_document, other_document, deep_value, twice, same_meaning]  # fmt: skip


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


# -- code ------------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def bomb(marker: Path) -> bytes:
    return pickle.dumps(Bomb(marker))

"""Text of users, files and models, made fit to be shown: it is not trusted with more than to be read.

A terminal obeys control characters: it moves its cursor, sets titles and the clipboard, hides text, opens links. Others
are invisible, or turn the order of what stands beside them, so that one name looks like another. All of these are shown
as Python writes them, `\\x1b` or `\\u202e`; line breaks and tabs stay.
"""

import json
import re
import shlex
from os import PathLike
from typing import Any

#: control characters (C0 but for tab and line break, DEL, C1), line and paragraph separators, what embeds, isolates or
#: overrides a direction, halves of surrogate pairs, which no file can hold, and what is invisible
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)
#: what joins or parts letters, and what marks a direction: part of how some scripts and emoji are written
_JOINERS, _MARKS = "\u200b\u200c\u200d", "\u061c\u200e\u200f"
#: the scripts before this need none of them
_FIRST_JOINED = "\u0530"
#: characters of a line of a message, and lines
LONGEST_LINE, MOST_LINES = 1000, 200


def plain(text: str) -> str:
    """What a terminal shows as it is; line breaks (LF or CR LF) and tabs stay."""
    return _UNFIT.sub(_shown, text.replace("\r\n", "\n"))


def one_line(text: str, most: int = 2000) -> str:
    """On one line, at most so many characters."""
    return clipped(" ".join(plain(text).split()), most)


def clipped(text: str, most: int) -> str:
    """At most so many characters, with the number of all of them where some are left out."""
    text = plain(text)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters in all)"


def message(text: str) -> str:
    """What is said to a user, of a few lines that a screen can hold, whatever was given: of a line that is too long
    its beginning and its end."""
    lines = [_shorter(line) for line in plain(text).split("\n")]
    left = len(lines) - MOST_LINES
    return "\n".join([*lines[:MOST_LINES], f"… and {left:,} more lines"] if left > 0 else lines)


def json_text(value: Any, encoding: str | None = None) -> str:
    """A value as JSON of several lines, with every character escaped that is not fit to be shown, and those that
    `encoding` has not: what reads it gets each of them back.

    Raises:
        ValueError: it holds a number that is not finite.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    try:
        _UNFIT.sub("", text).encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(value, indent=2, allow_nan=False, default=str)
    return _UNFIT.sub(_json_escaped, text)


def markdown_code(text: str) -> str:
    """A path or a name as Markdown's code, which it cannot end, nor a cell of a table."""
    return f"`{one_line(text, 200).replace('`', chr(39)).replace('|', '/')}`"


def command_line(*words: str | PathLike[str]) -> str:
    """A command as a shell takes it; one word of it or more. A path that begins with a dash is written as `./-x`, so
    that it is not taken for a flag, and what cannot be seen as `$'\\n'`."""
    return " ".join(_word(word if isinstance(word, str) else _path(word)) for word in words)


def _path(path: PathLike[str]) -> str:
    text = str(path)
    return f"./{text}" if text.startswith("-") else text


def _word(word: str) -> str:
    if plain(word) == word and not set("\n\t") & set(word):
        return shlex.quote(word)
    inner = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return f"$'{_UNFIT.sub(_escaped, inner)}'"


def _escaped(found: re.Match[str]) -> str:
    """As shells read it between `$'` and `'`: the bytes of a name."""
    return "".join(f"\\x{byte:02x}" for byte in found[0].encode("utf-8", "surrogateescape"))


def _json_escaped(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))


def _shown(found: re.Match[str]) -> str:
    character, place, text = found[0], found.start(), found.string
    before, after = text[max(0, place - 1) : place], text[place + 1 : place + 2]
    beside = before >= _FIRST_JOINED, after >= _FIRST_JOINED
    if (character in _JOINERS and all(beside)) or (character in _MARKS and any(beside)):
        return character
    if (code := ord(character)) < 0x80:
        return f"\\x{code:02x}"
    return character.encode("ascii", "backslashreplace").decode()


def _shorter(line: str) -> str:
    if len(line) <= LONGEST_LINE:
        return line
    head, tail = line[: LONGEST_LINE * 2 // 3], line[-LONGEST_LINE // 5 :]
    return f"{head}… ({len(line):,} characters in all) …{tail}"

"""What `spectune validate` found, in words and colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spectune.cli.console import say

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from spectune.data import DataReport, LabelledExample, Labels
    from spectune.data.checked import Checked, Shown
    from spectune.data.overlaps import Repeats

#: control characters but for tab and line end: a terminal would obey them
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_WIDTH = 32
#: origins that are named of what is counted
_NAMED = 3


def print_rows(out: Console, shown: Sequence[Shown], tokenizer: PreTrainedTokenizerBase) -> None:
    """Each sequence as text, with what is learned in colour, or in brackets where there are no colours."""
    from rich.text import Text

    from spectune.data import LabelledExample
    from spectune.data.marked_text import marked, stretches

    colours = out.color_system is not None and not out.no_color
    for row in shown:
        example = row.example
        if isinstance(example, LabelledExample):
            _print_labelled(out, example, tokenizer)
            continue
        say(out, _heading(row), style="bold")
        pieces = [piece._replace(text=_visible(piece.text)) for piece in stretches(example, tokenizer)]
        if colours:
            styled = [(piece.text, "bold green" if piece.learned else "dim") for piece in pieces]
            out.print(Text.assemble(*styled), soft_wrap=True)
        else:
            say(out, marked(pieces))
        say(out, "")


def _print_labelled(out: Console, example: LabelledExample, tokenizer: PreTrainedTokenizerBase) -> None:
    """A text and its label, or words and their tags; the text as the head reads it."""
    from spectune.data.head_labels import label_of

    row = example.row
    what = f"label {label_of(row)!r}" if example.label is not None else f"{example.target_tokens:,} words with a tag"
    say(out, f"{row.origin} ({row.shape}): {example.length:,} tokens, {what}", style="bold")
    text = str(tokenizer.decode(example.input_ids))
    if row.tokens is not None and row.tags is not None:
        text = " ".join(f"{row.tokens[word]}[[{row.tags[word]}]]" for word in example.words)
    say(out, _visible(text))
    say(out, "")


def print_part(out: Console, part: Checked) -> None:
    """Where the rows of a part went, and what is learned of them."""
    report, ending = part.encoded.report, part.ending
    say(out, f"{part.name}: {part.source}", style="bold")
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in part.shapes.items())
    _line(out, "rows", f"{report.rows:,} ({shapes})")
    if len(report.sources) > 1:
        _line(out, "rows by source", ", ".join(f"{found.rows:,} {name}" for name, found in report.sources.items()))
    _line(out, "bad rows left out", _some(len(report.bad), report.bad))
    without = [f"{reason} ({', '.join(origins[:_NAMED])})" for reason, origins in part.dropped.items()]
    _line(out, "rows without a learned token", _some(len(report.dropped), without))
    _line(out, "sequences", f"{report.examples:,} of {report.kept:,} rows")
    if part.labels is not None:
        _print_classes(out, part.labels, report)
    else:
        _line(out, "turns learned", f"{report.turns:,}")
        share = f" ({report.target_tokens / report.tokens:.0%})"
        _line(out, "tokens", f"{report.tokens:,}, {report.target_tokens:,} of them learned{share}")
    _line(out, "longest sequence", f"{report.longest:,} tokens (max_length {part.max_length:,})")
    cut = [
        f"the {lost} of {counts['rows']:,} ({counts['tokens']:,} tokens)" for lost, counts in part.truncations.items()
    ]
    _line(out, "rows cut to max_length", _some(len(report.cut), cut))
    windows = sum(entry["windows"] for entry in report.split)
    _line(out, "long texts in windows", _some(len(report.split), [f"{windows:,} windows, no token lost"]))
    if part.labels is None:
        _line(out, "rows that end with EOS", f"{ending['with_eos']:,} of {ending['rows']:,}")
    for label, count in _rare(part).items():
        if count:
            _line(out, label, f"{count:,}")
    for key, count in report.ignored.items():
        _line(out, f"rows with {key}, not used", f"{count:,} (name it in columns to take it)")
    _repeats(out, part.seen.repeats, "copies of an earlier row", "earlier prompt, other answer")
    say(out, "")


def _print_classes(out: Console, labels: Labels, report: DataReport) -> None:
    """What a head learns, and how many texts or words there are of each class."""
    _line(out, "task", labels.describe())
    counts = [f"{name} {count:,}" for name, count in report.labels.most_common()]
    if counts:
        _line(out, "texts or words of each class", _some(len(counts), counts))
    _line(out, "tokens", f"{report.tokens:,}")


def print_overlaps(out: Console, overlaps: Sequence[dict[str, Any]]) -> None:
    """What the parts have in common."""
    from spectune.data.overlaps import Repeats, Twins

    for found in overlaps:
        say(out, f"{found['of']} rows ({found['of_rows']:,}) that are in {found['in']}", style="bold")
        pairs = {key: [Twins(*pair) for pair in found[key]] for key in ("equal_rows", "equal_prompts")}
        _repeats(out, Repeats(found["rows"], found["prompts"], **pairs), "equal rows", "equal prompts, other answer")


def _heading(row: Shown) -> str:
    example = row.example
    parts = "window" if example.row.text is not None else "sequence"
    which = f", {parts} {row.number} of {row.count}" if row.count > 1 else ""
    return (
        f"{example.row.origin} ({example.row.shape}{which}): {example.length:,} tokens, "
        f"{example.target_tokens:,} of them learned"
    )


def _rare(part: Checked) -> dict[str, int]:
    report = part.encoded.report
    return {
        "rows with EOS in an answer": report.eos_inside,
        "rows with unknown tokens": report.unknown,
        "rows the tokenizer changes": report.inexact,
        "turns without their thought": report.thoughts_cut,
        "turns without a prompt": report.unasked,
    }


def _repeats(out: Console, repeats: Repeats, rows: str, prompts: str) -> None:
    for label, count, pairs in (
        (rows, repeats.rows, repeats.equal_rows),
        (prompts, repeats.prompts, repeats.equal_prompts),
    ):
        _line(out, label, _some(count, [f"{pair.row} = {pair.earlier}" for pair in pairs]))


def _line(out: Console, label: str, value: str) -> None:
    say(out, f"  {label:<{_WIDTH}} {value}")


def _some(count: int, named: Sequence[str]) -> str:
    """A number, and a few of what it counts."""
    more = ", ..." if count > len(named[:_NAMED]) and len(named) > _NAMED else ""
    return f"{count:,}" + (f": {', '.join(named[:_NAMED])}{more}" if count and named else "")


def _visible(text: str) -> str:
    """Control characters as the signs that Unicode has for them."""
    return _CONTROLS.sub(lambda found: chr(0x2421 if found[0] == "\x7f" else 0x2400 + ord(found[0])), text)

"""Data files made to harm, in every format, through what reads rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.faults import spoiling
from tests.faults.damage import Trial, kind
from tests.faults.kinds import Place
from tests.faults.scenes import BASE, CPU, FINISHED, QUICK, copied, scene, with_runs

NAME = "strangers-rows"
#: what texts may hold; commands show some of them
TEXTS = [
    "\x1b[2J\x1b]0;title\x07", "\x9b31m", "\u202etxt.exe", "=HYPERLINK(\"http://x\")", "@SUM(A1)", "-1+1",
    "<|endoftext|>",
    "<s></s><|im_end|>", "{{ 7 * 7 }}{% for x in y %}", "</script><script>alert(1)</script>", "![x](http://x)", "\0",
    "a\u2028b\u2029c\x85d", "\ud83d", "\U0001f600" * 50, "e\u0301" * 200, "\ufeff", "\ufffe\uffff", "", " ", "\n" * 500,
    "x" * 100_000, "'; DROP TABLE x; --", "$(touch marker)", "`touch marker`", "%s%n", "../../etc/passwd", "ﷺ" * 300,
    "\r\rfake: progress\r", "\x08" * 50, "[31mred[/31m]", "[link=http://x]y[/link]", ":smile:", "\x1bP\x1b\\",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, -1, 1e308, 10**400, [], {}, [[]], ["a", 1], {"a": {"b": []}}, "text", float("nan"), "9" * 5000,
    ["x"] * 10_000, {"role": "user"}, [{"role": "assistant"}], [None], "\ud83d",
]  # fmt: skip
GOOD = {"prompt": "name: Ada | town: Leeds\n", "completion": "Ada lives in Leeds."}
KEYS = ["prompt", "completion", "text", "messages", "conversations", "instruction", "input", "output", "references",
        "choices", "label", "tools", "documents", "chat_template_kwargs", "system", "history", "tokens", "tags", "id",
        "input_ids", "weight", "__class__", "\x1b[2J", "", "=1+1", "a" * 3000, "images"]  # fmt: skip


def commands(name: str) -> list[tuple[str, ...]]:
    return [
        ("validate", "--model", BASE, "--data", name, "--show", "3"),
        ("validate", "--model", BASE, "--data", name, "--json"),
        ("validate", "--model", BASE, "--data", name, "--skip-bad-rows"),
        ("train", "--model", BASE, "--data", name, "--output-dir", "new", *QUICK, *CPU),
        ("train", "--model", BASE, "--data", name, "--output-dir", "new", "--skip-bad-rows", *QUICK, *CPU),
        ("generate", "--run", FINISHED, "--data", name, "--max-new-tokens", "4", *CPU),
        ("eval", "--run", FINISHED, "--data", name, "--generate-rows", "1", "--max-new-tokens", "4", *CPU),
    ]


def make(place: Place, random: Random, folder: Path) -> Trial:
    """A data file, and a command that reads it."""
    base = random.choice(["gpt2", "gpt2", "llama"])
    origin = copied(scene(place, base), folder)
    maker = random.choice(MAKERS)
    name, what = maker(random, folder)
    argv = random.choice(commands(name))
    if "--run" in argv:
        origin = copied(with_runs(place, base), folder)
    return Trial(origin, argv, name, what, names=(name,), compared=False)


def good_rows(count: int) -> list[dict[str, Any]]:
    return [{**GOOD, "completion": f"Ada lives in Leeds, number {n}."} for n in range(count)]


def odd_row(random: Random) -> dict[str, Any]:
    """A row with a text or a value that is met nowhere else."""
    row: dict[str, Any] = dict(GOOD)
    kind = random.randrange(6)
    if kind == 0:
        row[random.choice(["prompt", "completion"])] = random.choice(TEXTS)
    elif kind == 1:
        row[random.choice(KEYS)] = random.choice(VALUES)
    elif kind == 2:
        row = {random.choice(KEYS): random.choice([*VALUES, *TEXTS]) for _ in range(random.randrange(4))}
    elif kind == 3:
        row = {"messages": [message(random) for _ in range(random.choice([0, 1, 2, 3, 40]))]}
    elif kind == 4:
        row = {"messages": [*chat(), message(random)], random.choice(KEYS): random.choice(VALUES)}
    else:
        row |= {random.choice(["references", "choices", "label"]): random.choice([*VALUES, *TEXTS, [TEXTS[0]]])}
    return row


def chat() -> list[dict[str, Any]]:
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def message(random: Random) -> Any:
    return random.choice(
        [
            {"role": random.choice(["user", "assistant", "system", "tool", "\x1b[2J", 4, None, "x" * 2000]),
             "content": random.choice([*TEXTS, *VALUES])},
            {"role": "assistant", "tool_calls": random.choice(VALUES)},
            {"role": "assistant", "content": "a",
            "tool_calls": [{"function": {"name": "f", "arguments": random.choice(VALUES)}}]},
            {"role": "user", "content": [{"type": random.choice(["text", "image", 4]), "text": random.choice(TEXTS)}]},
            {"from": random.choice(["human", "gpt", 4]), "value": random.choice(TEXTS)}, random.choice(VALUES),
            {"role": "user", "content": "x", random.choice(KEYS): random.choice(VALUES)},
        ]
    )  # fmt: skip


def mixed(random: Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [*good_rows(8), *(odd_row(random) for _ in range(random.choice([1, 1, 2, 30])))]
    random.shuffle(rows)
    return rows


def dumped(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# -- one file each ---------------------------------------------------------------------------------------------------


def json_lines(random: Random, folder: Path) -> tuple[str, str]:
    """Rows that are odd, as JSON lines or in a list."""
    rows = mixed(random)
    if random.random() < 0.3:
        (folder / f"{NAME}.json").write_text(json.dumps(rows if random.random() < 0.8 else {"data": rows}))
        return f"{NAME}.json", "odd rows"
    text = "".join(json.dumps(row, ensure_ascii=random.random() < 0.5) + "\n" for row in rows)
    (folder / f"{NAME}.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    return f"{NAME}.jsonl", "odd rows"


def bad_lines(random: Random, folder: Path) -> tuple[str, str]:
    """Lines that are no rows."""
    kinds: dict[str, bytes] = {
        "deep": b"[" * spoiling.DEEP, "deep object": b'{"prompt":' * 5000 + b"1" + b"}" * 5000,
        "long": b'{"prompt": "' + b"x" * 80_000_000 + b'", "completion": "y"}',
        "long without an end": b'{"prompt": "' + b"x" * 80_000_000,
        "large number": b'{"prompt": ' + b"9" * 1_000_000 + b"}",
        "not UTF-8": b'{"prompt": "\xff\xfe", "completion": "x"}',
        "zeros": bytes(1000), "not JSON": b"{'prompt': 'x'}", "a list": b"[1, 2]", "a number": b"7", "a text": b'"x"',
        "NaN": b'{"prompt": NaN, "completion": "x"}', "twice": b'{"prompt": "a", "prompt": "b", "completion": "c"}',
        "escapes": b'{"\\u001b[2J": "x"}', "comment": b"// x", "many": b"{}\n" * 50_000, "blank": b"\n" * 100_000,
        "many keys": b"{" + b",".join(b'"k%d": 1' % n for n in range(100_000)) + b"}", "half": b'{"prompt": "a", "comp',
        "other ends": b'{"prompt": "a", "completion": "b"}\r{"prompt": "a", "completion": "b"}\r',
        "mark": b"\xef\xbb\xbf",
        "raw escapes": b'\x1b[2J{"prompt": "\x1b]0;x\x07"',
        "large exponent": b'{"prompt": 1e999999999, "completion": "x"}',
    }  # fmt: skip
    name = random.choice(sorted(kinds))
    rows = [dumped([row]) for row in good_rows(8)]
    rows.insert(random.randrange(len(rows) + 1), kinds[name] + b"\n")
    suffix = random.choice([".jsonl", ".jsonl", ".ndjson", ".json"])
    (folder / f"{NAME}{suffix}").write_bytes(b"".join(rows))
    return f"{NAME}{suffix}", f"a line: {name}"


def documents(random: Random, folder: Path) -> tuple[str, str]:
    """One JSON document that is no list of rows."""
    path = folder / f"{NAME}.json"
    path.write_text(json.dumps(good_rows(8)))
    what = random.choice([spoiling.other_document, spoiling.deep_value, spoiling.other_value, spoiling.without_key])(
        random, path
    )
    return path.name, str(what)


def encodings(random: Random, folder: Path) -> tuple[str, str]:
    encoding = random.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-8-sig", "cp037", "shift_jis"])
    rows = [{**row, "completion": "naïve café"} for row in good_rows(8)]
    suffix = random.choice([".jsonl", ".csv", ".txt", ".json"])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) if suffix != ".csv" else tables(rows)
    (folder / f"{NAME}{suffix}").write_bytes(text.encode(encoding, "replace"))
    return f"{NAME}{suffix}", encoding


def tables(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def cells(random: Random, folder: Path) -> tuple[str, str]:
    """A CSV: odd cells, headers, quotes, widths."""
    rows: list[dict[str, Any]] = [*good_rows(8)]
    kinds: dict[str, Callable[[], bytes]] = {
        "odd cells": lambda: tables([*rows, *({**GOOD, "prompt": t, "references": t} for t in TEXTS)]).encode("utf-8",
        "surrogatepass"),
        "an open quote": lambda: tables(rows).encode() + b'"a,b\n' + b"x,y\n" * 1000,
        "a long open quote": lambda: tables(rows).encode() + b'"' + b"x" * 80_000_000,
        "wide": lambda: b",".join([b"prompt", b"completion", *(b"c%d" % n for n in range(50_000))]) + b"\na,b\n",
        "wide row": lambda: tables(rows).encode() + b"," * 1_000_000 + b"\n",
        "zeros": lambda: tables(rows).encode() + bytes(1000),
        "quotes": lambda: b'prompt,completion\n"""""""",""""\n' * 9,
        "header twice": lambda: b"prompt,prompt,completion\na,b,c\n" * 9, "no header": lambda: b"a,b\nc,d\n",
        "escapes in the header": lambda: b"prompt,completion,\x1b[2J,=1+1\na,b,c,d\n", "empty": lambda: b"",
        "only a header": lambda: b"prompt,completion\n", "excel": lambda: b"sep=;\nprompt;completion\na;b\n" * 5,
        "lists": lambda: tables([*rows, {**GOOD, "references": "[" * 90_000}]).encode(),
        "ends": lambda: b"prompt,completion\ra,b\r",
        "deep": lambda: tables([*rows, {**GOOD, "messages": '[{"role":' * 3000}]).encode(),
        "commas": lambda: b"," * 10_000_000,
    }  # fmt: skip
    name = random.choice(sorted(kinds))
    suffix = random.choice([".csv", ".csv", ".tsv"])
    (folder / f"{NAME}{suffix}").write_bytes(kinds[name]())
    return f"{NAME}{suffix}", name


def packed(random: Random, folder: Path) -> tuple[str, str]:
    """Packed files: bombs, cut ones, ones in one another, and what is not packed at all."""
    inner = dumped(good_rows(8))
    bomb = b"".join(gzip.compress(b) for b in [inner] + [b"\n" * 10_000_000] * 1)
    kinds: dict[str, Callable[[], bytes]] = {
        "bomb of one line": lambda: _bomb(b"x"), "bomb of rows": lambda: _bomb(b'{"prompt": "a", "completion": "b"}\n'),
        "bomb of blank lines": lambda: _bomb(b"\n"), "cut": lambda: gzip.compress(inner)[: random.randrange(20, 120)],
        "not packed": lambda: inner, "in one another": lambda: gzip.compress(gzip.compress(inner)),
        "blank": lambda: bomb,
        "rest": lambda: gzip.compress(inner) + b"rest", "flipped": lambda: flipped(random, gzip.compress(inner)),
        "empty": lambda: b"", "forged length": lambda: gzip.compress(inner)[:-4] + b"\xff" * 4,
        "whole": lambda: gzip.compress(inner), "pickle": lambda: gzip.compress(spoiling.bomb(folder / "marker")),
    }  # fmt: skip
    name = random.choice(sorted(kinds))
    ending = random.choice([".jsonl.gz", ".jsonl.gz", ".csv.gz", ".json.gz", ".txt.gz", ".jsonl.zst", ".parquet.gz"])
    (folder / f"{NAME}{ending}").write_bytes(kinds[name]())
    return f"{NAME}{ending}", f"packed: {name}"


def _bomb(unit: bytes, size: int = 2**32) -> bytes:
    """Four gigabytes, unpacked: members of gzip follow one another."""
    block = gzip.compress(unit * (2**24 // len(unit)))
    return block * (size // 2**24)


def flipped(random: Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(random.choice([1, 1, 3])):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def columns(random: Random, folder: Path) -> tuple[str, str]:
    """Parquet and Arrow: forged and damaged bytes, bombs, columns of other types."""
    suffix, raw = column_file(random, folder / "made")
    path = folder / f"{NAME}{suffix}"
    path.write_bytes(raw)
    what = "as made"
    if random.random() < 0.6:
        what = str(
            random.choice([spoiling.flip, spoiling.flip, spoiling.truncate, spoiling.zeros, spoiling.noise])(
                random, path
            )
        )
    return path.name, what


def column_file(random: Random, scratch: Path) -> tuple[str, bytes]:
    import pyarrow as pa
    from pyarrow import feather, ipc, parquet

    prompts, answers = ["name: Ada\n"] * 8, ["Ada lives here."] * 8
    deep: Any = "x"
    for _ in range(random.choice([2, 60])):
        deep = [deep]
    kind = random.choice(
        ["plain", "plain", "bomb", "long", "bytes", "deep", "dates", "names", "nulls", "numbers", "dictionary"]
    )
    table = {
        "plain": lambda: pa.table({"prompt": prompts, "completion": answers}),
        "bomb": lambda: pa.table({"prompt": pa.array(["x" * 1000]).take(pa.array([0] * 1_000_000)),
        "completion": pa.nulls(1_000_000, pa.string())}),
        "long": lambda: pa.table({"prompt": ["x" * 80_000_000], "completion": ["y"]}),
        "bytes": lambda: pa.table({"prompt": pa.array([b"\xff\xfe"] * 8), "completion": answers}),
        "deep": lambda: pa.table({"prompt": [deep] * 8, "completion": answers}),
        "dates": lambda: pa.table({"prompt": pa.array([2**62] * 8, pa.timestamp("us")), "completion": answers}),
        "names": lambda: pa.table({"prompt": prompts, "completion": answers, "\x1b[2J": prompts, "": prompts}),
        "nulls": lambda: pa.table({"prompt": pa.nulls(8), "completion": answers}),
        "numbers": lambda: pa.table({"prompt": [float("nan")] * 8, "completion": [10**18] * 8}),
        "dictionary": lambda: pa.table({"prompt": pa.array(prompts).dictionary_encode(), "completion": answers}),
    }[kind]()  # fmt: skip
    suffix = random.choice([".parquet", ".parquet", ".arrow", ".feather"]) if kind != "bomb" else ".parquet"
    try:
        if suffix == ".parquet":
            parquet.write_table(
                table, scratch, compression=random.choice(["zstd", "snappy", "none"]) if kind != "bomb" else "zstd"
            )
        elif suffix == ".feather":
            feather.write_feather(table, str(scratch), compression="uncompressed")
        else:
            with ipc.new_file(str(scratch), table.schema) as writer:
                writer.write_table(table)
        return suffix, scratch.read_bytes()
    finally:
        scratch.unlink(missing_ok=True)


def texts(random: Random, folder: Path) -> tuple[str, str]:
    kinds: dict[str, Callable[[], bytes]] = {
        "odd": lambda: "\n\n".join(random.sample(TEXTS, 9)).encode("utf-8", "surrogatepass"),
        "zeros": lambda: bytes(10_000),
        "long": lambda: b"x" * 80_000_000, "lines": lambda: b"\n" * 5_000_000,
        "bytes": lambda: random.randbytes(10_000),
        "words": lambda: b"name: Ada lives. " * 5_000, "empty": lambda: b"", "space": lambda: b" " * 100_000,
        "special": lambda: b"<|endoftext|><s>" * 3000, "pickle": lambda: spoiling.bomb(folder / "marker"),
    }  # fmt: skip
    name = random.choice(sorted(kinds))
    suffix = random.choice([".txt", ".md"])
    (folder / f"{NAME}{suffix}").write_bytes(kinds[name]())
    return f"{NAME}{suffix}", f"text: {name}"


def nodes(random: Random, folder: Path) -> tuple[str, str]:
    """What is no file, under a file's name."""
    path = (
        folder / f"{NAME}{random.choice(['.jsonl', '.json', '.csv', '.txt', '.parquet', '.arrow', '.jsonl.gz', '.py'])}"
    )
    path.write_bytes(dumped(good_rows(8)))
    return path.name, str(random.choice(spoiling.NODES)(random, path))


def folders(random: Random, folder: Path) -> tuple[str, str]:
    """A folder in place of a file."""
    place = folder / NAME
    place.mkdir()
    kind = random.choice(["empty", "loop", "mixed", "saved", "script", "fifo", "names"])
    if kind == "loop":
        (place / "a").symlink_to(".")
    elif kind == "mixed":
        (place / "a.jsonl").write_bytes(dumped(mixed(random)))
        (place / "b.csv").write_text("prompt,completion\na,b\n")
    elif kind == "saved":
        (place / "dataset_info.json").write_bytes(random.choice([b"{}", b"[", b"[1]", b'{"features": 4}']))
        (place / "state.json").write_bytes(
            random.choice([b"{}", b'{"_data_files": [{"filename": "../../x"}]}', b"\xff"])
        )
    elif kind == "script":
        (place / f"{NAME}.py").write_text(f"import os\nos.mkdir({str(folder / 'marker')!r})\n")
        (place / "a.jsonl").write_bytes(dumped(good_rows(8)))
    elif kind == "fifo":
        os.mkfifo(place / "a.jsonl")
    elif kind == "names":
        (place / "\x1b[2J.jsonl").write_bytes(dumped(good_rows(8)))
    return NAME, f"a folder: {kind}"


MAKERS: list[Callable[[Random, Path], tuple[str, str]]] = [
    json_lines, json_lines, json_lines, bad_lines, bad_lines, documents, encodings, cells, cells, packed, columns,
    columns,
    texts, nodes, folders,
]  # fmt: skip
KINDS = (kind("hostile-data", "A data file made to harm is read or refused by name, within bounds.", 1000, make),)

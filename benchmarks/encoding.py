"""Rows as ids and labels: the time of `encode` beside that of tokenizing the same text alone, and the memory of many.

    PYTHONPATH=src python -m benchmarks.encoding --base BASE --data FOLDER                   20,000 chats of each kind
    PYTHONPATH=src python -m benchmarks.encoding --base BASE --data FOLDER --rows 1000000    memory, short rows

FOLDER holds `chat_sgd`, `instruct_rasbt` and `e2e`; BASE is any base with a fast tokenizer, to which the end-of-turn
tokens of ChatML are added. The two sides take turns, and the least of each is printed, in seconds by the clock and in
seconds of all cores (CPU), which say more where other work runs on the machine. The tokenizer alone gets all texts in
one call, which is the fastest that it has, and one text a call.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spectune.data import Row, encode, load_rows

LONGEST = 8192
CHATML = (
    r"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: as long, and with as many branches, as those of today's families: tools, tool calls and results, a default system
QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions.\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
           or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
#: dates, a system message that always stands there, stripped contents
LLAMA31 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system\n\nCutting Knowledge Date: December 2023\nToday Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|im_end|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|im_start|>assistant\n\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- '}<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>ipython\n\n' + message.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n\n' }}
{%- endif %}
"""
TEMPLATES = {"ChatML": CHATML, "Qwen2.5": QWEN25, "Llama-3.1": LLAMA31}


def chats(data: Path, turns: int, count: int) -> list[dict[str, Any]]:
    """So many conversations, no two alike, made of those that there are."""
    if turns == 16:
        found = [row["messages"] for row in records(data / "chat_sgd/train.jsonl")]
    else:
        pairs = [
            [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            for asked, answer in asked_and_answered(data)
        ]
        each = turns // 2
        found = [list(itertools.chain(*pairs[at : at + each])) for at in range(0, len(pairs) - each, each)]
    return [
        {"messages": [{**messages[0], "content": f"{number}: {messages[0]['content']}"}, *messages[1:]]}
        for number, messages in enumerate(itertools.islice(itertools.cycle(found), count))
    ]


def asked_and_answered(data: Path) -> Iterator[tuple[str, str]]:
    """Of instructions and of E2E, by turns."""
    instructed = (
        (f"{r['instruction']}\n{r['input']}", r["output"]) for r in records(data / "instruct_rasbt/train.jsonl")
    )
    described = ((r["prompt"], r["completion"]) for r in records(data / "e2e/train.jsonl"))
    for pair in zip(itertools.cycle(list(instructed)), described, strict=False):
        yield from pair


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def tokenizer_of(base: Path, template: str) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    found.chat_template = template
    return found


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """By the clock, and of all cores."""
    gc.collect()
    begin, used = time.perf_counter(), time.process_time()
    kept = work()  # what is made is part of the work, what becomes of it is not
    found = time.perf_counter() - begin, time.process_time() - used
    del kept
    return found


def times(rows: list[Row], tokenizer: PreTrainedTokenizerBase, repeats: int) -> dict[str, tuple[float, float]]:
    """The least seconds of each way, which take turns."""
    texts = [str(tokenizer.apply_chat_template(row.messages or [], tokenize=False)) for row in rows]
    ways: dict[str, Callable[[], Any]] = {
        "call": lambda: tokenizer(texts, add_special_tokens=False),
        "encode": lambda: encode(rows, tokenizer, max_length=LONGEST),
        "loop": lambda: [tokenizer(text, add_special_tokens=False) for text in texts],
    }
    tokenizer(texts[:64])
    found = [{name: seconds(way) for name, way in ways.items()} for _ in range(repeats)]
    return {name: (min(one[name][0] for one in found), min(one[name][1] for one in found)) for name in ways}


def compare(args: argparse.Namespace) -> None:
    print(f"{args.count:,} chats of each kind; {os.cpu_count()} cores; TOKENIZERS_PARALLELISM="
          f"{os.environ.get('TOKENIZERS_PARALLELISM', '(not set)')}; least of {args.repeats}")  # fmt: skip
    print("| messages | template | tokens | one call, s (CPU) | a call each | encode | of one call | of a call each |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for turns in args.turns:
        rows = load_rows(chats(args.data, turns, args.count))
        for name in args.templates:
            tokenizer = tokenizer_of(args.base, TEMPLATES[name])
            tokens = encode(rows, tokenizer, max_length=LONGEST).report.tokens
            least = times(rows, tokenizer, args.repeats)
            call, loop, ours = (least[way] for way in ("call", "loop", "encode"))
            cells = [f"{clock:.2f} ({cpu:.2f})" for clock, cpu in (call, loop, ours)]
            cells += [f"{ours[0] / other[0]:.2f} ({ours[1] / other[1]:.2f})" for other in (call, loop)]
            print(f"| {turns} | {name} | {tokens:,} | {' | '.join(cells)} |", flush=True)


def remember(args: argparse.Namespace) -> None:
    """The peak of this process's memory behind each step."""
    pairs = list(itertools.islice(asked_and_answered(args.data), 1, 20_000, 2))  # E2E's
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number, (_, answer) in zip(range(args.rows), itertools.cycle(pairs), strict=False):
                asked, said = f"row {number}:", " ".join(answer.split()[:10])
                file.write(json.dumps({"prompt": asked, "completion": f" {said}"}) + "\n")
        tokenizer = tokenizer_of(args.base, CHATML)
        tokenizer(["warm"] * 64)
        del pairs
        gc.collect()
        print(f"{args.rows:,} rows of prompt and completion, {path.stat().st_size / 2**20:,.0f} MiB of JSON lines")
        print("| behind | seconds | resident, MiB | peak, MiB |\n|---|---:|---:|---:|")
        begin = time.perf_counter()
        print(_memory("start", begin), flush=True)
        rows = load_rows(path)
        print(_memory("load_rows", begin), flush=True)
        encoded = encode(rows, tokenizer, max_length=LONGEST)
        print(_memory("encode", begin), flush=True)
        print(f"| sha256 {encoded.sha256[:12]} | | | |")
        print(_memory("sha256", begin))
        print(f"{encoded.report.tokens:,} tokens, {encoded.report.target_tokens:,} of them learned")


def _memory(step: str, begin: float) -> str:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"| {step} | {time.perf_counter() - begin:.1f} | {resident / 2**20:,.0f} | {peak / 2**20:,.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--base", type=Path, required=True, help="a folder with a fast tokenizer")
    add("--data", type=Path, required=True, help="the folder of the data sets")
    add("--count", type=int, default=20_000, help="chats of each kind")
    add("--turns", type=int, nargs="*", default=[16, 4, 2], help="messages of a chat")
    add("--templates", nargs="*", default=list(TEMPLATES), choices=list(TEMPLATES))
    add("--repeats", type=int, default=3)
    add("--rows", type=int, help="measure memory with so many short rows instead")
    args = parser.parse_args()
    remember(args) if args.rows else compare(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

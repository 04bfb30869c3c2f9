"""Write docs/data.md: what the data may be, and of each shape what is learned, as `spectune validate` prints it.

python tools/data_page.py
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "data.md"

_PROMPT = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_CALLS = (
    '{%- for call in m.tool_calls or [] %}{{ \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}"
)
CHATML = (
    "{%- if tools %}{{ '<|im_start|>system\\nTools: ' }}{{ tools | tojson }}{{ '<|im_end|>\\n' }}{% endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}" + _CALLS + "{{ '<|im_end|>\\n' }}"
    "{%- endfor %}" + _PROMPT
)
LLAMA_3 = (
    "{{- bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
    "{{- m.content.strip() + '<|eot_id|>' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_THOUGHTS_CUT = (
    "{%- for m in messages %}{% set answer = m.content %}{% if m.role == 'assistant' and not loop.last %}"
    "{%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{- '<|im_start|>' + m.role + '\\n' + answer + '<|im_end|>\\n' }}{% endfor %}"
)
THOUGHTS = _THOUGHTS_CUT + _PROMPT
THOUGHTS_ASKED = _THOUGHTS_CUT + _PROMPT.replace("assistant\\n", "assistant\\n<think>\\n")
MARKED = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{- m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + _PROMPT
)


@dataclass(frozen=True)
class Base:
    """A tokenizer with one token a byte, and what belongs to a family of models."""

    eos: str = "<|endoftext|>"
    bos: str | None = None
    special: tuple[str, ...] = ()
    template: str | None = None

    def save(self, folder: Path) -> None:
        """A folder that `spectune validate` takes for a base: it reads no weights."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import GPT2Config, PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        names = [self.eos, *([self.bos] if self.bos else []), *self.special]
        core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        if self.bos:
            front = [(self.bos, core.token_to_id(self.bos))]
            core.post_processor = processors.TemplateProcessing(single=f"{self.bos} $A", special_tokens=front)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=self.eos, bos_token=self.bos)
        tokenizer.chat_template = self.template  # type: ignore[assignment]
        tokenizer.save_pretrained(folder)
        rows, eos = len(tokenizer), tokenizer.eos_token_id
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 4096}
        config = GPT2Config(vocab_size=rows, bos_token_id=None, eos_token_id=eos, **sizes)
        config.architectures = ["GPT2LMHeadModel"]
        config.save_pretrained(folder)


PLAIN, WITH_BOS = Base(), Base(eos="</s>", bos="<s>")
IM = ("<|im_start|>",)
CHATML_BASE = Base("<|im_end|>", special=IM, template=CHATML)
OTHER_EOS = Base("<|endoftext|>", special=("<|im_end|>", *IM), template=CHATML)
LLAMA_BASE = Base("<|eot_id|>", "<|begin_of_text|>", ("<|start_header_id|>", "<|end_header_id|>"), LLAMA_3)
THOUGHTS_BASE, ASKED_BASE = (Base("<|im_end|>", special=IM, template=text) for text in (THOUGHTS, THOUGHTS_ASKED))
MARKED_BASE = Base("<|im_end|>", special=IM, template=MARKED)


@dataclass(frozen=True)
class Example:
    """Records of a file, and what `spectune validate` prints of them."""

    records: Sequence[dict[str, Any]]
    base: Base = PLAIN
    flags: tuple[str, ...] = field(default=())
    counts: bool = False

    def markdown(self) -> str:
        rows = "\n".join(json.dumps(record, ensure_ascii=False) for record in self.records)
        asked = " ".join(
            flag if flag.isascii() and " " not in flag and "\\" not in flag else f"'{flag}'" for flag in self.flags
        )
        command = f"$ spectune validate --data rows.jsonl{f' {asked}' if asked else ''}"
        return f"```json\n{rows}\n```\n```text\n{command}\n{self._printed()}\n```"

    def _printed(self) -> str:
        from typer.testing import CliRunner

        from spectune.cli.app import build_app

        with _elsewhere() as folder:
            self.base.save(folder / "base")
            lines = (json.dumps(record) + "\n" for record in self.records)
            (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
            arguments = ["validate", "--data", "rows.jsonl", "--model", "base", *self.flags]
            result = CliRunner().invoke(build_app(), arguments)
        if result.exit_code != 0:
            return str(result.stderr).strip()
        rows, _, counts = f"\n{result.stdout}".partition("\ntrain: ")
        shown = f"{rows.strip()}\n\ntrain: {counts}" if self.counts else rows
        return "\n".join(line.rstrip() for line in shown.strip().splitlines())


@contextlib.contextmanager
def _elsewhere() -> Iterator[Path]:
    """An empty working directory, in which nothing is in colour."""
    kept, before = {name: os.environ.get(name) for name in ("NO_COLOR", "FORCE_COLOR")}, Path.cwd()
    os.environ["NO_COLOR"] = "1"
    os.environ.pop("FORCE_COLOR", None)
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        try:
            yield Path(made)
        finally:
            os.chdir(before)
            for name, value in kept.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


CHAT = [
    {"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"}, {"role": "assistant", "content": "Seven."},
]  # fmt: skip
THOUGHT_CHAT = [
    {"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "<think>\n2 + 2\n</think>\n\nFour."},
    {"role": "user", "content": "And three?"}, {"role": "assistant", "content": "<think>\n4 + 3\n</think>\n\nSeven."},
]  # fmt: skip
CALL = {"type": "function", "function": {"name": "time_in", "arguments": '{"town": "York"}'}}
TOOL_CHAT = [
    {"role": "user", "content": "What time is it in York?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "10:15"}, {"role": "assistant", "content": "A quarter past ten."},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "time_in"}}]

FILES = """\
## Files

| `--data` | What is read |
| --- | --- |
| `.jsonl`, `.ndjson` | One object a line |
| `.json` | A list of objects, an object of columns, or one with a single list of rows in it |
| `.csv`, `.tsv` | Strict CSV (RFC 4180), cells of any size; the delimiter is found in the header (`,`, `;`, tab, `\\|`), or told: `delimiter`. Lists and objects are JSON in their cells |
| `.parquet`, `.arrow`, `.feather` | Tables |
| `.txt`, `.md` | Text; a line that holds `<\\|endoftext\\|>` alone separates documents |
| the text formats with `.gz` or `.zst` behind | The same, unpacked on the way |
| a folder | One that `datasets` saved, or files of one kind |
| `name`, `name:split`, `name@config:split` | A data set of the hub; `train` where no split is named |

In Python also lists and iterators of dicts, a dict of columns, `datasets` objects, DataFrames and pyarrow's tables. The
same rows give the same token ids, whatever they are read from. Text is UTF-8, or what its byte order mark says, or what
`encoding` tells. A null is an absent key.

A row that cannot be read or learned as it is written is an error that names it as `file:line` (a table's as its number);
all bad rows are named at once, and the command ends with 3. `--skip-bad-rows` leaves them out and counts them.

A line or row has at most 8 MiB, 10,000 columns and 4,000,000 values; a document of plain text that is longer is read in parts,
which end where a line does, and a `.json` that is one object has at most 256 MiB. What is packed becomes at most 256 MiB, or 100 times its size where that is more. Reading stops at 100,000
bad rows. Pipes and devices (`<(...)`, `/dev/stdin`) are refused: data is read again by `--resume` and `eval`. A chat
template is a program of whoever made the base: its steps, memory and time are limited, and it has to write the same text
each time.

## Columns

Columns of other names are told: `--set columns.prompt=question --set columns.completion=answer`, or in YAML

```yaml
columns:
  prompt: question     # what it is taken for: the data's own name
  completion: answer
  messages: null       # this one is ignored
```

Where a row has several shapes, the one that `columns` names is taken, else the first of `prompt` + `completion`,
`messages`, `conversations`, `instruction` + `output`, `tokens` + `tags`, `text`; what is not used is counted. Columns that mean nothing here
are kept with the row and never shown to the model."""

#: its own section, so that it can be rewritten as a whole
MIXING = """\
## Mixing: several files

`--data web.jsonl --data books.jsonl=2 --data code.jsonl=0.5` takes several files: each row of the second twice an epoch, of
the third a half that is drawn with the seed (1.5: all of them, and a half once more). A long text stays whole. In YAML:

```yaml
data:
  - web.jsonl
  - {path: books.jsonl, weight: 2, name: books}
```

In Python: `spectune.train(..., [Source("web.jsonl"), Source("books.jsonl", weight=2, name="books")])`, and `compare` alike.

`train`, `compare`, `plan` and `--dry-run` say what it comes to: `54 rows of web (x 0.5), 36 of books (x 2): 99 examples an
epoch`; `data_report.json` has rows, tokens and learned tokens of each source, once and by epoch. Rows to validate and to
judge on are taken once each, whatever the weight, and `--valid`, `--test` and `eval --data` take several files, too. Where
such rows are of several sources, losses are by source as well: `valid_loss_by_source` in `result.json`, a table of all
methods and the bare base in a comparison.

A source is called as its file, without folder and suffix (`train`, the next one `train-2`), or by its `name`. A weight must
be above 0 and leave at least one row. `--resume` refuses another weight by name. A file whose own name has a `=` is taken as
it is, where it exists."""

RULES = """\
## The rules

- What is learned is decided on text. A chat is rendered with the tokenizer's own template; a turn's prompt is what the
  template makes of the messages before it, with its generation prompt, which is what the model is asked with later. It has
  to be a prefix of the rendered chat, and the turn is what follows. Where it is no prefix, the turn is learned in a
  sequence of its own, or the row is refused.
- EOS ends what is learned: where the template ends a turn with EOS, that one; else one EOS is put behind the last turn.
  It is never doubled, and what a template writes behind it is not in the sequence.
- BOS stands once in front where the tokenizer puts it there, or where the template writes it, and is never learned.
- A sequence's first token has no loss: nothing stands before it.
- Special tokens that stand in a row's text are special tokens. EOS in the middle of an answer stays, and is counted:
  generation ends there.
- Nothing is trimmed, but for what a template itself trims. A prompt and its completion are joined as they are written.
- A conversation may begin with the assistant's greeting: it is learned where the template can ask for it, else it is read,
  not learned, and counted. Where a template ends an earlier turn with another token than the last (gpt-oss), that token is
  not learned: a model that is asked has to write the last one's.
- Roles are read in other tools' spellings (`human`, `gpt`, `bot`, `model`, `function`, ...), tool calls as OpenAI's API
  writes them (`content: null`, arguments as JSON, the old `function_call`), in the form that the template wants.
- Ids that the base's embedding does not have are refused, and so are roles, tools, documents and arguments that the
  template leaves out without a word."""


def sections() -> Iterator[str]:
    """The page, part by part."""
    yield "# Data: what is read, and what is learned of it"
    yield (
        "Made by `python tools/data_page.py` (`make docs`): what stands below a command is what it printed. What is "
        "learned stands between `[[` and `]]`; on a terminal it is green instead. The tokenizers of this page have one "
        "token a byte, so that all numbers can be counted."
    )
    yield FILES
    renamed = ("--set", "columns.prompt=question", "--set", "columns.completion=answer")
    yield Example([{"id": 7, "question": "Capital of France?", "answer": " Paris."}], flags=renamed).markdown()
    yield MIXING
    yield RULES
    yield "## Shapes"
    yield from _shapes()
    yield "## Chat templates"
    yield from _templates()
    yield "## Rows that are too long"
    yield from _lengths()
    yield "## References, labels and choices"
    yield (
        "`references` (a list) and `label` with `choices` may stand beside any shape. They are not learned; how they are "
        "encoded and scored is in [metrics.md](metrics.md)."
    )
    yield "## What is counted"
    yield from _counts()


def _shapes() -> Iterator[str]:
    yield "### `text`"
    yield "All of it is learned, and EOS. A row of text alone is for going on with texts, as in pretraining."
    yield Example([{"text": "York lies on two rivers."}]).markdown()
    yield "### `prompt` + `completion`"
    yield "The completion and EOS. `separator` goes between the two; it belongs to the prompt."
    yield Example([{"prompt": "Capital of France?", "completion": " Paris."}]).markdown()
    yield Example(
        [{"prompt": "Capital of France?", "completion": "Paris."}], WITH_BOS, ("--set", r'separator="\n"')
    ).markdown()
    yield "### alpaca: `instruction`, `input`, `output`"
    yield "Stanford Alpaca's prompt. A `system` stands in place of its first sentence, the pairs of `history` before it."
    yield Example([{"instruction": "Name a river.", "input": "in York", "output": "The Ouse."}]).markdown()
    row = {
        "system": "Be brief.",
        "history": [["Name a town.", "York."]],
        "instruction": "Its river?",
        "output": "Ouse.",
    }
    yield Example([row]).markdown()
    yield "### `messages`"
    yield "Every turn of the assistant, with what the template ends it with. `--train-on last` learns the last one alone."
    yield Example([{"messages": CHAT}], CHATML_BASE).markdown()
    yield Example([{"messages": CHAT}], CHATML_BASE, ("--train-on", "last")).markdown()
    yield "A message with `weight: 0` or `train: false` is not learned. `system` may be a column."
    unlearned = [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]]
    yield Example([{"system": "Be brief.", "messages": unlearned}], CHATML_BASE).markdown()
    yield "`prompt` and `completion` may be lists of messages, too; those of the completion are learned."
    yield Example([{"prompt": CHAT[:3], "completion": CHAT[3:]}], CHATML_BASE).markdown()
    yield "### sharegpt: `conversations`"
    turns = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]
    yield Example([{"conversations": turns}], CHATML_BASE).markdown()
    yield "### For a head: `text` + `label`, and `tokens` + `tags`"
    yield (
        "A class, or a number, for a text; a class for each word. No token is learned and no EOS added: "
        "[heads.md](heads.md). `--task-type CAUSAL_LM` learns the text instead."
    )
    reviews = [{"text": "A fine day.", "label": "positive"}, {"text": "Rain again.", "label": "negative"}]
    yield Example(reviews).markdown()
    yield Example([{"tokens": ["New", "York", "is", "far"], "tags": ["B-LOC", "I-LOC", "O", "O"]}]).markdown()


def _templates() -> Iterator[str]:
    yield "### A template that writes BOS and trims"
    yield "As Llama 3's. Its end of turn is EOS."
    spaced = [CHAT[0], {"role": "assistant", "content": " Four. "}]
    yield Example([{"messages": spaced}], LLAMA_BASE).markdown()
    yield "### An end of turn that is not EOS"
    yield "It is learned all the same, and EOS once, behind the last turn."
    yield Example([{"messages": CHAT}], OTHER_EOS).markdown()
    yield "### Thoughts"
    yield (
        "A template that cuts the thoughts of earlier turns: what it keeps is what is learned, and `validate` counts the "
        "turns without their thought."
    )
    yield Example([{"messages": THOUGHT_CHAT}], THOUGHTS_BASE).markdown()
    yield (
        "Where the generation prompt itself begins the thought, the history that such a template writes does not go on as "
        "the model is asked: each earlier turn is learned in a sequence of its own, thought and all."
    )
    yield Example([{"messages": THOUGHT_CHAT}], ASKED_BASE).markdown()
    yield "An answer without a thought does not begin as that prompt ends, and is refused:"
    yield Example([{"messages": CHAT[:2]}], ASKED_BASE).markdown()
    yield "### Tool calls"
    yield (
        "As OpenAI's API writes them: arguments as JSON text or as an object, `tools` beside the messages. The call as the "
        "template writes it is learned, the tool's result is not."
    )
    yield Example([{"messages": TOOL_CHAT, "tools": TOOLS}], CHATML_BASE).markdown()
    yield "### Generation markers"
    yield "Where a template marks what the assistant says (`{% generation %}`), that is what is learned."
    yield Example([{"messages": CHAT[:2]}], MARKED_BASE).markdown()


def _lengths() -> Iterator[str]:
    yield (
        "`max_length` counts tokens; it is the base's context, at most 1,024, where it is not given. `truncation` says what "
        "a row loses that is longer. `start`, the default: its beginning, but for BOS."
    )
    long = {"prompt": "One, two, three, four, five, six, seven, ", "completion": "eight."}
    limit = ("--set", "max_length=24")
    yield Example([long], WITH_BOS, limit).markdown()
    yield "`middle`: what lies between the beginning and the end of what stands before the last answer."
    yield Example([long], WITH_BOS, (*limit, "--set", "truncation=middle")).markdown()
    yield "`refuse`: such a row is a bad row."
    yield Example([long], WITH_BOS, (*limit, "--set", "truncation=refuse")).markdown()
    yield "Where the last answer alone is too long, its end goes, and EOS with it."
    yield Example([{"prompt": "Go on: ", "completion": "One, two, three, four, five."}], flags=limit).markdown()
    yield (
        "A `text` loses nothing: it becomes several sequences, of which each begins with the last token of the one before. "
        "`validate` shows the first."
    )
    yield Example([{"text": "One, two, three, four, five, six, seven."}], flags=limit).markdown()


def _counts() -> Iterator[str]:
    yield (
        "`spectune validate` reads the data as training does and counts what becomes of it, for `--data`, `--valid` and "
        "`--test`; `--json` has all of it as data. Rows are equal where what is asked and what is learned are, in Unicode's "
        "form NFC and outer white space aside. Without `--valid`, rows that stand twice are looked for among those that training "
        "would hold out, too."
    )
    rows = [
        {"prompt": "Capital of France?", "completion": " Paris."},
        {"prompt": "Capital of Italy?", "completion": " Rome."},
        {"prompt": "Capital of France?", "completion": "Paris. "},
        {"prompt": "Capital of Italy?", "completion": " Roma."},
        {"prompt": "Capital of Spain?", "completion": " Madrid.<|im_end|>Bye."},
        {"messages": [CHAT[0], {**CHAT[1], "weight": 0}]},
        {"messages": THOUGHT_CHAT},
    ]
    yield Example(rows, THOUGHTS_BASE, ("--show", "0"), counts=True).markdown()


def page() -> str:
    """The page, its prose in lines of 120 characters."""
    return "\n\n".join(part if "\n" in part else textwrap.fill(part, 120) for part in sections()) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

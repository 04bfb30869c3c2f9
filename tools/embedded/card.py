"""Write spectune-tiny's model card from what the pretraining run reported.

python tools/embedded/card.py RUN/report.json RUN/samples.txt src/spectune/embedded/model/README.md
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

CARD = """---
license: cc-by-sa-3.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# spectune-tiny

A very small English language model, embedded in spectune so that every command runs at once, without a download.
It is a base to try fine-tuning methods on, not a model to use for its answers.

| | |
| --- | --- |
| architecture | GPT-2 (`GPT2LMHeadModel`): {layers} layers, width {width}, {heads} heads, context 512, with biases, tied embeddings |
| weights | {weights:,}, stored in bfloat16, loaded as float32 |
| tokenizer | byte-level BPE of 8,192 words, trained on one shard of the corpus; `<|endoftext|>` is id 0: begin, end and padding |
| corpus | {corpus_tokens:,} tokens: {shards} shards of about 32 MB of English text each |
| training | {tokens:,} tokens ({epochs:.1f} epochs) in {steps:,} steps of {batch_tokens:,} tokens, {seconds:.0f} s on one {device} |
| recipe | AdamW, betas 0.9 and 0.95, weight decay 0.1 on matrices, clip 1.0, rate {learning_rate:g} with warm-up, then linear to zero; bf16 autocast over float32 weights; no dropout |
| held-out loss | **{held_out_loss:.3f} nats per token** (perplexity {perplexity:.1f}) on {held_out_tokens:,} tokens of 429 whole documents that were not trained on |

Held-out loss is that of the shipped bfloat16 weights, run in float32, over windows of 512 tokens of one document each.

## Data and licences

Documents of the corpus, shuffled across sources, so that each shard is the same mix (share of the text):

| source | share | licence |
| --- | --- | --- |
| English Wikipedia, extractions of 2015 and 2021 | 40% | CC BY-SA 3.0 |
| Project Gutenberg and other books published in 1929 or before (Gutenberg texts, classic books, ELTeC-eng, 100 English novels) | 42% | public domain in the USA; ELTeC's markup CC BY 4.0 |
| English Wikinews | 9% | CC BY 2.5 |
| Python PEPs, Rust RFCs, Ethereum EIPs, Microsoft's C++ documentation | 7% | public domain or CC0; MIT or Apache-2.0; CC0 1.0; CC BY 4.0 |
| OpenStax textbooks, US state of the union and inaugural addresses, 18F's site | 2% | CC BY 4.0; public domain; CC0 1.0 |

The articles of WikiText-2's validation and test parts were left out. The strictest licence of the texts is CC BY-SA 3.0,
and the card names it for the weights; the code around them is Apache-2.0.

## What it writes

Drawn with a fixed seed, all shown, unedited. The beginnings that were given, in this order at either temperature:
{prompts}.

{samples}

## Limits

It holds few facts and invents the rest; the thread is lost after a sentence or two; it repeats itself at low
temperature, and makes up words at temperature 1. English only. Old books and news carry the prejudices of their time,
and nothing was done to remove them. Not for any decision about people.
{spikes}

## How it was made

`tools/embedded` of the source tree, in this order: `tokenizer.py`, `pretrain.py`, `card.py` (this file),
`sample_retained.py` (the passages on which forgetting is measured), `make_data.py` (the record-to-sentence task).
"""
UNSTABLE = """
The run was not stable: its training loss was down to {low:.2f} in step {step:,}, then climbed several times and never
came back below that, so these weights are worse than this size allows.
"""


def spikes(curve: list[dict[str, float]]) -> str:
    """A sentence where the loss rose by over 0.5 from its lowest."""
    low = min(curve, key=lambda point: point["loss"])
    rose = any(point["loss"] > low["loss"] + 0.5 for point in curve if point["step"] > low["step"])
    return UNSTABLE.format(low=low["loss"], step=int(low["step"])) if rose else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("card", type=Path)
    parser.add_argument("--shards", type=int, default=5)
    args = parser.parse_args()
    report = json.loads(args.report.read_text(encoding="utf-8"))
    blocks = args.samples.read_text(encoding="utf-8").strip().split("\n\n[")
    quoted = []
    for block in blocks:
        head, text = block.removeprefix("[").split("] ", 1)
        quoted.append(f"{head.capitalize()}:\n\n" + "\n".join(f"> {line}".rstrip() for line in text.splitlines()))
    card = CARD.format(
        **report,
        shards=args.shards,
        perplexity=math.exp(report["held_out_loss"]),
        prompts='nothing; The river; In 1869 the; "I do not know," she said; The government announced on',
        samples="\n\n".join(quoted),
        spikes=spikes(report["curve"]),
    )
    args.card.write_text(card, encoding="utf-8")
    print(f"{args.card}: held-out loss {report['held_out_loss']}")


if __name__ == "__main__":
    main()

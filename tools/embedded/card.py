"""Write spectune-tiny's model card from the results of its training.

python tools/embedded/card.py
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "result"
CARD = ROOT / "src" / "spectune" / "embedded" / "model" / "README.md"

TEXT = """# spectune-tiny

A small English base that ships with spectune, so that every command and test runs without a network. GPT-2 architecture with
biases: {layers} layers, width {width}, {heads} heads, context 512, byte-level BPE of 8,192 words, tied embeddings;
{weights:,} weights, stored in bfloat16.

It is for trying out fine-tuning methods, not for use: it writes grammatical phrases that mean little, and knows no facts.

## Training

From scratch on {corpus_tokens:,} tokens of English text, {epochs} epochs, {tokens:,} tokens in {steps:,} steps of
{batch_tokens:,}; AdamW, peak learning rate {learning_rate:g}, weight decay 0.1, linear to zero, bfloat16 autocast over float32
weights; {seconds:.0f} s on one {device} with torch {torch}.

**Held-out loss: {held_out_loss:.3f} nats per token** (perplexity {perplexity:.1f}) on {held_out_tokens:,} tokens of whole documents
that were not trained on, in windows of 512 that do not overlap, with the weights as stored.

## Data and licences

Five of twelve shards of a mixed corpus: Wikipedia 2015 and 2021 (CC BY-SA 3.0), Project Gutenberg, classic books and 100
English novels (public domain), Wikinews (CC BY 2.5), ELTeC novels (public domain, markup CC BY 4.0), Python PEPs (public domain
or CC0), C++ documentation (CC BY 4.0), Rust RFCs (MIT or Apache-2.0), OpenStax (CC BY 4.0), EIPs (CC0), speeches and 18F pages
(public domain, CC0). The weights come under the project's licence, Apache-2.0; text it repeats keeps the licence of its source.

`data/train.jsonl`, `valid.jsonl` and `test.jsonl` (1,200, 200 and 200 rows) are made by a seeded script and hold no text of
others. `data/retained.jsonl` holds 64 passages of 128 tokens sampled from this model at temperature 1, seed 0, in float32:
forgetting is measured on them.

## Samples

Unedited, seed 0, first try; the words before the first line break of some were given.

{samples}

## How it was made

```
python tools/embedded/tokenizer.py CORPUS/train-000.txt.zst src/spectune/embedded/model
python tools/embedded/pretrain.py --corpus CORPUS --tokenizer src/spectune/embedded/model --out OUT --minutes {minutes:.1f} \\
    --batch {batch} --learning-rate {learning_rate:g}
python tools/embedded/make_data.py src/spectune/embedded/data
python tools/embedded/sample_retained.py src/spectune/embedded/data/retained.jsonl
python tools/embedded/card.py
```
"""


def main() -> None:
    report = json.loads((RESULT / "report.json").read_text())
    samples = (RESULT / "samples.txt").read_text().strip().split("\n\n[temperature")
    blocks = [(s if s.startswith("[temperature") else "[temperature" + s).strip() for s in samples]
    quoted = "\n\n".join("\n".join(f"> {line}".rstrip() for line in block.splitlines()) for block in blocks)
    CARD.write_text(
        TEXT.format(
            **{k: v for k, v in report.items() if k != "curve"},
            perplexity=2.718281828459045 ** report["held_out_loss"],
            samples=quoted,
            minutes=report["seconds"] / 60,
            batch=report["batch_tokens"] // 512,
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()

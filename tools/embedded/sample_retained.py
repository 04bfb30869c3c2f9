"""Sample the passages on which forgetting is measured, from spectune-tiny itself at temperature 1, float32.

python tools/embedded/sample_retained.py src/spectune/embedded/data/retained.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import spectune
from spectune.evaluation import sample_passages

COUNT, LENGTH, SEED = 64, 128, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    model, tokenizer = spectune.load("spectune-tiny", dtype="float32")
    passages = sample_passages(model, tokenizer, count=COUNT, length=LENGTH, seed=SEED)
    lines = [json.dumps({"ids": ids, "text": tokenizer.decode(ids[1:])}, ensure_ascii=False) for ids in passages]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} passages of {LENGTH} tokens in {path}")


if __name__ == "__main__":
    main()

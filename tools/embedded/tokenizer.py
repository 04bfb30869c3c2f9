"""Train spectune-tiny's tokenizer: byte-level BPE of 8,192 words on one shard of the corpus.

python tools/embedded/tokenizer.py CORPUS/train-000.txt.zst src/spectune/embedded/model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from corpus import END, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = 8192
CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shard", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=[END],  # id 0: beginning, end and padding
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
    )
    tokenizer.train_from_iterator(documents(arguments.shard), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )
    fast.save_pretrained(arguments.folder)
    print(f"{len(fast)} words in {arguments.folder}")


if __name__ == "__main__":
    main()

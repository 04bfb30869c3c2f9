"""The embedded base `spectune-tiny` and its data: what every command works on where the user names nothing.

Paths only; nothing is imported or read. The model card is `model/README.md`; all of it is made by `tools/embedded`.
"""

from pathlib import Path

_HERE = Path(__file__).parent

#: what users call it, in place of a folder
NAME = "spectune-tiny"
#: a transformers folder: config, weights (bfloat16), tokenizer
MODEL_FOLDER = _HERE / "model"
#: rows of a record-to-sentence task; valid and test rows have several `references`
TRAIN = _HERE / "data" / "train_rows.jsonl"
VALID = _HERE / "data" / "valid_rows.jsonl"
TEST = _HERE / "data" / "test_rows.jsonl"
#: passages that the base itself wrote at temperature 1 (`ids`, `text`): forgetting is measured on them
RETAINED = _HERE / "data" / "retained.jsonl"

"""What the runs need, in a folder small enough to be carried to another machine: tokens of a corpus, rows of E2E, and
gpt2-27m with its weights rounded to eight bits a row."""

from __future__ import annotations

import json
import lzma
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

SEPARATOR = "<|endoftext|>"
TRAIN_ROWS, VALID_ROWS = 4800, 200
VALID_TOKENS = 200_000
TOKENIZER = "tokenizer"
Codes = np.ndarray[Any, np.dtype[np.uint16]]


def pack(corpus: Path, base: Path, data: Path, out: Path, tokens: int) -> None:
    """Write the folder."""
    out.mkdir(parents=True, exist_ok=True)
    keep = out / TOKENIZER
    keep.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        shutil.copyfile(base / name, keep / name)
    tokenizer = AutoTokenizer.from_pretrained(base)
    shards = sorted(corpus.glob("train-*.txt.zst"))
    _keep(out / "train.xz", _tokens((text for shard in shards for text in _documents(shard)), tokenizer, tokens))
    _keep(out / "valid.xz", _tokens(_documents(corpus / "val.txt"), tokenizer, VALID_TOKENS))
    _pack_weights(load_file(base / "model.safetensors"), out / "gpt2-27m.xz")
    for name, count in (("train", TRAIN_ROWS), ("valid", VALID_ROWS)):
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        step = len(rows) // count  # rows of one record stand together: every so many, not the first ones
        texts = [json.dumps({key: row[key] for key in ("prompt", "completion")}) for row in rows[::step][:count]]
        (out / f"{name}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")


def tokens_of(file: Path) -> Codes:
    """Token ids that `pack` has written."""
    return np.frombuffer(lzma.decompress(file.read_bytes()), dtype=np.uint16)


def unpack_base(material: Path, out: Path) -> Path:
    """gpt2-27m as a transformers folder in bfloat16."""
    folder = out / "gpt2-27m"
    if (folder / "model.safetensors").is_file():
        return folder
    shutil.copytree(material / TOKENIZER, folder, dirs_exist_ok=True)
    head, _, body = lzma.decompress((material / "gpt2-27m.xz").read_bytes()).partition(b"\n")
    state, place = {}, 0
    for name, shape in json.loads(head).items():
        rows, size = (shape[0] if len(shape) > 1 else 1), int(np.prod(shape))
        scale = np.frombuffer(body, np.float32, rows, place)
        codes = np.frombuffer(body, np.int8, size, place + 4 * rows)
        place += 4 * rows + size
        state[name] = torch.from_numpy((codes.reshape(rows, -1) * scale[:, None]).reshape(shape)).bfloat16()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _pack_weights(state: dict[str, torch.Tensor], file: Path) -> None:
    body = b""
    for tensor in state.values():
        rows = tensor.float().reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1).numpy()
        scale = np.maximum(np.abs(rows).max(1), 1e-12).astype(np.float32) / 127
        body += scale.tobytes() + np.rint(rows / scale[:, None]).astype(np.int8).tobytes()
    head = json.dumps({name: list(tensor.shape) for name, tensor in state.items()}).encode()
    file.write_bytes(lzma.compress(head + b"\n" + body))


def _keep(file: Path, codes: Codes) -> None:
    file.write_bytes(lzma.compress(codes.tobytes()))


def _documents(file: Path) -> Iterator[str]:
    text = file.read_bytes() if file.suffix == ".txt" else subprocess.check_output(["zstd", "-dc", str(file)])
    yield from (part.strip() for part in text.decode().split(f"\n{SEPARATOR}\n") if part.strip())


def _tokens(documents: Iterator[str], tokenizer: Any, count: int) -> Codes:
    found: list[int] = []
    for document in documents:
        found += [*tokenizer(document, verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(found) >= count:
            break
    return np.array(found[:count], dtype=np.uint16)
